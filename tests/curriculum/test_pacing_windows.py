"""Moving windows against their formulas written out, and their draws against the probabilities."""

import json
import math
import pickle
from collections import Counter
from collections.abc import Callable

import jsonargparse
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.curriculum.pacing_windows import GaussianWindow, MovingCentre, SigmoidWindow

NAN, INF = math.nan, math.inf
DATA = {"num_examples": 5000}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# --- sigmoid window ------------------------------------------------------------


@given(st.integers(1, 1000), st.floats(0.01, 1.0), st.floats(0.1, 50.0))
@settings(deadline=None)
def test_the_sigmoid_window_keeps_its_width_moves_on_and_is_symmetric(total, width, steepness):
    window = SigmoidWindow(total, width, steepness)
    spans = [window(step) for step in range(0, total + 1, max(1, total // 20))]
    assert spans == sorted(spans)
    assert all(0.0 <= low < high <= 1.0 and high - low == pytest.approx(width) for low, high in spans)
    assert window(0)[0] == pytest.approx(1.0 - window(total)[1], abs=1e-12)
    assert window(10 * total) == window(total)


def test_the_sigmoid_window_has_the_written_out_values():
    window = SigmoidWindow(total_steps=100)
    for step, low in ((0, 0.8 * 0.0066928509), (30, 0.8 * 0.1192029220), (50, 0.4), (80, 0.8 * 0.9525741268)):
        assert window(step) == pytest.approx((low, low + 0.2), abs=1e-9)


def test_the_centre_moves_as_written_out():
    window = GaussianWindow()
    for rate, angle in ((0.0, 0.0), (0.25, 0.3), (0.5, 0.0), (0.9, 0.05), (1.0, 5.0)):
        expected = 500 * math.tanh(2 * (rate - 0.5)) + 500 * math.tanh(2 * angle)
        expected = 100.0 + min(max(expected, 0.0), 1000.0)
        moved = window.move(100.0, pass_rate=rate, angle=angle, num_examples=10**6)
        assert moved == pytest.approx(expected, rel=1e-12)
    assert window.move(100.0, pass_rate=0.1, angle=0.0, num_examples=10**6) == 100.0
    bounded = GaussianWindow(largest_move=30.0)
    assert bounded.move(100.0, pass_rate=1.0, angle=1.0, num_examples=10**6) == 130.0


def test_the_centre_stops_at_the_last_rank():
    assert GaussianWindow().move(4900.0, pass_rate=1.0, angle=1.0, **DATA) == 4999.0


def test_first_draws_have_the_probabilities_of_the_bell():
    window, trials, centre = GaussianWindow(sigma=1.5), 6000, 2.3
    weights = [math.exp(-0.5 * ((i - centre) / 1.5) ** 2) for i in range(8)]
    generator = rng(1)
    seen = Counter(window.draw(centre, num_examples=8, n=1, generator=generator)[0] for _ in range(trials))
    for rank, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(seen[rank] - trials * p) < 4 * math.sqrt(trials * p * (1 - p)) + 1


@given(st.integers(1, 300), st.data(), st.floats(0.01, 100.0))
@settings(deadline=None)
def test_a_round_has_its_size_without_repeats_even_far_beyond_the_bell(num_examples, data, sigma):
    n = data.draw(st.integers(0, num_examples))
    centre = data.draw(st.floats(0, num_examples - 1))
    drawn = GaussianWindow(sigma=sigma).draw(centre, num_examples=num_examples, n=n, generator=rng())
    assert drawn == sorted(set(drawn))
    assert len(drawn) == n
    assert all(0 <= rank < num_examples for rank in drawn)


def test_a_round_of_a_huge_data_set_is_around_its_centre():
    window = GaussianWindow()
    drawn = torch.tensor(window.draw(6e8, num_examples=10**9, n=4000, generator=rng()), dtype=torch.float64)
    # Drawing 4,000 of a bell 2,500 ranks wide without repeats widens it: to some 1,400 instead of 1,000.
    assert abs(drawn.mean() - 6e8) < 4 * 1500 / math.sqrt(4000)
    assert 1000 < drawn.std() < 2000
    assert window.draw(6e8, num_examples=10**9, n=4000, generator=rng()) == drawn.long().tolist()


# --- ability window -------------------------------------------------------------------------------


def test_windows_can_be_named_in_a_config_and_pickled():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--sigmoid", type=Callable[[int], tuple[float, float]])
    parser.add_argument("--gaussian", type=GaussianWindow)
    config = parser.parse_object(
        {
            "sigmoid": {
                "class_path": "rewarm.curriculum.pacing_windows.SigmoidWindow",
                "init_args": {"total_steps": 9},
            },
            "gaussian": {"sigma": 5.0},
        }
    )
    made = parser.instantiate_classes(config)
    assert made.sigmoid == pickle.loads(pickle.dumps(SigmoidWindow(9)))
    assert made.gaussian == pickle.loads(pickle.dumps(GaussianWindow(sigma=5.0)))


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: SigmoidWindow(0), "total_steps is 0"),
        (lambda: SigmoidWindow(5, width=0.0), "width is 0.0"),
        (lambda: SigmoidWindow(5, steepness=-1.0), "steepness is -1.0"),
        (lambda: GaussianWindow(sigma=0.0), "sigma is 0.0"),
        (lambda: GaussianWindow(steepness=INF), "steepness is inf"),
        (lambda: GaussianWindow(gain=-1.0), "gain is -1.0"),
        (lambda: GaussianWindow(target=1.5), "target is 1.5"),
        (lambda: GaussianWindow().move(0.0, pass_rate=1.5, angle=0.0, **DATA), "pass_rate is 1.5"),
        (lambda: GaussianWindow().move(0.0, pass_rate=0.5, angle=NAN, **DATA), "angle is nan"),
        (lambda: GaussianWindow().draw(5000.0, n=1, generator=rng(), **DATA), "centre is 5000.0"),
        (lambda: GaussianWindow().draw(0.0, n=5001, generator=rng(), **DATA), "n is 5001"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(act, named):
    with pytest.raises(ValueError, match=named):
        act()


# --- a centre that moves ----------------------------------------------------------------------------


def test_the_centre_moves_once_per_step_by_the_means_of_what_was_seen_before():
    centre = MovingCentre(GaussianWindow(sigma=2.0, gain=3.0, largest_move=5.0), num_examples=50)
    expected, seen = 0.0, []
    for step, round_of in enumerate([[(1.0, 0.2), (0.5, 0.4)], [], [(0.0, 0.1)], [(1.0, 2.0)] * 3]):
        for _ in range(2):  # a second call for the same step changes nothing
            centre.move(10 * step)
        if seen:
            rate, angle = (sum(values) / len(seen) for values in zip(*seen, strict=True))
            # mu <- mu + clamp(n tanh(a (acc - b)) + n tanh(a angle), 0, largest)
            drive = 3.0 * math.tanh(2.0 * (rate - 0.5)) + 3.0 * math.tanh(2.0 * angle)
            expected += min(max(drive, 0.0), 5.0)
        assert centre.rank == pytest.approx(expected, rel=1e-12)
        for rate, angle in round_of:
            centre.see(pass_rate=rate, angle=angle)
        seen = round_of
    centre.move(99)
    assert centre.rank == pytest.approx(expected + 5.0, rel=1e-12)


@pytest.mark.parametrize("cut", range(6))
def test_a_centre_saved_anywhere_goes_on_as_if_it_had_not_been(cut):
    acts = [("move", 0), ("see", 0.5), ("see", 1.0), ("move", 1), ("see", 0.75), ("move", 2)]

    def do(centre, some):
        for name, value in some:
            centre.move(value) if name == "move" else centre.see(pass_rate=value, angle=value / 10)

    def make():
        return MovingCentre(GaussianWindow(sigma=2.0, gain=3.0), num_examples=50)

    whole, before, after = make(), make(), make()
    do(whole, acts)
    do(before, acts[:cut])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    do(after, acts[cut:])
    assert after.state_dict() == whole.state_dict()
    assert after.draw(7, seed=3) == whole.draw(7, seed=3)


def test_with_the_papers_constants_the_centre_has_the_values_of_its_repository():
    """mu += clip(500 tanh(2 (acc / 2 - 0.5)) + 500 tanh(2 angle), 0, 1000), where acc goes up to 2."""
    centre = MovingCentre(GaussianWindow(), num_examples=10_000)
    # 500 tanh(0.5) + 500 tanh(0.2); then 500 tanh(0) + 500 tanh(0.5); then 500 tanh(-1), which holds it.
    rounds = [(1.5, 0.1, 329.746239), (1.0, 0.25, 560.804817), (0.0, 0.0, 560.804817)]
    centre.move(0)
    for step, (acc, angle, moved) in enumerate(rounds, 1):
        centre.see(pass_rate=acc / 2, angle=angle)
        centre.move(step)
        assert centre.rank == pytest.approx(moved, abs=1e-6)
