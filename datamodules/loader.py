"""From tokenised examples to batches: data set, collation, and a loader that knows its window."""

import itertools
import math
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from rewarm.checks import at_least
from rewarm.functional.document_attention import Documents
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.objectives.batch import as_batch
from rewarm.text.encoding import Tokens

Batch = dict[str, Any]
Bin = int | tuple[int, ...]
"""The number of the example that fills a row, or of those that share it."""


@dataclass(frozen=True)
class Example:
    """One example: an id, and its one sequence (or its chosen and its rejected one).

    Attributes:
        id: Number of the example in the data, the same in every run.
        sequences: Sequences of the example: one, or several that belong together.
        columns: Numbers that the example's row holds for the loss.

    Example:
        >>> tokens, learn = torch.tensor([5, 6, 7]), torch.tensor([False, True, True])
        >>> Example(0, (Tokens(tokens, learn),)).positions
        2
    """

    id: int
    sequences: tuple[Tokens, ...]
    columns: tuple[float, ...] = ()

    @property
    def positions(self) -> int:
        """The number of positions of a packed row that the example takes."""
        return sum(sequence.positions for sequence in self.sequences)


class Examples(Protocol):
    """Examples by number, in memory or read when they are asked for.

    Example:
        >>> tokens, learn = torch.tensor([5, 6, 7]), torch.tensor([False, True, True])
        >>> def positions(examples: Examples) -> int:
        ...     return sum(examples[number].positions for number in range(len(examples)))
        >>> positions([Example(0, (Tokens(tokens, learn),)), Example(1, (Tokens(tokens, learn),))])
        4
    """

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Example: ...


WORTH_FRAC = 0.05
"""Share of the positions of padded rows that must be superfluous for the rest to be laid out anew."""

NEUTRAL = {
    "weights": 1.0,
    "tasks": -1,
    "repeats": 0,
    "teacher_ids": 0,
    "teacher_logprobs": -math.inf,
}
"""Value that stands for each kind of `extra` where a target has none."""


class Bins(torch.utils.data.Dataset[list[Example]]):
    """A data set that is asked for the examples of a row.

    Args:
        examples: Examples by number.

    Example:
        >>> tokens, learn = torch.tensor([5, 6, 7]), torch.tensor([False, True, True])
        >>> bins = Bins([Example(number, (Tokens(tokens, learn),)) for number in range(3)])
        >>> [example.id for example in bins[0, 2]], len(bins)
        ([0, 2], 3)
    """

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __getitem__(self, row: Bin) -> list[Example]:
        """Return the examples of a row."""
        return [self.examples[number] for number in ((row,) if isinstance(row, int) else row)]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)


class Collate:
    """Makes a batch of rows from bins of examples.

    Args:
        pad_token_id: Id of the token that fills rows up; it is never attended to and never a target.
        packed: Whether a bin is one row with its sequences one after the other; else each sequence has a row.
        count: Function that returns further counts of a batch's examples by name, for exact normalisation.
        pad_to: Length of every row; None pads to the longest.
        joined: Whether all bins make one row, without any padding.
        columns: Names of the examples' `columns`.

    A batch of B rows with T positions has `input_ids`, `position_ids`, `targets` and `sequence_ids`, each of
    shape (B, T) and type int64; `documents`, which says which positions are computed and attend to which;
    `num_targets`; `ids`, the example id of each sequence; and `counts`, with at least `tokens` (targets that
    weigh something) and `sequences`.

    Example:
        >>> tokens, learn = torch.tensor([5, 6, 7]), torch.tensor([False, True, True])
        >>> examples = [Example(number, (Tokens(tokens, learn),)) for number in range(2)]
        >>> batch = Collate(0, packed=True)([examples])  # one row with both
        >>> batch["input_ids"].tolist(), batch["targets"].tolist()
        ([[5, 6, 5, 6]], [[6, 7, 6, 7]])
        >>> batch["position_ids"].tolist(), batch["ids"]
        ([[0, 1, 0, 1]], [0, 1])
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        packed: bool,
        count: Callable[[list[Example]], dict[str, int]] | None = None,
        pad_to: int | None = None,
        joined: bool = False,
        columns: Sequence[str] = (),
    ) -> None:
        self.pad_token_id, self.packed, self.count, self.pad_to = pad_token_id, packed, count, pad_to
        self.joined, self.columns = joined, tuple(columns)

    def __call__(self, bins: list[list[Example]]) -> Batch:
        """Return the batch of some bins, each the list of its examples."""
        examples = [example for bin in bins for example in bin]
        if self.joined:
            rows = [[sequence for example in examples for sequence in example.sequences]]
        elif self.packed:
            rows = [[sequence for example in bin for sequence in example.sequences] for bin in bins]
        else:
            rows = [[sequence] for example in examples for sequence in example.sequences]
        batch = collate_rows(rows, self.pad_token_id, restart=self.packed or self.joined, pad_to=self.pad_to)
        batch["ids"] = [example.id for example in examples for _ in example.sequences]
        if self.count is not None:
            batch["counts"] |= self.count(examples)
        if self.columns:
            values = [example.columns for example in examples]
            batch["columns"] = torch.tensor(values, dtype=torch.float32).view(-1, len(self.columns))
            batch["column_names"] = self.columns
        return batch


def collate_rows(
    rows: list[list[Tokens]], pad_token_id: int, *, restart: bool, pad_to: int | None = None
) -> Batch:
    """Lay sequences out in rows.

    Args:
        rows: Sequences of each row. An empty list gives one row of one padding token, so that a rank without
            work can still take part.
        pad_token_id: Id of the token that fills rows up.
        restart: Whether positions begin at 0 with each sequence, and again in the padding, by which
            transformers keeps sequences apart; else they count through the row.
        pad_to: Smallest length of the rows; None is that of the longest.

    Returns:
        The tensors of a batch and its `counts`, as in `Collate`, and what the sequences have as `extra`. The
        `inputs` of a sequence take the place of its tokens in `input_ids`.

    Example:
        >>> one = Tokens(torch.tensor([5, 6, 7]), torch.tensor([False, True, True]))
        >>> two = Tokens(torch.tensor([8, 9]), torch.tensor([False, True]))
        >>> batch = collate_rows([[one], [two]], 0, restart=False)
        >>> batch["input_ids"].tolist(), batch["targets"].tolist(), batch["counts"]
        ([[5, 6], [8, 0]], [[6, 7], [9, -100]], {'tokens': 3, 'sequences': 2})
    """
    length = max([sum(sequence.positions for sequence in row) for row in rows] + [1])
    length = length if pad_to is None else max(length, pad_to)
    shape = (max(len(rows), 1), length)
    input_ids = torch.full(shape, pad_token_id)
    targets = torch.full(shape, IGNORE_INDEX)
    sequence_ids = torch.full(shape, -1)
    position_ids = torch.arange(length).repeat(shape[0], 1)
    extras: dict[str, torch.Tensor] = {}
    number = 0
    for place, row in enumerate(rows):
        start = 0
        for tokens, learn, extra in row:
            end = start + len(tokens) - 1
            input_ids[place, start:end] = tokens[:-1]
            targets[place, start:end] = tokens[1:].masked_fill(~learn[1:], IGNORE_INDEX)
            sequence_ids[place, start:end] = number
            for name, values in extra.items():
                if name == "inputs":
                    input_ids[place, start:end] = values
                    continue
                if name not in extras:
                    extras[name] = values.new_full((*shape, *values.shape[1:]), NEUTRAL[name])
                extras[name][place, start:end] = values
            if restart:
                position_ids[place, start:end] = torch.arange(end - start)
            start, number = end, number + 1
        if restart:
            position_ids[place, start:] = torch.arange(length - start)
    counted = targets != IGNORE_INDEX
    num_targets = int(counted.sum())
    if "weights" in extras:
        counted &= extras["weights"] != 0.0
    counts = {"tokens": int(counted.sum()), "sequences": number}
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "targets": targets,
        "sequence_ids": sequence_ids,
        "documents": Documents(position_ids, None if restart else needed_places(rows, length)),
        "num_targets": num_targets,
        "counts": counts,
        **extras,
    }


def needed_places(rows: list[list[Tokens]], length: int) -> torch.Tensor | None:
    """Choose the positions of padded rows to compute: no padding, and a prompt that rows share only once.

    A prompt is what comes before the first target. The last token of a prompt stays in every row, since the
    row's first target is predicted from it.

    Args:
        rows: Sequences of each row.
        length: Number of positions of each row.

    Returns:
        Places in the rows laid end to end, int64 of shape (N,), in which rows of one prompt follow each
        other; None if that would leave out too little, or a row has several sequences.

    Example:
        >>> learn = torch.tensor([False, False, False, True])
        >>> chosen, rejected = (Tokens(torch.tensor([3, 4, 5, last]), learn) for last in (6, 7))
        >>> needed_places([[chosen], [rejected]], length=3).tolist()  # the prompt 3, 4 is computed once
        [0, 1, 2, 5]
    """
    if any(len(row) != 1 for row in rows):
        return None
    prompts: dict[bytes, list[torch.Tensor]] = {}
    for place, (sequence,) in enumerate(rows):
        targets = sequence.learn[1:].nonzero()
        size = int(targets[0]) if len(targets) else 0
        # What the model reads, which a transform may have changed in one of the rows.
        seen = sequence.extra.get("inputs", sequence.tokens)[: size + 1]
        group = prompts.setdefault(seen.numpy().tobytes(), [])
        begin = size if group else 0
        group.append(torch.arange(place * length + begin, place * length + sequence.positions))
    parts = [part for group in prompts.values() for part in group]
    needed = sum(len(part) for part in parts)
    return torch.cat(parts) if 0 < needed <= (1.0 - WORTH_FRAC) * len(rows) * length else None


class _Sampler(Protocol):
    @property
    def recut(self) -> int | None: ...
    def __iter__(self) -> Iterator[list[Bin]]: ...
    def __len__(self) -> int: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _outlive_signals(worker_id: int) -> None:
    """What a process group is sent is for the training, which needs its data until the step has ended."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class RowLoader:
    """Yields the batches of a sampler; its state is that of the last batch, also where workers run ahead.

    Args:
        examples: Examples by number.
        sampler: Sampler that says which examples share a row, and which rows a batch.
        collate: Function that makes the batches.
        num_workers: Number of processes that collate, >= 0. Another run may go on with another number.

    Example:
        >>> tokens, learn = torch.tensor([5, 6, 7]), torch.tensor([False, True, True])
        >>> examples = [Example(number, (Tokens(tokens, learn),)) for number in range(3)]
        >>> sampler = torch.utils.data.BatchSampler(range(3), batch_size=2, drop_last=False)
        >>> loader = RowLoader(examples, sampler, Collate(0, packed=False))
        >>> [batch["ids"] for batch in loader]
        [[0, 1], [2]]
    """

    def __init__(self, examples: Examples, sampler: _Sampler, collate: Collate, num_workers: int = 0) -> None:
        self._data, self._sampler, self._collate, self._num_workers = (
            Bins(examples),
            sampler,
            collate,
            num_workers,
        )
        self._workers: Any = None
        self._position: dict[str, Any] | None = None  # where the sampler is not any more

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield an epoch, or what a restored state or an epoch that was left early left of it."""
        if not self._num_workers:
            for rows in self._sampler:
                yield self._collate([self._data[row] for row in rows])
            return
        if self._position is not None:
            self.load_state_dict(self._position)
        self._position = self._sampler.state_dict()
        ahead: deque[dict[str, Any]] = deque()
        self._workers = iter(
            DataLoader(
                self._data,
                batch_sampler=self._draw(ahead),
                collate_fn=self._collate,
                num_workers=self._num_workers,
                worker_init_fn=_outlive_signals,
                # Its own: an epoch that begins must not move the random state that a checkpoint has saved.
                generator=torch.Generator(),
            )
        )
        for batch in self._workers:
            self._position = ahead.popleft()
            yield batch
        self._position = None

    def _draw(self, ahead: deque[dict[str, Any]]) -> Iterator[list[Bin]]:
        for rows in self._sampler:
            ahead.append(self._sampler.state_dict())
            yield rows

    def close(self) -> None:
        """End the workers: the garbage collector would wait five seconds for each of them."""
        if self._workers is not None:
            self._workers._shutdown_workers()
        self._workers = None

    @property
    def recut(self) -> int | None:
        """The number of batches of the epoch that are done, if the restored state was of other batches."""
        return self._sampler.recut

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was yielded."""
        return self._sampler.state_dict() if self._position is None else self._position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.close()
        self._position = None
        self._sampler.load_state_dict(state)


class _Loader(Protocol):
    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


class WindowLoader:
    """Adds to each batch the counts of its whole accumulation window: `batch["window"]`.

    The loader reads one window ahead, no further. A loss divided by these counts is the same for one batch
    and for any split of it into micro-batches, which a mean per micro-batch is not.

    Args:
        loader: Loader of batches with `counts`, or of such as `rewarm.as_batch` completes. It has a length,
            and `state_dict` and `load_state_dict` if it is to resume.
        accumulate_grad_batches: Number of micro-batches per optimizer step, >= 1, or a function that returns
            it.
        remaining: Function that returns how many batches of the epoch are still to come, where these may be
            fewer than the loader has (`limit_train_batches`).
        recount: Function that is told how many batches of the epoch are done, when a restored state was of
            batches of another size, which the loader says by an attribute `recut`.

    Example:
        >>> batches = [{"counts": {"tokens": n}} for n in (3, 5, 4)]
        >>> [batch["window"] for batch in WindowLoader(batches, accumulate_grad_batches=2)]
        [{'tokens': 8}, {'tokens': 8}, {'tokens': 4}]

    Raises:
        ValueError: If `accumulate_grad_batches` is below 1.
    """

    def __init__(
        self,
        loader: _Loader | list[Batch],
        accumulate_grad_batches: int | Callable[[], int],
        remaining: Callable[[], float] | None = None,
        recount: Callable[[int], None] | None = None,
    ) -> None:
        if isinstance(accumulate_grad_batches, int):
            at_least(1, accumulate_grad_batches=accumulate_grad_batches)
        self.loader = loader
        self._accumulate = accumulate_grad_batches
        self._remaining, self._recount = remaining, recount
        self._window_start: dict[str, Any] | None = None
        self._window_length = 0
        self._taken = 0  # of the window
        self._skip = 0

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield one epoch, or what a restored state left of it."""
        size = self._window_size
        batches = iter(self.loader)
        while True:
            skip, self._skip = self._skip, 0
            if size > 1:
                self._window_start = self._inner_state()
            left = size if self._remaining is None else min(size, self._remaining() + skip)
            window = list(itertools.islice(batches, int(left)))
            self._window_length, self._taken = len(window), 0
            if not window:
                return
            window = [batch if "counts" in batch else as_batch(batch) for batch in window]
            totals = {name: sum(batch["counts"][name] for batch in window) for name in window[0]["counts"]}
            for self._taken, batch in enumerate(window, 1):
                if self._taken > skip:
                    yield {**batch, "window": totals}

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was yielded."""
        if self._window_start is not None and 0 < self._taken < self._window_length:
            return {"loader": self._window_start, "skip": self._taken}
        return {"loader": self._inner_state(), "skip": self._skip}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        if state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])  # type: ignore[union-attr]
        self._skip, self._taken = state["skip"], 0
        done = getattr(self.loader, "recut", None)
        if done is not None:
            self._skip = 0  # a window that was begun is cut anew
            if self._recount is not None:
                self._recount(done)

    @property
    def _window_size(self) -> int:
        return self._accumulate if isinstance(self._accumulate, int) else self._accumulate()

    def _inner_state(self) -> dict[str, Any] | None:
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else None


class ListedLoader:
    """Yields batches of listed bins, in order and without state: validation and scoring.

    Args:
        bins: Bins of examples, each of which shares a row.
        examples: Examples by number.
        collate: Function that makes the batches.
        batch_size: Number of bins per batch and rank, >= 1.
        rank: Number of this process, in [0, world_size).
        world_size: Number of ranks. All ranks get equally many batches, some of them without rows.
        extra: Further keys of each batch.

    Example:
        >>> tokens, learn = torch.tensor([5, 6, 7]), torch.tensor([False, True, True])
        >>> examples = [Example(number, (Tokens(tokens, learn),)) for number in range(3)]
        >>> loader = ListedLoader(range(3), examples, Collate(0, packed=False), 1, rank=1, world_size=2)
        >>> [batch["ids"] for batch in loader]  # rank 0 has examples 0 and 2
        [[1], []]
    """

    def __init__(
        self,
        bins: Iterable[Bin],
        examples: Examples,
        collate: Collate,
        batch_size: int,
        rank: int,
        world_size: int,
        extra: dict[str, Any] | None = None,
    ) -> None:
        listed = list(bins)
        size = batch_size * world_size
        everyone = [listed[start : start + size] for start in range(0, len(listed), size)]
        self._batches = [chunk[rank::world_size] for chunk in everyone]
        self._data, self._collate, self._extra = Bins(examples), collate, extra or {}

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield every batch once."""
        for bins in self._batches:
            yield self._collate([self._data[bin] for bin in bins]) | self._extra
