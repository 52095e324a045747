"""Text corpora: packed rows from several sources, with exact replay of old ones."""

import logging
from collections.abc import Iterator
from typing import Any, Literal

from rich.progress import track

from rewarm.datamodules.base import LanguageData, example_bytes
from rewarm.datamodules.loader import Collate, Example, ListedLoader, WindowLoader
from rewarm.datamodules.samplers import MixtureSampler
from rewarm.rollouts.encoding import Sequence
from rewarm.rollouts.formats import Rows, text_of

log = logging.getLogger(__name__)


class CorpusData(LanguageData):
    """Text as full rows of tokens, mixed from several sources in exact shares.

    Documents follow each other without padding; positions restart with each document, so none sees another. A
    document that reaches over the end of a row goes on in the next one. Replayed rows replace new ones: the
    number of tokens per step is the same with and without replay.

    Args:
        train: Sources by name: a file, list of files, saved data set or Hub id with a `text` column, or
            `.txt`.
        tokenizer: Hugging Face folder or id of a tokenizer.
        max_length: Positions per row, >= 1.
        batch_size: Rows per batch and rank, >= 1.
        weights: Share of each new source among the new rows; by default in proportion to their rows.
        replay: Sources of earlier training, by name.
        replay_fraction: Share of `replay` in every stretch of rows, in [0, 1), exact to a row. Needed with
            `replay`.
        val: Validation sources by name; each gets its own loss.
        sample_by: What one document of a `.txt` file is: `line`, `paragraph` or `document`.
        shuffle: Draw rows in random order; else in the order of the data.
        num_workers: Processes that collate, >= 0.
        seed: Of the order.
    """

    def __init__(
        self,
        train: dict[str, str | list[str]],
        tokenizer: str,
        max_length: int = 1024,
        batch_size: int = 8,
        weights: dict[str, float] | None = None,
        replay: dict[str, str | list[str]] | None = None,
        replay_fraction: float = 0.0,
        val: dict[str, str | list[str]] | None = None,
        sample_by: Literal["line", "paragraph", "document"] = "line",
        shuffle: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, max_length, num_workers, seed)
        if not train:
            raise ValueError("train names no source")
        if not 0.0 <= replay_fraction < 1.0:
            raise ValueError(f"replay_fraction is {replay_fraction}; it must be in [0, 1)")
        if bool(replay) != (replay_fraction > 0.0):
            raise ValueError(f"replay is {replay} and replay_fraction {replay_fraction}: they go together")
        if replay and set(replay) & set(train):
            raise ValueError(f"{sorted(set(replay) & set(train))} are both in train and in replay")
        if weights is not None and set(weights) != set(train):
            raise ValueError(f"weights names {sorted(weights)}, train has {sorted(train)}")
        if weights is not None and not (min(weights.values()) >= 0.0 and sum(weights.values()) > 0.0):
            raise ValueError(f"weights is {weights}; none may be below 0, and not all may be 0")
        self.train, self.weights, self.replay, self.replay_fraction = (
            train,
            weights,
            replay or {},
            replay_fraction,
        )
        self.val, self.sample_by, self.shuffle = val or {}, sample_by, shuffle
        self._rows: dict[str, list[Example]] = {}
        self._val_rows: dict[str, list[Example]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenise and cut into rows."""
        if self._rows:
            return
        start = 0
        for name, path in {**self.train, **self.replay}.items():
            self._rows[name] = list(self._cut(path, start))
            start += len(self._rows[name])
            self._remember(name, path, len(self._rows[name]), example_bytes(self._rows[name]))
        self._val_rows = {name: list(self._cut(path, 0)) for name, path in self.val.items()}

    def shares(self) -> dict[str, float]:
        """Return the share of each source, summing to 1."""
        weights = self.weights or {name: float(len(self._rows[name])) for name in self.train}
        new = sum(weights.values())
        old = sum(len(self._rows[name]) for name in self.replay)
        shares = {name: (1.0 - self.replay_fraction) * weights[name] / new for name in self.train}
        return shares | {name: self.replay_fraction * len(self._rows[name]) / old for name in self.replay}

    def train_dataloader(self) -> WindowLoader:
        """Batches mixed in exact shares; an epoch is one pass over the new sources."""
        sampler = MixtureSampler(
            {name: len(rows) for name, rows in self._rows.items()},
            self.shares(),
            self.batch_size,
            epoch_sources=list(self.train),
            rank=self.rank,
            world_size=self.world_size,
            accumulate_grad_batches=self._accumulate(),
            shuffle=self.shuffle,
            seed=self.seed,
        )
        return self._train_loader(
            [row for rows in self._rows.values() for row in rows], sampler, self._collate()
        )

    def val_dataloader(self) -> list[ListedLoader]:
        """One loader per validation source; its batches say which `domain` they are."""
        return [
            self._listed_loader(rows, self._collate(), domain=name) for name, rows in self._val_rows.items()
        ]

    def _collate(self) -> Collate:
        return Collate(self.tokenizer.pad_token_id, packed=True, pad_to=self.max_length)

    def _cut(self, path: str | list[str], first: int) -> Iterator[Example]:
        """Cut documents into full rows; what is left at the end makes a last, shorter row."""
        rows = Rows(path, sample_by=self.sample_by)
        pieces: list[Sequence] = []
        free, number = self.max_length, first
        num_empty = 0
        bar: dict[str, Any] = {"total": len(rows), "disable": len(rows) < 5000, "transient": True}
        for place, row in enumerate(track(rows, f"tokenising {path}", **bar)):
            text = text_of(rows, place, row, "text")
            if not text:
                num_empty += 1
                continue
            document, start = self.encoder.document(text), 0
            while start < document.positions:
                end = min(document.positions, start + free)
                pieces.append(Sequence(document.tokens[start : end + 1], document.learn[start : end + 1]))
                free, start = free - (end - start), end
                if free == 0:
                    yield Example(number, tuple(pieces))
                    pieces, free, number = [], self.max_length, number + 1
        if num_empty:
            log.info("%s: %d of %d documents are empty and left out", path, num_empty, len(rows))
        if pieces:
            yield Example(number, tuple(pieces))
        elif number == first:
            raise ValueError(f"{path}: all documents are empty")
