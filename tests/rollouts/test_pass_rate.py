import math
import random
from statistics import NormalDist, mean, stdev

import pytest

from rewarm.rollouts.pass_rate import Z_95, pass_rate, pass_rate_by_group, wilson_interval


def test_the_default_interval_covers_95_percent():
    assert pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-14) == Z_95


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"),
    [
        (0, 1, 0.0, 0.7934567085261071),  # z^2 / (1 + z^2)
        (1, 1, 0.20654329147389294, 1.0),
        (0, 10, 0.0, 0.27753279964075415),  # z^2 / (10 + z^2)
        (5, 10, 0.236593090512564, 0.763406909487436),
        (15, 148, 0.06238, 0.16047),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_interval_has_the_known_values(passed, total, low, high):
    assert wilson_interval(passed, total) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(("passed", "total", "z"), [(0, 7, 1.0), (3, 7, 1.96), (499, 500, 2.6), (1, 1, 3.0)])
def test_wilson_ends_are_the_rates_that_lie_z_standard_errors_from_the_observed_one(passed, total, z):
    for end in wilson_interval(passed, total, z):
        if 0 < end < 1:
            assert abs(passed / total - end) == pytest.approx(
                z * math.sqrt(end * (1 - end) / total), rel=1e-9
            )


def test_wilson_reaches_exactly_0_and_1_where_none_or_all_passed():
    for total in range(1, 300):
        assert wilson_interval(0, total)[0] == 0.0
        assert wilson_interval(total, total)[1] == 1.0


def test_wilson_mirrors_successes_and_failures():
    low, high = wilson_interval(3, 11)
    assert wilson_interval(8, 11) == pytest.approx((1 - high, 1 - low))


def test_one_sample_per_prompt_gives_the_wilson_interval():
    rate = pass_rate([1, 0, 1, 1, 0, 1, 1, 1, 1, 1], num_samples=1)
    assert (rate.mean, rate.num_prompts) == (0.8, 10)
    assert (rate.low, rate.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_several_samples_give_the_normal_interval_of_the_prompt_means():
    fractions = [0.25, 0.5, 0.75, 0.5, 0.25, 0.5, 0.75, 0.25]
    rate = pass_rate(fractions, num_samples=4)
    half_width = 1.959964 * stdev(fractions) / math.sqrt(8)
    assert (rate.mean, rate.low, rate.high) == pytest.approx(
        (mean(fractions), mean(fractions) - half_width, mean(fractions) + half_width), abs=1e-6
    )


def test_samples_that_agree_within_a_prompt_add_no_certainty():
    repeated = pass_rate([1.0] * 50 + [0.0] * 50, num_samples=16)
    naive_low, naive_high = wilson_interval(800, 1600)
    once = pass_rate([1] * 50 + [0] * 50, num_samples=1)
    assert repeated.high - repeated.low == pytest.approx(once.high - once.low, rel=0.05)
    assert repeated.high - repeated.low > 3.5 * (naive_high - naive_low)


def test_the_interval_covers_the_true_rate_of_clustered_samples_95_times_in_100():
    generator = random.Random(0)
    covered, trials = 0, 1000
    for _ in range(trials):
        fractions = []
        for _ in range(60):
            chance = generator.betavariate(0.5, 0.5)  # mean 0.5, most prompts very easy or very hard
            fractions.append(sum(generator.random() < chance for _ in range(8)) / 8)
        rate = pass_rate(fractions, num_samples=8)
        covered += rate.low <= 0.5 <= rate.high
    assert 0.92 < covered / trials < 0.975


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_equal_fractions_and_a_single_prompt_keep_an_interval(fraction):
    many, one = pass_rate([fraction] * 20, num_samples=4), pass_rate([fraction], num_samples=4)
    assert (many.low, many.high) == wilson_interval(20 * fraction, 20)
    assert one.high - one.low > many.high - many.low > 0.1
    assert many.low <= fraction <= many.high


def test_the_ends_stay_within_0_and_1():
    rate = pass_rate([1.0, 1.0, 0.5], num_samples=2)
    assert rate.high == 1.0
    assert pass_rate([0.0, 0.0, 0.5], num_samples=2).low == 0.0


def test_fractions_that_are_not_exact_in_binary_are_accepted():
    assert pass_rate([1 / 3, 2 / 3, 0.333333], num_samples=3).num_prompts == 3


def test_groups_are_summarised_apart_in_order_of_appearance():
    rates = pass_rate_by_group([0.5, 1.0, 0.0, 0.5], ["b", "a", "b", "a"], num_samples=2)
    assert list(rates) == ["b", "a"]
    assert rates["b"] == pass_rate([0.5, 0.0], num_samples=2)
    assert rates["a"] == pass_rate([1.0, 0.5], num_samples=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(0, 0), "total is 0"),
        (lambda: wilson_interval(-1, 4), "passed is -1"),
        (lambda: wilson_interval(5, 4), "passed is 5"),
        (lambda: wilson_interval(math.nan, 4), "passed is nan"),
        (lambda: wilson_interval(1, 4, z=0), "z is 0"),
        (lambda: pass_rate([], 2), "at least one prompt"),
        (lambda: pass_rate([0.5], 0), "num_samples is 0"),
        (lambda: pass_rate([0.5, 1.5], 2), r"fractions\[1\] is 1.5"),
        (lambda: pass_rate([0.5, math.nan], 2), r"fractions\[1\] is nan"),
        (lambda: pass_rate([0.5], 1), r"fractions\[0\] is 0.5; it must be a multiple of 1/1"),
        (lambda: pass_rate_by_group([0.5], [], 2), "groups has 0 entries; it must have 1"),
    ],
)
def test_an_argument_out_of_range_is_an_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()
