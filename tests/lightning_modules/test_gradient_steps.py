"""Clipping and leaving out steps as a part, in a module that is none of ours."""

import pytest
import torch

import rewarm
from tests import fits
from tests.lightning_modules import rank_foreign


def fit(loader, steps=3, optimizer=None, **options):
    torch.manual_seed(0)
    module, record = rank_foreign.Regression(), fits.Record()
    if optimizer is not None:
        module.configure_optimizers = lambda: optimizer(module.parameters())
    trainer = fits.trainer(max_steps=steps, callbacks=[record], **options)
    trainer.fit(module, rewarm.WindowLoader(loader, 1))
    return module, record, trainer


def test_gradients_are_clipped_to_the_bound_and_the_norm_before_is_logged():
    loader = rank_foreign.batches([22]) * 2
    _, plain, _ = fit(loader, 1)
    module, clipped, _ = fit(loader, 1, gradient_clip_val=0.1)
    norm = torch.cat([g.flatten() for g in plain.gradients[0].values()]).norm().item()
    assert norm > 0.1
    assert clipped.metrics[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-6)
    torch.manual_seed(0)
    start = fits.weights(rank_foreign.Regression())
    for name, gradient in plain.gradients[0].items():  # SGD at 0.1 moves by a tenth of what it is given
        moved = (start[name] - clipped.weights[0][name]) / 0.1
        torch.testing.assert_close(moved, gradient * 0.1 / (norm + 1e-6), rtol=1e-4, atol=1e-6)
    assert module.gradient_steps.skipped == 0


def test_a_foreign_modules_broken_step_is_left_out_counted_and_told_of():
    good, broken = rank_foreign.batches([11, 11])
    broken = {**broken, "y": torch.full_like(broken["y"], torch.inf)}
    for optimizer in (None, lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)):
        with pytest.warns(UserWarning, match="step 2: 1 left out since the last log"):
            module, record, _ = fit([good, broken, good], optimizer=optimizer)
        first, second, third = record.weights
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not all(torch.equal(third[name], second[name]) for name in first)
        assert [metrics["train/skipped_steps"] for metrics in record.metrics] == [0.0, 1.0, 1.0]
        assert module.gradient_steps.state_dict() == {"skipped": 1}


def test_counting_goes_on_from_a_state():
    module = rank_foreign.Regression()
    module.gradient_steps.load_state_dict({"skipped": 4})
    assert module.gradient_steps.skipped == 4
