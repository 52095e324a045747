"""The optimizer that modules have by default, and the groups of parameters that any gets."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Return AdamW at 2e-5, betas 0.9 and 0.95, fused.

    Args:
        parameters: Parameters, or groups of parameters.

    Example:
        >>> default_optimizer([torch.nn.Parameter(torch.zeros(2))]).defaults["lr"]
        2e-05
    """
    return torch.optim.AdamW(parameters, lr=2e-5, betas=(0.9, 0.95), fused=True)


def parameter_groups(parameters: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Divide parameters into matrices, which decay, and vectors (biases, norms), which don't.

    Args:
        parameters: Parameters of any shape; those that don't learn are left out.

    Returns:
        Groups for an optimizer. The group of the vectors, if there are any, has `weight_decay` 0.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(torch.nn.Linear(3, 2).parameters())]
        [1, 1]
    """
    learnt = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in learnt if p.ndim >= 2]}]
    if vectors := [p for p in learnt if p.ndim < 2]:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return groups
