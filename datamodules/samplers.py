"""Batch samplers that own order and pacing: which examples share a row, which rows a batch, on which rank.

Every rank runs the same sampler over the same data and takes its own rows, so the state is one and the same
on all ranks, and a run may go on with another number of them.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rewarm.checks import at_least, in_range, replaced
from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.packing import Packer
from rewarm.curriculum.permutation import Permutation
from rewarm.datamodules.loader import Bin


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
        curriculum: Curriculum that proposes the examples.
        batch_size: Number of rows per batch and rank, >= 1.
        lengths: Number of positions that each example takes, for packing and buckets of lengths.
        packer: Packer of examples into rows, which are then tuples of example numbers. None gives each
            example a row of its own, and batches are lists of example numbers, which any map-style Dataset
            takes.
        length_bucket: Number of global batches over which rows of similar length are put together, >= 1.
            These batches come in random order; 1 keeps the order of the curriculum. All rows of a bucket are
            drawn at once, as the pacing and the gate have it at the bucket's first step.
        seed: Seed of the order of the batches in a bucket of lengths.
        rank: Number of this process, in [0, world_size).
        world_size: Number of ranks.
        accumulate_grad_batches: Batches per optimizer step: what the pacing counts is steps.

    Example:
        >>> curriculum = Curriculum(5, scores=[4, 3, 2, 1, 0], order="ascending")
        >>> sampler = CurriculumSampler(curriculum, batch_size=2)
        >>> list(sampler)
        [[4, 3], [2, 1], [0]]

    Raises:
        ValueError: If a number is out of its range, or a packer or a bucket of lengths comes without lengths.
    """

    @replaced(length_window="length_bucket=")
    def __init__(
        self,
        curriculum: Curriculum,
        batch_size: int,
        *,
        lengths: Sequence[int] | None = None,
        packer: Packer | None = None,
        length_bucket: int = 1,
        rank: int = 0,
        world_size: int = 1,
        accumulate_grad_batches: int = 1,
        seed: int = 0,
    ) -> None:
        _check_batch(batch_size, rank, world_size)
        if lengths is None and (packer is not None or length_bucket > 1):
            what = "length_bucket" if packer is None else "packing"
            raise ValueError(f"{what} needs the lengths of the examples")
        at_least(1, length_bucket=length_bucket)
        if length_bucket > 1 and packer is not None:
            raise ValueError(f"length_bucket is {length_bucket}, but packed rows all have one length")
        self.curriculum, self.batch_size, self.rank, self.world_size = (
            curriculum,
            batch_size,
            rank,
            world_size,
        )
        self._lengths, self._packer = lengths, packer
        self._length_bucket, self._seed, self._buckets = length_bucket, seed, 0
        self._pending: list[Bin] = []
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

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch, over all ranks."""
        return self._epoch_size()

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return self._epoch.length(self._epoch_size())

    def __iter__(self) -> Iterator[list[Bin]]:
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
            "windows": self._buckets,
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
        self._buckets = state["windows"]
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

    def _next_rows(self, wanted: int) -> list[Bin]:
        if self._packer is None:
            if self._length_bucket > 1 or self._pending:
                return self._next_alike(wanted)
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

    def _next_alike(self, wanted: int) -> list[Bin]:
        """Take a batch out of a bucket of batches that are each of similar lengths."""
        batch = self._epoch.batch_rows
        # An epoch that is a pass must not draw from the next one.
        left = self._epoch_size() - self._epoch.rows if self.passes_align else math.inf
        wanted = int(min(wanted, left))
        while len(self._pending) < wanted:
            drawn = int(min(self._length_bucket * batch, left - len(self._pending)))
            examples = self.curriculum.propose(drawn, self._step)
            if self._lengths is not None:
                examples.sort(key=self._lengths.__getitem__)
            batches = [examples[start : start + batch] for start in range(0, drawn, batch)]
            # One that is not full stays the last.
            order = Permutation(max(1, drawn // batch), self._seed, (self._buckets,))
            places = [order(place) for place in range(drawn // batch)]
            places += range(len(places), len(batches))
            self._pending += [example for place in places for example in batches[place]]
            self._buckets += 1
        rows, self._pending = self._pending[:wanted], self._pending[wanted:]
        return rows


class _Rotation:
    """Gives turns in exact shares: the next one is of the name that is owed the most."""

    def __init__(self, names: Sequence[str]) -> None:
        self.owed = dict.fromkeys(names, 0.0)

    def __call__(self, weights: Mapping[str, float]) -> str:
        total = sum(weights[name] for name in self.owed)
        for name in self.owed:
            self.owed[name] += weights[name] / total
        # A share that ends leaves up to a turn owed, which isn't given without one.
        chosen = max((name for name in self.owed if weights[name] > 0.0), key=self.owed.__getitem__)
        self.owed[chosen] -= 1.0
        return chosen


def pass_order(size: int, seed: int, source: str, number: int) -> Permutation:
    """Return the order in which `MixtureSampler` shows the rows of a source in a pass.

    Args:
        size: Number of rows of the source, >= 1.
        seed: Seed of the sampler.
        source: Name of the source.
        number: Number of the pass, >= 0.

    Example:
        >>> order = pass_order(4, seed=0, source="wiki", number=0)
        >>> sorted(order(place) for place in range(4))
        [0, 1, 2, 3]
    """
    return Permutation(size, seed, (*source.encode(), number))


class MixtureSampler:
    """Batches of rows from several sources in exact shares, by rotation rather than by chance.

    A row comes from the source that lags its share the most, chosen first between the epoch's sources
    together and all others together. Every stretch of n rows then holds the others' share of n, give or take
    one row, however small the micro-batch; and so it is with each of two sources. Which row of a source comes
    at which place is computed, so that neither memory nor state grow with the sources.

    Args:
        sizes: Number of rows of each source; sources follow each other in the data set's numbering in this
            order.
        weights: Share of each source, normalised to sum to 1; or a function that gives them for an optimizer
            step, counted from 0.
        batch_size: Rows per batch and rank, >= 1.
        epoch_sources: Sources of which together an epoch is one pass, by their share at step 0; None is all.
        rank: Number of this process, in [0, world_size).
        world_size: Number of ranks.
        accumulate_grad_batches: Batches per optimizer step.
        shuffle: Whether each source's rows are drawn in random order, a new one in each pass; else in order.
        seed: Seed of the order within each source.
        branch: Whether a state with other sources may be restored. Sources of the same size go on where they
            were, and others begin.

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
        weights: Mapping[str, float] | Callable[[int], Mapping[str, float]],
        batch_size: int,
        *,
        epoch_sources: Sequence[str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        accumulate_grad_batches: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        branch: bool = False,
    ) -> None:
        _check_batch(batch_size, rank, world_size)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"source {name!r} is empty")
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._sizes, self._shuffle, self._seed, self._branch = dict(sizes), shuffle, seed, branch
        self._given = weights
        self._weights: dict[str, float] = {}
        self._offsets = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
        once = list(sizes) if epoch_sources is None else list(epoch_sources)
        if not set(once) <= set(sizes):
            raise ValueError(f"epoch_sources is {once}; the sources are {sorted(sizes)}")
        self._groups = {"epoch": once, "others": [name for name in sizes if name not in once]}
        self._step = 0  # of the optimizer, which the next batch is for
        self._set_weights()
        share = self._group_weights["epoch"] / sum(self._group_weights.values())
        if not share > 0.0:
            raise ValueError(f"the sources {once} have weight 0: an epoch over them would never end")
        # The small number keeps shares like 0.7 + 0.1 from costing a batch.
        self._rows_per_epoch = math.ceil(sum(sizes[name] for name in once) / share - 1e-9)
        self._between = _Rotation(list(self._groups))
        self._within = {group: _Rotation(names) for group, names in self._groups.items()}
        self._drawn = dict.fromkeys(sizes, 0)
        self._orders: dict[str, tuple[int, Permutation]] = {}
        self._epoch = _Epoch(batch_size * world_size, accumulate_grad_batches)

    @property
    def recut(self) -> int | None:
        """How many batches of the epoch are done, if the restored state was of other batches."""
        return self._epoch.recut

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return self._epoch.length(self._rows_per_epoch)

    def __iter__(self) -> Iterator[list[Bin]]:
        """Yield the batches of an epoch, or what a restored state left of it."""
        if self._epoch.rows >= self._rows_per_epoch:
            self._epoch.rows = self._epoch.batches = 0
        while self._epoch.rows < self._rows_per_epoch:
            draws = [self._draw() for _ in range(self._epoch.next_rows(self._rows_per_epoch))]
            if self._epoch.add(len(draws), self._rows_per_epoch):
                self._step += 1
                self._set_weights()
            yield [self._row(name, number) for name, number in draws[self.rank :: self.world_size]]

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the same on every rank."""
        return {
            "order": self._order(),
            "drawn": dict(self._drawn),
            "owed": [dict(rotation.owed) for rotation in (self._between, *self._within.values())],
            "step": self._step,
            **self._epoch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position, perhaps with another batch size or number of ranks."""
        then, now = state["order"], self._order()
        if then == now:
            self._drawn = dict(state["drawn"])
            for rotation, owed in zip((self._between, *self._within.values()), state["owed"], strict=True):
                # Another choice of an epoch's sources leaves nothing to go on from.
                rotation.owed = {name: owed.get(name, 0.0) for name in rotation.owed}
        elif not self._branch:
            changed = next(name for name in now if then[name] != now[name])
            raise ValueError(f"the checkpoint has {changed} {then[changed]}, this run {now[changed]}")
        else:
            same = then | {"sizes": None} == now | {"sizes": None}
            self._drawn = {
                name: state["drawn"][name] if same and then["sizes"].get(name) == size else 0
                for name, size in self._sizes.items()
            }
            state = {**state, "batch_rows": 0}  # the epoch has another length, so it is cut anew
        self._step = state["step"]
        self._set_weights()
        self._epoch.load_state_dict(state, self._rows_per_epoch)

    def _order(self) -> dict[str, Any]:
        return {"sizes": dict(self._sizes), "seed": self._seed, "shuffle": self._shuffle}

    def _set_weights(self) -> None:
        weights = dict(self._given(self._step) if callable(self._given) else self._given)
        if set(weights) != set(self._sizes):
            raise ValueError(f"weights names {sorted(weights)}, the sources are {sorted(self._sizes)}")
        for name, weight in weights.items():
            if not weight >= 0.0:
                raise ValueError(f"the weight of source {name!r} is {weight}; it must not be below 0")
        if not 0.0 < sum(weights.values()) < math.inf:
            raise ValueError("all weights are 0")
        self._weights = weights
        self._group_weights = {
            group: sum(weights[name] for name in names) for group, names in self._groups.items()
        }

    def _draw(self) -> tuple[str, int]:
        """Return a source, and how many of its rows were drawn before."""
        name = self._within[self._between(self._group_weights)](self._weights)
        self._drawn[name] += 1
        return name, self._drawn[name] - 1

    def _row(self, name: str, number: int) -> int:
        done, place = divmod(number, self._sizes[name])
        if self._shuffle:
            if self._orders.get(name, (-1,))[0] != done:
                self._orders[name] = done, pass_order(self._sizes[name], self._seed, name, done)
            place = self._orders[name][1](place)
        return self._offsets[name] + place


def _check_batch(batch_size: int, rank: int, world_size: int) -> None:
    at_least(1, batch_size=batch_size, world_size=world_size)
    in_range(f"[0, {world_size})", rank=rank)
