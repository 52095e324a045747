"""Pacing against written-out values; the deck against a plain list; resuming against not stopping."""

import copy
import json
import math
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.gates import AtLeast, Band, TopShare
from rewarm.curriculum.live_scores import Ability, RunningScore, ScoreChange
from rewarm.curriculum.pacing import CyclicalPacing, LinearPacing, OnePassPacing, RootPacing, StagedPacing
from rewarm.curriculum.pacing_windows import GaussianWindow, SigmoidWindow

SCORES = [5.0, 1.0, 4.0, 0.0, 3.0, 2.0, 7.0, 6.0]
BY_SCORE = [3, 1, 5, 4, 2, 0, 7, 6]


def rounds(curriculum, sizes, step=0):
    """What several calls give, one after the other."""
    return [example for size in sizes for example in curriculum.propose(size, step)]


# --- pacing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.01, 0.25, 1.0])
@pytest.mark.parametrize("total_steps", [1, 7, 1000])
def test_pacing_begins_at_the_start_share_and_ends_at_everything(start, total_steps):
    pacings = [RootPacing(total_steps, start, power) for power in (1.0, 2.0, 5.0)] + [
        LinearPacing(total_steps, start)
    ]
    for pacing in pacings:
        assert pacing(0) == pytest.approx(start, rel=1e-12)
        assert pacing(total_steps) == pacing(10 * total_steps) == 1.0
        shares = [pacing(step) for step in range(total_steps + 1)]
        assert shares == sorted(shares)


def test_root_pacing_has_the_written_out_values():
    pacing = RootPacing(total_steps=100, start=0.01)
    # sqrt(t (1 - 0.0001) / 100 + 0.0001)
    assert pacing(1) == pytest.approx(0.10049378, abs=1e-8)
    assert pacing(25) == pytest.approx(0.50007499, abs=1e-8)
    assert pacing(64) == pytest.approx(0.80002250, abs=1e-8)
    # (0.5 (1 - 0.2^3) + 0.2^3)^(1/3) = 0.504^(1/3)
    assert RootPacing(10, start=0.2, power=3.0)(5) == pytest.approx(0.79581144, abs=1e-8)


def test_linear_pacing_has_the_written_out_values_and_is_the_first_root():
    pacing = LinearPacing(total_steps=8, start=0.2)
    assert [pacing(step) for step in (0, 2, 4, 6, 8)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    for step in range(9):
        assert pacing(step) == pytest.approx(RootPacing(8, 0.2, power=1.0)(step))


def test_staged_pacing_jumps_at_its_boundaries():
    pacing = StagedPacing(boundaries=[10, 20], shares=[0.2, 0.5, 1.0])
    assert [pacing(step) for step in (0, 9, 10, 19, 20, 99)] == [0.2, 0.2, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RootPacing(10, start=0.0), "start is 0.0"),
        (lambda: RootPacing(10, start=1.5), "start is 1.5"),
        (lambda: RootPacing(10, start=math.nan), "start is nan"),
        (lambda: RootPacing(0), "total_steps is 0"),
        (lambda: RootPacing(10, power=0.5), "power is 0.5"),
        (lambda: RootPacing(10, power=math.nan), "power is nan"),
        (lambda: LinearPacing(-1), "total_steps is -1"),
        (lambda: StagedPacing([10], [1.0]), "shares has 1 entries"),
        (lambda: StagedPacing([20, 10], [0.1, 0.2, 1.0]), r"boundaries is \[20, 10\]"),
        (lambda: StagedPacing([0], [0.1, 1.0]), r"boundaries is \[0\]"),
        (lambda: StagedPacing([10], [0.5, 0.1]), r"shares is \[0.5, 0.1\]"),
        (lambda: StagedPacing([10], [0.5, 1.1]), r"shares is \[0.5, 1.1\]"),
        (lambda: Band(0.7, 0.3), "low is 0.7 and high is 0.3"),
        (lambda: Band(math.nan, 0.3), "low is nan"),
        (lambda: Curriculum(0), "num_examples is 0"),
        (lambda: Curriculum(2, order="random"), "order is 'random'; it must be one of 'shuffled'"),
        (lambda: Curriculum(2, order="ascending"), "order 'ascending' needs scores"),
        (lambda: Curriculum(2, scores=[1.0, 2.0]), "scores are given, but order 'shuffled'"),
        (lambda: Curriculum(2, pacing=LinearPacing(5)), "set order to 'ascending' or 'descending'"),
        (lambda: Curriculum(2, scores=[1.0], order="ascending"), "scores has 1 entries for 2 examples"),
        (lambda: Curriculum(2, order=[0, 0]), "order must hold each of the numbers 0 to 1 once"),
        (lambda: Curriculum(2, window=2), "window is 2, but order 'shuffled' has none"),
        (lambda: Curriculum(2, order=[0, 1], window=0), "window is 0"),
        (
            lambda: Curriculum(2, order=[0, 1], window=2, pacing=LinearPacing(5)),
            "window is 2, but with",
        ),
        (lambda: Curriculum(2, groups=["a"]), "groups has 1 entries for 2 examples"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(make, named):
    with pytest.raises(ValueError, match=named):
        make()


# --- order ----------------------------------------------------------------------------------------


def test_a_sorted_pass_goes_through_the_scores_and_starts_over():
    ascending = Curriculum(8, scores=SCORES, order="ascending")
    assert rounds(ascending, [3, 3, 3, 3, 4]) == BY_SCORE * 2
    descending = Curriculum(8, scores=SCORES, order="descending")
    assert descending.propose(8, step=0) == BY_SCORE[::-1]


def test_unknown_scores_come_last_and_equal_scores_keep_the_order_of_the_data():
    scores = [math.nan, 1.0, 0.0, 1.0, math.nan, 1.0]
    assert Curriculum(6, scores=scores, order="ascending").propose(6, 0) == [2, 1, 3, 5, 0, 4]
    assert Curriculum(6, scores=scores, order="descending").propose(6, 0) == [1, 3, 5, 2, 0, 4]


def test_shuffled_passes_differ_and_the_seed_alone_sets_them():
    def stream(seed):
        return Curriculum(50, seed=seed).propose(100, step=0)

    first, second = stream(0)[:50], stream(0)[50:]
    assert first != second
    assert stream(0) == stream(0) != stream(1)
    assert sorted(first) == sorted(second) == list(range(50))


def test_the_first_place_of_a_shuffled_pass_is_uniform():
    first = Counter(Curriculum(5, seed=seed).propose(1, 0)[0] for seed in range(2000))
    # 400 each; the standard deviation is 18.
    assert all(abs(count - 400) < 80 for count in first.values())
    assert len(first) == 5


@given(
    st.integers(1, 30),
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.booleans(),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_every_pass_draws_every_visible_example_exactly_once(num_examples, sizes, is_sorted, seed):
    if is_sorted:
        scores = [float(i * 7 % num_examples) for i in range(num_examples)]
        curriculum = Curriculum(num_examples, scores=scores, order="descending")
    else:
        curriculum = Curriculum(num_examples, seed=seed)
    drawn = rounds(curriculum, sizes)
    for start in range(0, len(drawn), num_examples):
        one_pass = drawn[start : start + num_examples]
        assert len(set(one_pass)) == len(one_pass)
    assert curriculum.num_passes == math.ceil(len(drawn) / num_examples)


# --- pace -----------------------------------------------------------------------------------------


def paced(**options):
    pacing = StagedPacing(boundaries=[10, 20], shares=[0.25, 0.5, 1.0])
    return Curriculum(8, scores=SCORES, order="ascending", pacing=pacing, **options)


def test_only_the_visible_share_of_the_order_is_drawn():
    curriculum = paced()
    assert [curriculum.num_visible(step) for step in (0, 10, 20)] == [2, 4, 8]
    assert Counter(curriculum.propose(10, step=0)) == {3: 5, 1: 5}


def test_newly_visible_examples_join_the_running_pass():
    curriculum = paced()
    first = curriculum.propose(1, step=0)
    rest = curriculum.propose(3, step=10)
    assert sorted(first + rest) == sorted(BY_SCORE[:4])
    assert curriculum.num_passes == 1
    assert sorted(curriculum.propose(8, step=20)) == list(range(8))


def test_at_least_one_example_is_visible_and_shares_round_up():
    curriculum = Curriculum(
        10, scores=list(range(10)), order="ascending", pacing=LinearPacing(10, start=0.01)
    )
    # 0.01 + 0.099 t, of 10 examples
    assert [curriculum.num_visible(step) for step in range(11)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10]
    exact = Curriculum(10, scores=list(range(10)), order="ascending", pacing=lambda step: 0.7 + 0.1)
    assert exact.num_visible(0) == 8


@given(st.integers(2, 25), st.integers(1, 9), st.integers(1, 20), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_between_two_passes_no_visible_example_is_left_out(num_examples, size, total_steps, seed):
    curriculum = Curriculum(
        num_examples,
        scores=list(range(num_examples)),
        order="ascending",
        pacing=RootPacing(total_steps, start=0.1),
        seed=seed,
    )
    passes = {}
    for step in range(2 * total_steps):
        for _ in range(size):
            (example,) = curriculum.propose(1, step)
            assert example < curriculum.num_visible(step)
            passes.setdefault(curriculum.num_passes, []).append(example)
    for number, drawn in passes.items():
        assert len(set(drawn)) == len(drawn)
        if number < curriculum.num_passes:
            assert sorted(drawn) == list(range(len(drawn)))


def ordered(**options):
    return Curriculum(8, scores=SCORES, order="ascending", **options)


def test_an_order_of_ones_own_is_gone_through():
    curriculum = Curriculum(4, order=[2, 0, 3, 1])
    assert rounds(curriculum, [3, 3]) == [2, 0, 3, 1, 2, 0]


def test_windows_are_shuffled_anew_in_each_pass_and_hold_their_examples():
    curriculum = Curriculum(30, order=list(range(30)), window=10, seed=2)
    first, second = curriculum.propose(30, 0), curriculum.propose(30, 0)
    assert first != second
    for drawn in (first, second):
        assert [example // 10 for example in drawn] == [n // 10 for n in range(30)]
        assert sorted(drawn) == list(range(30)) != drawn


def test_each_stage_of_a_one_pass_pacing_is_shown_only_while_it_lasts():
    curriculum = ordered(pacing=OnePassPacing(boundaries=[10, 20], shares=[0.25, 0.5, 1.0]))
    assert Counter(curriculum.propose(3, step=0)).keys() == set(BY_SCORE[:2])
    # What the stage before has left over goes with it.
    assert sorted(curriculum.propose(2, step=10)) == sorted(BY_SCORE[2:4])
    assert sorted(curriculum.propose(4, step=20)) == sorted(BY_SCORE[4:])


def test_a_share_that_shrinks_hides_the_hardest_again():
    shares = {0: 0.5, 1: 1.0, 2: 0.25}
    curriculum = ordered(pacing=shares.__getitem__)
    curriculum.propose(1, step=0)
    curriculum.propose(1, step=1)
    assert set(curriculum.propose(6, step=2)) <= set(BY_SCORE[:2])
    assert set(curriculum.propose(20, step=1)) == set(range(8))


# --- gate -----------------------------------------------------------------------------------------


def test_a_refused_example_is_passed_over_once_and_then_tried_again():
    curriculum = Curriculum(4, scores=[0.0, 1.0, 2.0, 3.0], order="ascending", gate=Band(0.25, 0.75))
    assert curriculum.propose(4, 0) == [0, 1, 2, 3]
    curriculum.observe([0, 1, 2], [0.0, 0.5, 1.0])
    assert curriculum.propose(2, 0) == [1, 3]
    assert curriculum.num_refused == 2
    assert curriculum.propose(4, 0) == [0, 1, 2, 3]
    assert curriculum.num_refused == 2


def test_a_gate_that_refuses_everything_does_not_stop_the_stream():
    curriculum = Curriculum(3, gate=lambda score: False, seed=1)
    curriculum.observe([0, 1, 2], [0.1, 0.2, 0.3])
    assert sorted(curriculum.propose(3, 0)) == [0, 1, 2]
    assert curriculum.num_refused == 3
    curriculum.observe([1], [0.1])
    assert curriculum.admit([1, 0]) == [False, True]


def test_admission_goes_by_what_the_live_scores_make_of_the_observed():
    seen = [0.0, 0.25, 0.5, 0.75, 0.8]
    last = Curriculum(6, gate=Band(0.25, 0.75))
    last.observe(range(5), seen)
    # What was never observed is let in.
    assert last.admit([*range(5), 5]) == [False, True, True, True, False, True]
    # (0 + 0.8) / 2 is within the band, though the last value is not.
    mean = Curriculum(2, gate=Band(0.25, 0.75), live=RunningScore(0.5))
    mean.observe([0, 0, 1], [0.0, 0.8, 0.8])
    assert mean.admit([0, 1]) == [True, False]
    fallen = Curriculum(1, gate=Band(0.25, 0.75), live=ScoreChange())
    fallen.observe([0, 0], [2.0, 1.5])
    assert fallen.admit([0]) == [True]
    able = Curriculum(
        2, scores=[-1.0, 1.0], order="ascending", gate=Band(high=0.0), live=Ability(Band(low=0.5))
    )
    able.observe([0, 1], [1.0, 1.0])  # pass rates, which are no difficulties
    assert able.admit([0, 1]) == [True, False]


def test_without_a_gate_everything_is_admitted():
    curriculum = Curriculum(2)
    curriculum.observe([0], [0.0])
    assert curriculum.admit([0, 1]) == [True, True]


def test_smoothing_is_set_where_the_live_scores_are():
    with pytest.raises(TypeError, match=r"'smoothing' any more; write live=RunningScore\(smoothing\)"):
        Curriculum(2, smoothing=0.5)


def test_a_gate_that_looks_at_all_decides_when_a_pass_begins():
    curriculum = Curriculum(4, order=[0, 1, 2, 3], gate=TopShare(0.5))
    assert curriculum.propose(4, 0) == [0, 1, 2, 3]
    curriculum.observe([0, 1, 2, 3], [1.0, 4.0, 3.0, 2.0])
    assert curriculum.propose(2, 0) == [1, 2]
    assert curriculum.num_refused == 2
    # Forgotten scores are unknown, and so let in.
    assert curriculum.propose(3, 0) == [0, 1, 3]
    # It has decided, and does not look again at those that it let in.
    curriculum.observe([0, 1, 3], [0.0, 1.0, 2.0])
    assert curriculum.admit([0, 1, 3]) == [True, True, True]


def test_floors_go_by_the_groups_of_the_examples():
    gate = TopShare(0.5, floor=0.5)
    curriculum = Curriculum(4, order=[0, 1, 2, 3], gate=gate, groups=["a", "a", "b", "b"])
    curriculum.observe([0, 1, 2, 3], [1.0, 2.0, 8.0, 9.0])
    assert curriculum.propose(2, 0) == [1, 3]


def test_what_the_model_is_able_to_grows_with_its_answers():
    curriculum = Curriculum(
        6,
        scores=[-2.0, -1.0, 0.0, 1.0, 2.0, 3.0],
        order="ascending",
        gate=AtLeast(Band(high=0.0), 2),
        live=Ability(correct=Band(high=0.5), start=-1.0),
    )
    assert curriculum.propose(2, 0) == [0, 1]
    curriculum.observe([0, 1], [0.1, 0.1])
    # Both right: the ability is now 0.63 by the maximum of -t^2 / 2 + log s(t + 2) + log s(t + 1).
    grid = [t / 1000 for t in range(-3000, 3000)]
    best = max(grid, key=lambda t: -t * t / 2 - math.log1p(math.exp(-t - 2)) - math.log1p(math.exp(-t - 1)))
    assert curriculum.propose(3, 0) == [0, 1, 2]
    assert curriculum.live.ability == pytest.approx(best, abs=2e-3)


def test_an_ability_too_low_for_every_example_rises_until_one_is_in_reach():
    gate, live = Band(high=0.0), Ability(Band(high=0.5), start=-3.0)
    curriculum = Curriculum(2, scores=[0.0, 9.0], order="ascending", gate=gate, live=live)
    assert curriculum.propose(1, 0) == [0]
    assert curriculum.num_refused == 2 * 30


def test_a_gate_that_refuses_for_good_is_an_error():
    gate, live = Band(high=0.0), Ability(Band(high=0.5))
    curriculum = Curriculum(1, scores=[math.inf], order="ascending", gate=gate, live=live)
    with pytest.raises(ValueError, match="the gate refuses every visible example"):
        curriculum.propose(1, 0)


def test_sorted_again_the_largest_fall_comes_first():
    curriculum = Curriculum(3, scores=[0.0, 0.0, 0.0], order="descending", live=ScoreChange(), reorder=True)
    assert curriculum.propose(3, 0) == [0, 1, 2]
    curriculum.observe([0, 1, 2], [3.0, 3.0, 3.0])
    curriculum.observe([0, 1, 2], [2.5, 1.0, 2.0])
    assert curriculum.propose(3, 0) == [1, 2, 0]


def test_sorted_again_the_order_is_in_the_state():
    def start():
        return Curriculum(
            4, scores=[0.0] * 4, order="descending", reorder=True, pacing=[0.5, 1.0].__getitem__
        )

    before, after = start(), start()
    before.observe([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0])
    first = before.propose(1, step=0)
    after.load_state_dict(before.state_dict())
    assert sorted(first + after.propose(3, step=1)) == [0, 1, 2, 3]


def test_observed_scores_are_smoothed_and_unknown_before():
    curriculum = Curriculum(3, live=RunningScore(0.75))
    assert math.isnan(curriculum.score(1))
    curriculum.observe([1, 1], [1.0, 0.0])
    curriculum.observe([2], [0.5])
    assert (curriculum.score(1), curriculum.score(2)) == (0.75, 0.5)
    with pytest.raises(ValueError, match="2 ids but 1 scores"):
        curriculum.observe([1, 2], [0.5])


# --- draw -----------------------------------------------------------------------------------------


def drawing(n=40, gate=None, **window):
    """Prompts whose order is by score descending, drawn around a moving centre."""
    options = {"sigma": 2.0, "gain": 4.0, "largest_move": 8.0} | window
    scores = [n - number * 7 % n for number in range(n)]
    return Curriculum(
        n,
        scores=[score / n for score in scores],
        order="descending",
        draw=GaussianWindow(**options),
        gate=gate,
        seed=2,
    )


def test_a_round_is_drawn_around_the_centre_and_moves_it_by_what_was_seen():
    """GAIN-RL: the order by angle, largest first; the centre moves by mean pass rate and mean angle."""
    curriculum = drawing()
    angles = [(40 - number * 7 % 40) / 40 for number in range(40)]
    order = sorted(range(40), key=lambda number: -angles[number])
    centre = 0.0
    for step in range(12):
        drawn = curriculum.propose(6, step)
        assert len(set(drawn)) == 6
        ranks = [order.index(number) for number in drawn]
        # The six are the heaviest but for chance: none lies further than some standard deviations.
        assert max(abs(rank - centre) for rank in ranks) < 8 * 2.0
        rates = [(step + place) % 3 / 2 for place in range(6)]
        curriculum.observe(drawn, rates)
        mean_rate, mean_angle = sum(rates) / 6, sum(angles[number] for number in drawn) / 6
        drive = 4 * math.tanh(2 * (mean_rate - 0.5)) + 4 * math.tanh(2 * mean_angle)
        centre = min(centre + min(max(drive, 0.0), 8.0), 39.0)
        before = curriculum.state_dict()["centre"]["rank"]
        curriculum.propose(1, step)  # more for the same step does not move it
        assert curriculum.state_dict()["centre"]["rank"] == before
        after = copy.deepcopy(curriculum)
        after.propose(1, step + 1)
        assert after.state_dict()["centre"]["rank"] == pytest.approx(centre, rel=1e-12)
    assert 30.0 < centre <= 39.0


def test_refused_examples_are_drawn_for_again():
    curriculum = drawing(gate=Band(0.25, 0.75))
    first = curriculum.propose(8, 0)
    curriculum.observe(first, [1.0] * 8)
    second = curriculum.propose(8, 1)
    assert len(second) == 8
    # It passes over those of the first round that it draws, and each only once.
    assert 0 < curriculum.num_refused <= 8
    known = [number for number in first if not math.isnan(curriculum.score(number))]
    assert len(known) == 8 - curriculum.num_refused
    assert set(second).isdisjoint(known)


def test_a_draw_may_ask_for_more_than_there_is():
    drawn = drawing(5).propose(12, 0)
    assert Counter(drawn[:5]).keys() == set(range(5)) == Counter(drawn[5:10]).keys()
    assert len(drawn) == 12


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: Curriculum(2, draw=GaussianWindow()), "draw draws from an order: set order"),
        (lambda: Curriculum(2, order=[1, 0], draw=GaussianWindow()), "draw is given: it needs scores"),
        (
            lambda: ordered(draw=GaussianWindow(), pacing=LinearPacing(5)),
            "draw is given: .* has no pacing and no window",
        ),
        (lambda: ordered(draw=GaussianWindow(), window=2), "draw is given: .* no window"),
        (lambda: drawing(gate=TopShare(0.5)).propose(1, 0), "draw is given: it goes with a gate on single"),
        (
            lambda: ordered(draw=GaussianWindow(), reorder=True).propose(1, 0),
            "draw is given: .* not with reorder",
        ),
        (
            lambda: ordered(draw=GaussianWindow()).load_state_dict(ordered().state_dict()),
            "has a draw, the other none",
        ),
        (
            lambda: ordered().load_state_dict(ordered(draw=GaussianWindow()).state_dict()),
            "has a draw, the other none",
        ),
    ],
)
def test_what_does_not_go_with_a_draw_is_named(act, named):
    with pytest.raises(ValueError, match=named):
        act()


# --- state ----------------------------------------------------------------------------------------

KINDS = {
    "draw": lambda: drawing(gate=Band(0.2, 0.8)),
    "shuffled": lambda: Curriculum(9, seed=3),
    "sorted": lambda: Curriculum(8, scores=SCORES, order="descending"),
    "paced": lambda: paced(seed=4),
    "gated": lambda: Curriculum(8, gate=Band(0.3, 0.8), live=RunningScore(0.2), seed=5),
    "all": lambda: paced(gate=Band(0.3, 0.8), seed=6),
    "windows": lambda: Curriculum(8, scores=SCORES, order="ascending", window=3, seed=1),
    "one pass": lambda: ordered(pacing=OnePassPacing([8, 20], [0.25, 0.6, 1.0]), seed=7),
    "cyclical": lambda: ordered(pacing=CyclicalPacing(4), seed=8),
    "top share": lambda: ordered(gate=TopShare(0.5), groups=list("aabbaabb")),
    "change": lambda: ordered(pacing=SigmoidWindow(20, width=0.5), live=ScoreChange(0.2), reorder=True),
    "ability": lambda: ordered(gate=AtLeast(Band(high=0.0), 3), live=Ability(Band(high=0.4))),
}


def live(curriculum, draws):
    """Draw one by one, each draw observed, as training does."""
    drawn = []
    for draw in draws:
        ids = curriculum.propose(2, step=draw)
        curriculum.observe(ids, [(draw * 37 + i * 11) % 10 / 10 for i in ids])
        drawn += ids
    return drawn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "copy", [lambda s: json.loads(json.dumps(s)), lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_state_saved_at_any_draw_gives_the_same_stream(kind, copy):
    whole = live(KINDS[kind](), range(30))
    for cut in range(30):
        before = KINDS[kind]()
        assert live(before, range(cut)) == whole[: 2 * cut]
        after = KINDS[kind]()
        after.load_state_dict(copy(before.state_dict()))
        assert live(after, range(cut, 30)) == whole[2 * cut :]


def test_a_saved_state_does_not_change_with_the_curriculum():
    curriculum = KINDS["all"]()
    live(curriculum, range(5))
    state = curriculum.state_dict()
    before = json.dumps(state)
    live(curriculum, range(5, 20))
    assert json.dumps(state) == before


def test_two_ranks_that_observe_the_same_hold_the_same_state():
    ranks = [KINDS["all"](), KINDS["all"]()]
    assert live(ranks[0], range(20)) == live(ranks[1], range(20))
    assert ranks[0].state_dict() == ranks[1].state_dict()


def test_a_state_of_other_data_is_refused():
    with pytest.raises(ValueError, match="curriculum has 9 examples, this 8"):
        KINDS["sorted"]().load_state_dict(KINDS["shuffled"]().state_dict())
