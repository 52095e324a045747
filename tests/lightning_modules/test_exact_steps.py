"""Exact normalisation as a part: a foreign module has one gradient in any split, on any ranks."""

import pytest
import torch
from lightning.pytorch import LightningModule

import rewarm
from rewarm.lightning_modules.exact_steps import Means
from tests import fits
from tests.distributed.ranks import on_ranks
from tests.lightning_modules import rank_foreign

RAGGED = [([8, 8, 6], 1), ([2, 3, 3, 1, 1, 6, 5, 1], 3), ([1, 1, 1, 5, 3, 3, 1, 1, 4, 2], 4)]
"""Sizes of the micro-batches and how many make a step: each step has the same eight rows, the last six."""


def assert_same_steps(gradients, metrics, whole):
    assert len(gradients) == len(whole.gradients) == 3
    for one, other in zip(gradients, whole.gradients, strict=True):
        assert fits.distance(one, other) < 1e-6
    for one, other in zip(metrics, whole.metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(("sizes", "accumulate"), RAGGED[1:])
def test_ragged_micro_batches_of_a_foreign_module_have_the_gradients_of_one_batch(sizes, accumulate):
    whole, parts = rank_foreign.fit(*RAGGED[0]), rank_foreign.fit(sizes, accumulate)
    assert_same_steps(parts.gradients, parts.metrics, whole)


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_two_ranks_of_a_foreign_module_have_the_gradients_of_one_process(strategy):
    # Batches go to the ranks in turns: of each step, the ranks have unequal shares.
    cases = [([3, 5, 6, 2, 1, 5], 1, strategy), ([1, 2, 3, 2, 4, 1, 1, 2, 3, 1, 1, 1], 2, strategy)]
    whole = rank_foreign.fit(*RAGGED[0])
    for of_rank in on_ranks(2, rank_foreign.fit_each, cases):
        for gradients, metrics in of_rank:
            assert_same_steps(gradients, metrics, whole)


class Mean(rank_foreign.Regression):
    """A mean per micro-batch, as most modules have it."""

    def training_step(self, batch, batch_idx):
        return (self.net(batch["x"])[:, 0] - batch["y"]).square().mean()


def test_a_mean_per_micro_batch_would_fail_these_tests(monkeypatch):
    whole = rank_foreign.fit(*RAGGED[0])
    monkeypatch.setattr(rank_foreign, "Regression", Mean)
    assert fits.distance(rank_foreign.fit(*RAGGED[1]).gradients[0], whole.gradients[0]) > 1e-2


def test_batches_without_counts_are_refused_with_what_adds_them():
    (batch,) = rank_foreign.batches([22])
    for accumulate, message in (
        (1, "has neither 'window' nor 'counts'"),
        (2, "wrap your loader in rewarm.W"),
    ):
        bare = [{name: batch[name] for name in "xy"}] * 2
        if accumulate > 1:
            bare = [batch] * 2  # counts of its own are not those of a window
        with pytest.raises(ValueError, match=message):
            fits.trainer(max_steps=1, accumulate_grad_batches=accumulate).fit(
                rank_foreign.Regression(), torch.utils.data.DataLoader(bare, None)
            )


def test_a_step_without_a_single_row_has_loss_zero():
    batch = {"x": torch.zeros(0, 3), "y": torch.zeros(0), "counts": {"rows": 0}}
    record = fits.Record()
    trainer = fits.trainer(max_steps=1, callbacks=[record])
    trainer.fit(rank_foreign.Regression(), torch.utils.data.DataLoader([batch], None))
    assert record.metrics[0]["train/loss"] == 0.0


class Validated(LightningModule):
    def __init__(self):
        super().__init__()
        self.means = Means(self)

    def on_validation_epoch_start(self):
        self.means.begin()

    def validation_step(self, batch, batch_idx):
        self.means.add("loss", batch.sum(), len(batch))

    def on_validation_epoch_end(self):
        self.means.log("val")


def test_means_are_over_all_values_of_all_batches_and_begin_anew():
    module, trainer = Validated(), fits.trainer()
    loader = torch.utils.data.DataLoader([torch.tensor([1.0, 2.0]), torch.tensor([9.0])], None)
    for _ in range(2):
        (metrics,) = trainer.validate(module, loader, verbose=False)
        assert metrics == {"val/loss": 4.0}


def test_the_parts_are_at_the_face():
    assert rewarm.StepCounts.__module__ == "rewarm.lightning_modules.exact_steps"
