"""Where a data module's training loader is, in a run that Lightning counts in batches."""

from typing import Any

from lightning.pytorch import LightningDataModule

from rewarm.datamodules.loader import WindowLoader


class LoaderPosition:
    """The position of a data module's training loader, which its checkpoint keeps.

    Lightning keeps the state of a loader too, but gives it back only inside an epoch: the next one would
    repeat its order.

    Args:
        data: The data module, whose trainer says how many batches a step has and how far the epoch is.
    """

    def __init__(self, data: LightningDataModule) -> None:
        self._data = data
        self._loader: WindowLoader | None = None
        self.restored: dict[str, Any] | None = None
        """The position that the next loader begins at."""

    def accumulate(self) -> int:
        """Return how many batches an optimizer step has."""
        trainer = self._data.trainer
        return 1 if trainer is None else trainer.accumulate_grad_batches

    def windows(self, loader: Any) -> WindowLoader:
        """Return the loader of a loader's batches with their windows, from the restored position on."""
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
