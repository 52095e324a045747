"""How fast a device takes the steps whose costs are predicted."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rewarm.costs.cost_model import CostTrace, seconds
from rewarm.costs.cost_step import Cost, lay_out
from rewarm.costs.cost_work import PRECISIONS, Work
from rewarm.lightning_modules.policy import Policy, build_empty


@dataclass(frozen=True)
class Rates:
    """What a device reaches.

    Attributes:
        flops: Operations of matrix products per second.
        training_bytes: Bytes moved per second in training; infinite if `flops` is a mean over whole steps.
        sampling_bytes: Bytes moved per second while sampling.
        source: Where these rates come from.

    Example:
        >>> from rewarm.costs.cost_model import Operation
        >>> cost = Cost({}, [([Operation(6e9, 0)], 2.0)], [])
        >>> Rates(1e9, 1e9, 1e9, "a guess").step_seconds(cost)
        12.0
    """

    flops: float
    training_bytes: float
    sampling_bytes: float
    source: str

    def step_seconds(self, cost: Cost) -> float:
        """Time of an optimizer step, with its share of the sampling."""
        timed = ((cost.training, self.training_bytes), (cost.sampling, self.sampling_bytes))
        return sum(n * seconds(ops, self.flops, rate) for part, rate in timed for ops, n in part)


def measured_for(works: Iterable[Work], clock: Callable[[], float] = time.perf_counter) -> list[Rates]:
    """Measure what this machine reaches for each of some works: once for each model and precision.

    Args:
        works: Whose models are taken, see `measured`.
        clock: Seconds from any fixed moment.
    """
    known: dict[str, Rates] = {}
    made = []
    for work in works:
        # Products in bfloat16 are faster on one processor and slower on another.
        kind = repr((work.module.model_source, work.module.attention, work.precision))
        if kind not in known:
            known[kind] = measured(work, clock)
        made.append(known[kind])
    return made


def measured(work: Work, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Measure what this machine reaches: in a product, in a sum, and in one decoder layer with the head.

    Args:
        work: Whose model is taken, with one layer, in rows of at most 512 positions.
        clock: Seconds from any fixed moment.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def timed(run: Callable[[], Any]) -> float:
        run()
        taken = []
        for _ in range(5):
            began = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(clock() - began)
        return sorted(taken)[2]

    config = build_empty(work.module.model_source, work.module.attention).config
    text = config.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    dtype, autocast = PRECISIONS[work.precision]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    policy = Policy(model.to(device), "torch")
    small = lay_out(replace(work, rows=2, length=min(work.length, 512), documents=1, rollout=None))
    inputs = {name: small[name].to(device) for name in ("input_ids", "position_ids", "targets")}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logprobs = policy(**inputs)
        logprobs.sum().backward()

    with CostTrace() as trace:
        step()
    kind = torch.bfloat16 if autocast else dtype
    left = torch.randn(2048, text.hidden_size, device=device).to(kind)
    right = torch.randn(text.hidden_size, 4 * text.hidden_size, device=device).to(kind)
    flops = 2.0 * left.numel() * right.shape[1] / timed(lambda: left @ right)
    terms = torch.ones(2**24, device=device)
    moved = 3.0 * 4 * terms.numel() / timed(lambda: terms + terms)
    slower = timed(step) / seconds(trace.operations, flops, moved)
    return Rates(flops / slower, moved / slower, moved / slower, f"measured on this {device.type}")
