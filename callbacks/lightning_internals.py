"""What the callbacks use of Lightning that Lightning does not publish, one function for each.

Nothing else in the callbacks touches a private name of Lightning. Each function says what the public way
lacks, and a test holds each to what it promises, against the installed version.
"""

from typing import Any

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy

TRIED = ("2.6.0", "2.6.1", "2.6.4", "2.6.5", "2.6.6")
"""Versions of Lightning with which the tests of these functions have passed."""


def logs_now(trainer: Trainer) -> bool:
    """Return whether the loggers see what is logged in this batch.

    `log_every_n_steps` is public, but not what it counts: batches that ended a step of any optimizer, which
    is less than `global_step` where there are several optimizers.

    Example:
        >>> options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        >>> [logs_now(Trainer(log_every_n_steps=number, **options)) for number in (0, 1)]
        [False, True]
    """
    return bool(trainer._logger_connector.should_update_logs)


def step_in_logs(trainer: Trainer) -> int:
    """Return the step under which Lightning logs what is logged in this batch.

    It is the number of batches that ended a step of any optimizer; `global_step` counts the steps of each.

    Example:
        >>> trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
        >>> step_in_logs(trainer)
        0
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def metrics_for_loggers(trainer: Trainer) -> dict[str, Any]:
    """Return what this batch has logged and loggers will see.

    The public `logged_metrics` keeps what earlier epochs and validations have logged, too.

    Example:
        >>> trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
        >>> trainer.training = True
        >>> metrics_for_loggers(trainer)
        {}
    """
    return dict(trainer._logger_connector.metrics["log"])


def log_step_now(trainer: Trainer) -> None:
    """Send what this batch has logged to the loggers, as Lightning does after all callbacks.

    There is no public way to send it earlier, when the process is about to exit.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Early(BoringModel):
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(torch.ones(1, 32)).sum()
        ...     def on_train_batch_end(self, *arguments):
        ...         self.log("seen", 1.0)
        ...         log_step_now(self.trainer)
        ...         print(self.trainer.logged_metrics)
        >>> options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        >>> options |= {"enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(max_steps=1, log_every_n_steps=1, limit_val_batches=0, **options)
        >>> trainer.fit(Early(), range(1))
        {'seen': tensor(1.)}
    """
    trainer._logger_connector.update_train_step_metrics()


def validates_by_clock(trainer: Trainer) -> bool:
    """Return whether validation is due at intervals of time.

    The public `val_check_interval` is missing from such a trainer, rather than an interval of time.

    Example:
        >>> options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        >>> validates_by_clock(Trainer(val_check_interval="00:00:30:00", **options))
        True
    """
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]


def validation_is_due(trainer: Trainer) -> bool:
    """Return whether Lightning validates after this batch, if there are data for it.

    The public attributes tell the settings (`val_check_batch`, `check_val_every_n_epoch`, ...), but not what
    follows from them and from a loader without a length, whose last batch is known when it is fetched.

    Example:
        >>> trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
        >>> validation_is_due(trainer)  # it has no validation data
        False
    """
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))  # type: ignore[arg-type]


def may_stop_early(trainer: Trainer) -> bool:
    """Return whether `should_stop` would end the training now, which `min_epochs` and `min_steps` may forbid.

    The public `min_epochs` and `min_steps` lack the rule by which they are compared with what was done.

    Example:
        >>> trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
        >>> may_stop_early(trainer)
        True
        >>> may_stop_early(Trainer(accelerator="cpu", logger=False, barebones=True, min_steps=10))
        False
    """
    return bool(trainer.fit_loop._can_stop_early)


def take_received_sigterm(trainer: Trainer) -> bool:
    """Return whether Lightning has got SIGTERM, and have it forget that, so that it doesn't stop by itself.

    The public `received_sigterm` can be read, but not set.

    Example:
        >>> trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
        >>> take_received_sigterm(trainer)
        False
    """
    received = trainer._signal_connector.received_sigterm
    trainer._signal_connector.received_sigterm = False
    return bool(received)


def cluster_environment(trainer: Trainer) -> ClusterEnvironment | None:
    """Return what tells the processes of a job from each other, also where there is one process alone.

    The public `strategy.cluster_environment` exists in strategies for several processes only, and a job of
    one process is requeued by SLURM, too.

    Example:
        >>> trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
        >>> isinstance(cluster_environment(trainer), ClusterEnvironment)
        True
    """
    return trainer._accelerator_connector.cluster_environment


def saves_shards(strategy: Strategy) -> bool:
    """Return whether every rank writes its shards into a checkpoint; else rank 0 writes one file.

    The choice is an argument of `ModelParallelStrategy`, which has no public attribute for it. Where there is
    no choice, shards are written as they are.

    Example:
        >>> from lightning.pytorch.strategies import ModelParallelStrategy
        >>> saves_shards(ModelParallelStrategy(save_distributed_checkpoint=False))
        False
    """
    return bool(getattr(strategy, "_save_distributed_checkpoint", True))


def note_saved_step(checkpoint: ModelCheckpoint, step: int) -> None:
    """Have a checkpoint callback say that it saved last at a step, for loggers that ask it.

    Loggers (`LitLogger`) look at the private name, and Lightning sets it in a private method only.

    Example:
        >>> checkpoint = ModelCheckpoint()
        >>> note_saved_step(checkpoint, 20)
        >>> checkpoint._last_global_step_saved
        20
    """
    checkpoint._last_global_step_saved = step
