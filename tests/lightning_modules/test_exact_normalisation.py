"""One batch == micro-batches == ranks, for all methods."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rewarm
from tests import fits, tiny
from tests.lightning_modules import rank_fits

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings(
        "ignore:Found .* in eval mode at the start of training"
    ),  # the frozen reference
]

EXAMPLES = 20  # at 8 per step the last step has 4


def pairs(count, seed=0):
    return list(zip(fits.sequences(count, seed), fits.sequences(count, seed + 50), strict=True))


SFT = (rewarm.CurriculumSFT, {}, fits.sequences, fits.text_batch)
METHODS = {
    "continual pretraining": (rewarm.ContinualPretraining, {}, fits.sequences, fits.text_batch),
    "sft": SFT,
    "dpo": (rewarm.DPO, {"reference": "frozen", "nll_weight": 0.7}, pairs, fits.pair_batch),
    "nca": (rewarm.DPO, {"reference": "frozen", "loss": "nca_pair"}, pairs, fits.pair_batch),
} | {
    f"grpo by {options['normalise']}": (
        rewarm.GRPO,
        options,
        lambda n: fits.sampled(n // 4),
        fits.rollout_batch,
    )
    for options in (
        {"normalise": "token", "beta": 0.1},
        {"normalise": "sequence", "beta": 0.1, "scale_by_std": False},
        {"normalise": "constant", "constant_tokens": 30},
    )
}


def fit(method, size, accumulate):
    """Gradients and metrics of the steps of an epoch."""
    kind, options, examples, make = method
    torch.manual_seed(0)
    module, record = kind(tiny.LLAMA, fits.sgd(0.1), **options), fits.Record()
    loader = rewarm.WindowLoader(fits.cut(examples(EXAMPLES), size, make), accumulate)
    fits.trainer(max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[record]).fit(module, loader)
    return record


@functools.cache
def whole_batches(name):
    return fit(METHODS[name], 8, 1)


@pytest.mark.parametrize(("size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_have_the_gradients_of_one_batch(name, size, accumulate):
    whole, split = whole_batches(name), fit(METHODS[name], size, accumulate)
    assert len(whole.gradients) == len(split.gradients) == 3
    for one, other in zip(split.gradients, whole.gradients, strict=True):
        assert fits.distance(one, other) < 1e-6
    for one, other in zip(split.metrics, whole.metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_a_mean_per_micro_batch_would_fail_this_test():
    whole, split = whole_batches("sft"), fit((PerBatch, *SFT[1:]), 2, 4)
    assert fits.distance(split.gradients[0], whole.gradients[0]) > 1e-2


class PerBatch(rewarm.CurriculumSFT):
    def step_counts(self, batch, batch_idx):
        return {"tokens": 4 * (batch["targets"] != -100).sum()}


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


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_have_the_weights_and_metrics_of_one_process(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [sys.executable, *command, "-m", "tests.lightning_modules.rank_fits", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = rank_fits.run(tmp_path / "alone", 1)

    for name, (weights, metrics) in alone.items():
        for split_weights, split_metrics in (rank[name] for rank in ranks):
            assert len(split_weights) == len(weights) >= (1 if name == "packed sft" else 2)
            for one, other in zip(split_weights, weights, strict=True):
                assert fits.distance(one, other) < 1e-6, name
            for one, other in zip(split_metrics, metrics, strict=True):
                assert one == pytest.approx(other, rel=1e-5, abs=1e-5), name

    for name in ("live grpo", "filtered sft"):
        (weights, metrics, curriculum, states), (other, *rest) = (rank[name] for rank in ranks)
        assert [metrics, curriculum, states] == rest
        assert all(torch.equal(w, other[-1][parameter]) for parameter, w in weights[-1].items())
        assert curriculum["num_refused"] > 0 or name == "live grpo"
        assert states == 2
