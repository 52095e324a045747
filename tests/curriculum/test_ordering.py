"""Orders against plain sorts and slices, and the weighted draw against its probabilities written out."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.ordering import (
    block_order,
    draw_weighted,
    folded,
    interleave_order,
    shuffled_in_windows,
    sorted_order,
    staged_order,
)

NAN = math.nan
scores_of = st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(NAN)), min_size=1, max_size=40)
keys_of = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=40)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@given(scores_of, st.booleans())
@settings(deadline=None)
def test_sorting_is_stable_puts_the_unknown_last_and_equals_the_curriculums(scores, descending):
    order = sorted_order(scores, descending=descending)
    known = [i for i in order if not math.isnan(scores[i])]
    unknown = [i for i, score in enumerate(scores) if math.isnan(score)]
    assert order == known + unknown
    for one, other in itertools.pairwise(known):
        sign = -1 if descending else 1
        assert (sign * scores[one], one) < (sign * scores[other], other)
    curriculum = Curriculum(len(scores), scores=scores, order="descending" if descending else "ascending")
    assert curriculum.propose(len(scores), step=0) == order


@given(st.integers(0, 60), st.integers(1, 12), st.integers(0, 5))
@settings(deadline=None)
def test_a_window_keeps_its_examples_and_no_example_leaves_its_window(size, window, seed):
    order = random.Random(seed).sample(range(1000), size)
    shuffled = shuffled_in_windows(order, window, seed=seed)
    for start in range(0, size, window):
        stretch = slice(start, start + window)
        assert sorted(shuffled[stretch]) == sorted(order[stretch])
    assert shuffled == shuffled_in_windows(order, window, seed=seed)


def test_windows_passes_and_seeds_are_shuffled_differently():
    order = list(range(200))
    one = shuffled_in_windows(order, 20, seed=1)
    assert len({tuple(x - start for x in one[start : start + 20]) for start in range(0, 200, 20)}) == 10
    others = [shuffled_in_windows(order, 20, seed=2), shuffled_in_windows(order, 20, seed=1, stream=(1,))]
    assert one != others[0] != others[1] != one
    assert shuffled_in_windows(order, 1) == order


def test_every_order_within_a_window_is_equally_likely():
    seen = Counter()
    for seed in range(600):
        shuffled = shuffled_in_windows(range(8), 4, seed=seed)
        seen[tuple(shuffled[:4])] += 1
        seen[tuple(x - 4 for x in shuffled[4:])] += 1
    chi_square = sum((seen[one] - 50) ** 2 / 50 for one in itertools.permutations(range(4)))
    assert abs(chi_square - 23) < 4 * math.sqrt(46)


@given(keys_of)
@settings(deadline=None)
def test_blocks_finish_a_subject_before_the_next(keys):
    subjects, levels = [key[0] for key in keys], [key[1] for key in keys]
    expected = [
        i
        for subject in dict.fromkeys(subjects)
        for level in sorted(set(levels))
        for i in range(len(keys))
        if (subjects[i], levels[i]) == (subject, level)
    ]
    assert block_order(subjects, levels) == expected


@given(keys_of)
@settings(deadline=None)
def test_interleaving_deals_the_subjects_of_a_level_out_in_turns(keys):
    subjects, levels = [key[0] for key in keys], [key[1] for key in keys]
    expected = []
    for level in sorted(set(levels)):
        piles = [
            [i for i in range(len(keys)) if (subjects[i], levels[i]) == (subject, level)]
            for subject in dict.fromkeys(subjects)
        ]
        for turn in itertools.zip_longest(*piles):
            expected += [i for i in turn if i is not None]
    assert interleave_order(subjects, levels) == expected


def test_the_curriculum_of_the_paper_is_swept_level_by_level():
    subjects = ["maths"] * 4 + ["law"] * 4
    levels = [1, 2, 1, 2] * 2
    assert interleave_order(subjects, levels) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert block_order(subjects, levels) == [0, 2, 1, 3, 4, 6, 5, 7]


@given(st.integers(0, 60), st.integers(1, 70))
@settings(deadline=None)
def test_a_fold_holds_the_ranks_of_one_remainder(size, folds):
    order = random.Random(1).sample(range(1000), size)
    expected = [order[r] for fold in range(folds) for r in range(size) if r % folds == fold]
    assert folded(order, folds) == expected
    assert folded(order, 1) == order


def test_stages_follow_the_sequence_and_keep_the_order_of_the_data():
    stages = ["hard", "easy", "hard", "mid", "easy"]
    assert staged_order(stages, ["easy", "mid", "hard", "unused"]) == [1, 4, 3, 0, 2]


def test_a_weighted_draw_has_the_probabilities_of_drawing_one_after_the_other():
    weights = [1.0, 2.0, 4.0]
    generator, trials = rng(), 6000
    seen = Counter(
        tuple(draw_weighted(torch.tensor(weights).log(), 2, generator=generator).tolist())
        for _ in range(trials)
    )
    for first, second in itertools.permutations(range(3), 2):
        p = weights[first] / 7 * weights[second] / (7 - weights[first])
        assert abs(seen[first, second] - trials * p) < 4 * math.sqrt(trials * p * (1 - p))


def test_a_weight_of_zero_is_never_drawn_and_huge_ratios_do_not_underflow():
    log_weights = torch.tensor([-1e6, 0.0, -torch.inf, -2e6])
    assert draw_weighted(log_weights, 3, generator=rng()).tolist() == [1, 0, 3]
    assert draw_weighted(log_weights, 0, generator=rng()).tolist() == []


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: shuffled_in_windows([1], 0), "window is 0"),
        (lambda: folded([1], 0), "folds is 0"),
        (lambda: block_order(["a"], [1, 2]), "1 subjects but 2 levels"),
        (lambda: interleave_order(["a", "b"], [1, NAN]), r"levels\[1\] is nan"),
        (lambda: staged_order(["a"], ["b"]), r"example 0 is of stage 'a'; the sequence is \['b'\]"),
        (lambda: staged_order(["a"], ["a", "a"]), "must not hold a stage twice"),
        (lambda: draw_weighted(torch.zeros(2), 3, generator=rng()), "n is 3; 2 examples have a weight"),
        (lambda: draw_weighted(torch.zeros(2), -1, generator=rng()), "n is -1"),
        (lambda: draw_weighted(torch.tensor([NAN]), 1, generator=rng()), "holds NaN or inf"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(act, named):
    with pytest.raises(ValueError, match=named):
        act()
