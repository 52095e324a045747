"""How much of what a model had learned about a domain it has lost again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

When = TypeVar("When")


@dataclass(frozen=True)
class LossHistory(Generic[When]):
    """What became of the validation loss on one domain.

    Attributes:
        before: When the loss was first measured, and what it was, in nats.
        best: When the loss was lowest, and what it was.
        now: When the loss was last measured, and what it is.

    Example:
        >>> LossHistory(before=(0, 1.5), best=(100, 1.25), now=(200, 2.25)).forgotten
        1.0

    Source: see `loss_history`.
    """

    before: tuple[When, float]
    best: tuple[When, float]
    now: tuple[When, float]

    @property
    def forgotten(self) -> float:
        """How far the loss is above the lowest it has been, in nats, >= 0."""
        return self.now[1] - self.best[1]


def loss_history(points: Sequence[tuple[When, float]]) -> LossHistory[When]:
    """Find the first, the lowest and the last of a domain's losses.

    forgotten = now - best

    Args:
        points: When each loss was measured (a step, or the name of a stage) and what the loss was, in order,
            at least one. Losses that are not finite are never the best.

    Returns:
        The history. Its `forgotten` is 0 where the loss has never been lower than it is now.

    Raises:
        ValueError: If there is no point.

    Example:
        >>> history = loss_history([(0, 1.5), (100, 1.25), (200, 2.25)])
        >>> history.before, history.best, history.now, history.forgotten
        ((0, 1.5), (100, 1.25), (200, 2.25), 1.0)

    Source: Chaudhry et al. 2018, arXiv:1801.10112, section 3.2 (the best of the past less the present, of
    accuracies after each task). Differs: of losses, whose sign is the other; the present counts among the
    best, so nothing is ever below 0.
    """
    if not points:
        raise ValueError("points is empty; there must be at least one loss")
    best = min(points, key=lambda point: point[1] if math.isfinite(point[1]) else math.inf)
    return LossHistory(points[0], best, points[-1])
