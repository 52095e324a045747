"""Shapes against published formulas written out and golden values; what holds for every chain of phases."""

import math
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.schedules.phases import FREE_SHAPES, SHAPES, Phase, Schedule
from rewarm.schedules.published import constant, cosine, infinite, power, rewarmed, wsd, wsds

ENDED = [shape for shape in SHAPES if shape != "jump"]


def falls(shape, end=0.0, knob=None, at=(0.25, 0.5, 0.75)):
    """The shape from 1 to `end` over a quarter, a half and three quarters of its length."""
    return [Phase(shape, 100, end, knob).factor(p, start=1.0) for p in at]


@pytest.mark.parametrize(
    ("shape", "end", "knob", "expected"),
    [
        ("uba", 0.0, 0.5, [0.959, 0.800, 0.407]),
        ("uba", 0.0, 1.0, [0.921, 0.667, 0.255]),
        ("uba", 0.0, 2.0, [0.854, 0.500, 0.146]),
        ("uba", 0.0, 5.0, [0.700, 0.286, 0.064]),
        ("rex", 0.0, 0.5, [0.857, 0.667, 0.400]),
        ("rex", 0.0, 0.1, [0.968, 0.909, 0.769]),
        ("cospow", 0.0, 2.0, [0.807, 0.414, 0.107]),
        ("cospow", 0.0, 10.0, [0.682, 0.240, 0.045]),
        ("harmonic", 0.1, None, [0.3077, 0.1818, 0.1290]),
        ("sqrt", 0.1, None, [0.5500, 0.3636, 0.2206]),
        ("exponential", 0.1, None, [0.5623, 0.3162, 0.1778]),
    ],
)
def test_shapes_have_the_published_values(shape, end, knob, expected):
    digits = 4 if end else 3
    assert [round(value, digits) for value in falls(shape, end, knob)] == expected


def test_rex_near_its_end():
    assert round(falls("rex", knob=0.5, at=[0.9])[0], 3) == 0.182
    assert round(falls("rex", knob=0.1, at=[0.9])[0], 3) == 0.526


def cosine_power(p, k):
    c = (1 + math.cos(math.pi * p)) / 2
    return (k ** (c + 1) - k) / (k**2 - k)


def mirrored(p, end):
    """As far above the straight line as the cosine is below it, and the other way round."""
    line, wave = end + (1 - end) * (1 - p), end + (1 - end) * (1 + math.cos(math.pi * p)) / 2
    return line + (line - wave)


@pytest.mark.parametrize(
    ("shape", "end", "knob", "formula"),
    [
        ("linear", 0.1, None, lambda p: 0.1 + 0.9 * (1 - p)),
        ("cosine", 0.1, None, lambda p: 0.1 + 0.9 / 2 * (1 + math.cos(math.pi * p))),
        ("mirror-cosine", 0.1, None, lambda p: mirrored(p, 0.1)),
        ("sqrt", 0.1, None, lambda p: 1 * (1 - math.sqrt(p)) + 0.1 * math.sqrt(p)),
        ("square", 0.1, None, lambda p: 0.1 + 0.9 * (1 - p * p)),
        ("exponential", 0.1, None, lambda p: 10**-p),
        ("harmonic", 0.1, None, lambda p: 1 / (p / 0.1 + (1 - p))),
        ("inv-sqrt", 0.1, 3.0, lambda p: 1 - 0.9 * ((1 + 3 * p) ** -0.5 - 1) / (4**-0.5 - 1)),
        ("rex", 0.0, 0.5, lambda p: (1 - p) / (1 - p / 2)),
        ("rex", 0.0, 0.1, lambda p: (1 - p) / (0.1 + 0.9 * (1 - p))),
        ("uba", 0.0, 2.0, lambda p: (1 + math.cos(math.pi * p)) / 2),
        (
            "uba",
            0.0,
            5.0,
            lambda p: 2 * math.cos(math.pi * p / 2) ** 2 / (5 - 3 * math.cos(math.pi * p / 2) ** 2),
        ),
        ("cospow", 0.0, 1.0, lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("cospow", 0.0, 2.0, lambda p: cosine_power(p, 2)),
        ("cospow", 0.0, 10.0, lambda p: cosine_power(p, 10)),
    ],
)
def test_shapes_follow_their_formula(shape, end, knob, formula):
    phase = Phase(shape, 100, end, knob)
    for p in torch.linspace(0, 1, 101, dtype=torch.float64).tolist():
        assert phase.factor(p, start=1.0) == pytest.approx(formula(p), abs=1e-12)


def test_every_shape_has_its_formula_tested():
    (marks,) = [m for m in test_shapes_follow_their_formula.pytestmark if m.name == "parametrize"]
    assert {case[0] for case in marks.args[1]} == set(ENDED)


def test_inverse_sqrt_covers_the_published_share_of_its_way():
    for timescale, expected in ((1.0, [0.360, 0.627, 0.833]), (10.0, [0.666, 0.847, 0.941])):
        assert [round(1 - value, 3) for value in falls("inv-sqrt", knob=timescale)] == expected


@pytest.mark.parametrize("unit", [1, 1000], ids=["steps", "fractions"])
def test_a_half_life_halves_every_half_life(unit):
    length, half_life = (500, 125.0) if unit == 1 else (0.5, 0.125)
    schedule = Schedule([Phase("constant"), Phase("half-life", length, knob=half_life)], start=0.8)
    values = [schedule(500 + n, 1000) for n in (0, 125, 250, 375, 500)]
    assert values == pytest.approx([0.8, 0.4, 0.2, 0.1, 0.05], rel=1e-12)


def test_a_half_life_is_the_exponential_to_the_end_it_reaches():
    halved, ended = Phase("half-life", 300, knob=70), Phase("exponential", 300, 0.5 ** (300 / 70))
    for n in range(301):
        assert halved.factor(n / 300, 1.0) == pytest.approx(ended.factor(n / 300, 1.0), rel=1e-12)


@pytest.mark.parametrize("begin", [10, 60])
def test_a_power_law_sets_in_at_its_turn_or_where_it_begins(begin):
    law = Schedule([Phase("linear", begin, 0.5), Phase("power", None, knob=-0.7, turn=40)], start=0.0)
    for n in range(begin, 400):
        assert law(n, 400) == pytest.approx(0.5 * (max(n, begin, 40) / max(begin, 40)) ** -0.7, rel=1e-12)
    endless = [law(n, math.inf) for n in range(400)]
    assert endless == pytest.approx([law(n, 400) for n in range(400)], rel=1e-12)


def test_a_jump_takes_effect_after_the_last_step_of_the_phase_before_it():
    # 0.29 * 100 is 28.999999999999996: step 29 still belongs to the first phase.
    schedule = Schedule(
        [Phase("linear", 0.29, 0.5), Phase("jump", 0, 2.0), Phase("linear", 0.71, 1.0)], start=1.0
    )
    assert schedule(29, 100) == 0.5
    assert schedule(30, 100) == pytest.approx(2 - 1 / 71)
    assert schedule(100, 100) == 1.0


def test_a_fraction_and_the_steps_it_stands_for_are_one_curve():
    for n in range(101):
        assert wsd(0.1, 0.2, 0.1)(n, 100) == pytest.approx(wsd(10, 20, 0.1)(n, 100), abs=1e-12)


@pytest.mark.parametrize("total", [7, 10, 33, 1001, 10**13])
def test_lengths_that_sum_to_the_total_need_no_open_phase(total):
    thirds = Schedule(
        [Phase("linear", 0.1, 1.0), Phase("constant", 0.6), Phase("cosine", 0.3, 0.1)], start=0.0
    )
    assert thirds(total, total) == 0.1


@pytest.mark.parametrize(
    ("total", "fractions"), [(43746088856361, [0.01, 0.3, 0.69]), (88098159656577, [0.01, 0.2, 0.79])]
)
def test_fractions_of_many_tokens_fill_them_though_their_sum_is_rounded(total, fractions):
    phases = [Phase("linear", length, end) for length, end in zip(fractions, (1.0, 0.7, 0.1), strict=True)]
    assert Schedule(phases, start=0.0)(total, total) == 0.1


def test_lengths_in_tokens_are_exact_at_any_size():
    trillion = 10**12
    schedule = Schedule(
        [Phase("linear", 7 * trillion, 1.0), Phase("jump", 0, 0.5), Phase("linear", 3 * trillion + 1, 0.0)],
        start=0.0,
    )
    total = 10 * trillion + 1
    assert schedule(7 * trillion, total) == 1.0
    assert schedule(7 * trillion + 4_000_000, total) == pytest.approx(0.5, abs=1e-6)
    assert schedule(total, total) == 0.0


# --- properties of every chain --------------------------------------------------------------------------

lengths = st.floats(0.01, 1.0)
levels = st.floats(0.01, 2.0)


@st.composite
def schedules(draw):
    """Two to five phases without a jump, as fractions or steps, one of them open."""
    number = draw(st.integers(2, 5))
    weights = [draw(lengths) for _ in range(number)]
    opened = draw(st.integers(0, number - 1))
    phases = []
    for i, weight in enumerate(weights):
        share = weight / (sum(weights) * 1.01)
        length = None if i == opened else draw(st.sampled_from([share, max(1, int(share * 900))]))
        usable = [shape for shape in (*ENDED, *FREE_SHAPES) if shape != "half-life" or length is not None]
        shape = draw(st.sampled_from(usable))
        knob = turn = None
        if shape == "half-life":
            knob = (
                draw(st.floats(0.3, 1.0)) if isinstance(length, float) else length * draw(st.floats(0.3, 3))
            )
        elif shape == "power":
            knob, turn = draw(st.floats(-1.0, -0.1)), draw(st.floats(10, 2000))
        phases.append(Phase(shape, length, None if shape in FREE_SHAPES else draw(levels), knob, turn))
    return Schedule(phases, start=draw(levels))


def joins(schedule, total):
    ends, begin = [], 0.0
    for length in schedule._lengths(total):
        begin += length
        ends.append(begin)
    return ends


@settings(max_examples=100, deadline=None)
@given(schedule=schedules(), total=st.integers(1000, 3000))
def test_without_a_jump_it_is_continuous_everywhere(schedule, total):
    # A sqrt over two steps, the steepest here, moves by 0.005 in this time.
    for join in joins(schedule, total):
        assert schedule(max(0.0, join - 1e-8), total) == pytest.approx(schedule(join + 1e-5, total), abs=1e-2)
    assert schedule(0, total) == schedule.start


@settings(max_examples=100, deadline=None)
@given(
    schedule=schedules(),
    total=st.integers(1000, 3000),
    where=st.lists(st.floats(0, 4000), min_size=1, max_size=20),
)
def test_it_stays_between_the_factors_where_its_phases_join(schedule, total, where):
    corners = [schedule.start, *(schedule(join, total) for join in joins(schedule, total))]
    for position in where:
        assert min(corners) - 1e-9 <= schedule(position, total) <= max(corners) + 1e-9


@settings(max_examples=50, deadline=None)
@given(schedule=schedules(), order=st.permutations(range(40)))
def test_its_value_depends_on_the_position_alone(schedule, order):
    straight = [schedule(25.0 * n, 1000) for n in range(40)]
    asked = {n: schedule(25.0 * n, 1000) for n in order}
    restored = pickle.loads(pickle.dumps(schedule))
    assert straight == [asked[n] for n in range(40)] == [restored(25.0 * n, 1000) for n in range(40)]


@pytest.mark.parametrize("shape", ENDED)
def test_every_shape_goes_one_way_and_meets_its_ends_exactly(shape):
    for start, end in ((1.0, 0.1), (0.1, 1.0)):
        phase = Phase(shape, 50, end)
        values = [phase.factor(n / 50, start) for n in range(51)]
        assert (values[0], values[-1]) == (start, end)
        assert values == sorted(values, reverse=start > end)
        assert len(set(values)) == 51


# --- what cannot be -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Phase("cubic", 10, 0.0), "shape is 'cubic'; known shapes: constant, half-life, power, jump"),
        (lambda: wsd(shape="1-sqrt"), "shape is '1-sqrt'; known shapes"),
        (lambda: Phase("linear", 0, 0.0), "length is 0; a number of steps or tokens must be"),
        (lambda: Phase("linear", -3, 0.0), "length is -3"),
        (lambda: Phase("linear", True, 0.0), "length is True"),
        (lambda: Phase("linear", 100.5, 0.0), "length is 100.5; a float is a fraction"),
        (lambda: Phase("linear", math.nan, 0.0), "length is nan"),
        (lambda: Phase("jump", 1, 1.0), "length is 1; a jump has length 0"),
        (lambda: Phase("jump", None, 1.0), "length is None; a jump has length 0"),
        (lambda: Phase("jump", False, 1.0), "length is False; a jump has length 0"),
        (lambda: cosine(end=-0.1), "end is -0.1"),
        (lambda: cosine(end=math.nan), "end is nan"),
        (lambda: Phase("linear", 10), "end is None; a linear phase needs"),
        (lambda: Phase("constant", 10, 1.0), "end is 1.0; a constant phase keeps"),
        (lambda: Phase("half-life", 10, 1.0, knob=5), "end is 1.0; a half-life phase has no end to meet"),
        (lambda: Phase("power", 10, 1.0, turn=5), "end is 1.0; a power phase has no end to meet"),
        (lambda: wsd(end=0.0, shape="exponential"), "exponential goes from 1.0 to 0.0"),
        (lambda: Schedule([Phase("harmonic", None, 1.0)], start=0.0), "harmonic goes from 0.0 to 1.0"),
        (lambda: Phase("linear", 10, 0.0, knob=1.0), "knob is 1.0; linear has none"),
        (lambda: Phase("constant", 10, knob=1.0), "knob is 1.0; constant has none"),
        (lambda: Phase("rex", 10, 0.0, knob=0.0), "knob is 0.0; for rex it must be finite and > 0"),
        (lambda: Phase("uba", 10, 0.0, knob=math.inf), "knob is inf; for uba it must be finite and > 0"),
        (lambda: Phase("cospow", 10, 0.0, knob=0.5), "knob is 0.5; for cospow it must be finite and >= 1"),
        (lambda: Phase("power", 10, knob=0.0, turn=1), "knob is 0.0; for power it must be finite and < 0"),
        (lambda: Phase("power", 10, knob=-math.inf, turn=1), "knob is -inf; for power"),
        (lambda: Phase("half-life", 10), "knob is None; for half-life it must be finite and > 0"),
        (lambda: Phase("half-life", None, knob=5), "length is None; a half-life phase needs one"),
        (lambda: Phase("half-life", 0.5, knob=5000), "knob is 5000; the length 0.5 is a fraction"),
        (lambda: Phase("power", 10), "turn is None; power needs the finite position > 0"),
        (lambda: Phase("power", 10, turn=0), "turn is 0; power needs"),
        (lambda: Phase("linear", 10, 0.0, turn=5), "turn is 5; linear has none"),
        (lambda: Schedule([], start=1.0), "phases is empty"),
        (lambda: Schedule([Phase("constant")], start=-1.0), "start is -1.0"),
        (
            lambda: Schedule([Phase("constant"), Phase("linear", None, 0.0)], start=1.0),
            "only one can be None",
        ),
        (lambda: wsd(warmup=0.6, decay=0.6), "sum to 1.2 > 1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_when_it_is_made(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()


@pytest.mark.parametrize(
    ("schedule", "position", "total", "said"),
    [
        (wsd(60, 60), 1, 100, r"total is 100; .* need 120"),
        (cosine(100), 1, 100, r"total is 100; .* leave nothing for cosine"),
        (Schedule([Phase("linear", 50, 0.0)], start=1.0), 1, 100, r"total is 100; .* fill only 50"),
        (Schedule([Phase("linear", 0.5, 0.0)], start=1.0), 1, 100, r"total is 100; .* fill only 50"),
        (wsd(0.5, 60), 1, 100, r"total is 100; .* need 110"),
        (power(128, warmup=80), 1, 70, r"total is 70; .* need 87"),
        (constant(), -1, 100, "position is -1"),
        (constant(), math.nan, 100, "position is nan"),
        (constant(), 1, 0, "total is 0"),
        (constant(), 1, math.nan, "total is nan"),
        (cosine(10), 1, math.inf, "total is inf"),
        (constant(0.1), 1, math.inf, "total is inf"),
        (wsd(10, 10), 1, math.inf, "total is inf"),
        (infinite(10, 10, 10, 0.5, 0.1), 1, math.inf, "total is inf"),
    ],
)
def test_phases_that_do_not_fill_the_total_are_refused(schedule, position, total, said):
    with pytest.raises(ValueError, match=said):
        schedule(position, total)


def test_whole_lengths_may_come_as_floats():
    """A command line may make 100 a float, and YAML does so with 1.0e+9."""
    assert Phase("linear", 100.0, 0.0) == Phase("linear", 100, 0.0)
    assert isinstance(Phase("linear", 1e9, 0.0).length, int)
    assert Phase("linear", 1.0, 0.0).length == 1.0
    assert isinstance(Phase("linear", 1.0, 0.0).length, float)  # all of the total
    for ours, floats in ((wsds([100, 200], warmup=10), wsds([100.0, 200.0], warmup=10.0)),):
        assert repr(ours) == repr(floats)
    assert repr(rewarmed([100, 100], warmup=0.1)) == repr(rewarmed([100.0, 100.0], warmup=0.1))
    assert repr(cosine(warmup=20)) == repr(cosine(warmup=20.0))
