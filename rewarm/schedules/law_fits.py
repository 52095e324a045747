"""Fits of the loss laws to the curves of runs, and predictions with an error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rewarm.schedules.loss_laws import (
    AnnealingLaw,
    MultiPowerLaw,
    annealing_areas,
    changes_of,
    reduction,
)

Law: TypeAlias = AnnealingLaw | MultiPowerLaw

# Steps over which the annealing law forgets are 1 / (1 - decay): 10 to 2,000.
_DECAYS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)

# Huber's delta on the logarithm of the loss: both papers'.
_DELTA = 1e-3

# An objective worse than any: off by a factor of e at every point is about 1e3.
_FAR = 1e6

# Keeps the logarithms of parameters that the curves say nothing about near where they began.
_PULL = 1e-6

# Changes of the LR that a fit of the multi-power law sums over; more are taken together.
_MOST_CHANGES = 300


@dataclass(frozen=True)
class Curve:
    """The loss of one run, where it was measured, and the learning rate of all its steps.

    Args:
        lrs: LR of each optimizer step from the first on, >= 0, not all 0. Shape (T,).
        steps: After which steps the loss is known, ascending, from 1 to T. Shape (N,).
        losses: The loss there, > 0. Shape (N,).
        warmup: Steps of warm-up at the start, in [0, T).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> Curve(lrs=[0.5, 1.0, 1.0, 0.5], steps=[2, 4], losses=[4.0, 3.5], warmup=2).warmup
        2

    Source: ours.
    """

    lrs: Sequence[float]
    steps: Sequence[int]
    losses: Sequence[float]
    warmup: int = 0

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.losses) or not self.steps:
            raise ValueError(
                f"steps has {len(self.steps)} entries and losses {len(self.losses)}; there must be as many of"
                " each, and some"
            )
        if not all(0 <= lr < math.inf for lr in self.lrs) or not any(self.lrs):
            raise ValueError("lrs must be finite and >= 0, and not all 0")
        if list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1 or self.steps[-1] > len(self.lrs):
            raise ValueError(f"steps must ascend within 1 and {len(self.lrs)}, the number of lrs")
        if not all(0 < loss < math.inf for loss in self.losses):
            raise ValueError("losses must be finite and > 0")
        if not 0 <= self.warmup < len(self.lrs):
            raise ValueError(
                f"warmup is {self.warmup}; it must be in [0, {len(self.lrs)}), the number of lrs"
            )


def fit_annealing_law(
    curves: Sequence[Curve], decay: float | None = 0.999, start: AnnealingLaw | None = None
) -> AnnealingLaw:
    """Fit the annealing law to one or more curves.

    min over L0, A, alpha, C > 0 of the mean of Huber(log L(s) - log loss), delta = 1e-3

    Args:
        curves: At least one with a decrease of the LR after its warm-up.
        decay: lambda. None: the best of eight from 0.9 to 0.9995, for runs much shorter than 1,000 steps.
        start: Where to begin, with its decay; None for a grid.

    Returns:
        The law.

    Raises:
        ValueError: If the curves have fewer than 8 points, or no LR that decreases.

    Example:
        >>> lrs = [1e-3] * 100 + [1e-3 * (1 - n / 50) for n in range(50)]
        >>> true = AnnealingLaw(loss0=2.0, a=0.3, alpha=0.5, c=20.0, decay=0.9)
        >>> steps = list(range(10, 150, 5))
        >>> curve = Curve(lrs, steps, true(lrs, steps=steps).tolist())
        >>> round(fit_annealing_law([curve], decay=0.9).c, 2)
        20.0

    Source: Tissue et al. 2024, arXiv:2408.11029. Differs: L-BFGS with positive parameters from starts of
    linear least squares, where the paper has L-BFGS-B from a grid; choosing lambda is ours, and so is a weak
    pull to the starts, for parameters that the curves don't determine.
    """
    _check_curves(curves)
    if start is None and decay is None:
        laws = [fit_annealing_law(curves, decay=one) for one in _DECAYS]
        return min(laws, key=lambda law: _misfit(law, curves))
    decay = start.decay if start is not None else decay
    assert decay is not None
    peak = max(max(curve.lrs) for curve in curves)
    areas = [annealing_areas(curve.lrs, curve.warmup, decay) for curve in curves]
    s1, s2 = (
        torch.cat([area[i][_places(curve)] for area, curve in zip(areas, curves, strict=True)]) / peak
        for i in (0, 1)
    )
    losses = _all_losses(curves)

    def features(alpha: float) -> Tensor:
        return torch.stack([torch.ones_like(s1), s1**-alpha, -s2], dim=1)

    def law(theta: Tensor) -> Tensor:
        loss0, a, alpha, c = theta.exp()
        return loss0 + a * s1**-alpha - c * s2

    if start is not None:
        starts = [[start.loss0, start.a * peak**-start.alpha, start.alpha, start.c * peak]]
    else:
        starts = []
        for alpha in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0):
            loss0, a, c = _least_squares(features(alpha), losses)
            starts.append([loss0, a, alpha, c])
    loss0, a, alpha, c = _refine(law, losses, starts)
    return AnnealingLaw(loss0, a * peak**alpha, alpha, c / peak, decay)


def fit_multi_power_law(curves: Sequence[Curve], start: MultiPowerLaw | None = None) -> MultiPowerLaw:
    """Fit the multi-power law to some curves.

    min over all seven parameters > 0 of the mean of Huber(log L(t) - log loss), delta = 1e-3

    Args:
        curves: At least one with a decrease of the LR after its warm-up; a constant, a cosine and one with a
            sudden drop tell most.
        start: Where to begin; None for a grid.

    Returns:
        The law.

    Raises:
        ValueError: If the curves have fewer than 8 points, or no LR that decreases.

    Example:
        >>> lrs = [1e-3] * 100 + [1e-3 * (1 - n / 50) for n in range(50)]
        >>> true = MultiPowerLaw(2.0, 0.1, 0.4, 200.0, 2.0, 0.6, 0.6)
        >>> steps = list(range(10, 150, 5))
        >>> curve = Curve(lrs, steps, true(lrs, steps=steps).tolist())
        >>> abs(float(fit_multi_power_law([curve], start=true)(lrs)[-1] - true(lrs)[-1])) < 1e-4
        True

    Source: Luo et al. 2025, arXiv:2503.12811. Differs: the optimizer, its starts and its pull are ours, as in
    `fit_annealing_law`; of more than 300 changes of a curve's LR, neighbours are taken together.
    """
    _check_curves(curves)
    peak = max(max(curve.lrs) for curve in curves)
    parts, losses = [], _all_losses(curves)
    for curve in curves:
        rates = torch.tensor(list(curve.lrs), dtype=torch.float64) / peak
        sums = rates.cumsum(0)[_places(curve)]
        parts.append((sums, changes_of(rates, curve.warmup, _MOST_CHANGES)))
    every = torch.cat([sums for sums, _ in parts])

    def reduced(c: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
        return torch.cat([reduction(changes, sums, c, beta, gamma) for sums, changes in parts])

    def law(theta: Tensor) -> Tensor:
        loss0, a, alpha, b, c, beta, gamma = theta.exp()
        return loss0 + a * every**-alpha - b * reduced(c, beta, gamma)

    if start is not None:
        a, c = start.a * peak**-start.alpha, start.c * peak ** (1 - start.gamma)
        starts = [[start.loss0, a, start.alpha, start.b * peak, c, start.beta, start.gamma]]
    else:
        starts = []
        for c, beta, gamma in itertools.product((0.003, 0.03, 0.3), (0.3, 0.6), (0.4, 0.7)):
            lower = reduced(*torch.tensor([c, beta, gamma], dtype=torch.float64))
            for alpha in (0.2, 0.4, 0.7):
                columns = torch.stack([torch.ones_like(every), every**-alpha, -lower], dim=1)
                loss0, a, b = _least_squares(columns, losses)
                starts.append([loss0, a, alpha, b, c, beta, gamma])
    loss0, a, alpha, b, c, beta, gamma = _refine(law, losses, starts)
    return MultiPowerLaw(loss0, a * peak**alpha, alpha, b / peak, c * peak ** (gamma - 1), beta, gamma)


# --- fitting ------------------------------------------------------------------------------------------------


def _check_curves(curves: Sequence[Curve]) -> None:
    points = sum(len(curve.steps) for curve in curves)
    if points < 8:
        raise ValueError(f"curves have {points} points together; a fit needs at least 8")
    falls = [
        any(after < before for before, after in itertools.pairwise(curve.lrs[max(curve.warmup - 1, 0) :]))
        for curve in curves
    ]
    if not any(falls):
        raise ValueError(
            "curves have no LR that decreases after the warm-up, so what a decrease does is unknown"
        )


def _places(curve: Curve) -> Tensor:
    return torch.tensor(list(curve.steps)) - 1


def _all_losses(curves: Sequence[Curve]) -> Tensor:
    return torch.tensor([loss for curve in curves for loss in curve.losses], dtype=torch.float64)


def _least_squares(columns: Tensor, losses: Tensor) -> list[float]:
    """Coefficients of the columns that fit the losses, made positive: a start, no more."""
    found = torch.linalg.lstsq(columns, losses[:, None], driver="gelsd").solution.flatten()
    least = 1e-3 * losses.min() / columns.abs().amax(dim=0).clamp(min=1e-12)
    return torch.maximum(found, least).tolist()


def _objective(predicted: Tensor, losses: Tensor) -> Tensor:
    # A trial of the line search may predict losses below 0.
    distance = predicted.clamp(min=1e-3 * float(losses.min())).log() - losses.log()
    return torch.nn.functional.huber_loss(distance, torch.zeros_like(distance), delta=_DELTA) / _DELTA**2


def _refine(law: Callable[[Tensor], Tensor], losses: Tensor, starts: list[list[float]]) -> list[float]:
    """Parameters, all positive, that minimise the objective, from the best three starts."""
    thetas = [torch.tensor(start, dtype=torch.float64).log() for start in starts]
    thetas.sort(key=lambda theta: float(_objective(law(theta), losses)))
    found = []
    for begin in thetas[:3]:
        theta = begin.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [theta],
            max_iter=300,
            tolerance_grad=1e-8,
            tolerance_change=1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        best = (math.inf, begin.exp().tolist())

        def closure(
            theta: Tensor = theta, begin: Tensor = begin, optimizer: torch.optim.LBFGS = optimizer
        ) -> Tensor:
            nonlocal best
            optimizer.zero_grad()
            value = _objective(law(theta), losses) + _PULL * (theta - begin).square().sum()
            if not value.isfinite():  # a trial of the line search went too far; it cannot turn back from inf
                return value.new_tensor(_FAR)
            value.backward()
            best = min(best, (float(value.detach()), theta.detach().exp().tolist()))
            return value

        optimizer.step(closure)
        found.append(best)
    return min(found)[1]


def _misfit(law: Law, curves: Sequence[Curve]) -> float:
    predicted = [law(curve.lrs, curve.warmup, curve.steps) for curve in curves]
    return float(_objective(torch.cat(predicted), _all_losses(curves)))


# --- prediction ---------------------------------------------------------------------------------------------


def relative_errors(law: Law, curve: Curve) -> Tensor:
    """By how much a law's prediction is off at each point of a measured curve.

    e = L(s) / loss - 1

    Args:
        law: A fitted law.
        curve: Curve of a run of the same model, data and batch size.

    Returns:
        Relative errors, float64. Shape (N,).

    Example:
        >>> law = AnnealingLaw(loss0=2.0, a=1.0, alpha=0.5, c=0.0)
        >>> relative_errors(law, Curve(lrs=[1.0], steps=[1], losses=[2.0])).tolist()
        [0.5]

    Source: how both papers measure. Differs: nothing.
    """
    losses = torch.tensor(list(curve.losses), dtype=torch.float64)
    return law(curve.lrs, curve.warmup, curve.steps) / losses - 1.0


def fit_error(law: Law, curves: Sequence[Curve]) -> float:
    """Root mean square of a law's relative errors on some curves.

    Args:
        law: A law, fitted to these curves or not.
        curves: At least one.

    Returns:
        The error, >= 0, as a share of the loss.

    Example:
        >>> law = AnnealingLaw(loss0=2.0, a=1.0, alpha=0.5, c=0.0)
        >>> fit_error(law, [Curve(lrs=[1.0], steps=[1], losses=[2.0])])
        0.5

    Source: a standard measure. Differs: nothing.
    """
    errors = torch.cat([relative_errors(law, curve) for curve in curves])
    return float(errors.square().mean().sqrt())


class Prediction(NamedTuple):
    """A predicted loss with its error.

    Attributes:
        loss: Loss after the last step, in nats.
        error: About one standard deviation of the loss, in nats.

    Example:
        >>> prediction = Prediction(loss=2.5, error=0.01)
        >>> prediction.loss + 2 * prediction.error
        2.52

    Source: ours.
    """

    loss: float
    error: float


def predict_loss(
    law: Law, curves: Sequence[Curve], lrs: Sequence[float], warmup: int = 0, blocks: int = 5
) -> Prediction:
    """Predict the last loss of a schedule that was not run, with an error.

    error ** 2 = jackknife variance + (fit_error * loss) ** 2

    For the jackknife every curve is cut into blocks of neighbouring points, which are left out of the fit one
    at a time. The error knows of noise and of what the curves leave open; it knows nothing of what the law
    itself gets wrong, which shows on a curve that was held out (`relative_errors`).

    Args:
        law: A law that was fitted to the curves.
        curves: The curves that the law was fitted to.
        lrs: LR of each step of the new schedule. Shape (T,).
        warmup: Steps of warm-up of the new schedule.
        blocks: Parts that each curve is cut into, >= 2.

    Returns:
        The loss and its error.

    Raises:
        ValueError: If an argument is out of range, or the curves without a block don't determine the law.

    Example:
        >>> lrs = [1e-3] * 100 + [1e-3 * (1 - n / 50) for n in range(50)]
        >>> true = AnnealingLaw(loss0=2.0, a=0.3, alpha=0.5, c=20.0, decay=0.9)
        >>> steps = list(range(10, 150, 5))
        >>> curve = Curve(lrs, steps, true(lrs, steps=steps).tolist())
        >>> longer = [1e-3] * 200 + [1e-3 * (1 - n / 50) for n in range(50)]
        >>> fitted = fit_annealing_law([curve], decay=0.9)
        >>> round(predict_loss(fitted, [curve], longer).loss - float(true(longer)[-1]), 3)
        0.0

    Source: the laws are from arXiv:2408.11029 and arXiv:2503.12811; the delete-a-group jackknife is a
    standard method. Differs: putting them together is ours.
    """
    if blocks < 2:
        raise ValueError(f"blocks is {blocks}; it must be >= 2")
    last, others = [len(lrs)], []
    loss = float(law(lrs, warmup, last))
    for some in _without_blocks(curves, blocks):
        if isinstance(law, AnnealingLaw):
            other: Law = fit_annealing_law(some, start=law)
        else:
            other = fit_multi_power_law(some, start=law)
        others.append(float(other(lrs, warmup, last)))
    mean = math.fsum(others) / len(others)
    variance = (len(others) - 1) / len(others) * math.fsum((other - mean) ** 2 for other in others)
    return Prediction(loss, math.sqrt(variance + (fit_error(law, curves) * loss) ** 2))


def _without_blocks(curves: Sequence[Curve], blocks: int) -> list[list[Curve]]:
    """The curves, each time without one block of neighbouring points of one of them."""
    found = []
    for number, curve in enumerate(curves):
        bounds = [round(block * len(curve.steps) / blocks) for block in range(blocks + 1)]
        for low, high in itertools.pairwise(bounds):
            steps = [*curve.steps[:low], *curve.steps[high:]]
            losses = [*curve.losses[:low], *curve.losses[high:]]
            if 0 < len(steps) < len(curve.steps):
                left = Curve(curve.lrs, steps, losses, curve.warmup)
                found.append([*curves[:number], left, *curves[number + 1 :]])
    return found
