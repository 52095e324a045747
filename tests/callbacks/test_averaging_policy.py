"""Snapshots go into rows such that the rows with their shares are the means that the modes promise."""

import itertools

import pytest

from rewarm.callbacks.averaging_policy import AveragingPolicy
from rewarm.callbacks.ended_steps import EndedSteps


def taken(policy, steps):
    """The steps at which a snapshot is taken, of some that are looked at one after the other."""
    watch, found = EndedSteps(), []
    watch.before = watch.now = 0
    for step in steps:
        watch.before, watch.now = watch.now, step
        if policy.is_due(watch):
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"every_n_steps": 1}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"every_n_steps": 3}, [3, 6, 9]),
        ({"every_n_steps": 3, "start_step": 5}, [5, 8]),
        ({"every_n_steps": 3, "start_step": 1}, [1, 4, 7]),
        ({"every_n_steps": 100, "start_step": 4}, [4]),
        ({"mode": "ema", "start_step": 8}, [8, 9]),
        ({}, []),
    ],
)
def test_snapshots_are_taken_every_so_many_steps_from_the_first_on(settings, steps):
    assert taken(AveragingPolicy(**settings), range(1, 10)) == steps


def test_where_steps_go_by_twos_none_is_lost_and_none_is_early():
    assert taken(AveragingPolicy(every_n_steps=3), range(2, 20, 2)) == [4, 6, 10, 12, 16, 18]
    assert taken(AveragingPolicy(every_n_steps=3, start_step=5), range(2, 14, 2)) == [6, 8, 12]


def average_of(policy, values):
    """The average of numbers, as the policy has it done."""
    rows = []
    for number, value in enumerate(values, 1):
        if policy.opens_row(number):
            rows = [*rows, 0.0][-policy.max_rows :]
            assert policy.decay_of(number) == 0.0
        decay = policy.decay_of(number)
        rows[-1] = decay * rows[-1] + (1.0 - decay) * value
    shares = policy.shares(len(values), len(rows))
    assert sum(shares) == pytest.approx(1.0)
    return sum(share * row for share, row in zip(shares, rows, strict=True))


VALUES = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0]


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
def test_the_modes_are_means_by_their_definitions(number, weights):
    values, shares = VALUES[:number], weights or [1.0, 1.0, 1.0]

    def mean(some, weights):
        return sum(w * v for w, v in zip(weights, some, strict=True)) / sum(weights)

    newest = values[-3:]
    last_k = AveragingPolicy("last_k", 3, weights=weights)
    assert average_of(last_k, values) == pytest.approx(mean(newest, shares[-len(newest) :]))
    window = AveragingPolicy("window", 3, weights=weights)
    whole = number // 3 * 3
    some = values[whole - 3 : whole] if whole else values
    if whole or sum(shares[:number]):
        assert average_of(window, values) == pytest.approx(mean(some, shares[: len(some)]))


@pytest.mark.parametrize("number", range(1, 8))
def test_the_moving_average_is_the_corrected_recursion(number):
    moving = 0.0
    for value in VALUES[:number]:
        moving = 0.9 * moving + 0.1 * value
    expected = moving / (1.0 - 0.9**number)
    assert average_of(AveragingPolicy("ema", decay=0.9), VALUES[:number]) == pytest.approx(expected)


def test_the_snapshots_in_an_average_are_counted():
    counts = {"last_k": [0, 1, 2, 3, 3, 3, 3], "window": [0, 1, 2, 3, 3, 3, 3], "ema": range(7)}
    for mode, expected in counts.items():
        policy = AveragingPolicy(mode, **({} if mode == "ema" else {"k": 3}))
        rows = {"last_k": [0, 1, 2, 3, 3, 3, 3], "window": [0, 1, 1, 1, 2, 2, 2], "ema": [0] + [1] * 6}
        found = [policy.in_average(number, rows[mode][number]) for number in range(7)]
        assert found == list(expected)


def test_without_rows_there_are_no_shares():
    for mode, number in itertools.product(("last_k", "window", "ema"), (0, 5)):
        assert AveragingPolicy(mode).shares(number, 0) == []


def test_a_window_has_weights_and_the_other_modes_have_none():
    assert AveragingPolicy("window", 2, weights=[1.0, 3.0]).window == [0.25, 0.75]
    assert AveragingPolicy("last_k", 2).window is None
    assert AveragingPolicy("ema").window is None
