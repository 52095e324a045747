"""What a config of `rewarm fit` makes of a training step, as far as its cost depends on it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rewarm.checks import at_least
from rewarm.lightning_modules.base import LanguageModule
from rewarm.lightning_modules.dpo import DPO

PRECISIONS = {
    "32-true": (torch.float32, False),
    "bf16-mixed": (torch.float32, True),
    "16-mixed": (torch.float32, True),
    "bf16-true": (torch.bfloat16, False),
    "16-true": (torch.bfloat16, False),
}
"""What Lightning calls it: dtype of the weights, or one as wide; whether the forward is under autocast."""


@dataclass(frozen=True)
class Rollout:
    """What is sampled at once.

    Attributes:
        prompts: Number of prompts, over all devices.
        samples: Completions per prompt.
        prompt_length: Tokens of the longest prompt.
        new_tokens: Most tokens per completion.
        steps: Optimizer steps that use it.

    Example:
        >>> rollout = Rollout(prompts=4, samples=8, prompt_length=32, new_tokens=64, steps=2)
        >>> rollout.prompts * rollout.samples
        32
    """

    prompts: int
    samples: int
    prompt_length: int
    new_tokens: int
    steps: int


@dataclass(frozen=True)
class Work:
    """A training step on one device.

    Attributes:
        name: Name of the config.
        module: The method, without weights.
        rows: Rows of a micro-batch.
        length: Positions of a row.
        documents: Sequences in a row.
        accumulate: Micro-batches per optimizer step.
        precision: As Lightning calls it.
        replicas: Devices that have different data.
        ways: Devices that share each layer.
        sharded: Whether the replicas divide weights, gradients and optimizer state.
        averages: Copies of the weights that callbacks keep, float32.
        on_cpu: Whether it runs on a CPU.
        rollout: What is sampled for GRPO; None for other methods.
    """

    name: str
    module: LanguageModule
    rows: int
    length: int
    documents: int
    accumulate: int
    precision: str
    replicas: int
    ways: int
    sharded: bool
    averages: int
    on_cpu: bool
    rollout: Rollout | None = None

    @property
    def targets(self) -> int:
        """Targets of a row: all positions, or the completion."""
        return self.length if self.rollout is None else self.rollout.new_tokens


def read_work(
    config: str,
    trainer: Any,
    module: Any,
    data: Any,
    *,
    devices: int | None = None,
    prompt_length: int | None = None,
) -> Work:
    """Read what a config trains, and how.

    Args:
        config: Name of the config file, for messages and as the work's name.
        trainer: Section of the parsed config, with all defaults.
        module: The module that the config describes.
        data: Arguments of the data module that the config describes; empty without one.
        devices: Processes over all nodes, >= 1; None as the config says.
        prompt_length: Tokens of the longest prompt, for `GRPO`, >= 1.

    Raises:
        ValueError: If an argument is out of range, or the config says something that has no prediction here.
    """
    given = {"devices": devices, "prompt_length": prompt_length}
    at_least(1, **{name: value for name, value in given.items() if value is not None})
    if not isinstance(module, LanguageModule) or "batch_size" not in data:
        raise ValueError(f"{config}: only rewarm's modules with rewarm's data have a prediction")
    precision = str(trainer.precision or "32-true")
    if precision not in PRECISIONS:
        raise ValueError(f"{config}: trainer.precision is {precision!r}; known are {', '.join(PRECISIONS)}")
    accelerator = trainer.accelerator
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    processes = devices or _processes(config, trainer, on_cpu)
    sharded, ways = _strategy(config, trainer.strategy, processes)
    work = Work(
        name=Path(config).stem,
        module=module,
        rows=data["batch_size"],
        length=data.get("max_length") or 0,
        documents=1,
        accumulate=trainer.accumulate_grad_batches,
        precision=precision,
        replicas=processes // ways,
        ways=ways,
        sharded=sharded,
        averages=sum(_copies(callback, on_cpu) for callback in trainer.callbacks or []),
        on_cpu=on_cpu,
    )
    if "prompts_per_rollout" in data:
        return _with_rollout(config, work, data, prompt_length)
    packing = data.get("packing", "replay" in data and not data["attend_across_documents"])
    if packing == "padding_free":
        work = replace(work, rows=1, length=work.rows * work.length)
    if packing:
        # How many there are is not in a config; with two, none attends over the whole row.
        return replace(work, documents=2)
    return replace(work, rows=2 * work.rows) if isinstance(module, DPO) else work


def _with_rollout(config: str, work: Work, data: Any, prompt_length: int | None) -> Work:
    if prompt_length is None:
        raise ValueError(f"{config}: the longest prompt is not in a config: give --prompt-length")
    prompts, samples, new = (
        data[name] for name in ("prompts_per_rollout", "completions_per_prompt", "max_new_tokens")
    )
    parts = data["minibatches"] * work.accumulate * work.replicas
    if prompts * samples % parts:
        raise ValueError(
            f"{config}: {prompts} x {samples} completions do not divide into {parts} batches of"
            " minibatches, accumulated batches and devices"
        )
    rollout = Rollout(prompts, samples, prompt_length, new, data["minibatches"] * data["passes"])
    return replace(work, rows=prompts * samples // parts, length=prompt_length + new - 1, rollout=rollout)


def _processes(config: str, trainer: Any, on_cpu: bool) -> int:
    count = trainer.devices
    if count in ("auto", -1, "-1"):
        count = 1 if on_cpu else torch.cuda.device_count()
    if not str(count).isdigit() or not int(count):
        raise ValueError(f"{config}: trainer.devices is {trainer.devices!r}: give --devices")
    return int(count) * int(trainer.num_nodes)


def _strategy(config: str, strategy: Any, processes: int) -> tuple[bool, int]:
    """Whether weights are sharded, and how many processes share a layer."""
    name = strategy if isinstance(strategy, str) else strategy.class_path.rsplit(".", 1)[-1]
    if name == "FSDP2Strategy":
        ways = strategy.init_args.tensor_parallel_size
        if processes % ways:
            raise ValueError(f"{config}: tensor_parallel_size is {ways}, which does not divide {processes}")
        return True, ways
    if name in ("auto", "DDPStrategy") or name.startswith("ddp"):
        return False, 1
    raise ValueError(f"{config}: strategy is {name!r}; known are 'auto', 'ddp' and FSDP2Strategy")


def _copies(callback: Any, on_cpu: bool) -> int:
    if callback.class_path.rsplit(".", 1)[-1] != "CheckpointAveraging":
        return 0
    options = callback.init_args
    if options.device == "cpu" and not on_cpu:
        return 0
    return {"last_k": options.k, "window": 2, "ema": 1}[options.mode]
