"""Laws for the loss along a learning-rate schedule: what a schedule's LRs say about the loss after each step.

A law holds for one model, data set and batch size; `rewarm.schedules.law_fits` fits it to the curves of one
or two runs. It then tells the loss of another schedule, so that a decay can be chosen without training.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def _check_warmup(warmup: int, lrs: Sequence[float]) -> None:
    if not 0 <= warmup < len(lrs):
        raise ValueError(f"warmup is {warmup}; it must be in [0, {len(lrs)}), the number of steps")


def _at(values: Tensor, steps: Sequence[int] | None) -> Tensor:
    return values if steps is None else values[torch.tensor(list(steps)) - 1]


def annealing_areas(lrs: Sequence[float], warmup: int = 0, decay: float = 0.999) -> tuple[Tensor, Tensor]:
    """Forward area and annealing area of a schedule, up to and with each step.

    S1(s) = sum_i lr_i,  S2(s) = sum_i m_i,  m_i = decay * m_(i-1) + (lr_(i-1) - lr_i),  m_1 = 0

    Args:
        lrs: LR of each step. Shape (T,).
        warmup: Steps at the start that count as if they had the LR of the last of them.
        decay: lambda, in [0, 1): how fast a decrease of the LR is forgotten.

    Returns:
        S1 and S2, each float64 of shape (T,).

    Raises:
        ValueError: If warmup or decay is out of range.

    Example:
        >>> s1, s2 = annealing_areas([1.0, 1.0, 0.5, 0.0], decay=0.5)
        >>> s1.tolist(), s2.tolist()
        ([1.0, 2.0, 2.5, 2.5], [0.0, 0.0, 0.5, 1.25])

    Source: Tissue et al. 2024, arXiv:2408.11029. Differs: nothing.
    """
    _check_warmup(warmup, lrs)
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; it must be in [0, 1)")
    steady = [lrs[max(warmup - 1, 0)]] * warmup + list(lrs[warmup:])
    drops = [0.0, *(before - after for before, after in itertools.pairwise(steady))]
    momentum = itertools.accumulate(drops, lambda m, drop: decay * m + drop)
    s1, s2 = list(itertools.accumulate(steady)), list(itertools.accumulate(momentum))
    return torch.tensor(s1, dtype=torch.float64), torch.tensor(s2, dtype=torch.float64)


@dataclass(frozen=True)
class AnnealingLaw:
    """Loss as a power law in the summed LR, less a part that grows with the annealing.

    L(s) = L0 + A * S1(s) ** -alpha - C * S2(s)

    Args:
        loss0: L0, the loss that is never passed under at constant LR.
        a: A.
        alpha: Exponent, > 0; about 0.5.
        c: C, how much annealing helps.
        decay: lambda of S2, in [0, 1); the paper has 0.999.

    Example:
        >>> law = AnnealingLaw(loss0=2.0, a=1.0, alpha=0.5, c=0.1, decay=0.5)
        >>> law([1.0, 1.0, 0.5, 0.0]).tolist()[:2]
        [3.0, 2.7071067811865475]

    Source: Tissue et al. 2024, arXiv:2408.11029. It rewards very long decays too much, and holds for one
    model, data set and batch size. Differs: nothing.
    """

    loss0: float
    a: float
    alpha: float
    c: float
    decay: float = 0.999

    def __call__(self, lrs: Sequence[float], warmup: int = 0, steps: Sequence[int] | None = None) -> Tensor:
        """Return the loss after some steps, counted from 1, or after each, float64. Shape (N,) or (T,)."""
        s1, s2 = (_at(area, steps) for area in annealing_areas(lrs, warmup, self.decay))
        return self.loss0 + self.a * s1**-self.alpha - self.c * s2


class Changes(NamedTuple):
    """Where the LR changes after the warm-up, K times.

    Attributes:
        drops: By how much the LR falls, negative where it rises. Shape (K,).
        lrs: The LR after the change. Shape (K,).
        before: Summed LR of all steps before the change. Shape (K,).

    Example:
        >>> changes = changes_of(torch.tensor([1.0, 1.0, 0.25]), warmup=0)
        >>> changes.drops.tolist(), changes.lrs.tolist(), changes.before.tolist()
        ([0.75], [0.25], [2.0])

    Source: the sums of Luo et al. 2025, arXiv:2503.12811.   Differs: nothing.
    """

    drops: Tensor
    lrs: Tensor
    before: Tensor


def changes_of(lrs: Tensor, warmup: int, most: int | None = None) -> Changes:
    """Find where a schedule's LR changes.

    Args:
        lrs: LR of each step. Shape (T,).
        warmup: Steps at the start whose changes don't count, in [0, T).
        most: Take neighbouring changes together so that there are no more than this; None for all.

    Returns:
        The changes.

    Example:
        >>> [part.tolist() for part in changes_of(torch.tensor([1.0, 2.0, 2.0, 0.5]), warmup=2)]
        [[1.5], [0.5], [5.0]]

    Source: the sums of Luo et al. 2025, arXiv:2503.12811.   Differs: taking neighbouring changes together is
    ours.
    """
    sums = torch.cat([lrs.new_zeros(1), lrs.cumsum(0)])
    first = max(warmup, 1)
    drops = lrs[first - 1 : -1] - lrs[first:]
    where = drops.nonzero().flatten()
    if most is None or len(where) <= most:
        return Changes(drops[where], lrs[first + where], sums[first + where])
    groups = where.tensor_split(most)
    middle = torch.stack([group[len(group) // 2] for group in groups])
    summed = torch.stack([drops[group].sum() for group in groups])
    return Changes(summed, lrs[first + middle], sums[first + middle])


def reduction(changes: Changes, sums: Tensor, c: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """The multi-power law's reduction of the loss, without its factor B.

    r(t) = sum_k drop_k * (1 - (1 + C * lr_k ** -gamma * S_k(t)) ** -beta)

    Args:
        changes: The changes of the schedule's LR.
        sums: Summed LR of all steps up to and with each step t asked for. Shape (N,).
        c: C, a scalar > 0. Shape ().
        beta: Exponent of the reduction, a scalar > 0. Shape ().
        gamma: Exponent of the LR, a scalar > 0. Shape ().

    Returns:
        The reduction at each step. Shape (N,).

    Example:
        >>> one, lrs = torch.tensor(1.0), torch.tensor([1.0, 0.25])
        >>> reduction(changes_of(lrs, 0), lrs.cumsum(0)[1:], one, one, one)
        tensor([0.3750])

    Source: Luo et al. 2025, arXiv:2503.12811. Differs: nothing.
    """
    # An LR of 0 has no power; one so small has the same effect.
    scale = changes.lrs.clamp(min=1e-12) ** -gamma
    reach = (sums[:, None] - changes.before).clamp(min=0.0)  # 0 where the change is still to come
    return -(torch.expm1(-beta * torch.log1p(c * scale * reach)) @ changes.drops)


@dataclass(frozen=True)
class MultiPowerLaw:
    """Loss as a power law in the summed LR, less a power law for every decrease of the LR.

    L(t) = L0 + A * (S1(t) + S_W) ** -alpha - B * sum_k (lr_(k-1) - lr_k) * G(lr_k ** -gamma * S_k(t)),
    G(x) = 1 - (1 + C * x) ** -beta

    S_W is the summed LR of the warm-up, S1 that after it, S_k that from step k on.

    Args:
        loss0: L0.
        a: A.
        alpha: Exponent of the summed LR, > 0.
        b: B.
        c: C, > 0.
        beta: Exponent of the reduction, > 0.
        gamma: Exponent of the LR in it, > 0.

    Example:
        >>> law = MultiPowerLaw(loss0=2.0, a=1.0, alpha=0.5, b=1.0, c=1.0, beta=1.0, gamma=0.5)
        >>> [round(loss, 4) for loss in law([1.0, 1.0, 0.25]).tolist()]
        [3.0, 2.7071, 2.4167]

    Source: Luo et al. 2025, arXiv:2503.12811. Differs: within the warm-up, of which the paper says nothing,
    it is the power law alone.
    """

    loss0: float
    a: float
    alpha: float
    b: float
    c: float
    beta: float
    gamma: float

    def __call__(self, lrs: Sequence[float], warmup: int = 0, steps: Sequence[int] | None = None) -> Tensor:
        """Return the loss after some steps, counted from 1, or after each, float64. Shape (N,) or (T,)."""
        _check_warmup(warmup, lrs)
        rates = torch.tensor(list(lrs), dtype=torch.float64)
        sums, changes = _at(rates.cumsum(0), steps), changes_of(rates, warmup)
        c, beta, gamma = (torch.tensor(x, dtype=torch.float64) for x in (self.c, self.beta, self.gamma))
        # In parts: the whole would be a matrix of steps by changes.
        lower = torch.cat([reduction(changes, part, c, beta, gamma) for part in sums.split(256)])
        return self.loss0 + self.a * sums**-self.alpha - self.b * lower
