"""Weights of checkpoints whose mean stands for the end of a decayed learning rate."""

import itertools
from collections.abc import Sequence

from rewarm.schedules.phases import Phase, Schedule


def decay_weights(factors: Sequence[float]) -> list[float]:
    """Weights with which checkpoints of a run at a constant learning rate stand for the end of a decayed one.

    c_0 = 1 - w_1,  c_j = w_j - w_(j+1),  c_k = w_k

    A checkpoint is the first one plus the updates since: theta_j = theta_0 + d_1 + .. + d_j. In the weighted
    mean the updates between checkpoints j - 1 and j count c_j + .. + c_k = w_j times, as under a learning
    rate of w_j times the constant one, had the gradients been the same. A straight line to 0 gives the plain
    mean. Decays put more weight on old checkpoints: where late data are the best, the plain mean or
    `ema_weights` serves better (arXiv:2511.18903).

    Args:
        factors: w_1 .. w_k, factors of the constant learning rate between k + 1 checkpoints, oldest first, in
            [0, 1], none above the one before it. May be empty: one checkpoint.

    Returns:
        k + 1 weights that sum to 1, oldest first.

    Raises:
        ValueError: If the factors leave [0, 1] or rise.

    Example:
        >>> [round(c, 2) for c in decay_weights([0.75, 0.5, 0.25])]
        [0.25, 0.25, 0.25, 0.25]
        >>> [round(c, 2) for c in decay_weights([1.0 - (j / 6) ** 0.5 for j in range(1, 6)])]
        [0.41, 0.17, 0.13, 0.11, 0.1, 0.09]

    Source: arXiv:2507.17634 (merging in place of a decay). Differs: taken from third-party notes on the
    paper, not checked against its text; the formula itself follows from the two lines above.
    """
    bounds = [1.0, *factors, 0.0]
    if not all(1.0 >= before >= after >= 0.0 for before, after in itertools.pairwise(bounds)):
        raise ValueError(f"factors is {list(factors)}; they must fall from at most 1 to no less than 0")
    return [before - after for before, after in itertools.pairwise(bounds)]


def shape_weights(shape: str, k: int, *, end: float = 0.0) -> list[float]:
    """Weights with which k checkpoints stand for a decay of the learning rate in a known shape.

    c = decay_weights(f(1 / k), .., f((k - 1) / k))

    The checkpoints are evenly spaced over the decay. f(p) is the shape's factor at progress p, which falls
    from 1 to `end`.

    Args:
        shape: `linear`, `cosine`, `sqrt` (known as 1-sqrt), `square` and others that fall to a given end, see
            `rewarm.schedules.phases.Phase`.
        k: Number of checkpoints K, >= 1.
        end: Factor of the learning rate where the decay ends, in [0, 1].

    Returns:
        K weights that sum to 1, oldest first.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(c, 2) for c in shape_weights("cosine", 4)]
        [0.15, 0.35, 0.35, 0.15]

    Source: arXiv:2507.17634. Differs: see `decay_weights`.
    """
    if k < 1:
        raise ValueError(f"k is {k}; there must be at least 1 checkpoint")
    schedule = Schedule([Phase(shape, end=end)], start=1.0)
    return decay_weights([schedule(j, k) for j in range(1, k)])
