"""The shuffle by formula: a permutation at every size, and one that statistics can't tell from a fair one."""

import itertools
import math
import pickle
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.curriculum.permutation import Permutation


def order(size, seed=0, stream=()):
    return [Permutation(size, seed, stream)(place) for place in range(size)]


def parity(numbers):
    return sum(a > b for a, b in itertools.combinations(numbers, 2)) % 2


def deviations(counts, expected):
    """How many standard deviations Pearson's chi-square of equally likely outcomes lies above its mean."""
    freedom = len(counts) - 1
    return (sum((count - expected) ** 2 / expected for count in counts) - freedom) / math.sqrt(2 * freedom)


@given(st.integers(1, 400), st.integers(-(2**70), 2**70), st.lists(st.integers(0, 9), max_size=3))
@settings(deadline=None)
def test_each_example_has_one_place_and_the_inverse_finds_it(size, seed, stream):
    permutation = Permutation(size, seed, tuple(stream))
    examples = [permutation(place) for place in range(size)]
    assert sorted(examples) == list(range(size))
    assert [permutation.inverse(example) for example in examples] == list(range(size))
    assert len(permutation) == size


@pytest.mark.parametrize("size", [10**9, 10**9 + 7, 2**53])
def test_a_size_beyond_any_list_is_inverted_too(size):
    permutation = Permutation(size, seed=3)
    for place in [0, 1, 12345, size // 2, size - 1]:
        assert 0 <= permutation(place) < size
        assert permutation.inverse(permutation(place)) == place


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_orders_of_a_few_examples_are_equally_likely(size):
    orders = list(itertools.permutations(range(size)))
    seeds = 24 * len(orders) if size == 6 else 60 * len(orders)
    seen = Counter(tuple(order(size, seed)) for seed in range(seeds))
    assert abs(deviations([seen[one] for one in orders], seeds / len(orders))) < 4


@pytest.mark.parametrize("size", [9, 20, 49])
def test_odd_permutations_are_as_likely_as_even_ones(size):
    odd = sum(parity(order(size, seed)) for seed in range(400))
    assert abs(odd - 200) < 4 * math.sqrt(100)


@pytest.mark.parametrize("size", [13, 64, 100])
def test_every_place_gets_every_example_equally_often(size):
    seeds = 4000
    seen = Counter()
    for seed in range(seeds):
        permutation = Permutation(size, seed)
        seen.update((place, permutation(place)) for place in (0, 1, size // 2, size - 1))
    for place in (0, 1, size // 2, size - 1):
        counts = [seen[place, example] for example in range(size)]
        assert abs(deviations(counts, seeds / size)) < 4


def test_neighbours_are_not_related():
    # Ordered pairs of examples at neighbouring places, over seeds: all equally likely.
    seeds, size = 6000, 12
    seen = Counter(
        (permutation(4), permutation(5)) for permutation in (Permutation(size, s) for s in range(seeds))
    )
    pairs = list(itertools.permutations(range(size), 2))
    assert set(seen) <= set(pairs)
    assert abs(deviations([seen[pair] for pair in pairs], seeds / len(pairs))) < 4


@pytest.mark.parametrize("size", [10**6, 10**9 + 7])
def test_a_stretch_of_places_is_spread_like_random_numbers(size):
    n = 10_000
    permutation = Permutation(size, seed=5)
    drawn = [permutation(10**5 + place) / size for place in range(n)]
    # Kolmogorov-Smirnov: below 1.95 / sqrt(n) in 999 of 1000 cases.
    ranked = sorted(drawn)
    assert max(abs(value - (i + 0.5) / n) for i, value in enumerate(ranked)) < 1.95 / math.sqrt(n)
    for lag in (1, 2, 31623, 1000):
        # Correlation of uniform numbers at a lag: normal with deviation 1 / sqrt(pairs).
        pairs = list(zip(drawn, drawn[lag:], strict=False))
        if pairs:
            correlation = 12 * sum((x - 0.5) * (y - 0.5) for x, y in pairs) / len(pairs)
            assert abs(correlation) < 4 / math.sqrt(len(pairs))
    # Ascents between neighbours: mean (n - 1) / 2, variance (n + 1) / 12.
    ascents = sum(x < y for x, y in itertools.pairwise(drawn))
    assert abs(ascents - (n - 1) / 2) < 4 * math.sqrt((n + 1) / 12)


def test_fixed_points_are_one_on_average():
    size, seeds = 50, 800
    fixed = sum(sum(example == place for place, example in enumerate(order(size, s))) for s in range(seeds))
    assert abs(fixed - seeds) < 4 * math.sqrt(seeds)  # Poisson with mean 1 each


def test_seeds_and_streams_give_orders_that_agree_no_more_than_by_chance():
    size = 1000
    names = [(0, ()), (1, ()), (0, (0,)), (0, (1,)), (0, (0, 0)), (-1, ()), (1, (0,))]
    orders = [order(size, seed, stream) for seed, stream in names]
    for one, other in itertools.combinations(orders, 2):
        assert sum(x == y for x, y in zip(one, other, strict=True)) < 8  # Poisson with mean 1


def test_the_order_is_the_same_in_another_process_and_after_pickling():
    code = (
        "from rewarm.curriculum.permutation import Permutation as P;"
        " print([P(99, 7, (2,))(i) for i in range(99)])"
    )
    # Not from the repository root, whose folders would be importable by another name there.
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    permutation = pickle.loads(pickle.dumps(Permutation(99, 7, (2,))))
    assert other.strip() == str([permutation(place) for place in range(99)])


def test_the_order_of_a_seed_never_changes():
    # A checkpoint's position means nothing if another version shuffles otherwise.
    assert order(12, seed=0) == [0, 11, 6, 8, 1, 10, 4, 7, 2, 9, 5, 3]
    assert Permutation(10**9, seed=42, stream=(3, 1))(123_456_789) == 33_704_896


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: Permutation(0), "size is 0"),
        (lambda: Permutation(5)(5), "place is 5; it must be in 0 to 4"),
        (lambda: Permutation(5)(-1), "place is -1"),
        (lambda: Permutation(5).inverse(5), "example is 5"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(act, named):
    with pytest.raises(ValueError, match=named):
        act()
