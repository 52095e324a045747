"""Difficulty scores against loops over their definitions."""

import math
import random
import zlib
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from rewarm.scoring.difficulty import (
    angle_concentration,
    compression_ratio,
    perplexity,
    perplexity_ratio,
    token_counts,
    word_rarity,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_perplexity_is_that_of_the_cross_entropy():
    logits = torch.randn(3, 7, 11, generator=rng(), dtype=torch.float64)
    targets = torch.randint(11, (3, 7), generator=rng(1))
    lengths = torch.tensor([7, 3, 1])
    sums = torch.stack(
        [logits[i].log_softmax(-1).gather(1, targets[i, :, None])[:n].sum() for i, n in enumerate(lengths)]
    )
    for i, n in enumerate(lengths.tolist()):
        expected = F.cross_entropy(logits[i, :n], targets[i, :n]).exp()
        torch.testing.assert_close(perplexity(sums, lengths)[i], expected)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    sums = torch.tensor([-4.0, -9.0], dtype=torch.float64) * math.log(50)
    torch.testing.assert_close(perplexity(sums, torch.tensor([4, 9])), torch.full((2,), 50.0).double())


def test_a_very_unlikely_sequence_stays_finite():
    assert perplexity(torch.tensor([-300.0]), torch.tensor([1])).item() == pytest.approx(
        math.exp(300), rel=1e-12
    )


def test_the_ratio_is_that_of_the_perplexities():
    given, alone, n = torch.tensor([-3.0, -8.0]), torch.tensor([-6.0, -7.5]), torch.tensor([4, 2])
    torch.testing.assert_close(perplexity_ratio(given, alone, n), perplexity(given, n) / perplexity(alone, n))
    assert (perplexity_ratio(given, alone, n) < 1).tolist() == [True, False]


def test_rarity_is_the_sum_over_the_tokens_counted():
    rows = [torch.randint(9, (n,), generator=rng(n)) for n in (5, 1, 30, 8)]
    counted = Counter(token for row in rows for token in row.tolist())
    counts = token_counts(iter(rows), vocab_size=12)
    assert counts.tolist() == [counted[token] for token in range(12)]
    for row in rows:
        expected = -sum(math.log(counted[token] / counted.total()) for token in row.tolist())
        assert word_rarity(row, counts) == pytest.approx(expected, rel=1e-12)
    assert word_rarity(rows[0][:0], counts) == 0.0


def test_repetition_compresses_and_noise_does_not():
    draw = random.Random(0)
    letters = "".join(draw.choice("abcdefgh") for _ in range(2000))
    ratios = [compression_ratio(text) for text in ("ab" * 1000, "the cat sat. the dog sat. " * 77, letters)]
    assert ratios == sorted(ratios)
    assert 3 / 8 < ratios[-1] < 0.5  # 8 letters need 3 of the 8 bits
    text = "\u00dcbung macht den Meister. " * 9
    assert compression_ratio(text) == len(zlib.compress(text.encode(), 9)) / len(text.encode())


# --- angles ---------------------------------------------------------------------------------------


def concentration_by_pairs(hidden, prefix, suffix, weight):
    """All pairs of one row's tokens, prefix and suffix given by their lengths."""
    end = len(hidden) - suffix
    within, across = [], []
    for i in range(prefix, end):
        for j in range(i):
            cosine = F.cosine_similarity(hidden[i], hidden[j], dim=0).item()
            (across if j < prefix else within).append(cosine)
    return sum(within) / len(within) + (weight * sum(across) / len(across) if across else 0.0)


@pytest.mark.parametrize("weight", [0.0, 1.0, 8.0])
def test_angles_equal_the_mean_over_all_pairs(weight):
    shapes = [(4, 9, 2), (0, 6, 3), (3, 2, 0), (1, 12, 2)]  # prefix, question, suffix
    length = 16
    hidden = torch.randn(len(shapes), length, 5, generator=rng(), dtype=torch.float64) + 0.4
    question, prefix = torch.zeros(2, len(shapes), length, dtype=torch.bool)
    expected = []
    for row, (before, own, after) in enumerate(shapes):
        prefix[row, :before] = True
        question[row, before : before + own] = True
        expected.append(concentration_by_pairs(hidden[row, : before + own + after], before, after, weight))
    found = angle_concentration(hidden, question, prefix, prefix_weight=weight)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_lengths_of_the_states_do_not_matter_and_one_direction_is_most_concentrated():
    hidden = torch.randn(2, 6, 8, generator=rng())
    hidden[1] = torch.randn(8, generator=rng(1)) * torch.rand(6, 1, generator=rng(2))
    question = torch.tensor([[False, False, True, True, True, True]] * 2)
    found = angle_concentration(hidden, question, ~question)
    scaled = angle_concentration(hidden * torch.rand(2, 6, 1, generator=rng(3)), question, ~question)
    torch.testing.assert_close(found, scaled, rtol=1e-4, atol=1e-5)
    assert found[1].item() == pytest.approx(9.0, abs=1e-5)
    assert found[0] < found[1]


def test_padding_changes_nothing_not_even_nan_in_it():
    hidden = torch.randn(1, 5, 4, generator=rng())
    question, prefix = torch.tensor([[False, True, True, True, True]]), torch.tensor([[True] + [False] * 4])
    padded = torch.cat([hidden, torch.full((1, 3, 4), math.nan)], 1)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    torch.testing.assert_close(
        angle_concentration(padded, torch.cat([question, nothing], 1), torch.cat([prefix, nothing], 1)),
        angle_concentration(hidden, question, prefix),
    )


def test_half_precision_states_are_added_up_in_float32():
    hidden = (torch.randn(1, 300, 16, generator=rng()) + 1).bfloat16()
    question = torch.ones(1, 300, dtype=torch.bool)
    found = angle_concentration(hidden, question, ~question)
    expected = angle_concentration(hidden.double(), question, ~question)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


HIDDEN, ALL, NONE = torch.ones(1, 3, 2), torch.tensor([[True] * 3]), torch.tensor([[False] * 3])


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: perplexity(torch.zeros(2), torch.ones(3)), r"logprob_sums has shape \(2,\)"),
        (lambda: perplexity(torch.zeros(2), torch.tensor([1, 0])), "num_tokens is 0 at 1"),
        (lambda: perplexity(torch.tensor([math.nan]), torch.ones(1)), "logprob_sums is nan at 0"),
        (
            lambda: perplexity_ratio(torch.zeros(1), torch.tensor([math.nan]), torch.ones(1)),
            "unprompted_logprob_sums is nan at 0",
        ),
        (
            lambda: token_counts([torch.tensor([0]), torch.tensor([3])], 3),
            "sequence 1 has tokens outside of 0 to 2",
        ),
        (lambda: token_counts([torch.tensor([-1])], 3), "sequence 0 has tokens outside"),
        (lambda: word_rarity(torch.tensor([0, 1]), torch.tensor([4, 0])), "token 1 has count 0"),
        (lambda: compression_ratio(""), "text is empty"),
        (lambda: angle_concentration(HIDDEN, ALL[:, :2], NONE), r"question \(1, 2\)"),
        (lambda: angle_concentration(HIDDEN[0], ALL[0], NONE[0]), r"must be \(B, T, D\)"),
        (lambda: angle_concentration(HIDDEN, ALL, ALL), "both of the question and of its prefix"),
        (lambda: angle_concentration(HIDDEN, NONE, ALL), "row 0 has 0 question tokens"),
        (lambda: angle_concentration(HIDDEN, ALL, NONE, prefix_weight=-1.0), "prefix_weight is -1.0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(act, named):
    with pytest.raises(ValueError, match=named):
        act()
