"""Where a data module's training loader is, in a run that Lightning counts in batches."""

from typing import Any

from lightning.pytorch import LightningDataModule

from rewarm.datamodules.loader import WindowLoader


class LoaderPosition:
    """The position of a data module's training loader, which its checkpoint keeps.

    Lightning keeps the state of a loader too, but gives it back only inside an epoch, so that the next epoch
    would repeat the order of the one before.

    Args:
        data: The data module, whose trainer knows how many batches a step has and how far the epoch is.

    Example:
        >>> position = LoaderPosition(LightningDataModule())  # without a trainer
        >>> loader = position.windows([{"counts": {"tokens": 3}}, {"counts": {"tokens": 5}}])
        >>> [batch["window"] for batch in loader]
        [{'tokens': 3}, {'tokens': 5}]
    """

    def __init__(self, data: LightningDataModule) -> None:
        self._data = data
        self._loader: WindowLoader | None = None
        self.restored: dict[str, Any] | None = None
        """The position at which the next loader begins; None is the start."""

    def accumulate(self) -> int:
        """Return the number of batches of an optimizer step."""
        trainer = self._data.trainer
        return 1 if trainer is None else trainer.accumulate_grad_batches

    def windows(self, loader: Any) -> WindowLoader:
        """Return a loader that adds windows to the batches of another, from the restored position on."""
        self._loader = WindowLoader(loader, self.accumulate, self._remaining, self._recount)
        state, self.restored = self.restored, None
        if state is not None:
            self._loader.load_state_dict(state)
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """Return the position as `loader`, or nothing where there is no loader yet."""
        return {} if self._loader is None else {"loader": self._loader.state_dict()}

    def _remaining(self) -> float:
        trainer = self._data.trainer
        if trainer is None or not trainer.training:
            return float("inf")
        progress = trainer.fit_loop.epoch_loop.batch_progress
        return trainer.num_training_batches - progress.current.ready

    def _recount(self, done: int) -> None:
        """Let Lightning count in batches of this run's size; its checkpoint counted those of another."""
        trainer = self._data.trainer
        if trainer is None or not trainer.training:
            return
        progress, limit = trainer.fit_loop.epoch_loop.batch_progress, trainer.limit_train_batches
        batches = len(self._loader) if self._loader is not None else 0
        if (limit if isinstance(limit, int) else limit * batches) < batches and not progress.is_last_batch:
            # It ends such an epoch by its own count, wherever the pass over the data is.
            done = progress.current.ready - progress.current.ready % self.accumulate()
        if progress.current.ready:
            progress.current.increment_by(done - progress.current.ready)
