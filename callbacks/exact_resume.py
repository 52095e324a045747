"""Keeps the random state in checkpoints, which Lightning does not."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rewarm.rollouts.ranks import everyone, gather


class ExactResume(Callback):
    """Saves and restores the random state of Python, NumPy, torch and every CUDA device, on every rank.

    With it, the loaders of `rewarm.datamodules` and `LRSchedule`, a run that was killed and resumed has the
    losses of one that never was. On another number of ranks each rank starts from the state that the rank of
    its number had, and new ranks start from their seed.

    Example:
        >>> "torch" in random_state()
        True
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the random states of all ranks. A collective call."""
        return {"ranks": gather(random_state(), everyone())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the first batch."""
        self._restored = state_dict["ranks"]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore as late as can be: starting loaders and other callbacks draw random numbers too."""
        if self._restored is not None and trainer.global_rank < len(self._restored):
            set_random_state(self._restored[trainer.global_rank])
        self._restored = None


def random_state() -> dict[str, Any]:
    """Return the random state of this process: of Python, NumPy, torch and each CUDA device.

    Example:
        >>> list(random_state())
        ['python', 'numpy', 'torch', 'cuda']
    """
    version, internal, gauss = random.getstate()
    return {
        "python": (version, list(internal), gauss),
        "numpy": _plain(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned.

    Args:
        state: State of this or of another process.

    Example:
        >>> state, drawn = random_state(), torch.rand(3)
        >>> set_random_state(state)
        >>> torch.equal(torch.rand(3), drawn)
        True
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def _plain(value: Any) -> Any:
    # LightningCLI opens checkpoints with `weights_only`, which knows no NumPy types.
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
