"""Schedules against published formulas written out, golden values, and the schedules of transformers."""

import math
import pickle
import re

import jsonargparse
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.functional.schedule import SHAPES, Phase, Schedule, constant, cosine, infinite, linear, wsd

UNIT_SHAPES = [shape for shape in SHAPES if shape not in ("constant", "jump")]
POSITIVE_SHAPES = ("exponential", "harmonic")


def falls(shape, end=0.0, knob=None):
    """The shape from 1 to `end` over a quarter, a half and three quarters of its length."""
    phase = Phase(shape, 100, end, knob)
    return [phase.factor(p, start=1.0) for p in (0.25, 0.5, 0.75)]


@pytest.mark.parametrize(
    ("shape", "end", "knob", "expected"),
    [
        ("uba", 0.0, 0.5, [0.959, 0.800, 0.407]),
        ("uba", 0.0, 1.0, [0.921, 0.667, 0.255]),
        ("uba", 0.0, 2.0, [0.854, 0.500, 0.146]),
        ("uba", 0.0, 5.0, [0.700, 0.286, 0.064]),
        ("rex", 0.0, 0.5, [0.857, 0.667, 0.400]),
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


def cosine_power(p, k):
    c = (1 + math.cos(math.pi * p)) / 2
    return (k ** (c + 1) - k) / (k**2 - k)


@pytest.mark.parametrize(
    ("shape", "end", "knob", "formula"),
    [
        ("linear", 0.1, None, lambda p: 0.1 + 0.9 * (1 - p)),
        ("cosine", 0.1, None, lambda p: 0.1 + 0.9 / 2 * (1 + math.cos(math.pi * p))),
        ("sqrt", 0.1, None, lambda p: 1 * (1 - math.sqrt(p)) + 0.1 * math.sqrt(p)),
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


def test_inverse_sqrt_covers_the_published_share_of_its_way():
    for timescale, expected in ((1.0, [0.360, 0.627, 0.833]), (10.0, [0.666, 0.847, 0.941])):
        assert [round(1 - value, 3) for value in falls("inv-sqrt", knob=timescale)] == expected


def test_rex_near_its_end():
    assert round(Phase("rex", 1.0, 0.0, 0.5).factor(0.9, 1.0), 3) == 0.182
    assert round(Phase("rex", 1.0, 0.0, 0.1).factor(0.9, 1.0), 3) == 0.526


def test_exponential_with_a_half_life_halves_every_half_life():
    steps, half_life = 500, 125
    decay = Phase("exponential", steps, end=0.5 ** (steps / half_life))
    assert [decay.factor(n / steps, 1.0) for n in (125, 250, 375, 500)] == pytest.approx(
        [0.5, 0.25, 0.125, 0.0625]
    )


def test_infinite_has_the_published_learning_rates():
    schedule = infinite(0.01, 0.6, 0.1, 1.65e-4 / 3e-4, 3e-5 / 3e-4)
    expected = {5: 1.5e-4, 10: 3e-4, 310: 2.325e-4, 610: 1.65e-4, 660: 1.65e-4, 710: 1.65e-4, 1000: 3e-5}
    for n, lr in expected.items():
        assert 3e-4 * schedule(n, 1000) == pytest.approx(lr, rel=1e-12)
    assert 3e-4 * schedule(855, 1000) == pytest.approx(7.036e-5, abs=5e-9)


def test_infinite_without_an_anneal_stays_at_its_constant_for_ever():
    schedule = infinite(warmup=10, cooldown=600, constant_factor=0.55)
    assert schedule(610, math.inf) == schedule(10**9, math.inf) == pytest.approx(0.55)
    assert [schedule(n, math.inf) for n in range(700)] == [schedule(n, 10_000) for n in range(700)]


@pytest.mark.parametrize(
    "schedule",
    [constant(10), linear(10, 0.2), cosine(10, 0.2), wsd(10, 20, 0.2), infinite(10, 20, 20, 0.5, 0.2)],
)
def test_the_first_step_learns_the_warm_up_ends_at_the_peak_and_the_last_step_at_the_end(schedule):
    assert [schedule(n, 100) for n in range(11)] == pytest.approx([n / 10 for n in range(11)])
    assert schedule(10, 100) == 1.0
    last = 1.0 if schedule.phases[-1].shape == "constant" else 0.2
    assert schedule(100, 100) == schedule(101, 100) == schedule(1e9, 100) == last


@pytest.mark.parametrize("schedule", [constant(), linear(0), cosine(0.0), wsd(0), infinite(0)])
def test_without_warm_up_it_starts_at_the_peak(schedule):
    assert schedule(0, 100) == 1.0
    assert schedule(1, 100) >= 0.99


def test_a_linear_run_to_zero_without_warm_up_is_one_minus_the_share_done():
    assert [linear(0)(n, 8) for n in range(9)] == [1 - n / 8 for n in range(9)]


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


def test_lengths_that_sum_to_the_total_need_no_open_phase():
    thirds = Schedule(
        [Phase("linear", 0.1, 1.0), Phase("constant", 0.6), Phase("cosine", 0.3, 0.1)], start=0.0
    )
    for total in (7, 10, 33, 1001):
        assert thirds(total, total) == 0.1


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
        shape = draw(st.sampled_from([*UNIT_SHAPES, "constant"]))
        share = weight / (sum(weights) * 1.01)
        length = None if i == opened else draw(st.sampled_from([share, max(1, int(share * 900))]))
        phases.append(Phase(shape, length, None if shape == "constant" else draw(levels)))
    return Schedule(phases, start=draw(levels))


@settings(max_examples=60, deadline=None)
@given(schedule=schedules(), total=st.integers(1000, 3000))
def test_without_a_jump_it_is_continuous_everywhere(schedule, total):
    joins, begin = [], 0.0
    for length in schedule._lengths(total):
        begin += length
        joins.append(begin)
    # A sqrt over two steps, the steepest here, moves by 0.005 in this time.
    for join in joins:
        assert schedule(max(0.0, join - 1e-8), total) == pytest.approx(schedule(join + 1e-5, total), abs=1e-2)
    assert schedule(0, total) == schedule.start


@settings(max_examples=60, deadline=None)
@given(
    schedule=schedules(),
    total=st.integers(1000, 3000),
    where=st.lists(st.floats(0, 4000), min_size=1, max_size=20),
)
def test_it_stays_between_the_factors_of_its_phases(schedule, total, where):
    corners = [schedule.start, *(phase.end for phase in schedule.phases if phase.end is not None)]
    for position in where:
        assert min(corners) - 1e-9 <= schedule(position, total) <= max(corners) + 1e-9


@settings(max_examples=30, deadline=None)
@given(schedule=schedules(), order=st.permutations(range(40)))
def test_its_value_depends_on_the_position_alone(schedule, order):
    straight = [schedule(25.0 * n, 1000) for n in range(40)]
    asked = {n: schedule(25.0 * n, 1000) for n in order}
    restored = pickle.loads(pickle.dumps(schedule))
    assert straight == [asked[n] for n in range(40)] == [restored(25.0 * n, 1000) for n in range(40)]


@pytest.mark.parametrize("shape", UNIT_SHAPES)
def test_every_shape_goes_one_way_and_meets_its_ends_exactly(shape):
    for start, end in ((1.0, 0.1), (0.1, 1.0)):
        phase = Phase(shape, 50, end)
        values = [phase.factor(n / 50, start) for n in range(51)]
        assert (values[0], values[-1]) == (start, end)
        assert values == sorted(values, reverse=start > end)
        assert len(set(values)) == 51


def transformers_factors(make, steps, **settings_):
    parameter = torch.nn.Parameter(torch.zeros(1))
    scheduler = make(torch.optim.SGD([parameter], lr=1.0), **settings_)
    return [scheduler.lr_lambdas[0](n) for n in range(steps + 1)]


# The functions agree at every n. What differs is which n a step gets: torch's schedulers give the n-th step
# lambda(n - 1), so that their first step has LR 0 and the end value is never used; ours gives it schedule(n).
@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
def test_wsd_is_that_of_transformers_one_step_later(shape):
    transformers = pytest.importorskip("transformers")
    theirs = transformers_factors(
        transformers.get_wsd_schedule,
        100,
        num_warmup_steps=10,
        num_decay_steps=20,
        num_training_steps=100,
        decay_type={"sqrt": "1-sqrt"}.get(shape, shape),
    )
    ours = [wsd(10, 20, 0.0, shape)(n, 100) for n in range(101)]
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_cosine_and_linear_are_those_of_transformers_one_step_later():
    transformers = pytest.importorskip("transformers")
    span = {"num_warmup_steps": 10, "num_training_steps": 100}
    for make, ours in (
        (transformers.get_cosine_schedule_with_warmup, cosine(10, 0.0)),
        (transformers.get_linear_schedule_with_warmup, linear(10, 0.0)),
    ):
        assert [ours(n, 100) for n in range(101)] == pytest.approx(
            transformers_factors(make, 100, **span), abs=1e-12
        )
    theirs = transformers_factors(
        transformers.get_cosine_with_min_lr_schedule_with_warmup, 100, **span, min_lr_rate=0.1
    )
    assert [cosine(10, 0.1)(n, 100) for n in range(101)] == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Phase("cubic", 10, 0.0), "shape is 'cubic'; known shapes: constant, jump, linear, cosine"),
        (lambda: wsd(shape="1-sqrt"), "shape is '1-sqrt'; known shapes"),
        (lambda: Phase("linear", 0, 0.0), "length is 0; a number of steps"),
        (lambda: Phase("linear", -3, 0.0), "length is -3"),
        (lambda: Phase("linear", True, 0.0), "length is True"),
        (lambda: Phase("linear", 100.0, 0.0), "length is 100.0; a float is a fraction"),
        (lambda: cosine(warmup=-0.1), "length is -0.1"),
        (lambda: constant(warmup=False), "length is False"),
        (lambda: wsd(decay=0), "length is 0"),
        (lambda: Phase("jump", 1, 1.0), "length is 1; a jump has length 0"),
        (lambda: Phase("jump", None, 1.0), "length is None; a jump has length 0"),
        (lambda: cosine(end=-0.1), "end is -0.1"),
        (lambda: cosine(end=math.nan), "end is nan"),
        (lambda: Phase("linear", 10), "end is None; a linear phase needs"),
        (lambda: Phase("constant", 10, 1.0), "end is 1.0; a constant phase keeps"),
        (lambda: wsd(end=0.0, shape="exponential"), "exponential goes from 1.0 to 0.0"),
        (lambda: Schedule([Phase("harmonic", None, 1.0)], start=0.0), "harmonic goes from 0.0 to 1.0"),
        (lambda: Phase("linear", 10, 0.0, knob=1.0), "knob is 1.0; linear has none"),
        (lambda: Phase("rex", 10, 0.0, knob=0.0), "knob is 0.0; for rex it must be finite and > 0"),
        (lambda: Phase("cospow", 10, 0.0, knob=0.5), "knob is 0.5; for cospow it must be finite and >= 1"),
        (lambda: Schedule([], start=1.0), "phases is empty"),
        (lambda: Schedule([Phase("constant")], start=-1.0), "start is -1.0"),
        (
            lambda: Schedule([Phase("constant"), Phase("linear", None, 0.0)], start=1.0),
            "only one can be None",
        ),
        (lambda: wsd(warmup=0.6, decay=0.6), "sum to 1.2 > 1"),
        (lambda: infinite(constant=0.1), "constant is 0.1 and end is None"),
        (lambda: infinite(end=0.1), "constant is None and end is 0.1"),
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
        (constant(), -1, 100, "position is -1"),
        (constant(), math.nan, 100, "position is nan"),
        (constant(), 1, 0, "total is 0"),
        (cosine(10), 1, math.inf, "total is inf"),
        (constant(0.1), 1, math.inf, "total is inf"),
        (wsd(10, 10), 1, math.inf, "total is inf"),
    ],
)
def test_phases_that_do_not_fill_the_total_are_refused(schedule, position, total, said):
    with pytest.raises(ValueError, match=said):
        schedule(position, total)


class Holder:
    """Takes a schedule, as the callback does."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule


def parsed(schedule):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "holder")
    config = parser.parse_object({"holder": {"schedule": schedule}})
    return getattr(parser, "instantiate", parser.instantiate_classes)(config).holder.schedule


@pytest.mark.parametrize(
    ("name", "arguments", "same"),
    [
        ("constant", {"warmup": 100}, constant(100)),
        ("linear", {"warmup": 0.1, "end": 0}, linear(0.1, 0.0)),
        ("cosine", {}, cosine()),
        (
            "wsd",
            {"warmup": 100, "decay": 0.2, "end": 0.1, "shape": "harmonic"},
            wsd(100, 0.2, 0.1, "harmonic"),
        ),
        ("infinite", {"constant": 0.1, "end": 0.1}, infinite(constant=0.1, end=0.1)),
    ],
)
def test_a_config_can_name_the_functions_as_class_path(name, arguments, same):
    schedule = parsed({"class_path": f"rewarm.functional.schedule.{name}", "init_args": arguments})
    assert (schedule.phases, schedule.start) == (same.phases, same.start)
    # An int is steps and a float a fraction, so the parser must not turn one into the other.
    assert [type(p.length) for p in schedule.phases] == [type(p.length) for p in same.phases]


def test_a_config_can_write_out_the_phases():
    phases = [{"shape": "linear", "length": 10, "end": 1}, {"shape": "rex", "end": 0, "knob": 0.3}]
    schedule = parsed(
        {"class_path": "rewarm.functional.schedule.Schedule", "init_args": {"start": 0, "phases": phases}}
    )
    assert schedule.phases == (Phase("linear", 10, 1.0), Phase("rex", None, 0.0, 0.3))
