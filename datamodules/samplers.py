"""Batch samplers that own order and pacing: which examples share a row, which rows a batch, on which rank.

Every rank runs the same sampler over the same data and takes its own rows, so the state is one and the same
on all ranks, and a run may go on with another number of them.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rewarm.datamodules.loader import Row
from rewarm.functional.curriculum import Curriculum
from rewarm.functional.packing import Packer


class _Epoch:
    """How far an epoch is: in rows, and in the batches of all ranks together that this run cuts them into.

    A restored state may be of other batches, and then leave a number of rows that takes fewer batches than
    whole accumulation windows are left of this run's epoch. The rows are then spread over those: the epoch
    ends with its last row, every window is whole, and none is without rows.

    Args:
        batch_rows: Rows per batch.
        accumulate: Batches per optimizer step.
    """

    def __init__(self, batch_rows: int, accumulate: int) -> None:
        self.batch_rows, self.accumulate = batch_rows, accumulate
        self.rows = self.batches = 0
        self.recut: int | None = None

    def length(self, size: int) -> int:
        """Return the batches of an epoch of `size` rows."""
        return math.ceil(size / self.batch_rows)

    def next_rows(self, size: int) -> int:
        """Return how many rows the next batch takes; an epoch's last one, in full."""
        rows, batches = size - self.rows, self.length(size) - self.batches
        return self.batch_rows if rows > (batches - 1) * self.batch_rows else rows // batches

    def add(self, rows: int, size: int) -> bool:
        """Count a batch, and return whether it ends an optimizer step."""
        self.rows, self.batches = self.rows + rows, self.batches + 1
        return self.batches % self.accumulate == 0 or self.rows >= size

    def state_dict(self) -> dict[str, int]:
        return {
            "epoch_rows": self.rows,
            "epoch_batches": self.batches,
            "batch_rows": self.batch_rows,
            "accumulate": self.accumulate,
        }

    def load_state_dict(self, state: dict[str, int], size: int) -> None:
        self.rows, self.batches, self.recut = state["epoch_rows"], state["epoch_batches"], None
        if (state["batch_rows"], state["accumulate"]) != (self.batch_rows, self.accumulate):
            needed = self.length(max(0, size - self.rows))
            done = self.length(size) - needed
            self.batches = self.recut = done - done % self.accumulate if needed else done


class CurriculumSampler:
    """Batches of rows in a curriculum's order, packed or not; give it to a DataLoader as `batch_sampler`.

    Unpaced, ungated and unpacked, an epoch is one pass over the data, with a smaller last batch. Packed, it
    is as many batches as the first pass needs; paced or gated, as many as a pass in the data's order would
    need. The stream of rows then goes on across epochs.

    A run may go on from a saved state with other batches: a begun epoch then ends with the row that it would
    have ended with, and `recut` tells how many batches of it are done, which is what a trainer that counts
    batches has to know.

    Args:
        curriculum: Proposes the examples.
        batch_size: Rows per batch and rank, >= 1.
        lengths: Positions that each example takes, for packing.
        packer: Packs examples into rows, which are then tuples of example numbers. None gives each example a
            row of its own, and batches are lists of example numbers, which any map-style Dataset takes.
        rank: Of this process.
        world_size: Number of ranks.
        accumulate_grad_batches: Batches per optimizer step: what the pacing counts is steps.

    Example:
        >>> curriculum = Curriculum(5, scores=[4, 3, 2, 1, 0], order="ascending")
        >>> sampler = CurriculumSampler(curriculum, batch_size=2)
        >>> list(sampler)
        [[4, 3], [2, 1], [0]]

    Raises:
        ValueError: If batch_size is below 1, or a packer comes without lengths.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        batch_size: int,
        *,
        lengths: Sequence[int] | None = None,
        packer: Packer | None = None,
        rank: int = 0,
        world_size: int = 1,
        accumulate_grad_batches: int = 1,
    ) -> None:
        _check_batch(batch_size, rank, world_size)
        if packer is not None and lengths is None:
            raise ValueError("packing needs the lengths of the examples")
        self.curriculum, self.batch_size, self.rank, self.world_size = (
            curriculum,
            batch_size,
            rank,
            world_size,
        )
        self._lengths, self._packer = lengths, packer
        self._pending: list[Row] = []
        self._step = 0  # of the optimizer, which the next batch is for
        self._epoch = _Epoch(batch_size * world_size, accumulate_grad_batches)
        self._rows_per_epoch: int | None = None

    @property
    def passes_align(self) -> bool:
        """Whether an epoch is exactly one pass over the data."""
        return self._packer is None and self._shows_everything

    @property
    def recut(self) -> int | None:
        """How many batches of the epoch are done, if the restored state was of other batches."""
        return self._epoch.recut

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return self._epoch.length(self._epoch_size())

    def __iter__(self) -> Iterator[list[Row]]:
        """Yield the batches of an epoch, or what a restored state left of it."""
        size = self._epoch_size()
        if self._epoch.rows >= size:
            self._epoch.rows = self._epoch.batches = 0
        while self._epoch.rows < size:
            rows = self._next_rows(self._epoch.next_rows(size))
            self._step += self._epoch.add(len(rows), size)
            yield rows[self.rank :: self.world_size]

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the same on every rank."""
        return {
            "curriculum": self.curriculum.state_dict(),
            "packer": None if self._packer is None else self._packer.state_dict(),
            "pending": list(self._pending),
            "step": self._step,
            "rows_per_epoch": self._epoch_size(),
            **self._epoch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position, perhaps with another batch size or number of ranks."""
        self.curriculum.load_state_dict(state["curriculum"])
        if (self._packer is None) != (state["packer"] is None):
            then, now = ("packed" if it else "not packed" for it in (state["packer"], self._packer))
            raise ValueError(f"the checkpoint's rows are {then}, this run's are {now}")
        if self._packer is not None:
            self._packer.load_state_dict(state["packer"])
        self._pending = list(state["pending"])
        self._step, self._rows_per_epoch = state["step"], state["rows_per_epoch"]
        self._epoch.load_state_dict(state, self._rows_per_epoch)

    @property
    def _shows_everything(self) -> bool:
        return not self.curriculum.is_paced and self.curriculum.gate is None

    def _epoch_size(self) -> int:
        if self._rows_per_epoch is None:
            self._rows_per_epoch = num_examples = self.curriculum.num_examples
            if self._packer is not None:
                assert self._lengths is not None
                order: Sequence[int] = range(num_examples)
                if self._shows_everything:
                    order = copy.deepcopy(self.curriculum).propose(num_examples, step=0)
                trial = Packer(self._packer.capacity, self._packer.open_bins)
                closed = sum(len(trial.add(example, self._lengths[example])) for example in order)
                self._rows_per_epoch = closed + len(trial.flush())
        return self._rows_per_epoch

    def _next_rows(self, wanted: int) -> list[Row]:
        if self._packer is None:
            if self.passes_align:
                wanted = min(wanted, self.curriculum.num_examples - self._epoch.rows)
            return list(self.curriculum.propose(wanted, self._step))
        assert self._lengths is not None
        while len(self._pending) < wanted:
            passes = self.curriculum.num_passes
            (example,) = self.curriculum.propose(1, self._step)
            if self._shows_everything and self.curriculum.num_passes > passes:
                # The last examples of a pass must not wait for those of the next one to fill their rows.
                self._pending += [tuple(bin) for bin in self._packer.flush()]
            self._pending += [tuple(bin) for bin in self._packer.add(example, self._lengths[example])]
        rows, self._pending = self._pending[:wanted], self._pending[wanted:]
        return rows


class MixtureSampler:
    """Batches of rows from several sources in exact shares, by rotation rather than by chance.

    A row comes from the source that lags its share the most, chosen first between the epoch's sources
    together and all others together. Every stretch of n rows then holds the others' share of n, give or take
    one row, however small the micro-batch; and so it is with each of two sources.

    Args:
        sizes: Rows per source; sources follow each other in the data set's numbering in this order.
        weights: Share of each source; they are normalised to sum to 1.
        batch_size: Rows per batch and rank, >= 1.
        epoch_sources: Sources of which an epoch is one pass, together; default all.
        rank: Of this process.
        world_size: Number of ranks.
        accumulate_grad_batches: Batches per optimizer step.
        shuffle: Draw each source's rows in random order; else in order.
        seed: Of the order within each source.

    Example:
        >>> sizes, weights = {"new": 3, "old": 9}, {"new": 3.0, "old": 1.0}
        >>> sampler = MixtureSampler(sizes, weights, 4, epoch_sources=["new"], shuffle=False)
        >>> list(sampler)
        [[0, 1, 3, 2]]

    Raises:
        ValueError: For an empty source, a weight below 0, weights that are all 0, or names that differ.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float],
        batch_size: int,
        *,
        epoch_sources: Sequence[str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        accumulate_grad_batches: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        _check_batch(batch_size, rank, world_size)
        if set(sizes) != set(weights):
            raise ValueError(f"weights names {sorted(weights)}, the sources are {sorted(sizes)}")
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"source {name!r} is empty")
            if weights[name] < 0.0:
                raise ValueError(f"the weight of source {name!r} is {weights[name]}; it must not be below 0")
        total = sum(weights.values())
        if not total > 0.0:
            raise ValueError("all weights are 0")
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._shares = {name: weights[name] / total for name in sizes}
        self._offsets = {name: sum(list(sizes.values())[:place]) for place, name in enumerate(sizes)}
        self._orders = {
            name: Curriculum(
                size,
                scores=None if shuffle else [0.0] * size,
                order="shuffled" if shuffle else "ascending",
                seed=_mix(seed, place),
            )
            for place, (name, size) in enumerate(sizes.items())
        }
        once = list(sizes) if epoch_sources is None else list(epoch_sources)
        if not set(once) <= set(sizes):
            raise ValueError(f"epoch_sources is {once}; the sources are {sorted(sizes)}")
        share = sum(self._shares[name] for name in once)
        if not share > 0.0:
            raise ValueError(f"the sources {once} have weight 0: an epoch over them would never end")
        # The small number keeps shares like 0.7 + 0.1 from costing a batch.
        rows = math.ceil(sum(sizes[name] for name in once) / share - 1e-9)
        self._rows_per_epoch = rows
        self._groups = [once, [name for name in sizes if name not in once]]
        self._drawn = dict.fromkeys(sizes, 0)
        self._epoch = _Epoch(batch_size * world_size, accumulate_grad_batches)

    @property
    def recut(self) -> int | None:
        """How many batches of the epoch are done, if the restored state was of other batches."""
        return self._epoch.recut

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return self._epoch.length(self._rows_per_epoch)

    def __iter__(self) -> Iterator[list[Row]]:
        """Yield the batches of an epoch, or what a restored state left of it."""
        if self._epoch.rows >= self._rows_per_epoch:
            self._epoch.rows = self._epoch.batches = 0
        while self._epoch.rows < self._rows_per_epoch:
            rows: list[Row] = [self._next_row() for _ in range(self._epoch.next_rows(self._rows_per_epoch))]
            self._epoch.add(len(rows), self._rows_per_epoch)
            yield rows[self.rank :: self.world_size]

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the same on every rank."""
        return {
            "orders": {name: order.state_dict() for name, order in self._orders.items()},
            "drawn": dict(self._drawn),
            **self._epoch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position, perhaps with another batch size or number of ranks."""
        if set(state["drawn"]) != set(self._drawn):
            raise ValueError(
                f"the checkpoint has sources {sorted(state['drawn'])}, this run {sorted(self._drawn)}"
            )
        for name, order in self._orders.items():
            order.load_state_dict(state["orders"][name])
        self._drawn = dict(state["drawn"])
        self._epoch.load_state_dict(state, self._rows_per_epoch)

    def _next_row(self) -> int:
        group = self._most_behind(self._groups)
        (source,) = self._most_behind([[name] for name in group])
        self._drawn[source] += 1
        return self._offsets[source] + self._orders[source].propose(1, step=0)[0]

    def _most_behind(self, groups: list[list[str]]) -> list[str]:
        """Return the group of sources that lags its share of the rows, the next one too, the most."""
        shares = [sum(self._shares[name] for name in names) for names in groups]
        drawn = [sum(self._drawn[name] for name in names) for names in groups]
        row = sum(drawn) + 1
        lags = [share / sum(shares) * row - given for share, given in zip(shares, drawn, strict=True)]
        return groups[lags.index(max(lags))]


def _check_batch(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size} ranks")


def _mix(seed: int, place: int) -> int:
    # Sources of one run must not share their permutation.
    return seed * 1_000_003 + place
