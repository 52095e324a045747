"""Live scores: what a curriculum makes of what training sees of its examples.

Each class has the same five methods; a curriculum (`rewarm.curriculum.curriculum`) calls them, and its gate
looks at the result. All are the same on every rank if each rank is told the same.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from rewarm.checks import in_range
from rewarm.curriculum.gates import Band
from rewarm.curriculum.item_response import estimate_ability


class LiveScores(Protocol):
    """Scores of examples that follow the training.

    Example:
        >>> live: LiveScores = RunningScore()
        >>> live.observe(7, 0.25)
        >>> live.score(7)
        0.25

    Source: ours.
    """

    def observe(self, example: int, seen: float) -> None:
        """Take in what training saw of an example."""

    def score(self, example: int, difficulty: float = math.nan) -> float:
        """Return the live score of an example that has this score of its own; NaN if it is unknown."""

    def forget(self, example: int) -> None:
        """Let an example that was refused count as unknown again."""

    def begin_pass(self, difficulties: Sequence[float] | None) -> None:
        """Get ready for the next pass over the examples, which have these scores of their own."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes, as plain Python values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class RunningScore:
    """Running mean of what training sees: new = smoothing * old + (1 - smoothing) * seen.

    Args:
        smoothing: Weight of the old value, in [0, 1). 0 keeps the last.

    Raises:
        ValueError: If smoothing is out of range.

    Example:
        >>> live = RunningScore(smoothing=0.5)
        >>> live.observe(7, 1.0)
        >>> live.observe(7, 0.0)
        >>> live.score(7), live.score(8)
        (0.5, nan)

    Source: ours, an exponential moving average.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        in_range("[0, 1)", smoothing=smoothing)
        self.smoothing = smoothing
        self._mean: dict[int, float] = {}

    def observe(self, example: int, seen: float) -> None:
        """Take in what training saw of an example: a loss, a pass rate."""
        old = self._mean.get(example)
        mean = seen if old is None else self.smoothing * old + (1.0 - self.smoothing) * seen
        self._mean[example] = mean

    def score(self, example: int, difficulty: float = math.nan) -> float:
        """Return the running mean, NaN before the example was seen."""
        return self._mean.get(example, math.nan)

    def forget(self, example: int) -> None:
        """Let an example count as not seen."""
        self._mean.pop(example, None)

    def begin_pass(self, difficulties: Sequence[float] | None) -> None:
        """Do nothing: the mean goes on across passes."""

    def state_dict(self) -> dict[str, Any]:
        """Return the means."""
        return {"mean": dict(self._mean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._mean = _with_numbers(state["mean"])


class ScoreChange(RunningScore):
    """How far the running mean has fallen since the example was first seen: first - mean.

    Args:
        smoothing: Weight of the old value in the running mean, in [0, 1). 0 keeps the last.

    Raises:
        ValueError: If smoothing is out of range.

    Example:
        >>> live = ScoreChange()
        >>> live.observe(7, 3.0)
        >>> live.observe(7, 1.0)
        >>> live.score(7)
        2.0

    Source: the delta-loss selector of DataFlex, arXiv:2603.26164, in its repository. Differs: losses are
    those that training saw, not of passes over all data.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__(smoothing)
        self._first: dict[int, float] = {}

    def observe(self, example: int, seen: float) -> None:
        """Take in what training saw of an example."""
        super().observe(example, seen)
        self._first.setdefault(example, seen)

    def score(self, example: int, difficulty: float = math.nan) -> float:
        """Return the fall, 0 after one observation, NaN before."""
        return self._first.get(example, math.nan) - super().score(example)

    def state_dict(self) -> dict[str, Any]:
        """Return the means and the first values."""
        return super().state_dict() | {"first": dict(self._first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self._first = _with_numbers(state["first"])


class Ability:
    """How far an example's difficulty is above the model's ability: difficulty - ability.

    The ability is estimated when a pass begins, from the last answer to each example since the pass before.
    An estimate that is not the best so far raises it by `rise` instead, so that what is within reach grows
    also when the model doesn't get better. `AtLeast(Band(high=0.0), 100)` is the gate that goes with it.

    Args:
        correct: Which of the values that training sees count as a correct answer, such as `Band(high=0.5)` of
            a loss, or `Band(low=0.5)` of a pass rate.
        rise: Added to the ability when the estimate is not the best, > 0. 0.1 for GLUE, 1 for GSM8K.
        start: Ability of the first pass.
        prior_std: Deviation of the prior of the estimate, see
            `rewarm.curriculum.item_response.estimate_ability`.

    Attributes:
        ability: What the scores are measured against now.

    Raises:
        ValueError: If rise is not above 0.

    Example:
        >>> live = Ability(correct=Band(high=0.5))
        >>> live.begin_pass([-1.0, 0.0, 1.0])
        >>> for example, loss in enumerate([0.1, 0.2, 2.0]):
        ...     live.observe(example, loss)
        >>> live.begin_pass([-1.0, 0.0, 1.0])
        >>> round(live.ability, 4), round(live.score(2, difficulty=1.0), 4)
        (0.3048, 0.6952)

    Source: PUDF, arXiv:2408.05326, in its repository. Differs: the answers are those of training, where the
    repository asks again before each epoch; the window is a gate's.
    """

    def __init__(self, correct: Band, rise: float = 0.1, start: float = 0.0, prior_std: float = 1.0) -> None:
        in_range("(0, inf)", rise=rise)
        self.correct, self.rise, self.prior_std = correct, rise, prior_std
        self.ability, self._best = start, -math.inf
        self._answers: dict[int, bool] = {}
        self._passes = 0

    def observe(self, example: int, seen: float) -> None:
        """Take in what training saw of an example."""
        self._answers[example] = self.correct(seen)

    def score(self, example: int, difficulty: float = math.nan) -> float:
        """Return how far above the ability an example is."""
        return difficulty - self.ability

    def forget(self, example: int) -> None:
        """Do nothing: the ability decides when the example is tried again."""

    def begin_pass(self, difficulties: Sequence[float] | None) -> None:
        """Estimate the ability.

        Raises:
            ValueError: If the examples have no scores of their own.
        """
        if difficulties is None:
            raise ValueError("an ability needs the difficulties of the examples: set the score to order by")
        self._passes += 1
        if self._passes == 1:
            return
        known = [i for i in sorted(self._answers) if math.isfinite(difficulties[i])]
        answers = torch.tensor([self._answers[i] for i in known], dtype=torch.float64)
        b = torch.tensor([difficulties[i] for i in known], dtype=torch.float64)
        estimate = estimate_ability(answers, b, prior_std=self.prior_std) if known else -math.inf
        if estimate > self._best:
            self.ability = self._best = estimate
        else:
            self.ability += self.rise
        self._answers = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the ability and the answers since it was estimated."""
        return {
            "ability": self.ability,
            "best": self._best,
            "passes": self._passes,
            "answers": dict(self._answers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.ability, self._best, self._passes = state["ability"], state["best"], state["passes"]
        self._answers = _with_numbers(state["answers"])


def _with_numbers(values: dict[Any, Any]) -> dict[int, Any]:
    return {int(example): value for example, value in values.items()}  # JSON makes text of keys
