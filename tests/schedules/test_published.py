"""Named schedules against golden values, loops written out, and the schedules of transformers and torch."""

import math
import re

import jsonargparse
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.schedules.phases import Phase, Schedule
from rewarm.schedules.published import (
    branch,
    constant,
    cosine,
    cosine_power,
    infinite,
    linear,
    power,
    rewarmed,
    rex,
    uba,
    wsd,
    wsdc,
    wsds,
)

# --- golden values --------------------------------------------------------------------------------------


def test_infinite_has_the_published_learning_rates():
    schedule = infinite(0.01, 0.6, 0.1, 1.65e-4 / 3e-4, 3e-5 / 3e-4)
    expected = {5: 1.5e-4, 10: 3e-4, 310: 2.325e-4, 610: 1.65e-4, 660: 1.65e-4, 710: 1.65e-4, 1000: 3e-5}
    for n, lr in expected.items():
        assert 3e-4 * schedule(n, 1000) == pytest.approx(lr, rel=1e-12)
    assert 3e-4 * schedule(855, 1000) == pytest.approx(7.036e-5, abs=5e-9)


def test_infinite_with_an_inverse_sqrt_cool_down_follows_the_published_formula():
    schedule = infinite(0.01, 0.6, 0.1, 0.55, 0.1, shape="inv-sqrt", timescale=10.0)

    def g(u):
        return 1 / math.sqrt(1 + 10 * u) - 1

    for n in range(10, 611):
        assert schedule(n, 1000) == pytest.approx(1 + (0.55 - 1) * g((n - 10) / 600) / g(1), abs=1e-12)
    assert schedule(855, 1000) == infinite(constant=0.1, end=0.1)(855, 1000)


def test_infinite_without_an_anneal_stays_at_its_constant_for_ever():
    schedule = infinite(warmup=10, cooldown=600, constant_factor=0.55)
    assert schedule(610, math.inf) == schedule(10**9, math.inf) == pytest.approx(0.55)
    assert [schedule(n, math.inf) for n in range(700)] == [schedule(n, 10_000) for n in range(700)]


@pytest.mark.parametrize(
    ("batch_size", "tokens", "lr"),
    [(128, 1e9, 1.316e-2), (32, 1e9, 3.29e-3), (1024, 1e12, 3.107e-3), (1024, 2.5e10, 0.02)],
)
def test_power_has_the_published_learning_rates(batch_size, tokens, lr):
    got = 0.02 * power(batch_size)(tokens, 2e12)
    assert float(f"{got:.3e}") == lr


def test_the_cap_of_power_ends_where_published():
    for batch_size, end in ((1024, 2.60e10), (128, 4.40e8)):
        assert float(f"{power(batch_size).phases[1].turn:.2e}") == end


def test_power_is_its_formula_written_out():
    total, warm, down, peak = 10**12, 10**9, 10**11, 0.02

    def law(n):
        return min(peak, 256 * 4 * n**-0.51)

    def expected(n):
        if n < warm:
            return n / warm * law(warm)
        if n <= total - down:
            return law(n)
        at = law(total - down)
        return at * (0.001 * peak / at) ** ((n - (total - down)) / down)

    schedule = power(256)
    for n in torch.logspace(6, 12, 200, dtype=torch.float64).tolist():
        assert peak * schedule(n, total) == pytest.approx(expected(n), rel=1e-9)


def test_the_budget_of_power_moves_its_decay_and_nothing_else():
    schedule = power(64, decay=0.1)
    for n in (1e8, 1e9, 1e10, 8e10):
        assert schedule(n, 1e11) == pytest.approx(schedule(n, 1e12), rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (rex(0), [0.857, 0.667, 0.400]),
        (uba(0), [0.959, 0.800, 0.407]),
        (uba(0, phi=5.0), [0.700, 0.286, 0.064]),
        (cosine_power(0), [0.682, 0.240, 0.045]),
        (cosine_power(0, k=2.0), [0.807, 0.414, 0.107]),
        (branch(), [0.5, 0.293, 0.134]),
        (branch(0.1, "harmonic"), [0.308, 0.182, 0.129]),
    ],
)
def test_single_decays_have_the_published_values(schedule, expected):
    assert [round(schedule(n, 100), 3) for n in (25, 50, 75)] == expected
    assert schedule(0, 100) == 1.0


# --- corners --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        constant(10),
        linear(10, 0.2),
        cosine(10, 0.2),
        rex(10, 0.2),
        uba(10, 0.2),
        cosine_power(10, 0.2),
        wsd(10, 20, 0.2),
        wsds([60, 40], 10, 0.1, 0.2),
        wsdc(10, 20, 20, 0.2),
        infinite(10, 20, 20, 0.5, 0.2),
        rewarmed(warmup=0.1, end=0.2),
        rewarmed([100], warmup=0.1, end=0.2),
    ],
)
def test_the_first_step_learns_the_warm_up_ends_at_the_peak_and_the_last_step_at_the_end(schedule):
    assert [schedule(n, 100) for n in range(11)] == pytest.approx([n / 10 for n in range(11)])
    assert schedule(10, 100) == 1.0
    last = 1.0 if len(schedule.phases) == 2 and schedule.phases[-1].shape == "constant" else 0.2
    assert schedule(100, 100) == schedule(101, 100) == schedule(1e9, 100) == last


@pytest.mark.parametrize(
    "schedule", [constant(), linear(0), cosine(0.0), wsd(0), infinite(0), rex(0), wsdc(0), wsds([0.5, 0.5])]
)
def test_without_warm_up_it_starts_at_the_peak(schedule):
    assert schedule(0, 100) == 1.0
    assert schedule(1, 100) >= 0.98


@st.composite
def named(draw):
    """A published schedule with arguments of its range, and where it is declared to jump, of 600 steps."""
    warmup, length = draw(st.sampled_from([0, 1, 30, 0.05])), draw(st.sampled_from([1, 60, 150, 0.2]))
    end, knob = draw(st.floats(0.01, 0.9)), draw(st.floats(0.1, 10.0))
    shape = draw(
        st.sampled_from(["linear", "cosine", "mirror-cosine", "sqrt", "square", "exponential", "harmonic"])
    )
    return draw(
        st.sampled_from(
            [
                (constant(warmup), []),
                (linear(warmup, end), []),
                (cosine(warmup, end), []),
                (rex(warmup, end, knob), []),
                (uba(warmup, end, knob), []),
                (cosine_power(warmup, end, 1 + knob), []),
                (wsd(warmup, length, end, shape), []),
                (wsds([200, 100, 300], draw(st.sampled_from([0, 40])), 0.2, end, shape), [200, 300]),
                (wsdc(warmup, length, length, end, shape), []),
                (infinite(warmup, length, length, end, end * draw(st.floats(0.01, 1.0)), shape), []),
                (rewarmed([200, 100, 300], 0.1, end), []),
                (branch(end, shape), []),
            ]
        )
    )


@settings(max_examples=60, deadline=None)
@given(made=named(), order=st.permutations(range(601)))
def test_every_schedule_is_a_bounded_function_of_position_and_jumps_only_where_declared(made, order):
    schedule, jumps = made
    asked = {n: schedule(n, 600) for n in order}
    assert [asked[n] for n in range(601)] == [schedule(n, 600) for n in range(601)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in asked.values())
    for n in range(600):
        change = abs(schedule(n + 1e-5, 600) - asked[n])
        assert (change > 1e-2) == (n in jumps and asked[n] < 0.99), n


def test_a_linear_run_to_zero_without_warm_up_is_one_minus_the_share_done():
    assert [linear(0)(n, 8) for n in range(9)] == [1 - n / 8 for n in range(9)]


def test_wsd_with_a_half_life_is_that_of_minicpm():
    schedule = wsd(10, 100, end=None, shape="half-life", knob=50)
    for n in range(10, 301):
        assert schedule(n, 300) == pytest.approx(0.5 ** (max(0, n - 200) / 50), rel=1e-12)


def river(n, lengths, warmup, decay, end):
    """WSD-S written out: which period, how far into it, and the harmonic mean of the ends."""
    begin = 0
    for number, length in enumerate(lengths):
        if n <= begin + length:
            inside, down = n - begin, decay * length
            if number == 0 and inside <= warmup:
                return inside / warmup
            if inside <= length - down:
                return 1.0
            p = (inside - (length - down)) / down
            return 1 / (p / end + (1 - p) / 1.0)
        begin += length
    raise AssertionError


@pytest.mark.parametrize("lengths", [[100, 100, 200], [100, 50], [400]])
def test_wsds_is_its_formula_written_out(lengths):
    total = sum(lengths)
    whole = wsds(lengths, warmup=20, decay=0.1, end=0.1)
    shares = wsds([x / total for x in lengths], warmup=20 / total, decay=0.1, end=0.1)
    for n in range(1, total + 1):
        expected = river(n, lengths, 20, 0.1, 0.1)
        assert whole(n, total) == pytest.approx(expected, rel=1e-9)
        assert shares(n, total) == pytest.approx(expected, rel=1e-6)


def test_a_wsds_run_made_longer_has_the_same_past():
    short, long = wsds([100, 100], 10), wsds([100, 100, 300], 10)
    assert [short(n, 200) for n in range(201)] == [long(n, 500) for n in range(201)]
    assert long(201, 500) == 1.0


def test_rewarmed_repeats_warm_up_and_cosine_for_every_period():
    schedule, again = rewarmed([100, 300], warmup=0.1, end=0.1), cosine(30, 0.1)
    assert [schedule(n, 400) for n in range(101)] == pytest.approx(
        [cosine(10, 0.1)(n, 100) for n in range(101)], abs=1e-12
    )
    assert [schedule(100 + n, 400) for n in range(31)] == pytest.approx(
        [0.1 + 0.9 * n / 30 for n in range(31)], abs=1e-12
    )
    assert [schedule(100 + n, 400) for n in range(30, 301)] == pytest.approx(
        [again(n, 300) for n in range(30, 301)], abs=1e-12
    )


def test_rewarmed_can_start_where_the_checkpoint_ended():
    schedule = rewarmed(warmup=0.1, start=0.1)
    assert [schedule(n, 100) for n in (0, 5, 10, 100)] == pytest.approx([0.1, 0.55, 1.0, 0.1])


def test_wsdc_holds_its_floor():
    schedule = wsdc(0.1, 0.2, 0.3, 0.25, "cosine")
    assert {schedule(n, 100) for n in range(10, 51)} == {1.0}
    assert {schedule(n, 100) for n in range(70, 101)} == {0.25}
    assert schedule(60, 100) == pytest.approx(0.625)


# --- parity ---------------------------------------------------------------------------------------------


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
    ("make", "ours"),
    [
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50, eta_min=0.1), branch(0.1, "cosine")),
        (lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 50), branch(0.1, "linear")),
        (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.1 ** (1 / 50)), branch(0.1, "exponential")),
    ],
    ids=["cosine", "linear", "exponential"],
)
def test_branches_are_the_schedulers_of_torch(make, ours):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, theirs = make(optimizer), []
    for _ in range(51):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [ours(n, 50) for n in range(51)] == pytest.approx(theirs, abs=1e-12)


# --- what cannot be, and configs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: cosine(warmup=-0.1), "length is -0.1"),
        (lambda: constant(warmup=False), "length is False"),
        (lambda: wsd(decay=0), "length is 0"),
        (lambda: rex(beta=0.0), "knob is 0.0; for rex"),
        (lambda: uba(phi=-1.0), "knob is -1.0; for uba"),
        (lambda: cosine_power(k=0.5), "knob is 0.5; for cospow"),
        (lambda: infinite(constant=0.1), "constant is 0.1 and end is None"),
        (lambda: infinite(end=0.1), "constant is None and end is 0.1"),
        (lambda: infinite(timescale=2.0), "knob is 2.0; cosine has none"),
        (lambda: wsds([]), "periods is []; there must be at least one"),
        (lambda: wsds([100, 0.5]), "periods is [100, 0.5]; there must be"),
        (lambda: wsds([100], decay=1.0), "decay is 1.0; it is a share of each period, in (0, 1)"),
        (lambda: wsds([100], warmup=95), "periods begins with 100; warmup 95 and decay 10 are more"),
        (lambda: wsds([100], warmup=0.1), "warmup is 0.1; it must be in the unit of the periods, [100]"),
        (lambda: wsds([0.5, 0.6]), "sum to 1.1 > 1"),
        (lambda: rewarmed(warmup=0.0), "warmup is 0.0; it is a share of each period, in (0, 1)"),
        (lambda: rewarmed([1]), "length is 0"),
        (lambda: rewarmed(start=-0.1), "start is -0.1"),
        (lambda: branch(shape="half-life", knob=5), "end is 0.0; a half-life phase has no end"),
        (lambda: power(0), "batch_size is 0; it must be finite and > 0"),
        (lambda: power(8, b=0.5), "-b is -0.5; it must be finite and > 0"),
        (lambda: power(8, a=-4.0), "a is -4.0; it must be finite and > 0"),
        (lambda: power(8, peak=0.0), "peak is 0.0; it must be finite and > 0"),
        (lambda: power(8, warmup=0.01), "warmup is 0.01; it must be a whole number of tokens >= 1"),
        (lambda: power(8, end=0.0), "exponential goes from"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_when_it_is_made(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()


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
        ("rex", {"beta": 0.3}, rex(beta=0.3)),
        ("uba", {"phi": 2}, uba(phi=2.0)),
        ("cosine_power", {"k": 2}, cosine_power(k=2.0)),
        (
            "wsd",
            {"warmup": 100, "decay": 0.2, "end": 0.1, "shape": "harmonic"},
            wsd(100, 0.2, 0.1, "harmonic"),
        ),
        (
            "wsd",
            {"decay": 100, "end": None, "shape": "half-life", "knob": 20},
            wsd(0.01, 100, None, "half-life", 20),
        ),
        ("wsds", {"periods": [100, 300], "warmup": 10}, wsds([100, 300], 10)),
        ("wsds", {"periods": [0.25, 0.75]}, wsds([0.25, 0.75])),
        ("wsdc", {"constant": 0.3}, wsdc(constant=0.3)),
        ("infinite", {"constant": 0.1, "end": 0.1}, infinite(constant=0.1, end=0.1)),
        ("infinite", {"shape": "inv-sqrt", "timescale": 10}, infinite(shape="inv-sqrt", timescale=10.0)),
        ("rewarmed", {}, rewarmed()),
        ("rewarmed", {"periods": [100, 200]}, rewarmed([100, 200])),
        ("branch", {"end": 0.1, "shape": "cosine"}, branch(0.1, "cosine")),
        ("power", {"batch_size": 128}, power(128)),
    ],
)
def test_a_config_can_name_the_functions_as_class_path(name, arguments, same):
    schedule = parsed({"class_path": f"rewarm.schedules.published.{name}", "init_args": arguments})
    assert (schedule.phases, schedule.start) == (same.phases, same.start)
    # An int is steps and a float a fraction, so the parser must not turn one into the other.
    assert [type(p.length) for p in schedule.phases] == [type(p.length) for p in same.phases]


def test_a_config_can_write_out_the_phases():
    phases = [{"shape": "linear", "length": 10, "end": 1}, {"shape": "rex", "end": 0, "knob": 0.3}]
    schedule = parsed(
        {"class_path": "rewarm.schedules.phases.Schedule", "init_args": {"start": 0, "phases": phases}}
    )
    assert schedule.phases == (Phase("linear", 10, 1.0), Phase("rex", None, 0.0, 0.3))
