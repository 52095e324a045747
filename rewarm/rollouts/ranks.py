"""Who has other data, and what all of them have together.

Ranks that share a layer (tensor parallel) have the same data; all others have other data each. What is
sampled, scored or counted is shared out among those, and gathered from them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch import Trainer

T = TypeVar("T")


class Place(NamedTuple):
    """Where a process stands among those that have different data.

    Attributes:
        rank: Number of the process, in [0, size).
        size: How many there are; those that share a layer (tensor parallel) count once.
        group: Process group of them; None for all processes.

    Example:
        >>> ALONE
        Place(rank=0, size=1, group=None)
    """

    rank: int
    size: int
    group: Any


ALONE = Place(0, 1, None)
"""The place of a process without others."""


def place(trainer: Trainer | None) -> Place:
    """Return where this process stands among those that have different data.

    Args:
        trainer: The trainer whose strategy has set the processes up; None for a process without others.

    Example:
        >>> place(None)
        Place(rank=0, size=1, group=None)
    """
    if trainer is None:
        return ALONE
    module = trainer.lightning_module
    mesh = None if module is None else module.device_mesh
    if mesh is None:
        return Place(trainer.global_rank, trainer.world_size, None)
    data = mesh["data_parallel"]
    return Place(data.get_local_rank(), data.size(), data.get_group())


def everyone() -> Place:
    """Return where this process stands among all processes, whether they have different data or not.

    Example:
        >>> everyone()
        Place(rank=0, size=1, group=None)
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ALONE
    return Place(torch.distributed.get_rank(), torch.distributed.get_world_size(), None)


def gather(value: T, place: Place) -> list[T]:
    """Return what each rank of a place has, in the order of the ranks. A collective call.

    Args:
        value: What this rank has; any object that can be pickled.
        place: This rank's place.

    Example:
        >>> gather("mine", ALONE)
        ['mine']
    """
    if place.size == 1:
        return [value]
    values: list[Any] = [None] * place.size
    torch.distributed.all_gather_object(values, value, group=place.group)
    return values


def gather_in_turn(share: Sequence[T], place: Place) -> list[T]:
    """Return the list of which each rank has every `size`-th item, from its `rank` on. A collective call.

    It undoes `items[place.rank :: place.size]`.

    Args:
        share: The items of this rank, in their order.
        place: This rank's place.

    Example:
        >>> gather_in_turn([2, 3, 5], ALONE)
        [2, 3, 5]
    """
    shares = gather(list(share), place)
    total = sum(map(len, shares))
    return [shares[number % place.size][number // place.size] for number in range(total)]
