"""One batch == micro-batches == ranks, for all methods."""

import functools

import pytest
import torch

import rewarm
from tests import fits, tiny
from tests.distributed.ranks import on_ranks
from tests.lightning_modules import rank_fits
from tests.lightning_modules.rank_fits import METHODS, SPLITS, PerBatch, Prepared

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings(
        "ignore:Found .* in eval mode at the start of training"
    ),  # the frozen reference
]


@functools.cache
def whole_batches(name, rows=rank_fits.ROWS):
    return rank_fits.fit(METHODS[name], 8, 1, rows=rows)


def assert_same_steps(gradients, metrics, whole):
    """To 1e-6 of the largest gradient."""
    assert len(gradients) == len(whole.gradients) >= 2
    for one, other in zip(gradients, whole.gradients, strict=True):
        assert fits.distance(one, other) < 1e-6
    for one, other in zip(metrics, whole.metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("split", SPLITS[1])
@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_have_the_gradients_of_one_batch(name, split):
    steps = rank_fits.fit(METHODS[name], *split)
    assert len(steps.gradients) == 3
    assert_same_steps(steps.gradients, steps.metrics, whole_batches(name))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("size", "strategy"),
    [
        (2, "DDP"),
        (2, "FSDP2"),
        pytest.param(4, "DDP", marks=pytest.mark.slow),
        pytest.param(4, "FSDP2", marks=pytest.mark.slow),
    ],
)
def test_ranks_have_the_gradients_of_one_process_in_any_split(tmp_path, size, strategy):
    found = on_ranks(size, rank_fits.fit_splits, strategy, tmp_path)
    for name in (*METHODS, "replay"):
        if name == "replay":
            whole = rank_fits.replayed(tmp_path, 8, 1)
        else:
            whole = whole_batches(name, 24 if name.startswith("grpo") else rank_fits.ROWS)
        for split in SPLITS[size]:
            for rank in found:
                assert_same_steps(*rank[name][split], whole)


def test_a_mean_per_micro_batch_would_fail_these_tests():
    whole, split = whole_batches("sft"), rank_fits.fit(Prepared(PerBatch), 2, 4)
    assert fits.distance(split.gradients[0], whole.gradients[0]) > 1e-2


class NewEveryEpoch:
    """Gives other examples in every epoch."""

    def __init__(self, size):
        self.size, self.epoch = size, 0

    def __len__(self):
        return -(-6 // self.size)

    def __iter__(self):
        self.epoch += 1
        return iter(fits.cut(fits.sequences(6, seed=self.epoch), self.size, fits.text_batch))


def test_an_epoch_of_one_window_has_its_own_counts():
    gradients = []
    for size, accumulate in ((6, 1), (1, 6), (1, 8)):
        torch.manual_seed(0)
        module, record = rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd(0.1)), fits.Record()
        loader = rewarm.WindowLoader(NewEveryEpoch(size), accumulate)
        fits.trainer(max_epochs=3, accumulate_grad_batches=accumulate, callbacks=[record]).fit(module, loader)
        gradients.append(record.gradients)
    for steps in gradients[1:]:
        for one, other in zip(steps, gradients[0], strict=True):
            assert fits.distance(one, other) < 1e-6


def test_a_second_fit_starts_with_its_own_counts():
    torch.manual_seed(0)
    module, records = rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd(0.0)), []
    for seed in (0, 1):
        records.append(fits.Record())
        loader = rewarm.WindowLoader(fits.cut(fits.sequences(4, seed), 1, fits.text_batch), 4)
        fits.trainer(max_epochs=1, accumulate_grad_batches=4, callbacks=[records[-1]]).fit(module, loader)
    loader = rewarm.WindowLoader(fits.cut(fits.sequences(4, 1), 4, fits.text_batch), 1)
    expected = fits.Record()
    fits.trainer(max_epochs=1, callbacks=[expected]).fit(module, loader)
    assert records[1].metrics[0] == pytest.approx(expected.metrics[0], rel=1e-6)


def test_a_cut_epoch_ends_in_a_ragged_window(tmp_path):
    """`limit_train_batches` ends the epoch in the middle of what the loader would call a window."""
    gradients = []
    for size, accumulate, limit in ((8, 1, 1), (2, 8, 4)):
        torch.manual_seed(0)
        module, record = rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd(0.1)), fits.Record()
        trainer = fits.trainer(
            max_epochs=1, accumulate_grad_batches=accumulate, limit_train_batches=limit, callbacks=[record]
        )
        trainer.fit(module, datamodule=fits.instructions(fits.Files(tmp_path), batch_size=size))
        gradients.append(record.gradients)
    assert [len(steps) for steps in gradients] == [1, 1]
    assert fits.distance(gradients[1][0], gradients[0][0]) < 1e-6


def test_a_step_without_targets_changes_nothing_and_is_no_nan():
    empty = fits.text_batch([], [])
    torch.manual_seed(0)
    module, record = rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd(0.1)), fits.Record()
    fits.trainer(max_epochs=1, callbacks=[record]).fit(module, rewarm.WindowLoader([empty], 1))
    assert record.metrics[0]["train/loss"] == 0.0
    assert all((gradient == 0).all() for gradient in record.gradients[0].values())


def test_accumulating_with_a_foreign_loader_says_what_to_do():
    class Foreign:
        def __len__(self):
            return 2

        def __iter__(self):
            return iter(fits.cut(fits.sequences(4), 2, fits.text_batch))

    with pytest.raises(
        ValueError, match=r"accumulate_grad_batches is 2, but .*: wrap your loader in rewarm.WindowLoader"
    ):
        fits.trainer(max_epochs=1, accumulate_grad_batches=2).fit(rewarm.CurriculumSFT(tiny.LLAMA), Foreign())
