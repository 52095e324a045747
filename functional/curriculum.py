"""Curricula: in which order examples come, how many are visible at a step, and which are let in.

A curriculum is an *order* (a score per example, ascending or descending), a *pacing* function (which share of
the ordered examples is visible), and a *gate* (which scores are admitted). `Curriculum` puts the three
together and owns what changes: the examples not yet drawn in this pass, the live scores, the random state. It
has four hooks, the same for every training method:

    ids = curriculum.propose(n, step)        # which examples next
    curriculum.observe(ids, scores)          # what training saw of them
    admitted = curriculum.admit(scores)      # which of them may train
    state = curriculum.state_dict()

Every rank holds the same curriculum and calls it with the same arguments, so no rank ever has to ask another.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Pacing = Callable[[int], float]
"""Optimizer steps (or whatever the caller counts) -> visible share of the ordered examples, in (0, 1]."""


def _check_start(start: float, total_steps: int) -> None:
    if not 0.0 < start <= 1.0:
        raise ValueError(f"start is {start}; it is the visible share at step 0 and must be in (0, 1]")
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}; it must be at least 1")


@dataclass(frozen=True)
class RootPacing:
    """Visible share that grows like the p-th root of time.

    c(t) = min(1, (t * (1 - c0^p) / T + c0^p)^(1/p))

    Args:
        total_steps: Step T at which everything is visible, >= 1.
        start: Share c0 visible at step 0, in (0, 1]. The paper uses 0.01.
        power: Exponent p >= 1; 2 is the paper's "square root" competence, 1 is linear.

    Example:
        >>> pacing = RootPacing(total_steps=100, start=0.1)
        >>> round(pacing(0), 3), round(pacing(50), 3), pacing(100)
        (0.1, 0.711, 1.0)

    Source: Platanios et al. 2019, arXiv:1903.09848. Differs: nothing.
    """

    total_steps: int
    start: float = 0.01
    power: float = 2.0

    def __post_init__(self) -> None:
        _check_start(self.start, self.total_steps)
        if not self.power >= 1.0:
            raise ValueError(f"power is {self.power}; it must be at least 1")

    def __call__(self, step: int) -> float:
        """Return the visible share at a step >= 0, in (0, 1]."""
        if step >= self.total_steps:
            return 1.0
        base = self.start**self.power
        return min(1.0, (step * (1.0 - base) / self.total_steps + base) ** (1.0 / self.power))


@dataclass(frozen=True)
class LinearPacing:
    """Visible share that grows linearly: c(t) = min(1, t * (1 - c0) / T + c0).

    Args:
        total_steps: Step T at which everything is visible, >= 1.
        start: Share c0 visible at step 0, in (0, 1]. The paper uses 0.01.

    Example:
        >>> round(LinearPacing(total_steps=10, start=0.2)(5), 6)
        0.6

    Source: Platanios et al. 2019, arXiv:1903.09848. Differs: nothing.
    """

    total_steps: int
    start: float = 0.01

    def __post_init__(self) -> None:
        _check_start(self.start, self.total_steps)

    def __call__(self, step: int) -> float:
        """Return the visible share at a step >= 0, in (0, 1]."""
        return 1.0 if step >= self.total_steps else step * (1.0 - self.start) / self.total_steps + self.start


@dataclass(frozen=True)
class StagedPacing:
    """Visible share that jumps at given steps ("baby steps": stages add up).

    Args:
        boundaries: Steps at which the next share begins, ascending, all > 0.
        shares: Visible shares, one more than boundaries, ascending, in (0, 1].

    Example:
        >>> pacing = StagedPacing(boundaries=[100, 200], shares=[0.25, 0.5, 1.0])
        >>> pacing(99), pacing(100), pacing(500)
        (0.25, 0.5, 1.0)

    Source: Bengio et al. 2009 (curriculum learning), in the cumulative form of Spitkovsky et al. 2010.
    Differs: the stages are given as steps.
    """

    boundaries: Sequence[int]
    shares: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.boundaries) + 1:
            raise ValueError(
                f"shares has {len(self.shares)} entries; {len(self.boundaries)} boundaries need one more"
            )
        if list(self.boundaries) != sorted(set(self.boundaries)) or any(b < 1 for b in self.boundaries):
            raise ValueError(f"boundaries is {list(self.boundaries)}; it must ascend and start above 0")
        if list(self.shares) != sorted(self.shares) or not all(0.0 < s <= 1.0 for s in self.shares):
            raise ValueError(f"shares is {list(self.shares)}; it must ascend within (0, 1]")

    def __call__(self, step: int) -> float:
        """Return the visible share at a step >= 0, in (0, 1]."""
        return self.shares[sum(step >= boundary for boundary in self.boundaries)]


@dataclass(frozen=True)
class Band:
    """A gate that admits scores within [low, high]; unknown scores (NaN) are admitted.

    Args:
        low: Smallest score admitted.
        high: Largest score admitted, >= low.

    Example:
        >>> band = Band(0.25, 0.75)
        >>> [band(score) for score in (0.0, 0.25, 0.5, 1.0, float("nan"))]
        [False, True, True, False, True]

    Source: balanced online difficulty filtering, arXiv:2504.03380. Differs: the thresholds are the caller's;
    the paper's own are not known to us.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; low must not be above high")

    def __call__(self, score: float) -> bool:
        """Return whether the score is admitted."""
        return math.isnan(score) or self.low <= score <= self.high


class Curriculum:
    """Draws example numbers 0..N-1 in an order, at a pace, through a gate, and remembers where it is.

    Without pacing and with a sorted order, a pass goes through the examples in that order. Otherwise each
    draw is uniform over the visible examples that this pass has not drawn yet; examples that become visible
    join the running pass.

    Args:
        num_examples: N, at least 1.
        scores: Difficulty per example, NaN where unknown (sorted last). They go with a sorted order.
        order: `shuffled`, `ascending` or `descending` by score. Equal scores keep the order of the data.
        pacing: Visible share as a function of the step; None shows everything.
        gate: Admits live scores; None admits everything, and examples not observed yet are always admitted.
            An example whose live score it refuses is passed over once; its score is then forgotten, so that
            it gets another chance in the next pass.
        smoothing: Weight of the old value when a live score is observed again, in [0, 1).
        seed: Of the draws.

    Example:
        >>> curriculum = Curriculum(4, scores=[3.0, 1.0, 2.0, 0.0], order="ascending")
        >>> curriculum.propose(3, step=0), curriculum.propose(3, step=0)
        ([3, 1, 2], [0, 3, 1])

    Raises:
        ValueError: For an empty curriculum, an unknown order, a sorted order without scores or scores without
            one, a pacing without a sorted order, or a wrong number of scores.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        scores: Sequence[float] | None = None,
        order: Literal["shuffled", "ascending", "descending"] = "shuffled",
        pacing: Pacing | None = None,
        gate: Callable[[float], bool] | None = None,
        smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        if num_examples < 1:
            raise ValueError(f"num_examples is {num_examples}: a curriculum needs at least one example")
        if order not in ("shuffled", "ascending", "descending"):
            raise ValueError(f"order is {order!r}; known are 'shuffled', 'ascending', 'descending'")
        if scores is None and order != "shuffled":
            raise ValueError(f"order {order!r} needs scores")
        if scores is not None and order == "shuffled":
            raise ValueError(
                "scores are given, but order 'shuffled' ignores them: set it to 'ascending' or 'descending'"
            )
        if pacing is not None and order == "shuffled":
            raise ValueError(
                "pacing shows the first share of an order: set order to 'ascending' or 'descending'"
            )
        if scores is not None and len(scores) != num_examples:
            raise ValueError(f"scores has {len(scores)} entries for {num_examples} examples")
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing is {smoothing}; it must be in [0, 1)")
        self.num_examples = num_examples
        self.gate = gate
        self._pacing, self._smoothing, self._order = pacing, smoothing, order
        self._ranking = list(range(num_examples))
        if order != "shuffled":
            assert scores is not None
            sign = 1.0 if order == "ascending" else -1.0
            self._ranking.sort(
                key=lambda i: (math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else sign * scores[i])
            )
        self._random = random.Random(seed)
        self._deck: list[int] = []
        self._num_visible = 0
        self._num_passes = 0
        self._num_refused = 0
        self._live: dict[int, float] = {}

    @property
    def num_passes(self) -> int:
        """How many passes over the visible examples have begun."""
        return self._num_passes

    @property
    def num_refused(self) -> int:
        """How many times the gate has passed over an example."""
        return self._num_refused

    @property
    def is_paced(self) -> bool:
        """Whether the visible share changes with the step."""
        return self._pacing is not None

    def num_visible(self, step: int) -> int:
        """Return how many of the ordered examples may be drawn at a step."""
        return (
            self.num_examples
            if self._pacing is None
            else max(1, math.ceil(self._pacing(step) * self.num_examples - 1e-9))
        )

    def score(self, example: int) -> float:
        """Return the live score of an example, NaN before it was observed."""
        return self._live.get(example, math.nan)

    def propose(self, n: int, step: int) -> list[int]:
        """Draw the next n examples.

        Args:
            n: How many, >= 1. They may repeat only across passes.
            step: What the pacing counts, >= 0.

        Returns:
            n example numbers.
        """
        visible = self.num_visible(step)
        drawn: list[int] = []
        while len(drawn) < n:
            self._show(visible)
            if not self._deck:
                self._num_passes += 1
                # Drawn from the end, so that a draw costs the same at any size.
                self._deck, self._num_visible = self._ranking[:visible][::-1], visible
            if not self._sorted_pass:
                pick = self._random.randrange(len(self._deck))
                self._deck[pick], self._deck[-1] = self._deck[-1], self._deck[pick]
            example = self._deck.pop()
            if self.gate is None or example not in self._live or self.gate(self._live[example]):
                drawn.append(example)
            else:
                del self._live[example]
                self._num_refused += 1
        return drawn

    def observe(self, ids: Sequence[int], scores: Sequence[float]) -> None:
        """Update the live scores of examples: new = smoothing * old + (1 - smoothing) * seen.

        Args:
            ids: Example numbers.
            scores: What training saw of each (a loss, a pass rate).
        """
        if len(ids) != len(scores):
            raise ValueError(f"{len(ids)} ids but {len(scores)} scores; there must be one per example")
        for example, seen in zip(ids, scores, strict=True):
            old = self._live.get(example)
            self._live[example] = (
                seen if old is None else self._smoothing * old + (1.0 - self._smoothing) * seen
            )

    def admit(self, scores: Sequence[float]) -> list[bool]:
        """Return for each score whether the gate lets it train."""
        return [self.gate is None or self.gate(score) for score in scores]

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes, as plain Python values."""
        return {
            "num_examples": self.num_examples,
            "deck": list(self._deck),
            "num_visible": self._num_visible,
            "num_passes": self._num_passes,
            "num_refused": self._num_refused,
            "live": dict(self._live),
            "random": self._random.getstate(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If the state belongs to another number of examples.
        """
        if state["num_examples"] != self.num_examples:
            raise ValueError(
                f"the checkpoint's curriculum has {state['num_examples']} examples, this {self.num_examples}"
            )
        self._deck = list(state["deck"])
        self._live = {
            int(example): score for example, score in state["live"].items()
        }  # JSON makes text of keys
        self._num_visible, self._num_passes = state["num_visible"], state["num_passes"]
        self._num_refused = state["num_refused"]
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))

    @property
    def _sorted_pass(self) -> bool:
        return self._order != "shuffled" and self._pacing is None

    def _show(self, visible: int) -> None:
        """Let newly visible examples join the running pass."""
        if self._deck and visible > self._num_visible:
            self._deck += self._ranking[self._num_visible : visible]
            self._num_visible = visible
