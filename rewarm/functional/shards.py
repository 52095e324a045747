"""Tensors that are divided among ranks (DTensor) and tensors that are not, as one and the same.

A *shard* is the part that one rank holds, a *whole* tensor has all values on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether some of the tensors are divided among ranks.

    Args:
        tensors: Tensors of any shapes.

    Example:
        >>> any_sharded([torch.zeros(2)])
        False

    Source: ours.
    """
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: its shard, or all of it. It shares the tensor's memory.

    Args:
        tensor: Any shape, divided among ranks or not.

    Returns:
        An ordinary tensor outside of the graph of gradients.

    Example:
        >>> local(torch.ones(2, requires_grad=True))
        tensor([1., 1.])

    Source: ours.
    """
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its values. For shards it is a collective call.

    Args:
        tensor: Any shape, divided among ranks or not.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])

    Source: ours.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_cpu(tensor: Tensor, *, keep: bool) -> Tensor | None:
    """Gather a tensor into main memory, one tensor at a time. For shards it is a collective call.

    Args:
        tensor: Any shape, divided among ranks or not.
        keep: Whether this rank keeps the tensor.

    Returns:
        The whole tensor on the CPU, or None.

    Example:
        >>> whole_on_cpu(torch.ones(2), keep=False) is None
        True

    Source: ours.
    """
    gathered = whole(tensor)
    return gathered.cpu() if keep else None


def part_like(values: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, divided as another tensor is; no communication.

    Args:
        values: The whole tensor, the same on all ranks.
        like: A tensor of its shape, divided among ranks or not.

    Returns:
        A copy that is divided, or the whole tensor itself if `like` is not.

    Example:
        >>> part_like(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])

    Source: ours.
    """
    if not isinstance(like, DTensor):
        return values
    # A copy, since a part would keep the whole in the device's memory.
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None).clone()


def joined_like(shard: Tensor, like: Tensor) -> Tensor:
    """Return what is the tensor of which each rank gives its shard, divided as another tensor is.

    Args:
        shard: This rank's shard, of the shape of `local(like)`.
        like: A tensor, divided among ranks or not.

    Returns:
        A divided tensor of the shape of `like` on the shard's device, or the shard itself if `like` is not
        divided.

    Example:
        >>> joined_like(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])

    Source: ours.
    """
    if not isinstance(like, DTensor):
        return shard
    joined = DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return joined.to(shard.device)


def total_norm(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of tensors together. All ranks that share some of them must call this together.

    n = (sum |x| ** p) ** (1 / p)

    Args:
        tensors: At least one tensor, of any shapes, on any devices; shards may be of several meshes.
        order: Order p of the norm, > 0.

    Returns:
        The norm, shape (), on the device of the first tensor, float32; the same on all ranks.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)

    Source: the definition.   Differs: nothing.
    """
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        place = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else tensor.device
        groups.setdefault(place, []).append(tensor)
    norms = [whole(torch.nn.utils.get_total_norm(group, order)) for group in groups.values()]
    return torch.linalg.vector_norm(
        torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]), order
    )


def reshard(module: nn.Module) -> None:
    """Drop what FSDP2 has gathered: after a forward pass without backward it would go on using that.

    Args:
        module: Any module; its parts that are in shards are found.

    Example:
        >>> reshard(nn.Linear(2, 2))

    Source: ours.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
