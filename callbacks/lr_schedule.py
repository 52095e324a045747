"""Applies a learning-rate schedule to the optimizers of any LightningModule."""

import math
from copy import deepcopy
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from rewarm.functional.schedule import Schedule


class LRSchedule(Callback):
    """Sets the learning rate before every optimizer step, from the position of the step and nothing else.

    LR of the n-th step since the anchor = peak * schedule(n, total), n = 1, 2, ..., total

    The peaks are the LRs that `configure_optimizers` gives, one per parameter group, and always those of this
    run: the LRs that a checkpoint brings back, and with which the schedulers of torch and transformers go on,
    are overwritten. A checkpoint holds the anchor and the name of the phase, and no setting of the schedule.

    Going on from a checkpoint (`trainer.fit(..., ckpt_path=...)`) is one of two things:

    - `mode="resume"`: the schedule goes on where the checkpoint left it.
    - `mode="rewarm"`: new data, new schedule. Its first step is the first one after the checkpoint, and the
      optimizer starts afresh. A checkpoint that has this run's own `phase` name comes from this run, stopped
      and started again: then the schedule goes on, as with "resume".

    Logs `lr` (of this step), or `lr/<group>` for every group where their peaks differ: <group> is the "name"
    of the group if it has one, else its index, after the optimizer's index if there are several. With manual
    optimization the steps of all optimizers count, as they do in `trainer.global_step` and `max_steps`.

    Args:
        schedule: Factor of the peak at (position, total): of `rewarm.functional.schedule`, or your own.
        total_steps: Length of the schedule in optimizer steps from the anchor, >= 1. None: up to the end of
            the training, as `max_steps` and `max_epochs` have it.
        mode: What to do with a checkpoint, see above. Without one there is no difference.
        phase: Name of this run's schedule; "rewarm" needs one, which the older checkpoint must not have.
        reset_optimizer: With "rewarm", None or True: the optimizer is as `configure_optimizers` made it;
            False: it is the checkpoint's, with its moments and its settings other than the LR. With "resume",
            None or False.
        log: Whether to log.

    Raises:
        ValueError: If an argument is out of range. When training starts: if the module has an LR scheduler,
            if the number of steps is not known or not what the phases need, or if a resumed checkpoint has
            another phase.

    Example:
        >>> from rewarm.functional.schedule import cosine
        >>> LRSchedule(cosine(warmup=100)).state_dict()
        {'phase': '', 'anchor': 0}

    Source: Ibrahim et al. 2024, arXiv:2403.08763, for re-warming with a fresh optimizer. Differs: nothing.
    """

    def __init__(
        self,
        schedule: Schedule,
        total_steps: int | None = None,
        mode: Literal["resume", "rewarm"] = "resume",
        phase: str = "",
        reset_optimizer: bool | None = None,
        log: bool = True,
    ) -> None:
        if total_steps is not None and total_steps < 1:
            raise ValueError(
                f"total_steps is {total_steps}; it must be >= 1, or None for the rest of the training"
            )
        if mode not in ("resume", "rewarm"):
            raise ValueError(f"mode is {mode!r}; it must be 'resume' or 'rewarm'")
        if mode == "rewarm" and not phase:
            raise ValueError(
                "phase is ''; mode='rewarm' needs a name, to know its own checkpoints from older ones"
            )
        if mode == "resume" and reset_optimizer:
            raise ValueError("reset_optimizer is True; mode='resume' keeps the optimizer, use mode='rewarm'")
        self.schedule = schedule
        self.total_steps = total_steps
        self.mode = mode
        self.phase = phase
        self.reset_optimizer = mode == "rewarm" if reset_optimizer is None else reset_optimizer
        self._logs = log  # Lightning gives every callback a `log` method
        self._anchor = 0
        self._total: float = 0
        self._restored: dict[str, Any] | None = None
        self._peaks: list[list[float]] = []
        self._fresh: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Name of the phase and the step at which its schedule began."""
        return {"phase": self.phase, "anchor": self._anchor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what the checkpoint says until training starts."""
        self._restored = dict(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the checkpoint of an earlier run."""
        self._restored = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the optimizers as configured, before Lightning restores those of the checkpoint."""
        if trainer.lr_scheduler_configs:
            raise ValueError(
                f"{type(pl_module).__name__}.configure_optimizers returns an LR scheduler, but LRSchedule"
                " sets the LR: return the optimizer alone, or leave LRSchedule out"
            )
        self._peaks = [[float(group["lr"]) for group in opt.param_groups] for opt in trainer.optimizers]
        if self.reset_optimizer:
            self._fresh = [deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the anchor and the total, and set the LR of the first step."""
        self._anchor = self._find_anchor(trainer)
        self._fresh = []
        done = trainer.global_step - self._anchor
        self._total = self.total_steps or done + _steps_left(trainer)
        self._set(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the LR of the coming step, and log it."""
        self._set(trainer)
        if self._logs and not trainer.barebones:
            lrs = self._named_lrs(trainer)
            pl_module.log_dict(lrs, prog_bar=False, on_step=True, on_epoch=False, batch_size=1)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Set the LR again: with manual optimization a batch may have several steps."""
        self._set(trainer)

    def _find_anchor(self, trainer: Trainer) -> int:
        saved = self._restored
        if saved is not None and saved["phase"] == self.phase:
            return saved["anchor"]
        if self.mode == "resume" and saved is not None:
            raise ValueError(
                f"phase is {self.phase!r}, but the checkpoint has {saved['phase']!r}: give that name to go on"
                " with its schedule, or mode='rewarm' to start this one"
            )
        if self.mode == "resume" or trainer.ckpt_path is None:
            return 0
        if self.reset_optimizer:
            for optimizer, state in zip(trainer.optimizers, self._fresh, strict=True):
                optimizer.load_state_dict(state)
        rank_zero_info(
            f"The LR schedule of phase {self.phase!r} begins after step {trainer.global_step},"
            f" with {'a fresh optimizer' if self.reset_optimizer else 'the optimizer of the checkpoint'}."
        )
        return trainer.global_step

    def _set(self, trainer: Trainer) -> None:
        factor = self.schedule(trainer.global_step - self._anchor + 1, self._total)
        for optimizer, peaks in zip(trainer.optimizers, self._peaks, strict=True):
            groups = optimizer.param_groups
            if len(groups) != len(peaks):
                raise ValueError(
                    f"param_groups are {len(groups)}, but were {len(peaks)} when the fit began: for one"
                    " added later there is no peak, so configure_optimizers has to return them all"
                )
            for group, peak in zip(groups, peaks, strict=True):
                # An LR in a tensor may be part of a captured graph, which reads that very tensor.
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(peak * factor)
                else:
                    group["lr"] = peak * factor

    def _named_lrs(self, trainer: Trainer) -> dict[str, Tensor]:
        # Tensors on the CPU: numbers would go to the device, and a logger wait to read them back.
        lrs = [[torch.tensor(float(g["lr"])) for g in opt.param_groups] for opt in trainer.optimizers]
        if len({peak for peaks in self._peaks for peak in peaks}) == 1:
            return {"lr": lrs[0][0]}
        return {
            f"lr/{f'{i}.' if len(lrs) > 1 else ''}{group.get('name', j)}": lrs[i][j]
            for i, optimizer in enumerate(trainer.optimizers)
            for j, group in enumerate(optimizer.param_groups)
        }


def _steps_left(trainer: Trainer) -> float:
    """Optimizer steps until the training ends.

    `trainer.estimated_stepping_batches` counts the epochs before a checkpoint as if they had today's length,
    which is wrong once the data has changed.
    """
    by_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps - trainer.global_step
    batches = trainer.num_training_batches
    if trainer.max_epochs in (None, -1) or batches == math.inf:
        return by_steps
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    varying = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
    if varying or not trainer.lightning_module.automatic_optimization:
        if by_steps < math.inf:
            return by_steps
        raise ValueError(
            "total_steps is None, and max_epochs does not tell the number of steps with manual optimization"
            " or a GradientAccumulationScheduler: give total_steps or Trainer(max_steps=...)"
        )
    window = trainer.accumulate_grad_batches
    per_epoch = math.ceil(batches / window)
    epochs: Any = trainer.fit_loop.epoch_progress.current
    left = per_epoch * (trainer.max_epochs - epochs.processed)
    if epochs.ready > epochs.processed:  # the checkpoint is from within an epoch
        seen = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        left -= per_epoch if seen >= batches else seen // window
    return min(by_steps, left)
