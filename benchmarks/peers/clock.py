"""Times, tokens and memory of optimizer steps; imports nothing that a peer's environment may lack."""

import itertools
import resource
import sys
import time
from typing import Any

import torch

_UNTIMED = 2


class Clock:
    """Notes when optimizer steps end, what they read and what they lost.

    Attributes:
        losses: Of each step.
        tokens: Positions of each step, padding among them.
        targets: Tokens of each step that are learnt.
    """

    def __init__(self, began: float) -> None:
        self.began = began
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self._ends: list[float] = []

    def end_step(self) -> None:
        """Note the time, when all that the device was given is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())

    def result(self, **more: Any) -> dict[str, Any]:
        """Return all of it; steps last from the end of one to that of the next, with reading and logging."""
        first, timed = self._ends[0], self._ends[_UNTIMED - 1 :]
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {
            "losses": self.losses,
            "tokens": self.tokens,
            "targets": self.targets,
            "seconds": [b - a for a, b in itertools.pairwise(timed)],
            "startup": first - self.began,
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak,
            **more,
        }
