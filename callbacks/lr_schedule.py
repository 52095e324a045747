"""Applies a learning-rate schedule to the optimizers of any LightningModule."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from rewarm.callbacks import lightning_internals as internals
from rewarm.callbacks.token_count import TokenCount, tokens_of
from rewarm.checks import at_least, one_of
from rewarm.functional.gradients import gradient_norm
from rewarm.schedules.phases import Schedule

Mode = Literal["resume", "rewarm", "branch"]

# What is "about 0" for the end of a schedule, as a factor of the peak.
_LOW = 0.1


class LRSchedule(Callback):
    """Sets the learning rate before every optimizer step, from the position of the step and nothing else.

    LR of a step = peak * schedule(position since the anchor, total)

    The n-th step has position n, so that the last one has position `total`; in tokens, that is what has been
    seen once the step is done. Peaks are the LRs that `configure_optimizers` gives, one per parameter group,
    and always those of this run: the LRs that a checkpoint brings back, and with which the schedulers of
    torch and transformers go on, are overwritten. A checkpoint holds counters, the name of the phase and, for
    a branch, the LRs it began with; no setting of the schedule.

    Going on from a checkpoint (`trainer.fit(..., ckpt_path=...)`) is one of three things:

    - `mode="resume"`: the schedule goes on where the checkpoint left it. The optimizer is the checkpoint's.
    - `mode="rewarm"`: new data, new schedule. Its first step is the first one after the checkpoint. The
      optimizer starts afresh, as `configure_optimizers` made it, or is kept if so asked.
    - `mode="branch"`: the decay of a stable run, such as `rewarm.branch()`, perhaps on other data. Its first
      step is the first one after the checkpoint, the peaks are the LRs in the checkpoint, and the optimizer
      is the checkpoint's.

    A kept optimizer has the checkpoint's state and its settings but the LR (betas, weight decay); one that
    starts afresh has no state, and the settings of this run. A checkpoint that has this run's own `phase`
    name comes from this run, stopped and started again: then the schedule goes on, as with "resume".

    Tokens are counted over all ranks, without waiting for the device before the optimizer step. They are the
    positions of `input_ids` that `rewarm.callbacks.token_count.tokens_of` finds to be no padding.

    A warning tells when data in ascending order (`order="ascending"` of the data module) meet an LR that ends
    below a tenth of the peak: what comes last, and is meant to count most, then counts least.

    Logs `lr` (of this step), or `lr/<group>` for every group where their peaks differ: <group> is the "name"
    of the group if it has one, else its index, after the optimizer's index if there are several. In tokens
    also `train/tokens`, those seen since the anchor. If asked, `train/grad_norm_l1` and `train/grad_norm_l2`
    of the whole gradient before clipping, of which `rewarm.refined` makes a schedule. All of it at the steps
    that loggers see. With manual optimization the steps of all optimizers count, as they do in
    `trainer.global_step` and `max_steps`.

    Args:
        schedule: Factor of the peak at (position, total): of `rewarm.schedules.published`, or your own.
        total_steps: Length of the schedule in optimizer steps from the anchor, >= 1. None: up to the end of
            the training, as `max_steps` and `max_epochs` have it. Not with tokens.
        mode: Use that is made of a checkpoint, see above. Without one, "resume" and "rewarm" are the same and
            "branch" is an error.
        phase: Name of this run's schedule; "rewarm" and "branch" need one, which the older checkpoint must
            not have.
        reset_optimizer: With "rewarm", None or True: the optimizer starts afresh; False: it is kept. With
            the other modes, None or False.
        log: Whether to log.
        unit: Unit of positions, of the total and of whole-number lengths of the schedule: "steps" or
            "tokens".
        total_tokens: Length of the schedule in tokens from the anchor, >= 1; None: it has no end. Only with
            tokens. The training itself ends by `max_steps` or `max_epochs`.
        count_tokens: Number of tokens of a batch on this rank, in place of the rule above; an int or a
            tensor.
        multipliers: Factors of the peaks by <group>, >= 0; groups not named have 1. Not with "branch", where
            they are part of the checkpoint's LRs.
        replace_scheduler: Whether an LR scheduler that `configure_optimizers` returns is taken out; the peaks
            are then the LRs that the optimizer was made with. By default it is an error.
        gradient_norms: Whether to log the norms of the gradients, every `log_every_n_steps` steps.

    Raises:
        ValueError: If an argument is out of range. When training starts: if the module has an LR scheduler,
            if the number of steps is not known or not what the phases need, if a resumed checkpoint has
            another phase or unit, or if the checkpoint of a branch is missing or has no LR above 0. Before
            any step: if the schedule gives a negative or infinite factor.

    Example:
        >>> from rewarm.schedules.published import cosine
        >>> LRSchedule(cosine(warmup=100)).state_dict()
        {'phase': '', 'anchor': 0, 'tokens': None, 'lrs': None}

    Source: Ibrahim et al. 2024, arXiv:2403.08763, for re-warming with a fresh optimizer; Hu et al. 2024
    (MiniCPM), arXiv:2404.06395, for branches; arXiv:2511.18903 for the warning. Differs: a tenth as the bound
    of the warning is ours.
    """

    def __init__(
        self,
        schedule: Schedule,
        total_steps: int | None = None,
        *,
        mode: Mode = "resume",
        phase: str = "",
        reset_optimizer: bool | None = None,
        log: bool = True,
        unit: Literal["steps", "tokens"] = "steps",
        total_tokens: int | None = None,
        count_tokens: Callable[[Any], int | Tensor] | None = None,
        multipliers: dict[str, float] | None = None,
        replace_scheduler: bool = False,
        gradient_norms: bool = False,
    ) -> None:
        one_of(("steps", "tokens"), unit=unit)
        one_of(get_args(Mode), mode=mode)
        for name, given, of in (
            ("total_steps", total_steps, "steps"),
            ("total_tokens", total_tokens, "tokens"),
        ):
            if given is not None and unit != of:
                raise ValueError(f"{name} is {given}, but unit is {unit!r}")
            if given is not None:
                at_least(1, **{name: given})
        if count_tokens is not None and unit == "steps":
            raise ValueError("count_tokens is given, but unit is 'steps'")
        if mode != "resume" and not phase:
            raise ValueError(
                f"phase is ''; mode={mode!r} needs a name, to know its own checkpoints from older ones"
            )
        if mode != "rewarm" and reset_optimizer:
            raise ValueError(f"reset_optimizer is True; mode={mode!r} keeps the optimizer, use mode='rewarm'")
        if mode == "branch" and multipliers:
            raise ValueError("multipliers are given; mode='branch' goes on with the checkpoint's LRs")
        for group, multiplier in (multipliers or {}).items():
            if not 0 <= multiplier < math.inf:
                raise ValueError(f"multipliers has {multiplier} for {group!r}; it must be finite and >= 0")
        self.schedule = schedule
        self.total_steps = total_steps
        self.mode = mode
        self.phase = phase
        self.reset_optimizer = mode == "rewarm" if reset_optimizer is None else reset_optimizer
        self.unit = unit
        self.total_tokens = total_tokens
        self.multipliers = dict(multipliers or {})
        self.replace_scheduler = replace_scheduler
        self.gradient_norms = gradient_norms
        self._logs = log  # Lightning gives every callback a `log` method
        self._anchor = 0
        self._total: float = 0
        self._count_tokens = count_tokens or tokens_of
        self._count = TokenCount(self._count_tokens)
        self._trainer: Trainer | None = None
        self._restored: dict[str, Any] | None = None
        self._has_callbacks = False
        self._peaks: list[list[float]] = []
        self._fresh: list[dict[str, Any]] = []

    # --- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Name of the phase, where its schedule began, the tokens so far, and a branch's first LRs.

        In tokens every rank has to call it.
        """
        tokens = None
        if self.unit == "tokens" and self._trainer is not None:
            tokens = self._count.collect(self._trainer)
        lrs = [list(peaks) for peaks in self._peaks] if self.mode == "branch" else None
        return {"phase": self.phase, "anchor": self._anchor, "tokens": tokens, "lrs": lrs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what the checkpoint says until training starts."""
        self._restored = dict(state_dict)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that the checkpoint has more than weights."""
        self._has_callbacks = True

    # --- before the first step ------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the checkpoint and the tokens of an earlier run."""
        if stage == "fit":
            self._restored, self._has_callbacks = None, False
            self._count, self._trainer = TokenCount(self._count_tokens), trainer

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the optimizers as configured, before Lightning restores those of the checkpoint."""
        if self.mode == "branch":
            self._check_branch(trainer)
        if self.gradient_norms and isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError("gradient_norms is True; FSDPStrategy hides the gradients, use FSDP2 or DDP")
        # A scheduler has already changed "lr" when it was made.
        key = "initial_lr" if self._take_out_schedulers(trainer, pl_module) else "lr"
        self._peaks = [
            [float(group.get(key, group["lr"])) for group in opt.param_groups] for opt in trainer.optimizers
        ]
        self._multiply(trainer)
        if self.reset_optimizer:
            self._fresh = [deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]

    def _take_out_schedulers(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Take out the module's own LR schedulers; return whether there were any."""
        configs = trainer.strategy.lr_scheduler_configs
        if not configs:
            return False
        if not self.replace_scheduler:
            raise ValueError(
                f"{type(pl_module).__name__}.configure_optimizers returns an LR scheduler, but LRSchedule"
                " sets the LR: return the optimizer alone, leave LRSchedule out, or give"
                " LRSchedule(replace_scheduler=True)"
            )
        names = [type(config.scheduler).__name__ for config in configs]
        if any(isinstance(config.scheduler, OneCycleLR | CyclicLR) for config in configs):
            raise ValueError(
                f"replace_scheduler is True, but {', '.join(names)} has changed the optimizer's LR for good:"
                " return the optimizer alone"
            )
        configs.clear()
        rank_zero_info(f"LRSchedule replaces {', '.join(names)}.")
        return True

    def _multiply(self, trainer: Trainer) -> None:
        names = self._group_names(trainer)
        known = {name for group in names for name in group}
        if unknown := set(self.multipliers) - known:
            raise ValueError(
                f"multipliers names {', '.join(sorted(unknown))}; the groups are {', '.join(sorted(known))}"
            )
        for peaks, group in zip(self._peaks, names, strict=True):
            peaks[:] = [
                peak * self.multipliers.get(name, 1.0) for peak, name in zip(peaks, group, strict=True)
            ]

    def _check_branch(self, trainer: Trainer) -> None:
        # Strategies for sharded models restore later, and themselves refuse to restore weights alone.
        if trainer.ckpt_path is not None and not self._has_callbacks:
            raise ValueError(
                f"ckpt_path is {str(trainer.ckpt_path)!r}, which has weights alone: a branch needs the"
                " optimizer and its LR"
            )
        if isinstance(self.schedule, Schedule) and self.schedule.start != 1.0:
            raise ValueError(
                f"schedule starts at {self.schedule.start}; a branch begins with the checkpoint's LR, so it"
                " must start at 1, as rewarm.branch() does"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the anchor and the total, and set the LR of the first step."""
        self._anchor = self._find_anchor(trainer)
        self._fresh = []
        if self.unit == "tokens":
            self._total = math.inf if self.total_tokens is None else self.total_tokens
        else:
            self._total = self.total_steps or trainer.global_step - self._anchor + _steps_left(trainer)
        self._set(trainer)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "order", None) == "ascending" and self._total < math.inf:
            last = self.schedule(self._total, self._total)
            if last < _LOW:
                rank_zero_warn(
                    f"{type(data).__name__} has order='ascending', but the LR ends at {last:.3g} of its peak:"
                    " the last examples hardly count. End at about a third of it, or keep the LR constant and"
                    " average checkpoints"
                )

    def _find_anchor(self, trainer: Trainer) -> int:
        saved = self._restored
        if saved is not None and saved["phase"] == self.phase:
            return self._own_anchor(saved)
        if self.mode == "resume" and saved is not None:
            raise ValueError(
                f"phase is {self.phase!r}, but the checkpoint has {saved['phase']!r}: give that name to go on"
                " with its schedule, or mode='rewarm' to start this one"
            )
        if self.mode == "branch":
            self._peaks = self._branch_lrs(trainer)
        elif self.mode == "resume" or trainer.ckpt_path is None:
            if self.unit == "tokens" and trainer.ckpt_path is not None:
                raise ValueError(
                    "unit is 'tokens', but the checkpoint has no count of tokens: use mode='rewarm'"
                )
            return 0
        if self.reset_optimizer:
            for optimizer, state in zip(trainer.optimizers, self._fresh, strict=True):
                optimizer.load_state_dict(state)
        rank_zero_info(
            f"The LR schedule of phase {self.phase!r} begins after step {trainer.global_step},"
            f" with {'a fresh optimizer' if self.reset_optimizer else 'the optimizer of the checkpoint'}."
        )
        return 0 if self.unit == "tokens" else trainer.global_step

    def _branch_lrs(self, trainer: Trainer) -> list[list[float]]:
        if trainer.ckpt_path is None:
            raise ValueError("mode is 'branch', but there is no checkpoint to branch from: give ckpt_path")
        lrs = [[float(group["lr"]) for group in opt.param_groups] for opt in trainer.optimizers]
        if not any(lr > 0 for group in lrs for lr in group):
            raise ValueError("mode is 'branch', but the checkpoint's LR is 0: use mode='rewarm'")
        return lrs

    def _own_anchor(self, saved: dict[str, Any]) -> int:
        """Go on with a schedule that a checkpoint was in."""
        if (saved["tokens"] is not None) != (self.unit == "tokens"):
            raise ValueError(
                f"unit is {self.unit!r}, but phase {self.phase!r} of the checkpoint counts"
                f" {'steps' if saved['tokens'] is None else 'tokens'}"
            )
        if (saved["lrs"] is not None) != (self.mode == "branch"):
            raise ValueError(
                f"mode is {self.mode!r}, but phase {self.phase!r} of the checkpoint is"
                f" {'no' if saved['lrs'] is None else 'a'} branch"
            )
        self._count.total = saved["tokens"] or 0
        self._peaks = saved["lrs"] or self._peaks
        return saved["anchor"]

    # --- steps ----------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the LR of the coming step, or count the tokens that decide on it."""
        if self.unit == "steps":
            self._set(trainer)
        else:
            self._count.add(batch)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Set the LR: only now are a step's tokens known, and a batch may have several manual steps."""
        if self.unit == "tokens":
            self._count.collect(trainer)
        self._set(trainer)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.gradient_norms and every and (trainer.global_step + 1) % every == 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norms = {f"train/grad_norm_l{order}": gradient_norm(parameters, order) for order in (1, 2)}
            pl_module.log_dict(norms, on_step=True, on_epoch=False, batch_size=1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the LR that the step had, if loggers see it."""
        if self._logs and internals.logs_now(trainer):
            lrs = self._named_lrs(trainer)
            if self.unit == "tokens":
                lrs["train/tokens"] = torch.tensor(float(self._count.total))
            pl_module.log_dict(lrs, prog_bar=False, on_step=True, on_epoch=False, batch_size=1)

    def _set(self, trainer: Trainer) -> None:
        position = self._count.total if self.unit == "tokens" else trainer.global_step + 1
        factor = self.schedule(position - self._anchor, self._total)
        if not 0 <= factor < math.inf:
            raise ValueError(
                f"schedule gives {factor} at position {position - self._anchor}; a factor of the LR must be"
                " finite and >= 0"
            )
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

    def _group_names(self, trainer: Trainer) -> list[list[str]]:
        several = len(trainer.optimizers) > 1
        return [
            [
                f"{f'{i}.' if several else ''}{group.get('name', j)}"
                for j, group in enumerate(opt.param_groups)
            ]
            for i, opt in enumerate(trainer.optimizers)
        ]

    def _named_lrs(self, trainer: Trainer) -> dict[str, Tensor]:
        # Tensors on the CPU: numbers would go to the device, and a logger wait to read them back.
        lrs = [[torch.tensor(float(g["lr"])) for g in opt.param_groups] for opt in trainer.optimizers]
        if len({peak for peaks in self._peaks for peak in peaks}) == 1:
            return {"lr": lrs[0][0]}
        names = self._group_names(trainer)
        return {
            f"lr/{name}": lr
            for named, group in zip(names, lrs, strict=True)
            for name, lr in zip(named, group, strict=True)
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
