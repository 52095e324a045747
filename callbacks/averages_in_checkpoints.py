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
        averages: This rank's shards.
        state: The callback's state, which gets `averages`.
        keep: Whether this rank writes the file; the others get None for each.
    """
    wholes = [whole_on_cpu(shard, keep=keep) for shard in _joined(averages, averages.rows).values()]
    length = len(averages.names)
    state["averages"] = [wholes[start : start + length] for start in range(0, len(wholes), length)]


def write_shards(averages: AveragedWeights, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Put averages into a checkpoint to which every rank writes its shards.

    Of such a checkpoint, callback states are written by rank 0 alone, and weights and optimizer states by all
    ranks. Among the weights our entries would be unexpected keys to whoever loads the model, so they are one
    more optimizer's state.

    Args:
        averages: This rank's shards.
        state: The callback's state, which gets `shards`: the entry and the number of rows.
        checkpoint: The checkpoint, which gets the entry.
    """
    checkpoint["optimizer_states"].append(_joined(averages, averages.rows))
    state["shards"] = (f"optimizer_{len(checkpoint['optimizer_states']) - 1}", len(averages.rows))


def read_shards(averages: AveragedWeights, entry: str, number: int, path: str | Path) -> list[list[Tensor]]:
    """Read this rank's shards of averages that any number of ranks wrote. A collective call.

    Args:
        averages: Has found the weights that the averages are of.
        entry: Name of the entry in the checkpoint.
        number: How many rows there are.
        path: The checkpoint, a folder.

    Returns:
        The rows, oldest first.
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
