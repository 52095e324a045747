"""Checkpoints that are there whole or not at all."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import proxy

import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.distributed.checkpoint.api import CheckpointException

from rewarm.callbacks import lightning_internals as internals
from rewarm.callbacks.ended_steps import EndedSteps
from rewarm.checkpoints.placing import partial, put_in_place, remove
from rewarm.checkpoints.whole import checksums, newest_first, write_checksums
from rewarm.checks import at_least

T = TypeVar("T")

_NAME = re.compile(r"step=(\d+)(\.old)?\.ckpt")


class Checkpoint(ModelCheckpoint):
    """Saves the last few checkpoints of a run, by steps and at its end, each whole or not at all.

    Each is written beside its place as `.NAME.partial` and renamed when all of it is on the disk; then the
    oldest one goes. A process killed at any instant leaves whole checkpoints and perhaps such a part, which
    the next start removes. Where ranks write shards, each hashes its own, and `checksums.json` in the folder
    has the sums; `rewarm.checkpoints.whole.verify` tells whether a checkpoint is what was written. If
    one cannot be written, for a full disk say, all ranks stop with one error that names the last good one.

    Checkpoints are of whole optimizer steps, never of a part of an accumulation window, and of all that
    belongs to a step: other callbacks have seen its end, and a validation that is due after it has been. So a
    resumed run has the validations of one that was never interrupted. It also has what was logged of the
    step: Lightning does that after all callbacks, so the checkpoint keeps it, and it is logged again. Out of
    reach are the module's own `on_train_batch_end`, which comes after all callbacks; `on_train_epoch_end`,
    which a run resumed from the last step of an epoch without validation does not call for it; and a run that
    `Trainer(max_time=...)` ends within a window.

    The last step of the training has a checkpoint, too; resumed from it, a finished run has nothing left to
    do. What the callback knows is in the folder, not in the checkpoint, so the folder may be moved.

    Args:
        dirpath: Local folder, shared by all nodes if they write shards; None is Lightning's choice, beside
            the logs.
        every_n_train_steps: Number of optimizer steps between checkpoints, >= 1.
        keep: Number of checkpoints to keep, >= 1. With two, one is left if the disk spoils the other.
            Checkpoints of later steps than the present one, of an earlier run in the same folder, are not
            touched.

    Raises:
        ValueError: If an argument is out of range, or dirpath is not local.

    Example:
        >>> trainer = Trainer(callbacks=[Checkpoint("run/checkpoints", every_n_train_steps=500)])
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 100, *, keep: int = 2) -> None:
        at_least(1, every_n_train_steps=every_n_train_steps, keep=keep)
        if dirpath is not None and "://" in str(dirpath):
            raise ValueError(f"dirpath is {dirpath!r}; it must be a local folder, where renaming is atomic")
        super().__init__(
            dirpath,
            "{step}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self._steps = EndedSteps()
        self._saved_step = 0
        self._is_due = self._waits = self._logs_next = False

    @property
    def state_key(self) -> str:
        """The same for any setting."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the folder tells."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing over."""

    def save(self, trainer: Trainer) -> Path:
        """Save a checkpoint of the present step now, unless there is one. A collective call.

        Returns:
            Its place.

        Raises:
            OSError: If it cannot be written.
        """
        assert self.dirpath is not None
        path = Path(self.dirpath) / f"step={trainer.global_step}.ckpt"
        if trainer.fast_dev_run or self._saved_step == trainer.global_step:  # type: ignore[attr-defined]
            return path
        for logger in trainer.loggers:
            logger.save()  # what was logged before the checkpoint is not logged again after it
        self._remember(save_checkpoint(trainer, path, self.keep))
        self._saved_step = trainer.global_step
        internals.note_saved_step(self, self._saved_step)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        return path

    def _remember(self, kept: dict[str, int]) -> None:
        """Fill in what loggers and `ckpt_path="best"` look at."""
        if not kept:
            return
        self.best_k_models = {path: torch.tensor(step) for path, step in kept.items()}
        self.best_model_path, *_, self.kth_best_model_path = [*kept, *kept]
        self.last_model_path = self.best_model_path
        self.best_model_score = self.current_score = self.best_k_models[self.best_model_path]
        self.kth_value = self.best_k_models[self.kth_best_model_path]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder, and remove from it what a killed process left half done."""
        # Without the stage Lightning doesn't warn that the folder isn't empty: to go on in it is the purpose.
        super().setup(trainer, pl_module, "")
        assert self.dirpath is not None
        if "://" in str(self.dirpath):
            raise ValueError(f"checkpoints would go to {self.dirpath}; give Checkpoint a local dirpath")
        if stage == "fit" and trainer.is_global_zero:
            for left in Path(self.dirpath).glob(".step=*.ckpt.partial"):
                shutil.rmtree(left, ignore_errors=True)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what Lightning logs of the step, which it does after the callbacks."""
        if self._logs_next and internals.logs_now(trainer):
            logged = convert_tensors_to_scalars(internals.metrics_for_loggers(trainer))
            metrics = {"epoch": trainer.current_epoch, **logged}
            step = metrics.pop("step", internals.step_in_logs(trainer))
            checkpoint["rewarm_log"] = {"metrics": metrics, "step": step}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Log it, perhaps once more: a process that was killed right after the checkpoint has not."""
        if trainer.state.fn == "fit" and "rewarm_log" in checkpoint:
            for logger in trainer.loggers:
                logger.log_metrics(**checkpoint["rewarm_log"])
                logger.save()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where the run goes on."""
        self._steps.begin(trainer)
        self._saved_step = trainer.global_step
        self._is_due = self._waits = False
        self._look(trainer)
        now = trainer.global_step
        if later := [path.name for step, path in _steps(Path(str(self.dirpath))) if step > now]:
            rank_zero_info(
                f"{self.dirpath} also has checkpoints of later steps than {now} ({', '.join(later)}):"
                " whoever goes on from the newest one gets those"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save if a step has ended and it is time, or wait for the validation that belongs to the step."""
        if not self._steps.look(trainer):
            return
        self._is_due |= self._steps.reached(self.every_n_train_steps) > 0
        self._waits = validation_follows(trainer)
        if not self._waits:
            self._logs_next = True
            self._save_if_due(trainer)
            self._logs_next = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what has waited for the validation."""
        if self._waits:
            self._waits = False
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save nothing: the last step has."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, if something other than the number of steps or epochs ended the training."""
        self.save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look which checkpoints there are, also if a finished run was resumed."""
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        self._remember(_kept_and_rest(Path(str(self.dirpath)), trainer.global_step, self.keep)[0])

    def _save_if_due(self, trainer: Trainer) -> None:
        if self._is_due or _is_last(trainer):
            self._is_due = False
            self.save(trainer)


def validation_follows(trainer: Trainer) -> bool:
    """Return whether Lightning validates between this batch and the next one. A collective call.

    Example:
        >>> trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
        >>> validation_follows(trainer)  # it has no validation data
        False
    """
    if internals.validates_by_clock(trainer):
        return False  # ranks may have different opinions
    if not internals.validation_is_due(trainer):
        return False
    if trainer.val_dataloaders is None:
        # The first validation; whether its loaders have any batches is not known yet.
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True
    return sum(trainer.num_val_batches) > 0


def save_checkpoint(trainer: Trainer, path: Path, keep: int | None = None) -> dict[str, int]:
    """Save a checkpoint that is there whole or not at all. A collective call.

    Args:
        trainer: The trainer, in a fit, between two batches.
        path: Path of the checkpoint, `step=N.ckpt` with the present step; what is there is replaced.
        keep: Number of checkpoints `step=N.ckpt` up to this step that are kept, this one included; None keeps
            all.

    Returns:
        The steps of the kept checkpoints by their paths, the newest first.

    Raises:
        OSError: On all ranks, if one rank could not write its part; the message names the last good
            checkpoint. What was at `path` before is still there.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
        >>> trainer.strategy.connect(BoringModel())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kept = save_checkpoint(trainer, Path(folder, "step=0.ckpt"))
        >>> list(kept.values())
        [0]
    """
    whole = partial(path) / path.name
    first = trainer.is_global_zero
    placing = ExitStack()

    def prepare() -> None:
        if first:
            placing.enter_context(put_in_place(path, replace=True))

    def write() -> dict[str, Any]:
        with _temporary_files_in(whole.parent):
            try:
                trainer.save_checkpoint(whole)
            except (Exception, CheckpointException):
                trainer.strategy.barrier()  # where the other ranks are waiting
                raise
        return checksums(whole, trainer.global_rank) if whole.is_dir() else {}

    def finish() -> None:
        if whole.is_dir() and first:
            write_checksums(whole, {name: sum for part in sums for name, sum in part.items()})
        placing.close()

    def prune() -> dict[str, int]:
        kept, rest = _kept_and_rest(path.parent, trainer.global_step, keep) if first else ({}, [])
        for other in rest:
            remove(other)
        return kept

    try:
        with placing:
            _on_all_ranks(trainer, prepare)
            sums = _on_all_ranks(trainer, write)
            _on_all_ranks(trainer, finish)
    except OSError as error:
        others = [str(other) for other in newest_first(path.parent)]
        last = f"the last good one is {others[0]}" if others else "there is none before it"
        raise OSError(f"the checkpoint {path} could not be written ({error}); {last}") from error
    return _on_all_ranks(trainer, prune)[0]


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints that `Checkpoint` names, by step, the latest first."""
    named = [(match, path) for path in folder.glob("step=*.ckpt") if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in named), reverse=True)


def _kept_and_rest(folder: Path, now: int, keep: int | None) -> tuple[dict[str, int], list[Path]]:
    kept: dict[str, int] = {}
    rest: list[Path] = []
    for step, path in _steps(folder):
        if step <= now and not path.stem.endswith(".old") and (keep is None or len(kept) < keep):
            kept[str(path)] = step
        elif step <= now and keep is not None:
            rest.append(path)
    return kept, rest


def _is_last(trainer: Trainer) -> bool:
    """Whether the training ends with this step, as far as Lightning knows by now."""
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    epoch_ends = trainer.is_last_batch or batches == trainer.num_training_batches
    return bool(
        trainer.global_step >= trainer.max_steps > -1
        or (trainer.current_epoch + 1 >= epochs > -1 and epoch_ends)
        or (trainer.should_stop and internals.may_stop_early(trainer))
    )


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    # Lightning writes a file to the machine's temporary folder first, which may be small, or memory.
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _on_all_ranks(trainer: Trainer, work: Callable[[], T]) -> list[T]:
    """Do something on every rank; if it goes wrong on one, all raise, so that none waits for another."""
    error: BaseException | None = None
    done: Any = None
    try:
        done = work()
    except (Exception, CheckpointException) as raised:
        error = raised
    outcomes: list[Any] = [(done, _cause(error))]
    if trainer.world_size > 1:
        outcomes = [None] * trainer.world_size
        torch.distributed.all_gather_object(outcomes, (done, _cause(error, trainer.global_rank)))
    if error is not None and not _is_from_disk(error):
        raise error
    for _, cause in outcomes:
        if cause is not None:
            raise OSError(cause) from error
    return [done for done, _ in outcomes]


def _is_from_disk(error: BaseException) -> bool:
    # torch.save has no exception of its own for a file that cannot be written.
    return isinstance(error, OSError | CheckpointException) or "PytorchStreamWriter" in str(error)


def _cause(error: BaseException | None, rank: int | None = None) -> str | None:
    if error is None:
        return None
    if isinstance(error, CheckpointException):  # the same on all ranks
        rank, (error, _) = next(iter(error.failures.items()))
    cause = str(error).splitlines()[0] if _is_from_disk(error) else f"{type(error).__name__}: {error}"
    return cause if rank is None else f"rank {rank}: {cause}"
