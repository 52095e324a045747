"""Gates: which examples may train, by their scores.

A *gate* looks at one score (`gate(score)`) or, with a method `select`, at the scores of all candidates.
Either works on known scores, before training, and on live ones (`rewarm.curriculum.live_scores`). Unknown
scores (NaN) are admitted.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from rewarm.checks import at_least, in_range, one_of


@runtime_checkable
class JointGate(Protocol):
    """A gate that looks at all candidates together.

    Example:
        >>> isinstance(TopShare(0.5), JointGate), isinstance(Band(), JointGate)
        (True, False)

    Source: ours.
    """

    def select(self, scores: Sequence[float], groups: Sequence[Hashable] | None = None) -> list[bool]:
        """Return for each candidate whether it is admitted."""


Gate = Callable[[float], bool] | JointGate
"""What decides on one score, or on all candidates' together."""


def admitted(gate: Gate, scores: Sequence[float], groups: Sequence[Hashable] | None = None) -> list[bool]:
    """Return for each candidate whether a gate admits it.

    Args:
        gate: Gate of either kind.
        scores: One per candidate, NaN where unknown.
        groups: The group of each candidate, for gates that look at them.

    Example:
        >>> admitted(Band(0.25, 0.75), [0.0, 0.5])
        [False, True]

    Source: ours.
    """
    return gate.select(scores, groups) if isinstance(gate, JointGate) else [gate(score) for score in scores]


@dataclass(frozen=True)
class Band:
    """A gate that admits scores within [low, high]; unknown scores (NaN) are admitted.

    Args:
        low: Smallest score admitted.
        high: Largest score admitted, >= low.

    Raises:
        ValueError: If low is above high.

    Example:
        >>> band = Band(0.25, 0.75)
        >>> [band(score) for score in (0.0, 0.25, 0.5, 1.0, float("nan"))]
        [False, True, True, False, True]

    Source: balanced online difficulty filtering, arXiv:2504.03380. Differs: the thresholds are the caller's;
    the paper's own are not known to us.
    """

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; low must not be above high")

    def __call__(self, score: float) -> bool:
        """Return whether the score is admitted."""
        return math.isnan(score) or self.low <= score <= self.high


@dataclass(frozen=True)
class TopShare:
    """A gate that admits the share of all known scores that is highest, or lowest, and a floor of each group.

    First floor(floor * size) of each group are admitted, the best of it, then the best of all others until
    floor(share * N) are.

    Args:
        share: Share to admit, in (0, 1].
        lowest: Whether the lowest scores are the best.
        floor: Share of each group that is admitted whatever the other groups have, in [0, share]. As much as
            `share` admits the same share of each group.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> TopShare(0.5).select([5.0, 9.0, 1.0, 2.0])
        [True, True, False, False]
        >>> TopShare(0.5, floor=0.5).select([5.0, 9.0, 1.0, 2.0], groups=["tool", "tool", "no", "no"])
        [False, True, False, True]

    Source: the highest perplexity, 0.3 of each group, in iTool, arXiv:2501.09766; the lowest, 0.2, in POINTS,
    arXiv:2409.04828; a floor per class in Sorscher et al. 2022, arXiv:2206.14486, whose own figure is not
    known to us. Differs: one rule for all of these.
    """

    share: float
    lowest: bool = False
    floor: float = 0.0

    def __post_init__(self) -> None:
        in_range("(0, 1]", share=self.share)
        in_range(f"[0, {self.share}]", floor=self.floor)  # at most share

    def select(self, scores: Sequence[float], groups: Sequence[Hashable] | None = None) -> list[bool]:
        """Return for each candidate whether it is admitted; of equal scores the first are.

        Raises:
            ValueError: If there are not as many groups as scores, or a floor comes without groups.
        """
        if groups is None and self.floor:
            raise ValueError(f"floor is {self.floor}, but no groups are given")
        if groups is not None and len(groups) != len(scores):
            raise ValueError(f"there are {len(scores)} scores but {len(groups)} groups")
        known = [place for place, score in enumerate(scores) if not math.isnan(score)]
        ranking = sorted(known, key=lambda place: scores[place] if self.lowest else -scores[place])
        members: dict[Hashable, list[int]] = {}
        for place in ranking:
            members.setdefault(None if groups is None else groups[place], []).append(place)
        # The small number keeps shares like 0.1 * 3 of ten from being one less.
        best = {place for group in members.values() for place in group[: int(self.floor * len(group) + 1e-9)]}
        rest = (place for place in ranking if place not in best)
        while len(best) < int(self.share * len(known) + 1e-9):
            best.add(next(rest))
        return [math.isnan(score) or place in best for place, score in enumerate(scores)]


@dataclass(frozen=True)
class AtLeast:
    """A gate that admits what another does, or the easiest if these are too few.

    Args:
        gate: The other gate.
        num_examples: Least number of candidates to admit, >= 1. If there are no more candidates, all are
            admitted.
        easiest: Whether low or high scores are easy: low for a loss or a difficulty, high for a pass rate.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> AtLeast(Band(high=0.0), 2).select([1.0, 0.5, 3.0, -1.0])
        [False, True, False, True]

    Source: the least number of PUDF, arXiv:2408.05326, in its repository. Differs: nothing.
    """

    gate: Gate
    num_examples: int
    easiest: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        at_least(1, num_examples=self.num_examples)
        one_of(("lowest", "highest"), easiest=self.easiest)

    def select(self, scores: Sequence[float], groups: Sequence[Hashable] | None = None) -> list[bool]:
        """Return for each candidate whether it is admitted; unknown scores count as hardest."""
        selected = admitted(self.gate, scores, groups)
        if sum(selected) >= self.num_examples:
            return selected
        sign = 1.0 if self.easiest == "lowest" else -1.0

        def difficulty(place: int) -> float:
            return math.inf if math.isnan(scores[place]) else sign * scores[place]

        easiest = set(sorted(range(len(scores)), key=difficulty)[: self.num_examples])
        return [place in easiest for place in range(len(scores))]
