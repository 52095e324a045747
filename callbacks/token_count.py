"""Counts the tokens that training has seen, over all ranks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def tokens_of(batch: Any) -> int | Tensor:
    """Count the positions of a batch that are no padding.

    Args:
        batch: Mapping with a tensor `input_ids`, usually of shape (B, T). Padding is where `sequence_ids` is
            -1 or, without these, where `attention_mask` is 0; with neither there is no padding.

    Returns:
        The number: an int, or a tensor of shape () on the batch's device where the device has to count.

    Raises:
        ValueError: If the batch is no mapping with a tensor `input_ids`.

    Example:
        >>> int(tokens_of({"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 0]] * 2)}))
        4
    """
    input_ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(input_ids, Tensor):
        raise ValueError("batches are no mappings with a tensor input_ids, so tokens need count_tokens")
    for name, padding in (("sequence_ids", -1), ("attention_mask", 0)):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.shape == input_ids.shape:
            return (mask != padding).sum()
    return input_ids.numel()


class TokenCount:
    """A running total of tokens: batches are added without waiting for the device, and collected at need.

    Args:
        count: Number of tokens of a batch on this rank; an int or a tensor.

    Example:
        >>> count = TokenCount(len)
        >>> count.add("abc")
        >>> count.add("de")
        >>> count.collect(Trainer(accelerator="cpu", logger=False, barebones=True))
        5
    """

    def __init__(self, count: Callable[[Any], int | Tensor] = tokens_of) -> None:
        self.total = 0
        self._count = count
        self._on_host = 0
        self._on_device: Tensor | None = None

    def add(self, batch: Any) -> None:
        """Count a batch."""
        tokens = self._count(batch)
        if not isinstance(tokens, Tensor):
            self._on_host += int(tokens)
        else:
            tokens = tokens.detach().long()
            self._on_device = tokens if self._on_device is None else self._on_device + tokens

    def collect(self, trainer: Trainer) -> int:
        """Return the total over all ranks, which all must call this together; it waits for the device."""
        strategy = trainer.strategy
        new = torch.tensor(self._on_host, device=strategy.root_device)
        if self._on_device is not None:
            new = new + self._on_device.to(strategy.root_device)
        new = strategy.reduce(new, reduce_op="sum")
        # Ranks that split a layer among them see the same batch.
        sampler = getattr(strategy, "distributed_sampler_kwargs", None) or {}
        copies = trainer.world_size // sampler.get("num_replicas", trainer.world_size)
        self.total += int(new) // copies
        self._on_host, self._on_device = 0, None
        return self.total
