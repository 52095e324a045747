"""The global norm of gradients, whole or in shards, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rewarm.functional.shards import local, total_norm


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor], order: float = 2.0) -> Tensor:
    """Norm of all gradients together, by default the Euclidean one.

    n = (sum_i |g_i| ** p) ** (1 / p)

    Args:
        parameters: Parameters of any shapes; those without a gradient count as 0. Shards (DTensor) may be of
            several meshes: all their ranks must call this together.
        order: Order p of the norm, > 0.

    Returns:
        The norm, shape (), on the gradients' device, float32; the same on all ranks. Not finite if any
        gradient is not, 0 if there is none.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradient_norm([weight]), gradient_norm([weight], order=1.0)
        (tensor(5.), tensor(7.))

    Source: the definition.   Differs: nothing.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return total_norm(gradients, order) if gradients else torch.tensor(0.0)


@torch.no_grad()
def clip_gradients_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down, in place, so that their global norm is at most a bound.

    g_i <- g_i min(1, max_norm / (n + 1e-6))

    Args:
        parameters: Parameters of any shapes, as for `gradient_norm`.
        max_norm: Bound of the norm, > 0.

    Returns:
        The norm before clipping, shape (). If it is not finite, the gradients are of no use.

    Raises:
        ValueError: If max_norm is not above 0.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients_([weight], max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])

    Source: Pascanu et al. 2013, arXiv:1211.5063. Differs: the small number, which is that of
    `torch.nn.utils.clip_grad_norm_`.
    """
    if not max_norm > 0.0:
        raise ValueError(f"max_norm is {max_norm}; it must be above 0")
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    shares: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            share = local(gradient)
            shares.setdefault(share.device, []).append(share)
    for device, of_device in shares.items():
        torch._foreach_mul_(of_device, scale.to(device))
    return norm
