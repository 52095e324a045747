"""Refinement against the paper's formula as loops, and norms against flat vectors."""

import math
import random
import re
import statistics

import jsonargparse
import pytest

from rewarm.schedules.phases import Schedule
from rewarm.schedules.refinement import refined


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(("number", "points"), [(2, 200), (37, 200), (1000, 10), (500, 7)])
def test_constant_norms_give_exactly_a_line_from_one_to_zero(norm, number, points):
    schedule = refined([3.7] * number, norm, points=points)
    for n in range(101):
        assert schedule(n, 100) == pytest.approx(1 - n / 100, abs=1e-12)
    assert schedule(100, 100) == 0.0


def noisy(number, seed=0):
    rng = random.Random(seed)
    return [(1 + 5 * math.exp(-t / 20)) * math.exp(rng.gauss(0, 0.5)) for t in range(number)]


@pytest.mark.parametrize(("norm", "exponent"), [("l1", -1), ("l2", -2)])
def test_it_is_the_formula_of_the_paper(norm, exponent):
    norms, number = noisy(201), 201
    schedule = refined(norms, norm, smoothing=0.0, points=number - 1)
    weights = [value**exponent for value in norms]
    expected = [weights[t] * sum(weights[p] for p in range(t + 1, number)) for t in range(number)]
    top = max(expected)
    for t in range(number):
        assert schedule(t, number - 1) == pytest.approx(expected[t] / top, rel=1e-9, abs=1e-12)


def test_norms_are_smoothed_by_a_median_over_the_share_of_the_run():
    norms, half = noisy(101), 5  # 2 * floor(0.1 * 101 / 2) + 1 = 11 wide
    mirrored = norms + [norms[-1 - k] for k in range(1, half + 1)]
    smooth = [statistics.median(mirrored[max(0, t - half) : t + half + 1]) for t in range(101)]
    ours, expected = refined(norms, points=100), refined(smooth, smoothing=0.0, points=100)
    for t in range(101):
        assert ours(t, 100) == pytest.approx(expected(t, 100), rel=1e-12, abs=1e-15)
    assert ours(50, 100) != pytest.approx(refined(norms, smoothing=0.0, points=100)(50, 100), rel=1e-3)


def test_large_norms_at_the_start_become_a_warm_up():
    schedule = refined([10 * math.exp(-t / 50) + 1 for t in range(1000)])
    values = [schedule(n, 1000) for n in range(1, 1001)]
    top = values.index(max(values))
    assert 50 < top < 300
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert max(values) == pytest.approx(1.0)


def test_a_scale_of_the_norms_changes_nothing():
    norms = noisy(300)
    one, other = refined(norms), refined([1e4 * value for value in norms])
    assert [one(n, 300) for n in range(301)] == pytest.approx([other(n, 300) for n in range(301)], abs=1e-12)


def test_it_fits_runs_of_any_length_and_a_config_can_name_it():
    def hold(schedule: Schedule) -> Schedule:
        return schedule

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(hold, "hold")
    path = "rewarm.schedules.refinement.refined"
    section = {"class_path": path, "init_args": {"gradient_norms": [4, 2, 1.0, 1.0], "norm": "l2"}}
    config = parser.parse_object({"hold": {"schedule": section}})
    made = getattr(parser, "instantiate", parser.instantiate_classes)(config).hold.schedule
    assert made(50, 100) == made(5e11, 1e12) == refined([4, 2, 1, 1], "l2")(0.5, 1.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gradient_norms": [1.0]}, "gradient_norms has 1 entries"),
        ({"gradient_norms": [1.0, 0.0]}, "gradient_norms has 0.0 at place 1"),
        ({"gradient_norms": [math.inf, 1.0]}, "gradient_norms has inf at place 0"),
        ({"gradient_norms": [1.0, math.nan]}, "gradient_norms has nan at place 1"),
        ({"norm": "l3"}, "norm is 'l3'; it must be 'l1' or 'l2'"),
        ({"smoothing": 1.0}, "smoothing is 1.0; it is a share"),
        ({"smoothing": -0.1}, "smoothing is -0.1"),
        ({"points": 1}, "points is 1; it must be >= 2"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        refined(**{"gradient_norms": [1.0, 2.0], **arguments})
