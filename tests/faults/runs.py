"""The runs that the fault tests break: small fits of the four methods that tell where they are.

A run leaves in its folder the checkpoints, every logged value, the finished model and, in memory that
outlives SIGKILL, the phase that it is in.
"""

import contextlib
import json
import mmap
import os
import random
import resource
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import rewarm
from rewarm import cli
from rewarm.callbacks.checkpoint import Checkpoint
from rewarm.callbacks.preemption import Preemption
from rewarm.lightning_modules.fsdp2_strategy import FSDP2Strategy
from tests import fits, tiny
from tests.faults.processes import PHASES

STEPS = 12
NOISY = {**tiny.LLAMA, "attention_dropout": 0.2}  # the random state is part of every step


@dataclass(frozen=True)
class Run:
    """A method with its data, and what else it needs."""

    module: Callable[..., LightningModule]
    data: Callable[[fits.Files], LightningDataModule]
    options: dict[str, Any] = field(default_factory=dict)
    band: tuple[float, float] | None = None
    checkpoint_every: int = 1


RUNS = {
    "ContinualPretraining": Run(
        rewarm.ContinualPretraining,
        lambda files: fits.corpus(
            files, replay={"old": files.old}, replay_fraction=0.25, val={"new": files.new}, num_workers=2
        ),
        checkpoint_every=2,
    ),
    "CurriculumSFT": Run(
        rewarm.CurriculumSFT,
        lambda files: fits.instructions(
            files,
            val=files.sft,
            packing=True,
            score="difficulty",
            order="ascending",
            pacing=rewarm.RootPacing(total_steps=8, start=0.3),
        ),
        band=(0.0, 4.0),
    ),
    "DPO": Run(
        rewarm.DPO,
        lambda files: fits.preferences(files, batch_size=3, val=files.pairs),
        {"loss": rewarm.Sum([rewarm.Sigmoid(), rewarm.ChosenNLL()], [1.0, 0.1])},
        checkpoint_every=2,
    ),
    "GRPO": Run(
        rewarm.GRPO,
        lambda files: fits.prompts(files, val=files.prompts, max_rounds=2, max_new_tokens=24),
        {"kl": 0.1},
        band=(0.1, 0.9),
    ),
}


class Written(fits.Files):
    """Files that another process has written."""

    def __post_init__(self) -> None: ...


class Phase:
    """Where a run is, in a file that another process can read at any time."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)
        self.past: list[tuple[str, float]] = []

    def set(self, name: str) -> None:
        self.past.append((name, time.monotonic()))
        struct.pack_into("<II", self._memory, 0, PHASES.index(name), len(self.past))

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        before = self.past[-1][0]
        self.set(name)
        yield
        self.set(before)


class Watch(Callback):
    """Tells the phase, and writes a line for every optimizer step."""

    def __init__(self, phase: Phase, steps: Path) -> None:
        self.phase, self.steps = phase, steps

    def on_train_batch_start(self, *_: Any) -> None:
        self.phase.set("forward and backward")

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        self.phase.set("optimizer step")
        if trainer.is_global_zero:
            with self.steps.open("a") as file:
                file.write(f"{trainer.global_step}\n")

    def on_train_batch_end(self, *_: Any) -> None:
        self.phase.set("between steps")

    def on_validation_start(self, *_: Any) -> None:
        self.phase.set("validation")

    def on_validation_end(self, *_: Any) -> None:
        self.phase.set("between steps")

    def on_train_end(self, *_: Any) -> None:
        self.phase.set("ending")


class WatchedCheckpoint(Checkpoint):
    phase: Phase

    def save(self, trainer: Trainer) -> Path:
        with self.phase.during("saving"):
            return super().save(trainer)


class Lines(Logger):
    """Writes what is logged at once, with all digits."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        line = json.dumps({"step": step, **metrics}, sort_keys=True)
        os.write(self._file, f"{line}\n".encode())


def train(
    name: str,
    files: Path,
    folder: Path,
    checkpoint: Path | None,
    seed: int,
    strategy: str = "one process",
    without: str = "",
) -> None:
    """Train to the end in this process, which is one of two if there is a strategy.

    Args:
        name: Of `RUNS`.
        files: Folder with the data.
        folder: Where everything goes.
        checkpoint: To go on from.
        seed: Of what is drawn before the checkpoint is restored.
        strategy: `one process`, `ddp` or `fsdp2`.
        without: Name of a callback to leave out.
    """
    warnings.simplefilter("ignore")
    rank, run = int(os.environ.get("LOCAL_RANK", "0")), RUNS[name]
    phase = Phase(folder / f"phase{rank}")
    phase.set("restoring" if checkpoint else "starting")
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    data = run.data(Written(files))
    if isinstance(data, rewarm.PromptData):
        watch_rollouts(data, phase)
    checkpoints = WatchedCheckpoint(str(folder / "checkpoints"), every_n_train_steps=run.checkpoint_every)
    checkpoints.phase = phase
    callbacks = [
        Watch(phase, folder / "steps"),
        *([] if run.band is None else [rewarm.DifficultyFilter(*run.band)]),
        rewarm.LRSchedule(rewarm.cosine(warmup=2)),
        rewarm.CheckpointAveraging(mode="ema", decay=0.9),
        rewarm.ExactResume(),
        rewarm.HuggingFaceExport(str(folder / "model")),
        Preemption(),
        checkpoints,
    ]
    strategies: dict[str, Any] = {"one process": "auto", "ddp": "ddp", "fsdp2": FSDP2Strategy()}
    trainer = fits.trainer(
        devices=1 if strategy == "one process" else 2,
        strategy=strategies[strategy],
        use_distributed_sampler=False,
        max_steps=STEPS,
        accumulate_grad_batches=2,
        callbacks=[callback for callback in callbacks if type(callback).__name__ != without],
        logger=Lines(folder / "log"),
        enable_checkpointing=True,
        val_check_interval=3,
    )
    trainer.fit(run.module(NOISY, fits.adamw(), **run.options), datamodule=data, ckpt_path=checkpoint)
    phase.set("ending")
    (folder / f"past{rank}").write_text(json.dumps(phase.past))


def command(arguments: list[str], file_bytes: int | None = None) -> None:
    """Run `rewarm` in this process, which may be kept from writing files larger than that."""
    warnings.simplefilter("ignore")
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    cli.main(arguments)


def watch_rollouts(data: Any, phase: Phase) -> None:
    sample = data._sample

    def watched(split: str, *args: Any) -> Any:
        with phase.during("rollout" if split == "train" else "validation"):
            return sample(split, *args)

    data._sample = watched
