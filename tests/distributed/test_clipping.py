"""Clipping by norm and by value, and steps that are left out, in one process and on every kind of ranks."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

import rewarm
from rewarm.rollouts.ranks import place
from tests import fits, tiny
from tests.distributed.ranks import on_ranks
from tests.distributed.runs import Fit, fit_all

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:step 3. 1 left out"),
]


class Broken(Callback):
    """At the third step, the log-probabilities of the last rank's rows are no numbers."""

    def on_fit_start(self, trainer, pl_module):
        rank, size, _ = place(trainer)

        def spoil(module, inputs, logprobs):
            spoilt = module.training and trainer.global_step == 2 and rank == size - 1
            return logprobs * torch.nan if spoilt else logprobs

        pl_module.policy.register_forward_hook(spoil)


def broken() -> list[Callback]:
    return [Broken(), rewarm.ExactResume()]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=2e-3, fused=True)


LLAMA = {**tiny.LLAMA, "num_key_value_heads": 2}
STEPS = {"max_steps": 6}
NORM = {"gradient_clip_val": 0.2}
VALUE = {"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"}
BROKEN = Fit("CurriculumSFT", model=LLAMA, callbacks=broken, optimizer=adamw, trainer=STEPS)
RUNS = {
    "by norm": replace(BROKEN, callbacks=list, trainer=STEPS | NORM),
    "by value": replace(BROKEN, callbacks=list, trainer=STEPS | VALUE),
    "not at all": replace(BROKEN, callbacks=list),
    "broken, by norm": replace(BROKEN, trainer=STEPS | NORM),
    "broken, by value": replace(BROKEN, trainer=STEPS | VALUE),
    "broken, not at all": replace(BROKEN, split=2),
}


def fit_on(size, strategy, folder, **changes):
    runs = [replace(run, strategy=strategy, **changes) for run in RUNS.values()]
    results = on_ranks(size, fit_all, runs, folder)
    return [dict(zip(RUNS, rank, strict=True)) for rank in results]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return fit_on(1, "one process", tmp_path_factory.mktemp("alone"))[0]


def test_clipping_changes_the_steps_and_not_the_norm_that_is_logged(alone):
    first = {name: fitted.metrics[0]["train/grad_norm"] for name, fitted in alone.items()}
    assert set(first.values()) == {first["by norm"]}
    assert first["by norm"] > 0.4
    losses = [tuple(alone[name].losses) for name in ("by norm", "by value", "not at all")]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("broken")])
def test_a_step_without_a_finite_norm_leaves_weights_and_optimizer_as_they_were(alone, name):
    fitted = alone[name]
    assert [metrics["train/skipped_steps"] for metrics in fitted.metrics] == [0, 0, 1, 1, 1, 1]
    assert fitted.skipped == 1
    before, at, after = (fitted.history[step] for step in (1, 2, 3))
    assert all(torch.equal(at[parameter], weight) for parameter, weight in before.items())
    assert not any(torch.equal(after[parameter], weight) for parameter, weight in before.items())
    assert {float(state["step"]) for state in fitted.moments.values()} == {5.0}
    assert not torch.tensor(fitted.metrics[2]["train/grad_norm"]).isfinite()
    assert torch.tensor(fitted.losses[3:]).isfinite().all()


@pytest.mark.parametrize(
    ("strategy", "size"),
    [
        ("FSDP2", 2),
        ("DDP", 2),
        pytest.param("tensor parallel", 4, marks=pytest.mark.slow),
    ],
)
def test_ranks_clip_and_leave_out_what_one_process_does(alone, tmp_path, strategy, size):
    for rank in fit_on(size, strategy, tmp_path):
        for name, fitted in rank.items():
            expected = alone[name]
            assert fitted.skipped == expected.skipped
            for one, other in zip(fitted.metrics, expected.metrics, strict=True):
                assert one == pytest.approx(other, rel=1e-5, abs=1e-5, nan_ok=True), name
            for parameter, weight in fitted.weights.items():
                torch.testing.assert_close(weight, expected.weights[parameter], rtol=1e-5, atol=1e-5)
            assert {float(state["step"]) for state in fitted.moments.values()} == {6.0 - fitted.skipped}


def test_a_resumed_run_goes_on_counting_what_it_left_out(tmp_path):
    runs = [replace(RUNS["broken, by norm"], strategy="FSDP2", save=tmp_path / "saved")]
    ((whole,), _) = on_ranks(2, fit_all, runs, tmp_path)
    runs = [replace(run, resume=tmp_path / "saved" / "4.ckpt", save=None) for run in runs]
    for (fitted,) in on_ranks(2, fit_all, runs, tmp_path):
        assert fitted.metrics == whole.metrics[4:]
        assert fitted.skipped == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_clips_and_exports_as_without_shards(tmp_path):
    """In this process, which may have used its device before."""
    losses = []
    for chosen in ("auto", rewarm.FSDP2Strategy()):
        torch.manual_seed(0)
        module, record = rewarm.CurriculumSFT(LLAMA, fits.adamw(2e-3)), fits.Record()
        trainer = fits.trainer(
            accelerator="gpu", strategy=chosen, max_steps=6, callbacks=[record, *broken()], **NORM
        )
        trainer.fit(module, datamodule=fits.instructions(fits.Files(tmp_path), val=None, batch_size=8))
        module.save_pretrained(tmp_path / str(len(losses)))
        losses.append([metrics["train/loss"] for metrics in record.metrics])
        assert module.skipped_steps == 1
    torch.distributed.destroy_process_group()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, nan_ok=True)
    whole, sharded = (load_file(tmp_path / str(number) / "model.safetensors") for number in (0, 1))
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, rtol=1e-4, atol=1e-4)
