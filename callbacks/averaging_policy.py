"""What an average is made of, and when: the arithmetic of `CheckpointAveraging`, without any weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rewarm.callbacks.ended_steps import EndedSteps
from rewarm.checks import at_least, in_range, one_of
from rewarm.functional.averaging import debiased_decay, mean_weights, merge_decay
from rewarm.schedules.decay_weights import shape_weights

Mode = Literal["last_k", "window", "ema"]


@dataclass(frozen=True)
class AveragingPolicy:
    """Which snapshots are taken, into which row each goes, and how much of the average each row is.

    A row is a copy of all averaged weights. Mode `last_k` has a row for each snapshot, `ema` one, which is
    the average itself, and `window` two: the last whole window, if there is one, and that which grows.

    The n-th snapshot changes a row by row <- decay * row + (1 - decay) * weights, with `decay_of(n)`.

    Args:
        mode: As in `CheckpointAveraging`, like all others.
        k: Snapshots in the mean, >= 1 (not `ema`).
        every_n_steps: Optimizer steps between snapshots, >= 1; None is 1 for `ema` and 100 for the others.
        start_step: Optimizer step of the first snapshot, >= 0.
        decay: Decay of the moving average per snapshot, in [0, 1) (`ema` only).
        weights: Weights of the k snapshots, or the shape of a decay; None is the plain mean.

    Raises:
        ValueError: If an argument is out of range or has no effect in this mode.

    Example:
        >>> policy = AveragingPolicy("window", k=2)
        >>> [policy.decay_of(number) for number in (1, 2, 3)]
        [0.0, 0.5, 0.0]
        >>> policy.shares(num_snapshots=3, num_rows=2)
        [1.0, 0.0]
    """

    mode: Mode = "last_k"
    k: int = 6
    every_n_steps: int | None = None
    start_step: int = 0
    decay: float = 0.999
    weights: Sequence[float] | str | None = None

    def __post_init__(self) -> None:
        """Check the arguments, and fill in `every_n_steps`."""
        one_of(get_args(Mode), mode=self.mode)
        at_least(1, k=self.k)
        in_range("[0, 1)", decay=self.decay)
        at_least(0, start_step=self.start_step)
        if self.mode == "ema" and self.k != 6:
            raise ValueError(f"k is {self.k}; mode 'ema' does not have it")
        if self.mode != "ema" and self.decay != 0.999:
            raise ValueError(f"decay is {self.decay}; only mode 'ema' has it")
        if self.weights is not None and self.mode == "ema":
            raise ValueError(f"weights is {self.weights!r}; mode 'ema' has none but its decay")
        if isinstance(self.weights, str):
            shape_weights(self.weights, self.k)
        elif self.weights is not None:
            row = list(self.weights)
            if len(row) != self.k or min(row) < 0.0 or not 0.0 < row[-1] <= sum(row) < math.inf:
                raise ValueError(
                    f"weights is {row}; it must be {self.k} numbers (k), 0 or more, the last above 0"
                )
        if self.every_n_steps is None:
            object.__setattr__(self, "every_n_steps", 1 if self.mode == "ema" else 100)
        at_least(1, every_n_steps=self.every_n_steps)

    @property
    def max_rows(self) -> int:
        """Most rows that are kept."""
        return {"last_k": self.k, "window": 2, "ema": 1}[self.mode]

    def is_due(self, steps: EndedSteps) -> bool:
        """Whether the steps that have just ended call for a snapshot."""
        assert self.every_n_steps is not None
        return steps.reached(self.every_n_steps, self.start_step) > 0

    def decay_of(self, number: int) -> float:
        """Return how much of its row the `number`-th snapshot leaves, in [0, 1)."""
        if self.mode == "ema":
            return debiased_decay(self.decay, number)
        return merge_decay(self._weights_of(self.k), number) if self.mode == "window" else 0.0

    def opens_row(self, number: int) -> bool:
        """Whether the `number`-th snapshot begins a row rather than changing the newest."""
        if self.mode == "window":
            return (number - 1) % self.k == 0
        return self.mode == "last_k" or number == 1

    def shares(self, num_snapshots: int, num_rows: int) -> list[float]:
        """Return how much of the average each row is, oldest first.

        Args:
            num_snapshots: Snapshots so far.
            num_rows: Rows that there are.
        """
        if not num_rows:
            return []
        if self.mode == "last_k":
            return self._weights_of(num_rows)
        newest_is_whole = self.mode == "ema" or num_snapshots % self.k == 0
        whole = num_rows - 1 if newest_is_whole else 0
        return [float(row == whole) for row in range(num_rows)]

    def in_average(self, num_snapshots: int, num_rows: int) -> int:
        """Return how many snapshots are in the average.

        Args:
            num_snapshots: Snapshots so far.
            num_rows: Rows that there are.
        """
        if self.mode == "ema":
            return num_snapshots
        return min(num_snapshots, self.k) if self.mode == "window" else num_rows

    @property
    def window(self) -> list[float] | None:
        """The weights within a window, which a resumed run must have, too; None in the other modes."""
        return self._weights_of(self.k) if self.mode == "window" else None

    def _weights_of(self, number: int) -> list[float]:
        if self.weights is None:
            return mean_weights(number)
        if isinstance(self.weights, str):
            return shape_weights(self.weights, number)
        newest = self.weights[-number:]
        return [weight / sum(newest) for weight in newest]
