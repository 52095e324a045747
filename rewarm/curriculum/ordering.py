"""Orders of a data set, from scores or keys: lists of example numbers, the first to be seen first.

Each is a pure function of its arguments, so that a running curriculum needs to remember no more than how far
it is. They compose: what takes an `order` takes what another function returned. The classes are the same
orders by the names of columns, for the `order` of a data module.
"""

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewarm.checks import at_least


def sorted_order(scores: Sequence[float], *, descending: bool = False) -> list[int]:
    """Examples by score; equal scores keep the order of the data, unknown ones (NaN) come last.

    Args:
        scores: One per example.
        descending: Whether the largest score comes first.

    Returns:
        Example numbers, in the order.

    Example:
        >>> sorted_order([2.0, 1.0, float("nan"), 2.0])
        [1, 0, 3, 2]
        >>> sorted_order([2.0, 1.0, float("nan"), 2.0], descending=True)
        [0, 3, 1, 2]

    Source: ours.   Differs: nothing.
    """
    sign = -1.0 if descending else 1.0

    def key(example: int) -> tuple[bool, float]:
        unknown = math.isnan(scores[example])
        return unknown, 0.0 if unknown else sign * scores[example]

    return sorted(range(len(scores)), key=key)


def shuffled_in_windows(
    order: Sequence[int], window: int, *, seed: int = 0, stream: tuple[int, ...] = ()
) -> list[int]:
    """Shuffle each stretch of an order by itself: no example moves further than `window - 1` places.

    Args:
        order: Example numbers.
        window: Length of a stretch, >= 1; the last may be shorter. 1 changes nothing.
        seed: Seed of the shuffles.
        stream: Numbers that tell shuffles of one seed apart, such as the pass.

    Returns:
        The same examples.

    Raises:
        ValueError: If window is below 1.

    Example:
        >>> shuffled_in_windows([10, 20, 30, 40, 50, 60], 3, seed=3)
        [20, 10, 30, 50, 40, 60]

    Source: the k-sorted order in the repository of Rodriguez and Lalor, arXiv:2408.05326. Differs: nothing.
    """
    at_least(1, window=window)
    # Of a text: numbers next to each other begin streams that are alike.
    source = random.Random(repr((int(seed), *map(int, stream))))
    shuffled: list[int] = []
    for start in range(0, len(order), window):
        stretch = list(order[start : start + window])
        source.shuffle(stretch)
        shuffled += stretch
    return shuffled


def block_order(subjects: Sequence[Hashable], levels: Sequence[float]) -> list[int]:
    """One subject after the other, each from its lowest level to its highest.

    Args:
        subjects: The subject of each example; they follow each other as they first appear.
        levels: The level of each example, not NaN; lower ones come first.

    Returns:
        Example numbers; those of one subject and level keep the order of the data.

    Raises:
        ValueError: If the lengths differ or a level is NaN.

    Example:
        >>> block_order(["algebra", "history", "algebra", "history"], [2, 1, 1, 2])
        [2, 0, 1, 3]

    Source: "blocking" of Lee et al. 2023, arXiv:2310.09518. Differs: the order of the subjects, which is not
    known to us, is ours.
    """
    _check_keys(subjects, levels)
    first = _first_places(subjects)
    return sorted(range(len(levels)), key=lambda i: (first[subjects[i]], levels[i]))


def interleave_order(subjects: Sequence[Hashable], levels: Sequence[float]) -> list[int]:
    """All subjects in turn at the lowest level, then all at the next.

    Within a level the subjects take turns, one example each. One that has run out is passed over, so that
    rounds of equal size need as many examples of each subject.

    Args:
        subjects: The subject of each example; they take turns as they first appear.
        levels: The level of each example, not NaN; lower ones come first.

    Returns:
        Example numbers; those of one subject and level keep the order of the data.

    Raises:
        ValueError: If the lengths differ or a level is NaN.

    Example:
        >>> interleave_order(["algebra", "algebra", "history", "algebra", "history"], [1, 1, 1, 1, 2])
        [0, 2, 1, 3, 4]

    Source: "interleaving" of Lee et al. 2023, arXiv:2310.09518. Differs: turns within a level, and the order
    of the subjects, which are not known to us, are ours.
    """
    _check_keys(subjects, levels)
    first = _first_places(subjects)
    turns: dict[tuple[float, Hashable], int] = {}
    keys = []
    for subject, level in zip(subjects, levels, strict=True):
        turn = turns.get((level, subject), 0)
        turns[level, subject] = turn + 1
        keys.append((level, turn, first[subject]))
    return sorted(range(len(keys)), key=keys.__getitem__)


def folded(order: Sequence[int], folds: int) -> list[int]:
    """Go through an order L times, each time over every L-th example.

    Fold l holds the ranks l, l + L, l + 2 L, and so on.

    Args:
        order: Example numbers, such as `sorted_order` returns.
        folds: Number of folds L, >= 1. 1 changes nothing.

    Returns:
        The same examples.

    Raises:
        ValueError: If folds is below 1.

    Example:
        >>> folded([0, 1, 2, 3, 4, 5, 6], 3)
        [0, 3, 6, 1, 4, 2, 5]

    Source: "folding" of arXiv:2506.21545 (DELT), as in its repository. Differs: nothing.
    """
    at_least(1, folds=folds)
    return [example for fold in range(folds) for example in order[fold::folds]]


def staged_order(stages: Sequence[Hashable], sequence: Sequence[Hashable]) -> list[int]:
    """All examples of the first stage, then all of the next.

    Args:
        stages: The stage of each example.
        sequence: The stages in their order, each once. Examples of no other stage may occur.

    Returns:
        Example numbers; those of one stage keep the order of the data.

    Raises:
        ValueError: If a stage is in the sequence twice, or not in it.

    Example:
        >>> staged_order(["gpt4", "chatgpt", "gpt4"], sequence=["chatgpt", "gpt4"])
        [1, 0, 2]

    Source: staged teachers of Orca, arXiv:2306.02707, and staged difficulty of Light-R1, arXiv:2503.10460.
    Differs: nothing.
    """
    ranks = {stage: rank for rank, stage in enumerate(sequence)}
    if len(ranks) < len(sequence):
        raise ValueError(f"sequence is {list(sequence)}; it must not hold a stage twice")
    for example, stage in enumerate(stages):
        if stage not in ranks:
            raise ValueError(f"example {example} is of stage {stage!r}; the sequence is {list(sequence)}")
    return sorted(range(len(stages)), key=lambda i: ranks[stages[i]])


def draw_weighted(log_weights: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
    """Draw examples one after the other, each with a probability in proportion to its weight, none twice.

    Takes the n largest of log_weights + g with g from a standard Gumbel distribution, which is the same.

    Args:
        log_weights: Logarithms of the weights; -inf is never drawn. Shape (N,).
        n: Number of examples to draw, 0 to the number of weights above 0.
        generator: Source of the randomness.

    Returns:
        Example numbers as they were drawn. int64, shape (n,).

    Raises:
        ValueError: If a weight is NaN or infinite, or there are too few to draw.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> weights = torch.tensor([1.0, 100.0, 0.0, 100.0])
        >>> draw_weighted(weights.log(), 2, generator=generator).sort().values
        tensor([1, 3])

    Source: Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir", in the form with Gumbel
    noise. Differs: nothing.
    """
    if (log_weights.isnan() | (log_weights == torch.inf)).any():
        raise ValueError("log_weights holds NaN or inf; a weight must be a finite number")
    possible = int((log_weights > -torch.inf).sum())
    if not 0 <= n <= possible:
        raise ValueError(f"n is {n}; {possible} examples have a weight above 0")
    noise = torch.empty(log_weights.shape, dtype=torch.float64, device=generator.device)
    gumbel = -noise.exponential_(generator=generator).log()
    return (log_weights.to(gumbel) + gumbel).topk(n).indices


class Order:
    """An order by columns of the data. Subclasses say which, and how.

    Attributes:
        numbers: Names of the columns that hold numbers.
        labels: Names of the columns that hold labels.

    Example:
        >>> class Reversed(Order):
        ...     numbers = ("place",)
        ...     def __call__(self, columns):
        ...         return sorted_order(columns["place"], descending=True)
        >>> Reversed()({"place": [0.0, 1.0, 2.0]})
        [2, 1, 0]

    Source: ours.
    """

    numbers: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> list[int]:
        """Return all example numbers, the first to be seen first.

        Args:
            columns: One value per example of each column that was asked for.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class _BySubject(Order):
    subject: str = "subject"
    level: str = "level"

    @property
    def numbers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The column of the level."""
        return (self.level,)

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """The column of the subject."""
        return (self.subject,)


@dataclass(frozen=True)
class Blocked(_BySubject):
    """One subject after the other, each from its lowest level to its highest: `block_order`.

    Args:
        subject: Name of the column with the subject.
        level: Name of the column with the level, a number.

    Example:
        >>> Blocked()({"subject": ["algebra", "history", "algebra"], "level": [2, 1, 1]})
        [2, 0, 1]

    Source: "blocking" of Lee et al. 2023, arXiv:2310.09518. Differs: see `block_order`.
    """

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> list[int]:
        """Return all example numbers, the first to be seen first."""
        return block_order(columns[self.subject], columns[self.level])


@dataclass(frozen=True)
class Interleaved(_BySubject):
    """All subjects in turn at the lowest level, then all at the next: `interleave_order`.

    Args:
        subject: Name of the column with the subject.
        level: Name of the column with the level, a number.

    Example:
        >>> Interleaved()({"subject": ["algebra", "algebra", "history"], "level": [1, 1, 1]})
        [0, 2, 1]

    Source: "interleaving" of Lee et al. 2023, arXiv:2310.09518. Differs: see `interleave_order`.
    """

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> list[int]:
        """Return all example numbers, the first to be seen first."""
        return interleave_order(columns[self.subject], columns[self.level])


@dataclass(frozen=True)
class Folded(Order):
    """Goes through the scores L times, each time over every L-th example: `folded`.

    Args:
        score: Name of the column with the score.
        folds: Number of folds L, >= 1.
        descending: Whether the largest score comes first.

    Raises:
        ValueError: If folds is below 1.

    Example:
        >>> Folded("score", folds=2)({"score": [4.0, 3.0, 2.0, 1.0]})
        [3, 1, 2, 0]

    Source: "folding" of arXiv:2506.21545 (DELT), as in its repository. Differs: nothing.
    """

    score: str
    folds: int
    descending: bool = False

    def __post_init__(self) -> None:
        folded([], self.folds)

    @property
    def numbers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The column of the score."""
        return (self.score,)

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> list[int]:
        """Return all example numbers, the first to be seen first."""
        return folded(sorted_order(columns[self.score], descending=self.descending), self.folds)


@dataclass(frozen=True)
class EasyToHard(Order):
    """Examples by several numbers that say how hard they are, the most important number first.

    With `rewarm.OnePassPacing` or `rewarm.StagedPacing` the data come in rounds, from easy to hard.

    Args:
        columns: Names of the columns with the numbers, such as tools, parameters and turns.

    Raises:
        ValueError: If there are no columns.

    Example:
        >>> EasyToHard(["tools", "turns"])({"tools": [3.0, 1.0, 1.0], "turns": [1.0, 2.0, 1.0]})
        [2, 1, 0]

    Source: the easy-to-hard warm-up of iTool, arXiv:2501.09766. Differs: its keys are not known to us.
    """

    columns: Sequence[str]

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("columns is empty; there must be at least one")

    @property
    def numbers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The columns."""
        return tuple(self.columns)

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> list[int]:
        """Return all example numbers, the first to be seen first."""
        keys = list(zip(*(columns[name] for name in self.columns), strict=True))
        return sorted(range(len(keys)), key=keys.__getitem__)


@dataclass(frozen=True)
class Staged(Order):
    """All examples of the first stage, then all of the next: `staged_order`.

    Stages with a learning rate, epochs or data of their own are the stages of a pipeline (`rewarm run`).

    Args:
        sequence: The stages in their order, each once.
        stage: Name of the column with the stage.

    Example:
        >>> Staged(["chatgpt", "gpt4"])({"stage": ["gpt4", "chatgpt", "gpt4"]})
        [1, 0, 2]

    Source: staged teachers of Orca, arXiv:2306.02707, and staged difficulty of Light-R1, arXiv:2503.10460.
    Differs: nothing.
    """

    sequence: Sequence[str]
    stage: str = "stage"

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """The column of the stage."""
        return (self.stage,)

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> list[int]:
        """Return all example numbers, the first to be seen first."""
        return staged_order([str(stage) for stage in columns[self.stage]], self.sequence)


def _first_places(keys: Sequence[Hashable]) -> dict[Hashable, int]:
    first: dict[Hashable, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    return first


def _check_keys(subjects: Sequence[Hashable], levels: Sequence[float]) -> None:
    if len(subjects) != len(levels):
        raise ValueError(
            f"there are {len(subjects)} subjects but {len(levels)} levels; each example needs both"
        )
    for example, level in enumerate(levels):
        if math.isnan(level):
            raise ValueError(f"levels[{example}] is nan; a level must be a number")
