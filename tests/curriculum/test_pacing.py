"""Pacing against written-out values, the published sizes of the cycles, and what holds for all."""

import inspect
import itertools
import math
import pickle
from collections.abc import Callable

import jsonargparse
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.curriculum import pacing
from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.pacing import (
    CyclicalPacing,
    ExponentialStepPacing,
    GeometricPacing,
    LinearPacing,
    OnePassPacing,
    SingleStepPacing,
    cycle_sizes,
    visible_ranks,
)

starts = st.floats(1e-6, 1.0)
lengths = st.integers(1, 1000)
growing = st.one_of(
    st.builds(GeometricPacing, lengths, starts),
    st.builds(ExponentialStepPacing, lengths, starts, st.floats(1.01, 10.0)),
    st.builds(SingleStepPacing, lengths, starts),
)


@given(growing, st.integers(0, 10**6))
@settings(deadline=None)
def test_growing_shares_begin_at_the_start_never_fall_and_end_at_everything(pace, step):
    assert pace(0) == pytest.approx(pace.start, rel=1e-12)
    assert 0.0 < pace(step) <= pace(step + 1) <= 1.0
    assert pace(10**9) == 1.0


def test_geometric_pacing_has_the_written_out_values():
    pace = GeometricPacing(total_steps=100, start=0.01)
    for step in (1, 37, 50, 99):
        # The published form: 2^((log2 1 - log2 c0) t / T + log2 c0).
        published = 2 ** ((math.log2(1) - math.log2(0.01)) * step / 100 + math.log2(0.01))
        assert pace(step) == pytest.approx(published, rel=1e-12)
    assert pace(25) == pytest.approx(0.0316227766, abs=1e-10)
    assert pace(75) == pytest.approx(0.316227766, abs=1e-9)


def test_exponential_steps_have_the_published_values():
    # 0.04, then times 1.5 each: the sizes that the repository lists for 10,000 examples.
    pace = ExponentialStepPacing(step_length=7)
    sizes = [round(10_000 * pace(7 * rise + 6), 4) for rise in range(9)]
    assert sizes == [400.0, 600.0, 900.0, 1350.0, 2025.0, 3037.5, 4556.25, 6834.375, 10_000.0]


def test_a_single_step_jumps_at_its_boundary():
    pace = SingleStepPacing(boundary=10, start=0.3)
    assert [pace(step) for step in (0, 9, 10, 11)] == [0.3, 0.3, 1.0, 1.0]


def published_cycle_sizes(start, end, factor, passes):
    """Loop over neighbours as the paper's pseudocode has it."""
    sizes = [start]
    while sum(sizes) < passes:
        last = sizes[-1]
        rose = len(sizes) > 1 and sizes[-2] < last
        if last == start or (rose and last != end):
            sizes.append(min(last / factor, end))
        else:
            sizes.append(max(last * factor, start))
    return sizes


def test_cycles_have_the_published_sizes():
    expected = [0.25, 0.5, 1.0, 0.5, 0.25, 0.5, 1.0]
    assert cycle_sizes(0.25, 1.0, 0.5, passes=4.0) == expected
    assert cycle_sizes(0.25, 1.0, 0.5, passes=3.9) == expected
    assert cycle_sizes(0.25, 1.0, 0.5, passes=4.1) == [*expected, 0.5]
    assert cycle_sizes(0.2, 1.0, 0.5, passes=4) == [0.2, 0.4, 0.8, 1.0, 0.5, 0.25, 0.2, 0.4, 0.8]


@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.floats(0.2, 0.9), st.floats(0.1, 8.0))
@settings(deadline=None)
def test_cycles_follow_the_published_rule(one, other, factor, passes):
    start, end = min(one, other), max(one, other)
    sizes = cycle_sizes(start, end, factor, passes)
    expected = published_cycle_sizes(start, end, factor, passes)
    # Rounding of the sum may decide on the last one.
    assert abs(len(sizes) - len(expected)) <= 1
    assert sizes[: len(expected)] == expected[: len(sizes)]


@given(
    st.integers(1, 300),
    st.sampled_from([(0.25, 1.0, 0.5), (0.1, 1.0, 0.5), (0.2, 0.6, 0.7), (0.5, 0.5, 0.5)]),
)
@settings(deadline=None)
def test_an_episode_of_a_cycle_is_one_pass_over_its_share(steps_per_pass, shape):
    pace = CyclicalPacing(steps_per_pass, *shape)
    begin = 0.0
    for share in cycle_sizes(*shape, passes=5.0):
        end = begin + share * steps_per_pass
        inside = range(math.ceil(begin - 1e-6), math.ceil(end - 1e-6))
        assert {pace(step) for step in inside} <= {share}
        begin = end


def test_a_cycle_goes_on_forever():
    pace = CyclicalPacing(steps_per_pass=1000)
    assert [pace(2250 * 10**9 + step) for step in (0, 250, 750, 1750)] == [0.25, 0.5, 1.0, 0.5]


def test_one_pass_shows_each_stage_only_while_it_lasts():
    pace = OnePassPacing(boundaries=[10, 20], shares=[0.2, 0.5, 0.9])
    assert [pace(step) for step in (0, 9, 10, 19, 20, 999)] == [
        (0.0, 0.2),
        (0.0, 0.2),
        (0.2, 0.5),
        (0.2, 0.5),
        (0.5, 0.9),
        (0.5, 0.9),
    ]


# --- ranks ----------------------------------------------------------------------------------------


@given(st.floats(0.001, 1.0), st.integers(1, 500))
@settings(deadline=None)
def test_a_share_shows_as_many_ranks_as_the_curriculum_does(share, num_examples):
    curriculum = Curriculum(
        num_examples, scores=[0.0] * num_examples, order="ascending", pacing=lambda step: share
    )
    assert visible_ranks(share, num_examples) == range(curriculum.num_visible(0))


@given(st.lists(st.floats(0.0, 1.0), max_size=6), st.integers(1, 60))
@settings(deadline=None)
def test_windows_without_a_gap_cut_the_order_into_parts(cuts, num_examples):
    edges = [0.0, *sorted(cuts), 1.0]
    windows = [visible_ranks(pair, num_examples) for pair in itertools.pairwise(edges)]
    assert all(0 <= w.start < w.stop <= num_examples for w in windows)
    assert {rank for window in windows for rank in window} == set(range(num_examples))
    if all(b - a >= 1.0 / num_examples for a, b in itertools.pairwise(edges)):
        assert sum(map(len, windows)) == num_examples


def test_three_tenths_of_ten_are_three():
    assert visible_ranks(0.1 + 0.2, 10) == range(3)
    assert visible_ranks((0.1 + 0.2, 0.6), 10) == range(3, 6)
    assert visible_ranks((1.0, 1.0), 10) == range(9, 10)


# --- use ------------------------------------------------------------------------------------------

CONFIGS = {
    "GeometricPacing": {"total_steps": 10},
    "ExponentialStepPacing": {"step_length": 10, "growth": 1.9},
    "SingleStepPacing": {"boundary": 5, "start": 0.1},
    "LinearPacing": {"total_steps": 10, "start": 0.2},
    "RootPacing": {"total_steps": 10, "power": 3.0},
    "StagedPacing": {"boundaries": [5], "shares": [0.5, 1.0]},
    "CyclicalPacing": {"steps_per_pass": 10, "start": 0.2},
    "OnePassPacing": {"boundaries": [5], "shares": [0.5, 1.0]},
}


def test_every_pacing_can_be_named_in_a_config_and_pickled():
    classes = {
        name for name, member in vars(pacing).items() if inspect.isclass(member) and name.endswith("Pacing")
    }
    assert set(CONFIGS) == classes - {"Pacing"}
    for name, arguments in CONFIGS.items():
        returns = tuple[float, float] if name == "OnePassPacing" else float
        parser = jsonargparse.ArgumentParser()
        parser.add_argument("--pacing", type=Callable[[int], returns] | None)
        path = f"rewarm.curriculum.pacing.{name}"
        config = parser.parse_object({"pacing": {"class_path": path, "init_args": arguments}})
        made = parser.instantiate_classes(config).pacing
        assert made == getattr(pacing, name)(**arguments) == pickle.loads(pickle.dumps(made))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GeometricPacing(0), "total_steps is 0"),
        (lambda: GeometricPacing(10, start=0.0), "start is 0.0"),
        (lambda: GeometricPacing(10, start=math.nan), "start is nan"),
        (lambda: ExponentialStepPacing(0), "step_length is 0"),
        (lambda: ExponentialStepPacing(5, start=1.1), "start is 1.1"),
        (lambda: ExponentialStepPacing(5, growth=1.0), "growth is 1.0"),
        (lambda: ExponentialStepPacing(5, growth=math.nan), "growth is nan"),
        (lambda: SingleStepPacing(0, 0.5), "boundary is 0"),
        (lambda: SingleStepPacing(5, -0.5), "start is -0.5"),
        (lambda: CyclicalPacing(0), "steps_per_pass is 0"),
        (lambda: CyclicalPacing(5, start=0.6, end=0.5), "start is 0.6 and end is 0.5"),
        (lambda: CyclicalPacing(5, start=math.nan), "start is nan"),
        (lambda: CyclicalPacing(5, end=1.5), "end is 1.5"),
        (lambda: CyclicalPacing(5, factor=1.0), "factor is 1.0"),
        (lambda: cycle_sizes(0.5, 1.0, 0.5, passes=math.inf), "passes is inf"),
        (lambda: OnePassPacing([10], [1.0]), "shares has 1 entries"),
        (lambda: OnePassPacing([20, 10], [0.1, 0.2, 1.0]), r"boundaries is \[20, 10\]"),
        (lambda: OnePassPacing([10], [0.5, 0.5]), r"shares is \[0.5, 0.5\]"),
        (lambda: visible_ranks(1.1, 5), "visible is 1.1"),
        (lambda: visible_ranks(math.nan, 5), "visible is nan"),
        (lambda: visible_ranks((0.5, 0.4), 5), r"visible is \(0.5, 0.4\)"),
        (lambda: visible_ranks(LinearPacing(5)(1), 0), "num_examples is 0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(make, named):
    with pytest.raises(ValueError, match=named):
        make()
