"""Live scores against their definitions, and through JSON and back."""

import json
import math

import pytest
import torch

from rewarm.curriculum.gates import AtLeast, Band
from rewarm.curriculum.item_response import estimate_ability
from rewarm.curriculum.live_scores import Ability, RunningScore, ScoreChange

DIFFICULTIES = [-1.5, -0.5, 0.0, 0.7, 2.0]


def test_a_running_score_is_smoothed_and_forgotten():
    live = RunningScore(smoothing=0.75)
    assert math.isnan(live.score(1))
    live.observe(1, 1.0)
    live.observe(1, 0.0)
    assert live.score(1) == 0.75
    live.forget(1)
    live.forget(2)
    assert math.isnan(live.score(1))


def test_a_change_is_measured_from_the_first_look_also_after_being_forgotten():
    live = ScoreChange(smoothing=0.5)
    live.observe(3, 4.0)
    assert live.score(3) == 0.0
    live.observe(3, 2.0)  # mean 3
    assert live.score(3) == 1.0
    live.forget(3)
    assert math.isnan(live.score(3))
    live.observe(3, 1.5)
    assert live.score(3) == 2.5


def test_ability_is_that_of_the_answers_since_the_last_pass_and_rises_when_it_is_not_the_best():
    live = Ability(correct=Band(high=0.5), rise=0.25)
    live.begin_pass(DIFFICULTIES)
    assert (live.ability, live.score(0, difficulty=0.7)) == (0.0, 0.7)
    for example, loss in enumerate([0.1, 0.2, 0.5, 0.9, 0.6]):
        live.observe(example, loss)
    live.observe(4, 0.4)  # the last answer counts
    live.begin_pass(DIFFICULTIES)
    first = estimate_ability(torch.tensor([1, 1, 1, 0, 1]), torch.tensor(DIFFICULTIES).double())
    assert live.ability == pytest.approx(first, abs=1e-6)
    live.observe(0, 3.0)  # one wrong answer to the easiest: worse than before
    live.begin_pass(DIFFICULTIES)
    assert live.ability == pytest.approx(first + 0.25, abs=1e-6)
    live.begin_pass(DIFFICULTIES)  # nothing was seen
    assert live.ability == pytest.approx(first + 0.5, abs=1e-6)


def test_an_unknown_difficulty_stays_unknown_and_tells_nothing():
    live = Ability(correct=Band(high=0.5))
    live.begin_pass([math.nan, 0.0])
    assert math.isnan(live.score(0, difficulty=math.nan))
    live.observe(0, 0.1)
    live.observe(1, 9.0)
    live.begin_pass([math.nan, 0.0])
    assert live.ability == pytest.approx(estimate_ability(torch.tensor([0]), torch.tensor([0.0])))


@pytest.mark.parametrize(
    "make", [lambda: RunningScore(0.3), lambda: ScoreChange(0.3), lambda: Ability(Band(high=0.5))]
)
def test_a_state_goes_through_json(make):
    def go_on(live, start):
        for number in range(start, start + 40):
            live.observe(number * 7 % 5, number * 13 % 10 / 10)
            if number % 9 == 0:
                live.begin_pass(DIFFICULTIES)
        return [live.score(example, DIFFICULTIES[example]) for example in range(5)]

    before, after = make(), make()
    go_on(before, 0)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert go_on(after, 40) == go_on(before, 40)


def test_the_ability_gate_is_the_published_window():
    # b <= theta + upper, and the easiest n where these are fewer.
    live = Ability(Band(high=0.5), start=0.1)
    live.begin_pass(DIFFICULTIES)
    margins = [live.score(example, b) for example, b in enumerate(DIFFICULTIES)]
    assert AtLeast(Band(high=0.0), 2).select(margins) == [True, True, True, False, False]
    assert AtLeast(Band(high=0.0), 4).select(margins) == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: RunningScore(1.0), "smoothing is 1.0"),
        (lambda: ScoreChange(-0.1), "smoothing is -0.1"),
        (lambda: Ability(Band(), rise=0.0), "rise is 0.0"),
        (lambda: Ability(Band()).begin_pass(None), "needs the difficulties of the examples"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(act, named):
    with pytest.raises(ValueError, match=named):
        act()
