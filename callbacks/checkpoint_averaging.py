"""Averages of the weights along a run: validated, exported, saved and resumed, next to the live weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from rewarm.callbacks import lightning_internals as internals
from rewarm.callbacks.averaged_weights import AveragedWeights
from rewarm.callbacks.averages_in_checkpoints import read_shards, write_shards, write_whole
from rewarm.callbacks.averaging_policy import AveragingPolicy, Mode
from rewarm.callbacks.ended_steps import EndedSteps
from rewarm.functional.shards import any_sharded


class CheckpointAveraging(Callback):
    """Averages the trainable weights of any LightningModule while it trains.

    Averaging late checkpoints of a run at a constant learning rate replaces most of a learning-rate decay,
    and keeps what the best, latest data taught. `last_k` is the mean of the last k snapshots, recomputed from
    them whenever it is needed; `window` the mean of the last whole one of consecutive windows of k snapshots,
    and before there is one, of those so far; `ema` an exponential moving average with bias correction. All
    see the weights after every `every_n_steps`-th optimizer step.

    The means are plain, or have `weights`: such that the mean stands for the end of a decayed run, or any.

    The average stands in for the weights during validation and testing (`validate`), and stays in place when
    the fit ends (`apply_at_end`), so that what exports afterwards exports the average. A monitored validation
    metric is the average's. Put this callback before others that export in `on_train_end`. A later fit with
    the same Trainer goes on from the live weights.

    Checkpoints hold the live weights in `state_dict`, whenever they are saved, and the buffers in the
    callback's state: a resumed run or a branch starts from the live weights, and the average goes on where it
    was. Only a weights-only checkpoint is out of our hands (Lightning doesn't call callbacks for it): it
    holds what is in place, the average once the fit has ended.

    Works with one device, DDP and `ModelParallelStrategy`. Under FSDP2 every rank averages its own shards,
    and a sharded checkpoint holds them as DTensors, so another number of ranks can resume. Checkpoints that
    are one file hold whole averages, and any of these strategies can resume from them.

    Logs:
        averaging/snapshots: Number of snapshots in the average (`ema`: updates so far), every
            `log_every_n_steps` steps.

    Cost: float32 buffers of the trainable weights, k times (`last_k`), twice (`window`) or once (`ema`), and
    one copy in their own dtype while the average is in place. The module is never copied. For models too
    large for that, average saved checkpoints instead: `rewarm average`.

    Args:
        mode: `last_k`, `window` or `ema`.
        k: Snapshots in the mean, >= 1 (not `ema`). 6 as in the curriculum paper.
        every_n_steps: Optimizer steps between snapshots or updates, >= 1. None is 1 for `ema` and 100 for the
            others (ours).
        start_step: Optimizer step of the first snapshot, >= 0. 0 starts at `every_n_steps`.
        decay: Decay of the moving average per update, in [0, 1) (`ema` only). 0 is the current weights.
        validate: Validate and test the average. Before the first snapshot, and in the sanity check, it is the
            live weights.
        apply_at_end: Leave the average in place when the fit ends.
        device: Where buffers live, for example `cpu`. None is the parameters' device.
        weights: Of the k snapshots, oldest first, 0 or more, of which only the proportions matter, that of
            the newest above 0; with fewer snapshots those of the newest (`last_k`) or the oldest (`window`).
            Or the shape of a learning-rate decay to 0 for which the mean stands: `linear`, `sqrt`, `cosine`
            and others, see `rewarm.schedules.decay_weights.shape_weights`. None is the plain mean. Not for
            `ema`.

    Raises:
        ValueError: If an argument is out of range or has no effect in this mode.

    Example:
        >>> averaging = CheckpointAveraging(k=6, every_n_steps=500, start_step=10_000)
        >>> trainer = Trainer(callbacks=[averaging])  # doctest: +SKIP
        >>> averaging.num_snapshots
        0

    Source: arXiv:2511.18903 (last six checkpoints under an ordered curriculum), arXiv:2306.03241 (mean of the
    last k), arXiv:2405.18392 (windows), arXiv:2507.17634 (weights that stand for a decay).
    Differs: the papers average saved files; the moving average is bias-corrected, which theirs is not.
    """

    def __init__(
        self,
        mode: Mode = "last_k",
        k: int = 6,
        *,
        every_n_steps: int | None = None,
        start_step: int = 0,
        decay: float = 0.999,
        validate: bool = True,
        apply_at_end: bool = True,
        device: str | None = None,
        weights: Sequence[float] | str | None = None,
    ) -> None:
        self.policy = AveragingPolicy(mode, k, every_n_steps, start_step, decay, weights)
        self.averages = AveragedWeights(device)
        self.validate = validate
        self.apply_at_end = apply_at_end
        self._num_taken = 0
        self._steps = EndedSteps()
        self._has_begun = False  # or the steps are those of a checkpoint
        self._evaluating = False
        # Rows still to be read from a sharded checkpoint: its entry and their number.
        self._shards: tuple[str, int] | None = None
        self._checkpoint_path: Any = None

    # --- access for exporters -------------------------------------------------------------------------------

    @property
    def num_snapshots(self) -> int:
        """Number of snapshots in the average; for `ema`, of updates."""
        return self.policy.in_average(self._num_taken, self._num_rows)

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[None]:
        """Put the average in place of the weights within a `with` block.

        Args:
            pl_module: The module that was trained. Its weights are the live ones again afterwards, unless the
                average was in place before.

        Raises:
            RuntimeError: If there is no snapshot yet.
        """
        if not self.num_snapshots:
            raise RuntimeError("there is no snapshot yet, so there is no average")
        applied = self._apply(pl_module)
        try:
            yield
        finally:
            if applied:
                self._restore(pl_module)

    def averaged_state_dict(self, pl_module: LightningModule) -> dict[str, Any]:
        """Return the module's `state_dict` with averages for the trainable weights.

        They have the weights' dtype, and share no memory with them.

        Args:
            pl_module: The module that was trained; not changed.

        Raises:
            RuntimeError: If there is no snapshot yet.
        """
        with self.averaged(pl_module):
            return self.averages.detached(pl_module.state_dict())

    # --- taking snapshots -----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go back to the live weights if an earlier fit left the average in place."""
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"strategy is {type(trainer.strategy).__name__}, whose flat shards can't be saved with a"
                " callback; use ModelParallelStrategy (FSDP2) or DDP"
            )
        if stage == "fit":
            self._restore(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the trainable weights, and take what a checkpoint restored."""
        if trainer.global_step == 0:
            self.averages.clear()
            self._num_taken, self._has_begun, self._shards = 0, False, None
        self._find(pl_module)
        if not self._has_begun:
            self._steps.begin(trainer)
            self._has_begun = True
        # A checkpoint saved after the step but before our hook lacks the snapshot of that step.
        self._look(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take a snapshot if an optimizer step was taken and it is time."""
        if not self._look(trainer):
            return
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self._steps.now % every == 0:
            pl_module.log("averaging/snapshots", float(self.num_snapshots))

    def _look(self, trainer: Trainer) -> bool:
        has_ended = self._steps.look(trainer)
        if has_ended and self.policy.is_due(self._steps):
            self._num_taken += 1
            opens_row = self.policy.opens_row(self._num_taken) or not self.averages.rows
            self.averages.take(self.policy.decay_of(self._num_taken), opens_row, self.policy.max_rows)
        return has_ended

    @property
    def _num_rows(self) -> int:
        if self._shards is not None:
            return min(self._shards[1], self.policy.max_rows)
        return len(self.averages.rows)

    # --- putting the average in place -----------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._evaluating = self.validate and not trainer.sanity_checking and self._apply(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the live weights."""
        if self._evaluating:
            self._restore(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the average."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the live weights."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Go back to the live weights, whatever happened while the average was in place."""
        self._restore(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in place."""
        if self.apply_at_end and not self._apply(pl_module):
            rank_zero_warn(
                f"CheckpointAveraging took no snapshot in {trainer.global_step} steps"
                f" (start_step={self.policy.start_step}, every_n_steps={self.policy.every_n_steps}): the"
                " weights are the last ones, not an average"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in place also when a finished run was resumed and had nothing left to train."""
        if self.apply_at_end:
            self._apply(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the accelerator, as Lightning does with the module."""
        self.averages.free_device()

    def _apply(self, pl_module: LightningModule) -> bool:
        """Put the average in place; return whether it was not, and there is one."""
        if self.averages.is_applied or not self.num_snapshots:
            return False
        self._find(pl_module)
        self.averages.apply(self._shares())
        return True

    def _restore(self, pl_module: LightningModule) -> None:
        if self.averages.is_applied:
            self.averages.restore(pl_module)
            self._evaluating = False

    def _shares(self) -> list[float]:
        return self.policy.shares(self._num_taken, self._num_rows)

    # Validation runs in inference mode; tensors made there could not be updated in training.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _find(self, pl_module: LightningModule) -> None:
        """Find the weights, read what is still in a sharded checkpoint, and bring the rows to the weights."""
        self.averages.find(pl_module)
        if self._shards is not None:
            rows = read_shards(self.averages, *self._shards, self._checkpoint_path)
            self.averages.rows, self._shards = rows[-self.policy.max_rows :], None
        self.averages.settle()

    # --- saving and resuming --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, oldest first, each a list in the order of `names`; without shards.

        `weights` has each one's share of the average.
        """
        sharded = any_sharded(self.averages.parameters)
        return {
            "mode": self.policy.mode,
            "num_updates": self._num_taken,
            "last_step": self._steps.now if self._has_begun else None,
            "names": self.averages.names,
            "averages": [] if sharded else [list(row) for row in self.averages.rows],
            "weights": self._shares(),
            "window": self.policy.window,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; shards are read when training or validation starts."""
        if state_dict["mode"] != self.policy.mode:
            raise ValueError(
                f"mode is {self.policy.mode!r}, but the checkpoint was averaged with {state_dict['mode']!r}"
            )
        if state_dict.get("window") != self.policy.window:
            raise ValueError(
                f"the weights in a window are {self.policy.window}, but the checkpoint was averaged with"
                f" {state_dict.get('window')}"
            )
        self._num_taken = state_dict["num_updates"]
        self._has_begun = state_dict["last_step"] is not None
        self._steps.now = state_dict["last_step"] or 0
        self.averages.names = state_dict["names"]
        self.averages.rows = state_dict["averages"][-self.policy.max_rows :]
        self._shards = state_dict.get("shards")

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Forget what was in place: Lightning has just written the live weights into the module."""
        self.averages.forget_live()
        self._evaluating = False
        self._checkpoint_path = trainer.ckpt_path

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the live weights into the checkpoint, and shards where every rank saves its own."""
        averages = self.averages
        if self._shards is not None:
            self._find(pl_module)
        if averages.is_applied:
            averages.exchange(pl_module)
            try:
                live = averages.detached(trainer.strategy.lightning_module_state_dict())
            finally:
                averages.exchange(pl_module)
            checkpoint["state_dict"] = {
                name: live.get(name, v) for name, v in checkpoint["state_dict"].items()
            }
        if averages.rows and any_sharded(averages.parameters):
            state = checkpoint["callbacks"][self.state_key]
            if internals.saves_shards(trainer.strategy):
                write_shards(averages, state, checkpoint)
            else:
                write_whole(averages, state, keep=trainer.is_global_zero)
