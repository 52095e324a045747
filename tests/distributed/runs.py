"""Fits of any method in one process or on every rank of a group, and what they used and left.

Everything here is called in processes of `tests.distributed.ranks`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import rewarm
from tests import fits, tiny

STRATEGIES: dict[str, Callable[[], Any]] = {
    "one process": lambda: "auto",
    "DDP": lambda: "ddp",
    "FSDP2": rewarm.FSDP2Strategy,
    "FSDP2, one file": partial(rewarm.FSDP2Strategy, save_distributed_checkpoint=False),
    "tensor parallel": partial(rewarm.FSDP2Strategy, tensor_parallel_size=2),
    "Lightning's": lambda: ModelParallelStrategy(ranks(), 1),
}


OPTIONS = {
    "DPO": {
        "reference": "frozen",
        "loss": rewarm.Sum([rewarm.Sigmoid(), rewarm.ChosenNLL()], [1.0, 0.3]),
    },
    "GRPO": {"kl": 0.1},
}


def data_options(method: str, files: fits.Files) -> dict[str, Any]:
    """Validation data, and replay for continual pretraining."""
    return {
        "ContinualPretraining": {
            "replay": {"old": files.old},
            "replay_fraction": 0.25,
            "val": {"new": files.new, "old": files.old},
        },
        "CurriculumSFT": {"val": files.sft},
        "DPO": {"val": files.pairs},
        "GRPO": {"val": files.prompts},
    }[method]


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def files_in(folder: Path) -> fits.Files:
    """Data that no other rank is writing at the same time."""
    return fits.Files(folder / f"files{os.environ.get('RANK', '')}")


@dataclass
class Fit:
    """A fit of 8 rows (of `PromptData`: 8 completions) per optimizer step, however they are split.

    Attributes:
        method: Of `fits.METHODS`.
        strategy: Of `STRATEGIES`.
        model: What the module is built from.
        options: Of the module, besides `OPTIONS`.
        data: Of the data module, besides `data_options`.
        split: In how many parts the rows of a step are cut by accumulation.
        callbacks: Called in each process.
        resume: Checkpoint to go on from.
        save: Folder for a checkpoint of every second step.
        export: Folder for the Hugging Face folder.
        trainer: Options of the Trainer.
    """

    method: str
    strategy: str = "one process"
    model: Any = field(default_factory=lambda: tiny.LLAMA)
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    split: int = 1
    callbacks: Callable[[], list[Callback]] = list
    resume: Path | None = None
    save: Path | None = None
    export: Path | None = None
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    def module(self) -> LightningModule:
        torch.manual_seed(0)
        options = OPTIONS.get(self.method, {}) | self.options
        return fits.METHODS[self.method].module(self.model, self.optimizer or fits.adamw(), **options)

    def datamodule(self, files: fits.Files) -> LightningDataModule:
        replicas = ranks() // (2 if self.strategy == "tensor parallel" else 1)
        rows = {} if self.method == "GRPO" else {"batch_size": 8 // (replicas * self.split)}
        return fits.METHODS[self.method].data(files, **rows | data_options(self.method, files) | self.data)

    def lightning_trainer(self, *callbacks: Callback) -> Trainer:
        saving = [] if self.save is None else [_saving(self.save)]
        options = {
            "devices": ranks(),
            "strategy": STRATEGIES[self.strategy](),
            "use_distributed_sampler": False,
            "accumulate_grad_batches": self.split,
            "callbacks": [*self.callbacks(), *callbacks, *saving],
            "enable_checkpointing": bool(saving),
        }
        return fits.trainer(**options | self.trainer)


@dataclass
class Fitted:
    """What a fit used and left, everything whole.

    Attributes:
        metrics: Logged at every optimizer step.
        validated: The last metrics of validation.
        history: The weights after every step.
        left: What is in the module at the end: the average, if there is one.
        moments: The optimizer's state at the end, by parameter.
        settings: Of the optimizer's groups at the end.
        ids: Which examples this rank trained on, by step.
        skipped: How many steps were left out.
    """

    metrics: list[dict[str, float]]
    validated: dict[str, float]
    history: list[dict[str, Tensor]]
    left: dict[str, Tensor]
    moments: dict[str, dict[str, Any]]
    settings: list[dict[str, Any]]
    ids: list[list[int]]
    skipped: int

    @property
    def weights(self) -> dict[str, Tensor]:
        """After the last step."""
        return self.history[-1] if self.history else self.left

    @property
    def losses(self) -> list[float]:
        return [metrics["train/loss"] for metrics in self.metrics]


class Steps(fits.Record):
    """Keeps whole gradients and the examples of every optimizer step, besides what `fits.Record` keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[list[int]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if len(self.ids) == len(self.gradients):
            self.ids.append([])
        self.ids[-1] += [int(number) for number in batch["ids"]]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.gradients.append(wholes(fits.gradients(pl_module)))


def _saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, "{step}", save_top_k=-1, every_n_train_steps=2, auto_insert_metric_name=False
    )


def whole(value: Any) -> Any:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().clone() if isinstance(value, Tensor) else value


def wholes(values: dict[str, Any]) -> dict[str, Any]:
    return {name: whole(value) for name, value in values.items()}


def fit(run: Fit, folder: Path) -> Fitted:
    files, steps = files_in(folder), Steps()
    module, trainer = run.module(), run.lightning_trainer(steps)
    trainer.fit(module, datamodule=run.datamodule(files), ckpt_path=run.resume)
    if run.export is not None:
        module.save_pretrained(run.export, trainer.datamodule.tokenizer)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # validation leaves the root gathered
    names = {parameter: name for name, parameter in module.named_parameters()}
    return Fitted(
        steps.metrics,
        {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")},
        [wholes(weights) for weights in steps.weights],
        wholes(fits.weights(module)),
        {names[parameter]: wholes(state) for parameter, state in trainer.optimizers[0].state.items()},
        [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizers[0].param_groups],
        steps.ids,
        module.skipped_steps,
    )


def fit_all(runs: list[Fit], folder: Path) -> list[Fitted]:
    """Several fits in one launch, each with its own model."""
    return [fit(run, folder) for run in runs]


def refusals(runs: list[Fit], folder: Path) -> list[str]:
    """What fits that must not begin say, in one launch."""
    said = []
    for run in runs:
        try:
            fit(run, folder)
            said.append("nothing")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said
