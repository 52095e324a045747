"""Schedules refined from the gradient norms of an earlier run, and those norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Literal

from rewarm.schedules.phases import Phase, Schedule


def refined(
    gradient_norms: Sequence[float],
    norm: Literal["l1", "l2"] = "l1",
    smoothing: float = 0.1,
    points: int = 200,
) -> Schedule:
    """Schedule for repeating a run, from the gradient norms which that run had.

    factor_t = w_t * sum(w_p for p > t) / max,  w = 1 / norm (L1) or 1 / norm ** 2 (L2), norms smoothed

    Large gradients at the start become a warm-up, and the decay follows. Constant norms give a straight line
    from 1 to 0. The repeated run is to be like the one that was logged: same model, data, batch size, number
    of steps.

    Args:
        gradient_norms: Norms of the whole gradient before clipping, evenly spaced over the run from its first
            step to its last, at least 2, all finite and > 0. Every step's, or what was logged. Shape (N,).
        norm: Kind of these norms: "l1" suits Adam, "l2" suits SGD.
        smoothing: Width of the median filter as a share of the run, in [0, 1).
        points: Number of straight pieces that the curve is made of, >= 2.

    Returns:
        The schedule, which ends at 0 and fits runs of any length.

    Raises:
        ValueError: If an argument is out of range or a norm is not finite and > 0.

    Example:
        >>> schedule = refined([4.0] * 10 + [1.0] * 90, norm="l1", points=100)
        >>> [round(schedule(n, 100), 2) for n in (1, 20, 60, 100)]
        [0.26, 0.9, 0.45, 0.0]

    Source: Defazio et al. 2023, arXiv:2310.07831: the weights, the sum, the median filter over a tenth of
    the run with the end mirrored. Differs: at the start the filter's window is cut off; norms are taken to
    `points` + 1 points by straight lines; the largest factor is 1.
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm is {norm!r}; it must be 'l1' or 'l2'")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}; it is a share of the run, in [0, 1)")
    if isinstance(points, bool) or points < 2:
        raise ValueError(f"points is {points}; it must be >= 2")
    if len(gradient_norms) < 2:
        raise ValueError(f"gradient_norms has {len(gradient_norms)} entries; there must be at least 2")
    for place, value in enumerate(gradient_norms):
        if not 0 < value < math.inf:
            raise ValueError(f"gradient_norms has {value} at place {place}; all must be finite and > 0")
    smooth = _at_points(_median_filter(gradient_norms, smoothing), points + 1)
    weights = [value ** (-1 if norm == "l1" else -2) for value in smooth]
    factors, rest = [0.0], 0.0
    for this, after in zip(weights[-2::-1], weights[:0:-1], strict=True):
        rest += after
        factors.append(this * rest)
    factors = [factor / max(factors) for factor in reversed(factors)]
    lengths = [1 / points] * (points - 1)
    phases = [Phase("linear", length, end) for length, end in zip([*lengths, None], factors[1:], strict=True)]
    return Schedule(phases, start=factors[0])


def _median_filter(values: Sequence[float], share: float) -> list[float]:
    half = int(share * len(values) / 2)
    padded = [*values, *reversed(values[-1 - half : -1])]
    return [median(padded[max(0, t - half) : t + half + 1]) for t in range(len(values))]


def _at_points(values: Sequence[float], number: int) -> list[float]:
    """Values at evenly spaced points from the first to the last, by straight lines between them."""
    found = []
    for place in range(number):
        where = place * (len(values) - 1) / (number - 1)
        low = min(int(where), len(values) - 2)
        found.append(values[low] + (where - low) * (values[low + 1] - values[low]))
    return found
