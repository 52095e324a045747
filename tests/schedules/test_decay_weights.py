"""Weights that stand for a decay, against runs with decayed updates."""

import math

import pytest
import torch

from rewarm.functional.averaging import mean_weights
from rewarm.schedules.decay_weights import decay_weights, shape_weights
from rewarm.schedules.phases import Phase

SHAPES = ["linear", "cosine", "sqrt", "square"]


def factors_of(shape, k, end=0.0):
    """Learning rates along a decay, between k checkpoints evenly spaced over it."""
    return [Phase(shape, end=end).factor(progress=j / k, start=1.0) for j in range(1, k)]


def test_weights_for_a_linear_and_a_square_root_decay_are_those_in_the_notes_on_the_paper():
    assert decay_weights(factors_of("linear", 6)) == pytest.approx(mean_weights(6))
    golden = [0.41, 0.17, 0.13, 0.11, 0.10, 0.09]
    assert decay_weights(factors_of("sqrt", 6)) == pytest.approx(golden, abs=5e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 6, 11])
def test_a_run_merged_with_decay_weights_ends_where_decayed_updates_lead(shape, k):
    updates = torch.randn(k - 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    factors = factors_of(shape, k, end=0.1)
    decayed = start.clone()
    for factor, update in zip(factors, updates, strict=True):
        decayed += factor * update
    saved = [start + updates[:j].sum(0) for j in range(k)]
    weights = decay_weights(factors)
    assert len(weights) == k
    assert sum(weights) == pytest.approx(1.0)
    torch.testing.assert_close(sum(w * s for w, s in zip(weights, saved, strict=True)), decayed)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_a_shape_has_the_weights_of_its_learning_rates(k):
    rates = {
        "linear": lambda p: 1 - 0.8 * p,
        "cosine": lambda p: 0.2 + 0.4 * (1 + math.cos(math.pi * p)),
        "sqrt": lambda p: 1 - 0.8 * math.sqrt(p),
        "exponential": lambda p: 0.2**p,
        "harmonic": lambda p: 1 / (p / 0.2 + 1 - p),
    }
    for shape, rate in rates.items():
        expected = decay_weights([rate(j / k) for j in range(1, k)])
        assert shape_weights(shape, k, end=0.2) == pytest.approx(expected, abs=1e-12)
    assert shape_weights("linear", k) == pytest.approx(mean_weights(k))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decay_weights([0.5, 0.6]), "must fall"),
        (lambda: decay_weights([1.1]), "at most 1"),
        (lambda: decay_weights([0.5, -0.1]), "no less than 0"),
        (lambda: shape_weights("up", 3), "shape is 'up'"),
        (lambda: shape_weights("linear", 0), "k is 0"),
        (lambda: shape_weights("linear", 3, end=1.5), "must fall"),
        (lambda: shape_weights("harmonic", 3), "neither may be 0"),
        (lambda: shape_weights("exponential", 3), "neither may be 0"),
        (lambda: shape_weights("half-life", 3), "has no end to meet"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
