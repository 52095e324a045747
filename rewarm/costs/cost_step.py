"""Memory and operations of a training step, predicted on tensors without data."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rewarm.costs.cost_model import CostTrace, Operation, trace_step, without_data
from rewarm.costs.cost_work import PRECISIONS, Rollout, Work
from rewarm.datamodules.loader import collate_rows
from rewarm.functional.logprob import rows_per_chunk
from rewarm.lightning_modules.policy import DOCUMENTS, Policy, build_empty
from rewarm.lightning_modules.sharding import decoder_layers
from rewarm.rollouts.engine import rollout_cache, sample
from rewarm.text.encoding import Tokens

Timed = list[tuple[list[Operation], float]]


@dataclass(frozen=True)
class Cost:
    """What a step takes on one device.

    Attributes:
        parts: Bytes by part, at the moment when most is held.
        training: Operations of a micro-batch and of the optimizer, with how often they come in a step.
        sampling: The same of a prefill and of a token, for GRPO.

    Example:
        >>> cost = Cost({"weights": 8.0, "working": 4.0}, [([Operation(6.0, 0)], 2.0)], [])
        >>> cost.total_bytes, cost.flops
        (12.0, 12.0)
    """

    parts: dict[str, float]
    training: Timed
    sampling: Timed

    @property
    def total_bytes(self) -> float:
        """Peak memory."""
        return sum(self.parts.values())

    @property
    def flops(self) -> float:
        """Operations of matrix products per step."""
        return sum(n * sum(op.flops for op in ops) for ops, n in [*self.training, *self.sampling])


def work_cost(work: Work) -> Cost:
    """Predict the memory and the operations of a step.

    Args:
        work: As `rewarm.costs.cost_work.read_work` gives it.

    Raises:
        ValueError: If the model cannot be built or divided.
    """
    dtype, autocast = PRECISIONS[work.precision]
    compute = torch.bfloat16 if work.sharded and autocast else dtype
    policy, reference = _policies(work, compute)
    layers = [list(layer.parameters()) for layer in decoder_layers(policy.model)]
    in_layers = {id(p) for layer in layers for p in layer}
    root = [p for p in policy.parameters() if id(p) not in in_layers] if work.sharded else []
    division = 1 / work.replicas if work.sharded else 1.0
    own = _numel(policy.parameters()) * dtype.itemsize * division
    # Traced are weights in the dtype that is gathered; a shard keeps its own.
    share = division * dtype.itemsize / compute.itemsize

    if not work.on_cpu and policy.model.config._attn_implementation == DOCUMENTS:
        # An accelerator has one kernel for all documents, which keeps what it keeps for one.
        work = replace(work, documents=1)
    batch = lay_out(work)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "targets", "documents")}

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logprobs: Tensor = policy(**inputs)
            if reference is not None:
                with torch.no_grad():
                    reference(**inputs)
        return logprobs

    work.module.policy = policy
    step = trace_step(
        forward,
        work.module.configure_optimizers(),
        accumulate=work.accumulate,
        shares={"gradients": share, "optimizer": share, "weights": 0.0 if work.sharded else 1.0},
        whole=root,
    )
    always = {
        "weights": own if work.sharded else 0.0,
        "buckets": own if work.replicas > 1 and not work.sharded else 0.0,
        "reference": own if reference is not None else 0.0,
        "averages": work.averages * own * 4 / dtype.itemsize,
    }
    training: dict[str, float] = {}
    if not work.on_cpu:
        head = policy.model.get_output_embeddings().weight
        training["working"] = _larger_chunks(work, *head.shape, narrow=autocast)
    if work.sharded:
        training["gathered"] = _gathered(max(map(_numel, layers)), _numel(root), compute.itemsize)
        training["gradients"] = _numel(root) * dtype.itemsize * division
    parts = _added(step.peak_parts, always, training)
    update = [Operation(op.flops, round(op.moved_bytes * division)) for op in step.update]
    operations: Timed = [(step.batch, work.accumulate), (update, 1)]
    if work.rollout is None:
        return Cost(parts, operations, [])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sampling, sampled = _trace_rollout(policy.model, work.rollout, work.replicas)
    held = {name: step.peak_parts.get(name, 0.0) for name in ("weights", "optimizer")}
    held["gradients"] = own
    if work.sharded:
        sampling["gathered"] = _numel(policy.parameters()) * compute.itemsize
    sampling = _added(held, always, sampling)
    return Cost(max(parts, sampling, key=lambda p: sum(p.values())), operations, sampled)


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _added(*parts: dict[str, float]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    totals = {name: sum(part.get(name, 0.0) for part in parts) for name in names}
    return {name: total for name, total in totals.items() if total}


def _gathered(layer: int, root: int, width: int) -> int:
    """Bytes that FSDP2 takes beside its shards (Zhao et al. 2023, arXiv:2304.11277).

    The root's own parameters stay gathered from the forward to the end of the backward pass. Two layers are:
    the one at work and the one fetched ahead. In the backward pass a layer's gradients are whole until they
    are reduced, in float32.
    """
    return width * (root + 2 * layer) + (width + 4) * layer


def _larger_chunks(work: Work, vocab: int, width: int, *, narrow: bool) -> int:
    """What the head's chunks take on an accelerator beyond those of a CPU, on which the trace was made."""
    targets = work.rows * work.targets
    here, there = (rows_per_chunk(targets, vocab, width, device) for device in ("cpu", "cuda"))
    # There the products of mixed precision take narrow copies of the weight and of the gradient's chunk.
    copies = 2 * vocab * (width + there) if narrow else 0
    return 4 * vocab * max(0, there - here) + copies


def _policies(work: Work, dtype: torch.dtype) -> tuple[Policy, Policy | None]:
    module = work.module
    # Without data there is nothing for a compiler or a Triton kernel.
    module.compile_layers, module.liger_layers = False, False
    policies = []
    for trainable in (True, False) if module.uses_reference else (True,):
        model = module.equip(_divided(work))
        without_data(model, dtype)
        policy = Policy(model, "dense" if module.backend == "dense" else "torch")
        policies.append(policy.requires_grad_(trainable).train(trainable))
    return policies[0], policies[1] if module.uses_reference else None


def _divided(work: Work) -> PreTrainedModel:
    """Build the part of the model that a device has of those that share each layer."""
    # Flash kernels need a GPU even for a model without weights, and keep what torch's own attention keeps.
    attention = None if "flash" in str(work.module.attention) else work.module.attention
    model = build_empty(work.module.model_source, attention)
    if work.ways == 1:
        return model
    config = model.config.get_text_config()
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        whole = getattr(config, name)
        if whole % work.ways:
            raise ValueError(
                f"{work.name}: tensor_parallel_size is {work.ways}, which does not divide {name} {whole}"
            )
        setattr(config, name, whole // work.ways)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, trust_remote_code=False)


def lay_out(work: Work) -> dict[str, Any]:
    """Return a batch as the data lays it out; with 0 for all tokens, as what they are plays no part."""
    size = math.ceil(work.length / work.documents)
    # Completions of a prompt that are in one batch compute it once: as few as can be.
    prompts = min(work.rows, work.rollout.prompts) if work.rollout else work.rows
    learn = torch.arange(size + 1) > work.length - work.targets
    rows = [
        [Tokens(torch.full((size + 1,), row * prompts // work.rows), learn)] * work.documents
        for row in range(work.rows)
    ]
    batch = collate_rows(rows, 0, restart=work.documents > 1)
    return batch | {name: batch[name].clamp(max=0) for name in ("input_ids", "targets")}


@torch.no_grad()
def _trace_rollout(model: PreTrainedModel, rollout: Rollout, replicas: int) -> tuple[dict[str, float], Timed]:
    """Prefill, then decode the last token, when the cache is longest; and one of middle length, for time."""
    model.eval()
    cache: Any = rollout_cache(model)
    prompts = math.ceil(rollout.prompts / replicas)

    def decode(rows: int, new: int, start: int) -> list[Operation]:
        trace.operations = []
        mask = torch.ones(rows, start + new, dtype=torch.long)
        mask[0, 0] = 0  # prompts differ in length
        out = model(
            input_ids=torch.zeros(rows, new, dtype=torch.long),
            attention_mask=mask,
            position_ids=torch.arange(start, start + new).expand(rows, -1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        sample(out.logits[:, -1], torch.zeros(rows, dtype=torch.float64))
        return trace.operations[:]

    with CostTrace() as trace:
        prefill = decode(prompts, rollout.prompt_length, 0)
        cache.batch_repeat_interleave(rollout.samples)
        times = []
        for place in (0.5, 1.0):
            held = rollout.prompt_length + round(place * (rollout.new_tokens - 1))
            for layer in cache.layers:
                wanted = min(held - 1, getattr(layer, "sliding_window", None) or held)
                for name in ("keys", "values"):
                    states = getattr(layer, name)
                    shape = (*states.shape[:-2], wanted, states.shape[-1])
                    setattr(layer, name, states.new_empty(shape))
            for start in (held - 1, held):  # the first makes room, which most tokens find
                operations = decode(prompts * rollout.samples, 1, start)
            times.append(operations)
    whole = sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))
    parts = {"cache": float(whole), "working": max(0.0, trace.peak_bytes - whole)}
    return parts, [(prefill, 1 / rollout.steps), (times[0], rollout.new_tokens / rollout.steps)]
