"""Sharding a policy with FSDP2, and with a tensor parallel plan inside each decoder layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PreTrainedModel

from rewarm.lightning_modules.policy import Policy, build_empty, build_model

if TYPE_CHECKING:
    from rewarm.lightning_modules.base import LanguageModule

# What transformers calls the ways to split a layer. The norms of queries and keys see the heads of their rank
# (dimension 2) alone, so the gradients of their weights must be summed over the ranks.
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a model's decoder.

    Args:
        model: The language model.

    Raises:
        ValueError: If the model has no single list of layers.

    Example:
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 2, "num_attention_heads": 1}
        >>> len(decoder_layers(build_model(tiny)))
        2
    """
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of {depth} decoder layers")
    return lists[0]


def build_sharded(module: LanguageModule) -> tuple[Policy, Policy | None]:
    """Build a module's policy in shards, and its frozen reference if the method uses one.

    Args:
        module: The module, which has a device mesh and no policy yet.

    Returns:
        The policy, and the reference; None where the method uses none.

    Example:
        >>> import rewarm
        >>> from lightning.pytorch import Trainer
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> module = rewarm.DPO(tiny, reference="frozen")
        >>> module.trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> names = ("data_parallel", "tensor_parallel")
        >>> module._device_mesh = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=names)
        >>> policy, reference = build_sharded(module)
        >>> type(policy.model.lm_head.weight).__name__, reference.training
        ('DTensor', False)
        >>> dist.destroy_process_group()
    """
    trainer, mesh = module.trainer, module.device_mesh
    assert mesh is not None
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        # FSDP2 keeps the buffers that it first gathers into, and training can't use those of this mode.
        loop.inference_mode = False
    source = None
    if trainer.is_global_zero:
        # Ranks that share a layer must go on drawing the same.
        with torch.random.fork_rng(devices=[]):
            source = build_model(module.model_source, module.attention, dtype="auto")
    # With bfloat16 weights throughout (bf16-true) there is nothing to cast.
    compute_dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else None
    policies = []
    for trainable in (True, False) if module.uses_reference else (True,):
        model = module.equip(build_empty(module.model_source, module.attention))
        policy = Policy(model, module.backend).requires_grad_(trainable).train(trainable)
        shard(policy, model, source, mesh, trainer.strategy.root_device, compute_dtype)
        policies.append(policy)
    if source is not None:
        policies[0].model.generation_config = source.generation_config
    return policies[0], policies[1] if module.uses_reference else None


def shard(
    policy: nn.Module,
    model: PreTrainedModel,
    source: PreTrainedModel | None,
    mesh: DeviceMesh,
    device: torch.device,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Shard a policy that lives on the meta device, in place, and fill it with the weights of rank 0.

    Each decoder layer is one FSDP2 unit, and all the rest (embeddings, norm, head) is another. Only rank 0
    holds a whole model, on the CPU; each other rank receives its shards, tensor by tensor.

    Args:
        policy: Module whose forward runs `model`.
        model: Language model in the policy, on the meta device.
        source: On rank 0 the same model with weights, on the other ranks None.
        mesh: Device mesh with the dimensions `data_parallel` and `tensor_parallel`.
        device: Device of the shards.
        compute_dtype: Type to gather weights and compute in; None keeps that of the weights. The weights, the
            sums of gradients and the optimizer's state stay as they are.

    Raises:
        ValueError: If the tensor parallel size is above 1 and the model has no plan for it, a plan with steps
            that are not known here, or heads that do not divide.

    Example:
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> names = ("data_parallel", "tensor_parallel")
        >>> mesh = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=names)
        >>> source, model = build_model(tiny), build_empty(tiny)
        >>> shard(Policy(model), model, source, mesh, torch.device("cpu"))
        >>> torch.equal(model.lm_head.weight.full_tensor(), source.lm_head.weight)
        True
        >>> dist.destroy_process_group()
    """
    if mesh["tensor_parallel"].size() > 1:
        _split_layers(model, mesh["tensor_parallel"])
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    frozen = not any(parameter.requires_grad for parameter in policy.parameters())
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh["data_parallel"], mp_policy=precision)
    # By default the root stays gathered for the backward pass, which a frozen model does not have.
    fully_shard(
        policy,
        mesh=mesh["data_parallel"],
        mp_policy=precision,
        reshard_after_forward=True if frozen else None,
    )
    policy.to_empty(device=device)
    _fill(model, source)


def _fill(model: PreTrainedModel, source: PreTrainedModel | None) -> None:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, source.state_dict() if source is not None else {}, options=options)
    # State dicts lack the buffers that can be recomputed, and empty ones hold anything.
    buffers = {} if source is None else dict(source.named_buffers())
    for name, buffer in model.named_buffers():
        if source is not None:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)


def _split_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    config, ways = model.config.get_text_config(), mesh.size()
    plan = getattr(model.base_model, "_tp_plan", None) or getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"tensor_parallel_size is {ways}, but transformers has no tensor parallel plan for"
            f" {config.model_type!r}: set it to 1"
        )
    steps = {pattern: step for pattern, step in plan.items() if pattern.startswith("layers.*.")}
    if unknown := sorted(set(steps.values()) - set(_STYLES)):
        raise ValueError(
            f"tensor_parallel_size is {ways}, but the plan of {config.model_type!r} has the steps"
            f" {', '.join(unknown)}; known are {', '.join(_STYLES)}: set it to 1"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name, ways) % ways:
            raise ValueError(
                f"tensor_parallel_size is {ways}, which does not divide {name} {getattr(config, name)}"
            )
    for layer in decoder_layers(model):
        names = [name for name, _ in layer.named_modules()]
        styles: dict[str, ParallelStyle] = {
            name: _STYLES[step]()
            for pattern, step in steps.items()
            for name in fnmatch.filter(names, pattern.removeprefix("layers.*."))
        }
        parallelize_module(layer, mesh, styles)
