"""Attention that keeps the documents of packed rows apart, without a mask over long rows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Documents", "document_attention", "has_kernel", "moved"]

# Documents up to this length are attended in padded batches: a call for each would cost more than padding.
_SHORT = 64
# Rows up to this length are attended to whole, under a mask, where there is no kernel: of so few positions
# all pairs cost less than taking the documents apart (`python -m benchmarks.attention`).
_SHORT_ROW = 128


class Run(NamedTuple):
    """Positions that follow each other: a document, or what else goes on from its beginning.

    Attributes:
        start: First place of the run, counted through the rows laid end to end.
        length: Number of the run's own positions, >= 1.
        document: Number of the run that a branch goes on from; of a document its own number.
        shared: Number of that document's positions that the run attends to beside itself.

    Example:
        >>> documents = Documents(torch.tensor([[0, 1, 2, 1, 2]]))  # a document and its branch
        >>> documents.runs[1]
        Run(start=3, length=2, document=0, shared=1)

    Source: ours.
    """

    start: int
    length: int
    document: int
    shared: int


class Bounds(NamedTuple):
    """Where runs begin and end, as the kernel asks for it.

    Attributes:
        queries: Cumulative lengths of the runs, int32. Shape (runs + 1,).
        keys: Cumulative lengths of the runs with what each one shares, int32. Shape (runs + 1,).
        most_queries: Length of the longest run.
        most_keys: Length of the longest run with what it shares.
        key_places: Places of the keys that each run attends to, int64. Shape (keys,). None for the runs' own.

    Example:
        >>> bounds = Documents(torch.tensor([[0, 1, 2, 0, 1]])).bounds(torch.device("cpu"))
        >>> bounds.queries.tolist(), bounds.most_queries
        ([0, 3, 5], 3)

    Source: the arguments of the kernel of Dao 2023, arXiv:2307.08691.   Differs: nothing.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    key_places: Tensor | None


class Documents:
    """Which positions of rows attend to which, told by where the position ids restart.

    A restart at 0 begins a document, which is causal in itself. A restart at c > 0 begins a branch of the
    document before it in its row: it attends to the first c positions of that document, and causally to
    itself. So completions that share a prompt need it only once in a row. All this stays on the host, where
    attention reads lengths without waiting for a device.

    Args:
        position_ids: Shape (B, T), on any device.
        places: Places of the positions that are computed at all, counted through the rows laid end to end:
            they make one row, in this order. Shape (N,). None for the rows as they are.

    Attributes:
        shape: (B, T); with places (1, their number).
        places: The places that were given.
        runs: The runs, in order.
        plain: Whether every row is one document.
        branched: Whether any run is a branch.

    Raises:
        ValueError: If a branch would share more positions than the document before it has.

    Example:
        >>> [tuple(run) for run in Documents(torch.tensor([[0, 1, 2, 1, 2, 0, 1]])).runs]
        [(0, 3, 0, 0), (3, 2, 0, 1), (5, 2, 2, 0)]

    Source: ours.
    """

    def __init__(self, position_ids: Tensor, places: Tensor | None = None) -> None:
        positions = position_ids.cpu()
        if places is not None:
            positions = positions.flatten()[places].unsqueeze(0)
        rows, length = positions.shape
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions.diff(dim=1) != 1
        starts = begins.flatten().nonzero()[:, 0]
        firsts = positions.flatten()[starts].tolist()
        lengths = starts.diff(append=starts.new_tensor([rows * length])).tolist()
        self.shape, self.places = (rows, length), places
        self.runs: list[Run] = []
        for number, (start, first, size) in enumerate(zip(starts.tolist(), firsts, lengths, strict=True)):
            # Whatever a row begins with is a document.
            is_branch = first > 0 and start % length > 0
            document = self.runs[-1].document if is_branch else number
            known = self.runs[document].length if is_branch and firsts[document] == 0 else 0
            if is_branch and first > known:
                raise ValueError(
                    f"position_ids of row {start // length} go on from {first} at column {start % length},"
                    f" but the document before has only its first {known} positions to share"
                )
            self.runs.append(Run(start, size, document, first if is_branch else 0))
        self.plain = len(self.runs) == rows
        self.branched = any(run.shared for run in self.runs)
        self._bounds: tuple[torch.device, Bounds] | None = None

    def bounds(self, device: torch.device) -> Bounds:
        """Return what the kernel asks for, on its device."""
        if self._bounds is None or self._bounds[0] != device:
            lengths = torch.tensor([[0, 0], *([run.length, run.shared + run.length] for run in self.runs)])
            queries, keys = moved(lengths.cumsum(0).to(torch.int32).t().contiguous(), device)
            places = None
            if self.branched:
                shared = [(self.runs[run.document].start, run.shared) for run in self.runs]
                spans = [span for pair in zip(shared, self.runs, strict=True) for span in pair]
                places = torch.cat([torch.arange(span[0], span[0] + span[1]) for span in spans])
                places = moved(places, device)
            most_queries, most_keys = lengths.amax(0).tolist()
            self._bounds = device, Bounds(queries, keys, most_queries, most_keys, places)
        return self._bounds[1]

    @functools.cached_property
    def mask(self) -> Tensor:
        """Which positions of its row each position attends to, bool. Shape (B, 1, T, T)."""
        rows, length = self.shape
        places = torch.arange(rows * length)
        runs = torch.tensor([[run.start, self.runs[run.document].start, run.shared] for run in self.runs])
        counts = torch.tensor([run.length for run in self.runs])
        start, document, shared = (
            part.view(rows, length, 1) for part in runs.repeat_interleave(counts, 0).t()
        )
        here, there = places.view(rows, length, 1), places.view(rows, 1, length)
        own = (there >= start) & (there <= here)
        return (own | ((there >= document) & (there < document + shared))).unsqueeze(1)

    @functools.cached_property
    def short(self) -> dict[int, list[int]]:
        """The numbers of short documents, by the number of bits of their length."""
        groups: dict[int, list[int]] = {}
        for number, run in enumerate(self.runs):
            if run.length <= _SHORT and not run.shared:
                groups.setdefault(run.length.bit_length(), []).append(number)
        return groups

    @functools.cached_property
    def padded(self) -> tuple[list[Tensor], Tensor]:
        """Where each short group's padded batch takes its positions from, and how they get back.

        The second is for each place of the rows its place in these batches, end to end, and then in all other
        runs.
        """
        batches, end = [], 0
        order = torch.empty(self.shape[0] * self.shape[1], dtype=torch.long)
        for group in self.short.values():
            starts, lengths = torch.tensor([self.runs[number][:2] for number in group]).split(1, dim=1)
            columns = torch.arange(int(lengths.max()))
            # Padding repeats the last position. It comes last, so that no position of the document sees it.
            places = starts + torch.minimum(columns, lengths - 1)
            real = columns < lengths
            order[places[real]] = end + real.flatten().nonzero()[:, 0]
            batches.append(places)
            end += places.numel()
        short = {number for group in self.short.values() for number in group}
        for number, run in enumerate(self.runs):
            if number not in short:
                order[run.start : run.start + run.length] = torch.arange(end, end + run.length)
                end += run.length
        return batches, order


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None = None
) -> Tensor:
    """Causal attention of each document, and of each branch with the positions that it shares.

    out[t] = softmax over s of (scale * query[t] . key[s]) @ value[s], s in t's run up to t or shared with it

    In float16 and bfloat16 on CUDA it is one call of the variable-length flash kernel of torch. Elsewhere it
    is `scaled_dot_product_attention`: called once, under a mask, for rows of up to 128 positions; for longer
    ones once per document, and a few times for all short ones.

    Args:
        query: Shape (B, H, T, D).
        key: Shape (B, K, T, D), with K a divisor of H: each key head serves H / K query heads.
        value: Shape (B, K, T, D).
        documents: Documents of the B rows of T positions.
        scale: Factor of the scores; None for D ** -0.5.

    Returns:
        Shape (B, H, T, D), in the dtype of the queries (under autocast, in its).

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> one, other = torch.randn(2, 1, 1, 3, 4)
        >>> both, apart = torch.cat([one, other], 2), Documents(torch.tensor([[0, 1, 2, 0, 1, 2]]))
        >>> alone = F.scaled_dot_product_attention(other, other, other, is_causal=True)
        >>> torch.allclose(document_attention(both, both, both, apart)[:, :, 3:], alone)
        True

    Source: ours; the kernel is Dao 2023, arXiv:2307.08691.   Differs: nothing.
    """
    if key.shape[:-1] != value.shape[:-1] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key and value have shapes {tuple(key.shape)} and {tuple(value.shape)}; allowed: (B, K, T, D),"
            f" K a divisor of the {query.shape[1]} heads of query"
        )
    if documents.shape != (len(query), query.shape[2]) or documents.shape != (len(key), key.shape[2]):
        raise ValueError(
            f"documents are of rows {documents.shape}; query has {(len(query), query.shape[2])},"
            f" key {(len(key), key.shape[2])}"
        )
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    shares_heads = query.shape[1] != key.shape[1]
    if documents.plain:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=shares_heads
        )
    size = query.shape[-1]
    suits = size == value.shape[-1] and size % 8 == 0 and size <= 256
    kernel = suits and has_kernel(query.device, query.dtype)
    if not kernel and query.shape[2] <= _SHORT_ROW:
        mask = moved(documents.mask, query.device)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=shares_heads
        )
    # All rows end to end. Models make queries, keys and values in this order, so that nothing is copied.
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    attend = _with_kernel if kernel else _one_by_one
    out = attend(query, key, value, documents, scale, shares_heads)
    return out.unflatten(0, documents.shape).transpose(1, 2)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """Return values from the host on a device, without waiting for what the device is busy with.

    Args:
        values: A tensor on the host. Any shape.
        device: Where the values are to be.

    Returns:
        The values on the device. Same shape.

    Example:
        >>> moved(torch.ones(2), torch.device("cpu"))
        tensor([1., 1.])

    Source: ours.
    """
    pinned = device.type == "cuda"
    return (values.pin_memory() if pinned else values).to(device, non_blocking=pinned)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has a kernel for documents of any lengths on a device, in a dtype.

    Example:
        >>> has_kernel(torch.device("cpu"), torch.bfloat16)
        False

    Source: ours; the kernel is Dao 2023, arXiv:2307.08691.
    """
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device)[0] >= 8
    )


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None, shares_heads: bool
) -> Tensor:
    attend: Callable[..., Tensor] = functools.partial(
        F.scaled_dot_product_attention, scale=scale, enable_gqa=shares_heads
    )
    states, runs = (query, key, value), documents.runs
    done = {number for group in documents.short.values() for number in group}
    out = []
    if done:
        batches, order = documents.padded
        for places in batches:
            flat = moved(places.flatten(), query.device)
            batch = (part.index_select(0, flat).unflatten(0, places.shape).transpose(1, 2) for part in states)
            out.append(attend(*batch, is_causal=True).transpose(1, 2).flatten(0, 1))
    if len(done) < len(runs):
        # Split, not sliced: the gradient of each slice would be as large as the whole.
        parts = list(zip(*(part.split([run.length for run in runs]) for part in states), strict=True))
        for number in sorted(set(range(len(runs))) - done):
            run, (queries, keys, values), mask = runs[number], parts[number], None
            if run.shared:
                _, first_keys, first_values = parts[run.document]
                keys = torch.cat([first_keys[: run.shared], keys])
                values = torch.cat([first_values[: run.shared], values])
                mask = query.new_ones((run.length, len(keys)), dtype=torch.bool).tril(run.shared)
            heads = (part.transpose(0, 1).unsqueeze(0) for part in (queries, keys, values))
            out.append(attend(*heads, attn_mask=mask, is_causal=mask is None).squeeze(0).transpose(0, 1))
    joined = torch.cat(out) if len(out) > 1 else out[0]
    return joined.index_select(0, moved(order, query.device)) if done else joined


def _with_kernel(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None, shares_heads: bool
) -> Tensor:
    # Importing it takes time that nothing else needs.
    from torch.nn.attention.varlen import varlen_attn

    bounds = documents.bounds(query.device)
    if bounds.key_places is not None:
        key, value = (states.index_select(0, bounds.key_places) for states in (key, value))
    # torch 2.11 has no such argument, and takes fewer key heads as they are.
    named = shares_heads and "enable_gqa" in inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if named else {}
    # Up to the query's own place and no further, counted from the ends of both.
    window = (-1, 0)
    out = varlen_attn(query, key, value, *bounds[:4], scale=scale, window_size=window, **options)
    assert isinstance(out, Tensor)  # and not its normaliser too, which was not asked for
    return out
