"""Scores of how hard an example is, from its text, its tokens, its losses or a model's hidden states.

All of them are numbers to sort by; none is calibrated against another. Pass rates are in
`rewarm.rollouts.pass_rate`, difficulties from several models' answers in `rewarm.curriculum.item_response`,
distances from prototypes in `rewarm.scoring.prototypes`.
"""

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from rewarm.checks import at_least


def perplexity(logprob_sums: Tensor, num_tokens: Tensor) -> Tensor:
    """Perplexity of each sequence, from summed log-probabilities.

    exp(-logprob_sums / num_tokens)

    Args:
        logprob_sums: Summed over the tokens that training would count, in nats. Shape (N,).
        num_tokens: How many these are, >= 1. Shape (N,).

    Returns:
        Perplexities, >= 1. float64, shape (N,).

    Raises:
        ValueError: If shapes differ, a sequence has no token or a sum is NaN.

    Example:
        >>> perplexity(torch.tensor([-2.0, 0.0]), torch.tensor([2, 5]))
        tensor([2.7183, 1.0000], dtype=torch.float64)

    Source: the exponential of the mean cross entropy. Differs: nothing.
    """
    _check_sums("logprob_sums", logprob_sums, num_tokens)
    return torch.exp(-logprob_sums.double() / num_tokens)


def perplexity_ratio(logprob_sums: Tensor, unprompted_logprob_sums: Tensor, num_tokens: Tensor) -> Tensor:
    """How much a prompt helps to predict its completion: below 1 if it does, near 1 if it doesn't.

    perplexity(completion | prompt) / perplexity(completion)

    Args:
        logprob_sums: Of the completion after its prompt, in nats. Shape (N,).
        unprompted_logprob_sums: Of the same tokens without the prompt. Shape (N,).
        num_tokens: Tokens of the completion, >= 1. Shape (N,).

    Returns:
        Ratios, > 0. float64, shape (N,).

    Raises:
        ValueError: If shapes differ, a sequence has no token or a sum is NaN.

    Example:
        >>> perplexity_ratio(torch.tensor([-2.0]), torch.tensor([-4.0]), torch.tensor([2]))
        tensor([0.3679], dtype=torch.float64)

    Source: ours, in the manner of instruction-following difficulty (IFD, arXiv:2308.12032).
    """
    _check_sums("logprob_sums", logprob_sums, num_tokens)
    _check_sums("unprompted_logprob_sums", unprompted_logprob_sums, num_tokens)
    return torch.exp((unprompted_logprob_sums.double() - logprob_sums.double()) / num_tokens)


def token_counts(sequences: Iterable[Tensor], vocab_size: int) -> Tensor:
    """How often each token occurs.

    Args:
        sequences: Token ids in [0, vocab_size), one tensor per sequence, of any shape.
        vocab_size: V, >= 1.

    Returns:
        Counts. int64, shape (V,).

    Raises:
        ValueError: If a token is out of range.

    Example:
        >>> token_counts([torch.tensor([0, 2]), torch.tensor([2])], vocab_size=3)
        tensor([1, 0, 2])
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for number, tokens in enumerate(sequences):
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise ValueError(f"sequence {number} has tokens outside of 0 to {vocab_size - 1}")
        counts += torch.bincount(tokens.flatten().cpu(), minlength=vocab_size)
    return counts


def word_rarity(tokens: Tensor, counts: Tensor) -> float:
    """How rare the tokens of a sequence are, summed: long sequences are rarer than short ones.

    -sum_t log(counts[t] / sum(counts))

    Args:
        tokens: Token ids of one sequence. Shape (T,).
        counts: How often each token occurs in the data, see `token_counts`. Shape (V,).

    Returns:
        The rarity in nats, >= 0.

    Raises:
        ValueError: If a token of the sequence does not occur in the data.

    Example:
        >>> round(word_rarity(torch.tensor([0, 1]), torch.tensor([1, 3])), 4)
        1.674

    Source: Platanios et al. 2019, arXiv:1903.09848. Differs: tokens in place of words.
    """
    seen = counts[tokens]
    if (seen < 1).any():
        token = int(tokens[seen < 1][0])
        raise ValueError(f"token {token} has count 0; the counts must be of data that hold the sequence")
    return float((counts.sum().double().log() - seen.double().log()).sum())


def compression_ratio(text: str) -> float:
    """Size of a text after compression, relative to before: high for dense text, low for repetitions.

    Below some hundred characters the compressor's fixed cost dominates, and the ratio may be above 1.

    Args:
        text: Not empty.

    Returns:
        compressed bytes / bytes, > 0.

    Raises:
        ValueError: If the text is empty.

    Example:
        >>> round(compression_ratio("again " * 100), 2)
        0.03

    Source: arXiv:2506.11300, where it is among the best of six scores. Differs: zlib at level 9 on UTF-8 is
    ours.
    """
    if not text:
        raise ValueError("text is empty; it must have at least one character")
    raw = text.encode()
    return len(zlib.compress(raw, 9)) / len(raw)


@torch.no_grad()
def angle_concentration(
    hidden: Tensor, question: Tensor, prefix: Tensor, *, prefix_weight: float = 8.0
) -> Tensor:
    """How much the hidden states of a question point the same way, among themselves and as its prefix.

    mean over i > j in the question of cos(x_i, x_j)
        + prefix_weight * mean over i in the question, j in the prefix of cos(x_i, x_j)

    GAIN-RL trains on the highest concentration first. Linear in the length: sums of unit vectors will do.

    Args:
        hidden: Hidden states that enter the last layer's `mlp.up_proj`. Shape (B, T, D).
        question: True at the question's own tokens, at least 2 per row. bool, shape (B, T).
        prefix: True at the tokens that the chat template puts before it; none at all leaves the second term
            out. Tokens of a suffix and padding are in neither. bool, shape (B, T).
        prefix_weight: Weight of the second term, >= 0. 8 is the repository's.

    Returns:
        Concentrations, in [-1 - prefix_weight, 1 + prefix_weight]. float32 (float64 for float64 states),
        shape (B,).

    Raises:
        ValueError: If shapes differ, a token is in both masks, a question has fewer than 2 tokens, or the
            weight is below 0.

    Example:
        >>> hidden = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]])
        >>> question, prefix = torch.tensor([[False, True, True]]), torch.tensor([[True, False, False]])
        >>> angle_concentration(hidden, question, prefix, prefix_weight=1.0)
        tensor([0.5000])

    Source: GAIN-RL, arXiv:2506.02281. Differs: the repository cuts rows twice where it means rows and
    columns, counts a pair's zero half and the diagonal in its means, and has the lengths of one template
    built in.
    """
    if not question.shape == prefix.shape == hidden.shape[:2] or hidden.ndim != 3:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, question {tuple(question.shape)} and prefix"
            f" {tuple(prefix.shape)}; they must be (B, T, D), (B, T) and (B, T)"
        )
    at_least(0, prefix_weight=prefix_weight)
    if (question & prefix).any():
        raise ValueError("a token is both of the question and of its prefix")
    num_question, num_prefix = question.sum(1), prefix.sum(1)
    if (num_question < 2).any():
        row = int((num_question < 2).nonzero()[0])
        raise ValueError(f"row {row} has {int(num_question[row])} question tokens; it must have at least 2")
    units = torch.nn.functional.normalize(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), dim=-1)
    questions = torch.where(question[..., None], units, 0.0)
    prefixes = torch.where(prefix[..., None], units, 0.0).sum(1)
    sums = questions.sum(1)
    # |sum of x|^2 counts every pair twice, and each x with itself.
    pairs = sums.square().sum(1) - questions.square().sum((1, 2))
    within = pairs / (num_question * (num_question - 1))
    across = (sums * prefixes).sum(1) / (num_question * num_prefix.clamp(min=1))
    return within + prefix_weight * across


def _check_sums(name: str, sums: Tensor, num_tokens: Tensor) -> None:
    if sums.shape != num_tokens.shape:
        raise ValueError(
            f"{name} has shape {tuple(sums.shape)} and num_tokens {tuple(num_tokens.shape)}; they must agree"
        )
    if (num_tokens < 1).any():
        raise ValueError(f"num_tokens is 0 at {int((num_tokens < 1).nonzero()[0])}; a score needs a token")
    if sums.isnan().any():
        raise ValueError(f"{name} is nan at {int(sums.isnan().nonzero()[0])}")
