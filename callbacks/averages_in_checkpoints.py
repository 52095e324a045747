"""Averages of weights in checkpoints: whole in one file, or in shards that all ranks write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from rewarm.callbacks.averaged_weights import AveragedWeights
from rewarm.functional.shards import joined_like, local, whole_on_cpu


def write_whole(averages: AveragedWeights, state: dict[str, Any], *, keep: bool) -> None:
    """Put averages into a callback's state, assembled from the shards of all ranks. A collective call.

    Args:
        averages: Averages of this rank's shards.
        state: State of the callback, which gets `averages`.
        keep: Whether this rank writes the file; the other ranks get None in place of each tensor.

    Example:
        >>> averages = AveragedWeights()
        >>> averages.find(torch.nn.Linear(2, 1, bias=False))
        >>> averages.take(decay=0.0, opens_row=True, max_rows=2)
        >>> state = {}
        >>> write_whole(averages, state, keep=True)
        >>> [[tuple(whole.shape) for whole in row] for row in state["averages"]]
        [[(1, 2)]]
    """
    wholes = [whole_on_cpu(shard, keep=keep) for shard in _joined(averages, averages.rows).values()]
    length = len(averages.names)
    state["averages"] = [wholes[start : start + length] for start in range(0, len(wholes), length)]


def write_shards(averages: AveragedWeights, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Put averages into a checkpoint to which every rank writes its shards.

    In such a checkpoint, rank 0 alone writes the states of callbacks, and all ranks write weights and the
    states of optimizers. Among the weights the averages would be unexpected keys when the model is loaded, so
    they are the state of one more optimizer.

    Args:
        averages: Averages of this rank's shards.
        state: State of the callback, which gets `shards`: the name of the entry and the number of rows.
        checkpoint: Checkpoint that gets the entry.

    Example:
        >>> averages = AveragedWeights()
        >>> averages.find(torch.nn.Linear(2, 1, bias=False))
        >>> averages.take(decay=0.0, opens_row=True, max_rows=2)
        >>> state, checkpoint = {}, {"optimizer_states": [{}]}
        >>> write_shards(averages, state, checkpoint)
        >>> state, list(checkpoint["optimizer_states"][1])
        ({'shards': ('optimizer_1', 1)}, ['averages.0.weight'])
    """
    checkpoint["optimizer_states"].append(_joined(averages, averages.rows))
    state["shards"] = (f"optimizer_{len(checkpoint['optimizer_states']) - 1}", len(averages.rows))


def read_shards(averages: AveragedWeights, entry: str, number: int, path: str | Path) -> list[list[Tensor]]:
    """Read this rank's shards of averages that any number of ranks wrote. A collective call.

    Args:
        averages: Averages that have found the weights.
        entry: Name of the entry in the checkpoint.
        number: Number of the rows.
        path: Folder of the checkpoint.

    Returns:
        The rows, the oldest first: tensors of the shapes of this rank's shards, in the order of the names.

    Example:
        >>> import tempfile, warnings
        >>> averages = AveragedWeights()
        >>> averages.find(torch.nn.Linear(2, 1, bias=False))
        >>> averages.take(decay=0.0, opens_row=True, max_rows=2)
        >>> checkpoint = {"optimizer_states": []}
        >>> write_shards(averages, {}, checkpoint)
        >>> entry = {"optimizer_0": checkpoint["optimizer_states"][0]}
        >>> with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        ...     _ = dcp.save(entry, checkpoint_id=folder, no_dist=True)
        ...     read = read_shards(averages, "optimizer_0", 1, folder)
        >>> torch.equal(read[0][0], averages.rows[0][0])
        True
    """
    empty = [averages.empty_row() for _ in range(number)]
    saved = _joined(averages, empty)
    dcp.load({entry: saved}, checkpoint_id=path)
    tensors = iter(saved.values())
    return [[local(next(tensors)) for _ in row] for row in empty]


@torch.no_grad()
def _joined(averages: AveragedWeights, rows: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """The rows as tensors that are divided among ranks as their weights are, by names of their own."""
    return {
        f"averages.{index}.{name}": joined_like(copy, parameter)
        for index, row in enumerate(rows)
        for name, copy, parameter in zip(averages.names, row, averages.parameters, strict=True)
    }
