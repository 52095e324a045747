"""Ends a run that is about to be killed, with a checkpoint and a defined exit code."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import distributed

from rewarm.callbacks import lightning_internals as internals
from rewarm.callbacks.checkpoint import Checkpoint, save_checkpoint, validation_follows
from rewarm.callbacks.ended_steps import EndedSteps
from rewarm.checks import in_range

_ONE_SIGNAL_SECONDS = 2.0
_PARENT_SECONDS = 30.0


class Preemption(Callback):
    """Answers SIGTERM at the end of an optimizer step: saves a checkpoint and exits; requeues under SLURM.

    Clusters send SIGTERM before they take a machine away. Lightning's own answer may come within a step, or
    leave ranks waiting for each other. Here a signal is only noted. When a step has ended, with all other
    callbacks and the validation that is due after it, the ranks find out whether any of them got one. If so,
    they save a checkpoint together and every process exits with the same code.

    A signal during validation or a rollout thus waits for the end of that step, and one after the model was
    set up but before the training begins for the end of the first step. The wait must be shorter than the
    time until SIGKILL: 30 seconds under `torchrun`, `KillWait` under SLURM. A second SIGTERM, two seconds or
    more after the first, ends the process at once; earlier ones count as the first, which launchers pass on
    in more than one way.

    Under SLURM with Lightning's automatic requeue, the requeue signal (SIGUSR1) leads to Lightning's handler,
    which writes `hpc_ckpt_N.ckpt` and calls `scontrol requeue`, but at the end of a step and once.
    `Checkpoint`, if there is one, saves first.

    Where the checkpoint goes: to the folder of the run's `Checkpoint`, which does not write a step twice; or
    else to `checkpoints` in the Trainer's `default_root_dir`.

    The ranks agree over gloo, on the CPU: where host names don't resolve, set GLOO_SOCKET_IFNAME.

    A SIGTERM to a whole process group also ends the workers of a DataLoader, and a step without its data
    cannot end: give loaders with workers a `worker_init_fn` that ignores SIGTERM.

    Args:
        exit_code: Exit code of the process, in 1 to 255; 143 is what shells show for SIGTERM, 128 + 15.

    Raises:
        ValueError: If exit_code is out of range; when training starts, if that is not in the main thread.

    Example:
        >>> trainer = Trainer(callbacks=[Checkpoint("run/checkpoints"), Preemption()])
    """

    def __init__(self, exit_code: int = 128 + signal.SIGTERM) -> None:
        in_range("[1, 255]", exit_code=exit_code)
        self.exit_code = exit_code
        self._sigterm_at: float | None = None
        self._requeue: Callable[[int, FrameType | None], Any] | None = None
        self._requeue_signal = 0
        self._got_requeue = False
        self._kill_children: Callable[[int], None] | None = None
        self._group: distributed.ProcessGroup | None = None
        self._steps = EndedSteps()
        self._waits = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind all other callbacks: Lightning puts those that save checkpoints last."""
        trainer.callbacks = [*(c for c in trainer.callbacks if c is not self), self]  # type: ignore[attr-defined]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which has just registered its handlers."""
        self._take_over(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over, if there was no sanity check, and count from where the run goes on."""
        self._take_over(trainer)
        self._steps.begin(trainer)
        self._waits = False
        if trainer.world_size > 1 and distributed.get_backend() != "gloo":
            # On the CPU, so that agreeing does not wait for the accelerator.
            self._group = distributed.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Answer at the end of a step, or wait for the validation that belongs to it."""
        if not self._steps.look(trainer):
            return
        self._waits = validation_follows(trainer)
        if not self._waits:
            self._answer(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer what has waited for the validation."""
        if self._waits:
            self._waits = False
            self._answer(trainer)

    # Nothing restores the handlers here: Lightning's own teardown puts back those from before its own.
    def _take_over(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or signal.getsignal(signal.SIGTERM) == self._on_sigterm:  # type: ignore[attr-defined]
            return
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "Preemption needs the training to run in the main thread, which gets the signals"
            )
        self._sigterm_at = time.monotonic() if internals.take_received_sigterm(trainer) else None
        launcher = trainer.strategy.launcher
        self._kill_children = None if launcher is None else launcher.kill
        signal.signal(signal.SIGTERM, self._on_sigterm)
        environment = internals.cluster_environment(trainer)
        self._requeue, self._got_requeue = None, False
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            handler = signal.getsignal(environment.requeue_signal)
            if callable(handler):
                self._requeue, self._requeue_signal = handler, environment.requeue_signal
                signal.signal(environment.requeue_signal, self._on_requeue)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._sigterm_at is None:
            self._sigterm_at = now
        elif now - self._sigterm_at > _ONE_SIGNAL_SECONDS:
            if self._kill_children is not None:
                self._kill_children(signal.SIGKILL)
            os._exit(self.exit_code)

    def _on_requeue(self, number: int, frame: FrameType | None) -> None:
        self._got_requeue = True

    def _answer(self, trainer: Trainer) -> None:
        flags = torch.tensor([self._sigterm_at is not None, self._got_requeue], dtype=torch.int32)
        if trainer.world_size > 1:
            distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=self._group)
        stops, requeues = flags.tolist()
        if requeues and self._requeue is not None:
            handler, self._requeue = self._requeue, None
            if _own(trainer) is not None:
                self._save(trainer)
            handler(self._requeue_signal, None)
        if stops:
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        path = self._save(trainer)
        if trainer.training:
            internals.log_step_now(trainer)  # what Lightning would do next
        rank_zero_info(f"SIGTERM: saved {path}, exit code {self.exit_code}")
        if trainer.world_size > 1:
            _wait_for_parent()
        raise SystemExit(self.exit_code)

    def _save(self, trainer: Trainer) -> Path:
        own = _own(trainer)
        if own is not None:
            return own.save(trainer)
        path = Path(trainer.default_root_dir, "checkpoints", f"step={trainer.global_step}.ckpt").absolute()
        save_checkpoint(trainer, path)
        return path


def _own(trainer: Trainer) -> Checkpoint | None:
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)), None)


def _wait_for_parent() -> None:
    """Let the process that started this one end first: Lightning's kills itself when one of its own has."""
    pids: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(pids, os.getpid())
    until = time.monotonic() + _PARENT_SECONDS
    while os.getppid() in pids and time.monotonic() < until:
        time.sleep(0.05)
