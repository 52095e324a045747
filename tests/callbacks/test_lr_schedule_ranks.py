"""Two ranks, replicated and in shards, use the learning rates and the optimizer of one process."""

import pytest
import torch

from rewarm.schedules.published import branch, constant, cosine, linear
from tests.callbacks import lr_ranks
from tests.distributed.ranks import on_ranks

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

PER_STEP = [sum(both) for both in zip(*lr_ranks.LENGTHS, strict=True)]
SEEN = [sum(PER_STEP[: n + 1]) for n in range(6)]


def expected(name):
    """The learning rates of six steps, and the steps that the optimizer's state has seen before them."""
    return {
        "stable": ([0.05 * constant(20)(n, 1e9) for n in SEEN], None),
        "resume": ([0.02] * 6, 6.0),
        "branch": ([0.05 * branch(0.1, "linear")(n, 6) for n in range(1, 7)], 6.0),
        "branch by tokens": ([0.05 * branch()(n, 60) for n in SEEN], 6.0),
        "rewarm": ([0.02 * cosine(2)(n, 6) for n in range(1, 7)], None),
        "rewarm, kept": ([0.02 * linear(2)(n, 6) for n in range(1, 7)], 6.0),
    }[name]


def check(results, alone):
    assert results.keys() == alone.keys()
    for name, (used, weights, state, norms) in results.items():
        rates, steps = expected(name)
        assert used == pytest.approx(rates, rel=1e-12), name
        assert torch.allclose(weights, alone[name][1], atol=1e-6), name
        if name != "stable":
            assert len(state) == (0 if steps is None else 8), name
            assert all(float(step) == steps for step in state[::2]), name
            for mine, one in zip(state, alone[name][2], strict=True):
                assert torch.allclose(mine, one, atol=1e-7), name
        for true_l1, true_l2, l1, l2 in norms:
            assert (l1, l2) == pytest.approx((true_l1, true_l2), rel=1e-5), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return lr_ranks.continued(tmp_path_factory.mktemp("alone"), "alone")


def test_one_process_is_as_expected(alone):
    check(alone, alone)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_ranks_are_as_one_process(tmp_path, alone, name):
    for results in on_ranks(2, lr_ranks.continued, tmp_path, name):
        check(results, alone)
