"""Sampling from a model that trains in shards: whole weights on every rank."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

T = TypeVar("T")


def call_unsharded(trainer: Trainer, model: nn.Module, function: Callable[[], T]) -> T:
    """Call a function while a model has its whole weights on every rank.

    Weights are gathered once, not layer by layer for every token, so that ranks may then call the model as
    often as each of them needs to, or not at all. All ranks must call this together. Without shards it is an
    ordinary call.

    Args:
        trainer: The trainer whose strategy holds the shards, FSDP2 (`ModelParallelStrategy`).
        model: The model, or the part of it, that the function calls; somewhere in the LightningModule.
        function: What to call; must not train. Memory must hold the whole model in its compute dtype.

    Returns:
        What the function returns.

    Raises:
        ValueError: If the strategy is Lightning's `FSDPStrategy`, the older kind of sharding.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ValueError("strategy is FSDPStrategy, which is not supported; use rewarm.FSDP2Strategy")
    shards = [m for m in trainer.lightning_module.modules() if isinstance(m, FSDPModule)]
    # `modules` lists the outermost first: that one gathers the weights that no inner one has.
    around = [shard for shard in shards if any(module is model for module in shard.modules())]
    within = [shard for shard in model.modules() if isinstance(shard, FSDPModule) and shard not in around]
    if not around:
        return _gathered(within, function)
    root: Any = around[0]
    # A call of the root, so that FSDP2 knows it for the root before any part of it is called.
    root.call_unsharded = lambda: _gathered([*around[1:], *within], function)
    register_fsdp_forward_method(root, "call_unsharded")
    try:
        result: T = root.call_unsharded()
        return result
    finally:
        del root.call_unsharded
        root.reshard()


def _gathered(shards: Sequence[FSDPModule], function: Callable[[], T]) -> T:
    with ExitStack() as stack:
        for shard in shards:
            stack.callback(shard.reshard)
            stack.callback(shard.set_reshard_after_forward, True, recurse=False)
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
        return function()
