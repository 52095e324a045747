"""Gates against what a plain look at the scores says."""

import math
from collections import Counter
from collections.abc import Callable

import jsonargparse
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewarm
from rewarm.curriculum.gates import AtLeast, Band, Gate, TopShare, admitted

NAN = math.nan
scores_of = st.lists(st.one_of(st.integers(-5, 5).map(float), st.just(NAN)), max_size=40)


def test_a_band_keeps_its_edges_and_what_is_unknown():
    assert admitted(Band(0.25, 0.75), [0.0, 0.25, 0.75, 0.76, NAN]) == [False, True, True, False, True]
    assert admitted(Band(high=1.0), [-1e9, 1.0, 1.1]) == [True, True, False]
    assert admitted(Band(), [-math.inf, math.inf]) == [True, True]


@given(scores_of, st.floats(0.05, 1.0), st.booleans())
@settings(deadline=None)
def test_a_top_share_has_its_size_and_nothing_outside_is_better(scores, share, lowest):
    chosen = TopShare(share, lowest=lowest).select(scores)
    known = [score for score in scores if not math.isnan(score)]
    inside = [s for s, is_in in zip(scores, chosen, strict=True) if is_in and not math.isnan(s)]
    outside = [s for s, is_in in zip(scores, chosen, strict=True) if not is_in]
    assert len(inside) == math.floor(share * len(known) + 1e-9)
    assert not any(math.isnan(score) for score in outside)
    if inside and outside:
        assert max(inside) <= min(outside) if lowest else min(inside) >= max(outside)


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc")), max_size=40), st.floats(0.0, 0.5))
@settings(deadline=None)
def test_each_group_keeps_its_floor_and_the_total_stays(rows, floor):
    scores, groups = [float(score) for score, _ in rows], [group for _, group in rows]
    chosen = TopShare(0.5, floor=floor).select(scores, groups)
    kept = Counter(group for group, is_in in zip(groups, chosen, strict=True) if is_in)
    for group, size in Counter(groups).items():
        assert kept[group] >= math.floor(floor * size)
    assert sum(kept.values()) == math.floor(0.5 * len(rows) + 1e-9)


def test_three_tenths_of_each_group_as_in_itool():
    # Ten rows with tools of high perplexity, ten without of low: three of either, the highest of each.
    scores = [*range(100, 110), *range(10)]
    groups = ["tool"] * 10 + ["none"] * 10
    chosen = TopShare(0.3, floor=0.3).select([float(score) for score in scores], groups)
    assert [place for place, is_in in enumerate(chosen) if is_in] == [7, 8, 9, 17, 18, 19]
    alone = TopShare(0.3).select([float(score) for score in scores], groups)
    assert sum(alone[:10]) == 6


@pytest.mark.parametrize(
    ("easiest", "expected"),
    [("lowest", [True, False, True, False]), ("highest", [False, True, True, False])],
)
def test_too_few_are_made_up_by_the_easiest(easiest, expected):
    scores = [0.0, 3.0, 2.0 if easiest == "highest" else 1.0, NAN]
    # Only the unknown one is within the band.
    assert AtLeast(Band(10, 20), 2, easiest=easiest).select(scores) == expected
    assert AtLeast(Band(10, 20), 1).select(scores) == [False, False, False, True]
    assert AtLeast(Band(10, 20), 9).select(scores) == [True] * 4


def test_gates_can_be_named_in_a_config():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--gate", type=Gate | None)
    band = {"class_path": "rewarm.Band", "init_args": {"low": "-.inf", "high": 0.0}}
    config = {"class_path": "rewarm.AtLeast", "init_args": {"gate": band, "num_examples": 100}}
    made = parser.instantiate_classes(parser.parse_object({"gate": config})).gate
    assert made == AtLeast(Band(-math.inf, 0.0), 100)
    share = {"class_path": "rewarm.TopShare", "init_args": {"share": 0.2, "lowest": True}}
    made = parser.instantiate_classes(parser.parse_object({"gate": share})).gate
    assert made == rewarm.TopShare(0.2, lowest=True)
    assert isinstance(Band(0, 1), Callable)


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: Band(0.7, 0.3), "low is 0.7 and high is 0.3"),
        (lambda: Band(NAN, 0.3), "low is nan"),
        (lambda: TopShare(0.0), "share is 0.0"),
        (lambda: TopShare(NAN), "share is nan"),
        (lambda: TopShare(0.2, floor=0.3), r"floor is 0.3; it must be in \[0, 0.2\]"),
        (lambda: TopShare(0.2, floor=0.1).select([1.0]), "floor is 0.1, but no groups are given"),
        (lambda: TopShare(0.2).select([1.0], ["a", "b"]), "1 scores but 2 groups"),
        (lambda: AtLeast(Band(), 0), "num_examples is 0"),
        (
            lambda: AtLeast(Band(), 1, easiest="low"),
            "easiest is 'low'; it must be one of 'lowest', 'highest'",
        ),
    ],
)
def test_a_bad_argument_is_named_with_its_value(act, named):
    with pytest.raises(ValueError, match=named):
        act()
