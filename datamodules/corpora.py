"""Text corpora: packed rows from several sources, with exact replay of old ones."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch.utils.data import ConcatDataset

from rewarm.checks import in_range
from rewarm.datamodules.base import LanguageData
from rewarm.datamodules.corpus_replay import (
    Rehearsal,
    Seen,
    SeenRows,
    more_seen,
    read_seen,
    rehearsal_shares,
)
from rewarm.datamodules.loader import Collate, Examples, ListedLoader, WindowLoader
from rewarm.datamodules.samplers import MixtureSampler
from rewarm.datamodules.token_store import TokenRows, TokenStore, token_store

Weights = dict[str, float] | list[tuple[int, dict[str, float]]] | Callable[[int], dict[str, float]]
"""Shares of the new sources: constant, from given optimizer steps on, or as a function of the step."""


class CorpusData(LanguageData):
    """Text as full rows of tokens, mixed from several sources in exact shares.

    Documents follow each other without padding; positions restart with each document, so none sees another. A
    document that reaches over the end of a row goes on in the next one. Replayed rows replace new ones: the
    number of tokens per step is the same with and without replay.

    A corpus may be of any size. It is read once, as a stream, and its tokens are kept on disk (see
    `rewarm.datamodules.token_store`); every later start finds them there, by size, time of change and samples
    of the files, without reading them. A row is read when it is its turn, from the place that the position of
    the run and the seed say. So memory does not grow with the corpus, and the position is all that a
    checkpoint needs to go on, with any number of ranks, workers and rows per step.

    Checkpoints say which rows of each source were seen, by this run and by the earlier runs whose checkpoint
    it was given as `seen`.

    Args:
        train: Sources by name: a `.jsonl`, `.parquet` or `.txt` file, a list of files, a folder of them, what
            `datasets` saved, or a Hub id. Rows have a column `text`, or are instruction data in any form that
            `InstructionData` takes, of which only the answers are learnt.
        tokenizer: Hugging Face folder or id of a tokenizer.
        max_length: Number of positions per row, >= 1.
        batch_size: Number of rows per batch and rank, >= 1.
        weights: Share of each new source among the new rows; by default in proportion to their rows. Also a
            list of `[step, weights]`, each of them from that optimizer step on, in which a source that isn't
            named has weight 0; or a function of the step.
        replay: Sources of earlier training by name, the oldest first.
        replay_fraction: Share of `replay` in every stretch of rows, in [0, 1), exact to a row. Needed with
            `replay`.
        val: Validation sources by name; each gets its own loss.
        sample_by: Unit of a `.txt` file that is one document: `line`, `paragraph` or `document` (the file).
        shuffle: Whether rows are drawn in random order; else they come in the order of the data.
        num_workers: Number of processes that collate, >= 0.
        seed: Seed of the order.
        rehearsal: Rule for the shares among the sources of `replay`: in proportion to their `rows`,
            `uniform`, or by a `power-law` of how long ago they were.
        rehearsal_power: Exponent of the power law, >= 0.
        seen: Checkpoint of an earlier run. Only rows that this run has seen are then replayed.
        most_tokens: Number of tokens, by the name of a source of `train` or `replay`, with whose document the
            reading of that source ends, >= 1.
        attend_across_documents: Whether a document sees those before it in its row, so that its first token
            is predicted from their end.
        branch: Whether a run may go on from a checkpoint that had other sources. Sources that are the same go
            on where they were.

    Raises:
        ValueError: If an argument is out of its range, arguments contradict each other, or `weights` or
            `most_tokens` name a source that there is not.

    Example:
        >>> sources, replayed = {"new": "new.jsonl"}, {"old": "old.jsonl"}
        >>> data = CorpusData(sources, "models/base", replay=replayed, replay_fraction=0.05, max_length=512)
        >>> data.replay_fraction, data.rehearsal
        (0.05, 'rows')
        >>> CorpusData(sources, "models/base", replay=replayed)
        Traceback (most recent call last):
            ...
        ValueError: replay is {'old': 'old.jsonl'} and replay_fraction 0.0: they go together
    """

    def __init__(
        self,
        train: dict[str, str | list[str]],
        tokenizer: str,
        *,
        max_length: int = 1024,
        batch_size: int = 8,
        weights: Weights | None = None,
        replay: dict[str, str | list[str]] | None = None,
        replay_fraction: float = 0.0,
        val: dict[str, str | list[str]] | None = None,
        sample_by: Literal["line", "paragraph", "document"] = "line",
        shuffle: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        rehearsal: Rehearsal = "rows",
        rehearsal_power: float = 1.0,
        seen: str | None = None,
        most_tokens: dict[str, int] | None = None,
        attend_across_documents: bool = False,
        branch: bool = False,
    ) -> None:
        super().__init__(tokenizer, batch_size, max_length, num_workers, seed)
        if not train:
            raise ValueError("train names no source")
        in_range("[0, 1)", replay_fraction=replay_fraction)
        if bool(replay) != (replay_fraction > 0.0):
            raise ValueError(f"replay is {replay} and replay_fraction {replay_fraction}: they go together")
        if replay and set(replay) & set(train):
            raise ValueError(f"{sorted(set(replay) & set(train))} are both in train and in replay")
        if seen is not None and not replay:
            raise ValueError(f"seen is {seen!r}, but there is no replay")
        _check_weights(weights, set(train))
        known = {*train, *(replay or {})}
        for name, count in (most_tokens or {}).items():
            if name not in known or count < 1:
                raise ValueError(f"most_tokens is {most_tokens}; known are {sorted(known)}, from 1 on")
        rehearsal_shares(dict.fromkeys(replay or {}, 1), rehearsal, rehearsal_power)
        self.train, self.weights, self.replay, self.replay_fraction = (
            train,
            weights,
            replay or {},
            replay_fraction,
        )
        self.val, self.sample_by, self.shuffle = val or {}, sample_by, shuffle
        self.rehearsal, self.rehearsal_power, self.seen = rehearsal, rehearsal_power, seen
        self.most_tokens, self.attend_across_documents = most_tokens or {}, attend_across_documents
        self.branch = branch
        self._rows: dict[str, Examples] = {}
        self._val_rows: dict[str, Examples] = {}
        self._seen_before: Seen = {}

    def prepare_data(self) -> None:
        """Read and tokenise on one process of each machine, where that has not been done before."""
        for name, path in {**self.train, **self.replay}.items():
            self._store(path, self.most_tokens.get(name))
        for path in self.val.values():
            self._store(path)

    def setup(self, stage: str | None = None) -> None:
        """Open the tokens, and make them where they are not there yet.

        Raises:
            ValueError: If a source cannot be read, or `seen` has not seen its rows.
        """
        if self._rows:
            return
        if self.seen is not None:
            self._seen_before = read_seen(self.seen)
        self._val_rows = {name: self._cut(self._store(path)) for name, path in self.val.items()}
        first = 0
        for name, path in {**self.train, **self.replay}.items():
            rows = self._cut(self._store(path, self.most_tokens.get(name)), first)
            self._fingerprints.add(name, path, len(rows), [rows.fingerprint.encode()])
            first += len(rows)
            self._rows[name] = rows
            if self.seen is not None and name in self.replay:
                if rows.fingerprint not in self._seen_before:
                    known = sorted({entry["name"] for entry in self._seen_before.values()})
                    raise ValueError(
                        f"{path} ({name}): {self.seen} has not seen these rows, cut to {self.max_length}"
                        f" positions with this tokenizer; it has seen rows of {', '.join(known)}"
                    )
                self._rows[name] = SeenRows(rows, self._seen_before[rows.fingerprint])

    def shares(self, step: int = 0) -> dict[str, float]:
        """Return the share of each source at an optimizer step, summing to 1.

        Args:
            step: Number of the optimizer step, from 0.

        Raises:
            ValueError: If a function given as `weights` returns other sources or impossible shares.
        """
        given = _weights_at(self.weights, step, self.train)
        weights = given or {name: float(len(self._rows[name])) for name in self.train}
        if set(weights) != set(self.train) or not _can_share(weights):
            raise ValueError(
                f"weights at step {step} is {weights}; it needs {sorted(self.train)}, none below 0, not all 0"
            )
        new, old = sum(weights.values()), {name: len(self._rows[name]) for name in self.replay}
        shares = {name: (1.0 - self.replay_fraction) * weights[name] / new for name in self.train}
        phases = rehearsal_shares(old, self.rehearsal, self.rehearsal_power)
        return shares | {name: self.replay_fraction * share for name, share in phases.items()}

    def train_dataloader(self) -> WindowLoader:
        """Return a loader of batches mixed in exact shares; an epoch is one pass over the new sources."""
        sampler = MixtureSampler(
            {name: len(rows) for name, rows in self._rows.items()},
            self.shares,
            self.batch_size,
            epoch_sources=list(self.train),
            rank=self.rank,
            world_size=self.world_size,
            accumulate_grad_batches=self._position.accumulate(),
            shuffle=self.shuffle,
            seed=self.seed,
            branch=self.branch,
        )
        return self._train_loader(ConcatDataset(list[Any](self._rows.values())), sampler, self._collate())

    def val_dataloader(self) -> list[ListedLoader]:
        """Return one loader per validation source, whose batches name the source as `domain`."""
        return [
            self._listed_loader(rows, self._collate(), domain=name) for name, rows in self._val_rows.items()
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return which data these are, where the loader is, and which rows have been seen."""
        state, seen = super().state_dict(), dict(self._seen_before)
        loader: Any = state.get("loader", self._position.restored)
        for name, rows in self._rows.items() if loader is not None else ():
            if isinstance(rows, TokenRows):
                drawn = loader["loader"]["drawn"][name]
                entry = {"name": name, "drawn": drawn, "seed": self.seed, "shuffle": self.shuffle}
                seen = more_seen(seen, {rows.fingerprint: entry})
        return state | {"seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make sure that the data are the same, or are those of a branch, and go on from the saved position.

        Raises:
            ValueError: If the training data differ; the message says in what.
        """
        if self.branch:
            known, now = state["data"], self._fingerprints.state_dict()
            state = state | {
                "data": {name: known.get(name, fingerprint) for name, fingerprint in now.items()}
            }
        super().load_state_dict(state)
        self._seen_before = more_seen(self._seen_before, state["seen"])

    def _collate(self) -> Collate:
        return Collate(self.tokenizer.pad_token_id, packed=True, pad_to=self.max_length)

    def _store(self, path: str | list[str], most_tokens: int | None = None) -> TokenStore:
        return token_store(path, self.encoder, self.sample_by, most_tokens)

    def _cut(self, store: TokenStore, first: int = 0) -> TokenRows:
        return TokenRows(store, self.max_length, first, self.attend_across_documents)


def _can_share(weights: Mapping[str, float]) -> bool:
    return min(weights.values()) >= 0.0 and 0.0 < sum(weights.values()) < math.inf


def _check_weights(weights: Weights | None, names: set[str]) -> None:
    if isinstance(weights, dict):
        if set(weights) != names:
            raise ValueError(f"weights names {sorted(weights)}, train has {sorted(names)}")
        if not _can_share(weights):
            raise ValueError(f"weights is {weights}; none may be below 0, and not all may be 0")
    elif isinstance(weights, list):
        steps = [step for step, _ in weights]
        if steps[:1] != [0] or steps != sorted(set(steps)):
            raise ValueError(f"weights is given from steps {steps}; they must ascend from 0")
        for step, some in weights:
            if not some or not set(some) <= names or not _can_share(some):
                raise ValueError(
                    f"weights from step {step} on is {some}; known are {sorted(names)},"
                    " none may be below 0, and not all may be 0"
                )
        unused = names - {name for _, some in weights for name in some if some[name] > 0.0}
        if unused:
            raise ValueError(f"weights never has {sorted(unused)}, which are in train")


def _weights_at(weights: Weights | None, step: int, names: Mapping[str, Any]) -> dict[str, float] | None:
    if isinstance(weights, list):
        now = next(some for start, some in reversed(weights) if start <= step)
        return {name: now.get(name, 0.0) for name in names}
    return weights(step) if callable(weights) else weights
