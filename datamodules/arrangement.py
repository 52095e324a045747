"""How the training rows of a data module become a curriculum: what all methods have in common."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.gates import Gate, admitted
from rewarm.curriculum.ordering import Order
from rewarm.curriculum.pacing import Pacing
from rewarm.curriculum.pacing_windows import GaussianWindow
from rewarm.datamodules.score_table import join_scores
from rewarm.text.formats import Rows, label_of, number_of

log = logging.getLogger(__name__)

T = TypeVar("T")
Measures = Mapping[str, Callable[[T], float]]
"""Scores that need no column, by name: what is read of a row -> its score."""


@dataclass(frozen=True)
class Arranged:
    """Training data in a curriculum.

    Attributes:
        kept: Places of the rows that are trained on, among the rows that were read, ascending.
        curriculum: Curriculum that draws the kept rows, which it counts from 0.
        content: Bytes that tell the scores and the order of the kept rows, for a fingerprint.

    Example:
        >>> curriculum = Curriculum(2, scores=[1.5, 0.5], order="ascending")
        >>> arranged = Arranged(kept=[0, 2], curriculum=curriculum, content=[])
        >>> [arranged.kept[number] for number in arranged.curriculum.propose(2, step=0)]
        [2, 0]
    """

    kept: list[int]
    curriculum: Curriculum
    content: list[bytes]


@dataclass(frozen=True)
class Arrangement:
    """What a curriculum is made from: the arguments that all data modules with one have.

    Args:
        score: Name of what the order sorts by: a column of numbers, or a measure of the data module.
        score_table: Table of further columns that `rewarm score` made for the training data.
        order: `shuffled`, `ascending` or `descending` by score; or an order by columns.
        window: Number of examples of the order that are shuffled among themselves in each pass, >= 1.
        pacing: Share of the order that is visible at each optimizer step.
        keep: Gate on the scores that chooses the examples to train on at all.
        group: Column with the group of each example, for gates that look at groups.
        draw: Window that draws from the order in place of passes, and moves by what training sees.

    Raises:
        ValueError: If nothing reads the table, or `keep` has no score.

    Example:
        >>> Arrangement(score="loss", score_table="scores.parquet", order="ascending", group="topic").labels
        {'topic'}
    """

    score: str | None = None
    score_table: str | None = None
    order: Literal["shuffled", "ascending", "descending"] | Order = "shuffled"
    window: int = 1
    pacing: Pacing | None = None
    keep: Gate | None = None
    group: str | None = None
    draw: GaussianWindow | None = None

    def __post_init__(self) -> None:
        if self.score_table is not None and self.score is None and isinstance(self.order, str):
            raise ValueError(
                f"score_table is {self.score_table!r}, but nothing reads it: set score to one of its columns"
            )
        if self.keep is not None and self.score is None:
            raise ValueError("keep chooses examples by their scores: set score")

    @property
    def numbers(self) -> set[str]:
        """Names of the scores that the curriculum needs."""
        by = self.order.numbers if isinstance(self.order, Order) else ()
        return {*by} | ({self.score} if self.score else set())

    @property
    def labels(self) -> set[str]:
        """Names of the columns with labels that the curriculum needs."""
        by = self.order.labels if isinstance(self.order, Order) else ()
        return {*by} | ({self.group} if self.group else set())

    def rows(self, path: str | list[str], measures: Measures[Any]) -> Rows:
        """Read the training data, with the columns of the table, and make sure that none is missing.

        Args:
            path: Path or Hub id of the training data.
            measures: Scores that need no column, by name.

        Raises:
            ValueError: If a column is unknown, or both a column and a measure.
        """
        rows, numbers, labels = Rows(path), self.numbers, self.labels - self.numbers
        if self.score_table is not None:
            join_scores(rows, self.score_table, numbers | labels)
        for name in sorted((numbers - {*measures} | labels) - {*rows.columns}):
            what = "score" if name == self.score else "group" if name == self.group else "a column of order"
            raise ValueError(
                f"{path}: {what} is {name!r}; known are {', '.join(measures)}"
                f" and the columns {', '.join(rows.columns)}"
            )
        for name in sorted(numbers & {*measures} & {*rows.columns}):
            raise ValueError(
                f"{path}: {name!r} is both a column and what is measured by itself: rename the column"
            )
        return rows

    def arrange(
        self, rows: Rows, items: Sequence[T], numbers: Sequence[int], measures: Measures[T], seed: int
    ) -> Arranged:
        """Make the curriculum.

        Args:
            rows: What `rows` returned.
            items: What was read of the rows, such as tokenised examples. Length N.
            numbers: Number of the row that each item was. Length N.
            measures: Scores of items that need no column, by name.
            seed: Seed of the draws.

        Raises:
            ValueError: If a score is missing or no number, or `keep` admits no row.
        """
        columns = {
            name: [measures[name](item) for item in items]
            if name in measures
            else _column(rows, numbers, name, number_of)
            for name in sorted(self.numbers)
        } | {name: _column(rows, numbers, name, label_of) for name in sorted(self.labels - self.numbers)}
        kept = list(range(len(items)))
        if self.keep is not None:
            assert self.score is not None
            groups = columns[self.group] if self.group else None
            kept = [
                place for place, is_in in enumerate(admitted(self.keep, columns[self.score], groups)) if is_in
            ]
            if not kept:
                raise ValueError(f"{rows.path}: keep admits none of {len(items)} rows by their {self.score}")
            log.warning("%s: %d of %d rows kept by %s", rows.path, len(kept), len(items), self.score)
            columns = {name: [values[place] for place in kept] for name, values in columns.items()}
        # A score that only `keep` reads does not go with a shuffled order.
        sorts = self.score is not None and (self.order != "shuffled" or self.keep is None)
        scores = columns[self.score] if self.score and sorts else None
        order = self.order(columns) if isinstance(self.order, Order) else self.order
        curriculum = Curriculum(
            len(kept),
            scores=scores,
            order=order,
            window=self.window,
            pacing=self.pacing,
            draw=self.draw,
            groups=columns[self.group] if self.group else None,
            seed=seed,
        )
        content = [torch.tensor(scores or [], dtype=torch.float64).numpy().tobytes()]
        if not isinstance(order, str):
            content.append(torch.tensor(order).numpy().tobytes())
        return Arranged(kept, curriculum, content)


def _column(rows: Rows, numbers: Sequence[int], name: str, read: Callable[..., Any]) -> list[Any]:
    values = rows.values(name)
    present = ({} if values[number] is None else {name: values[number]} for number in numbers)
    return [read(rows, number, row, name) for number, row in zip(numbers, present, strict=True)]
