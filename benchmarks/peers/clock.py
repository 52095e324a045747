"""Times, tokens and memory of optimizer steps; imports nothing that a peer's environment may lack."""

import itertools
import resource
import sys
import time
from collections import defaultdict
from typing import Any

import torch

_UNTIMED = 2


class Clock:
    """Notes what optimizer steps read and lost, when they end, and what their time goes to.

    On a GPU it puts events into its queue and never waits for it but in the first step, which is not timed.

    Args:
        began: When the process began, as `time.perf_counter()` gave it.
    """

    def __init__(self, began: float) -> None:
        self.began = began
        self.startup = 0.0
        self.losses: list[Any] = []
        self._counts: dict[str, list[Any]] = {"positions": [], "tokens": [], "targets": []}
        self._marks: list[tuple[str, Any]] = []
        self._steps: list[int] = []
        self._cpu: list[float] = []
        self._memory: dict[str, int] = {}

    def mark(self, phase: str) -> None:
        """Say what the time since the last mark went to."""
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def count(self, positions: Any, tokens: Any, targets: Any) -> None:
        """Note the positions of a step's rows, the tokens among them that are no padding, and the targets."""
        for name, value in {"positions": positions, "tokens": tokens, "targets": targets}.items():
            self._counts[name].append(value)

    def end_step(self) -> None:
        """Note the end of an optimizer step."""
        self.mark("rest")
        if not self._steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.startup = time.perf_counter() - self.began
        self._steps.append(len(self._marks) - 1)
        self._cpu.append(time.process_time())
        unit = 1 if sys.platform == "darwin" else 1024
        self._memory["rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if torch.cuda.is_available():
            self._memory["cuda_bytes"] = torch.cuda.max_memory_allocated()

    def result(self) -> dict[str, Any]:
        """Return all of it; steps last from the end of one to that of the next, with reading and logging."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        phases: dict[str, float] = defaultdict(float)
        first = self._steps[_UNTIMED - 1]
        for (_, before), (phase, after) in itertools.pairwise(self._marks[first : self._steps[-1] + 1]):
            phases[phase] += _seconds(before, after)
        ends = [self._marks[place][1] for place in self._steps[_UNTIMED - 1 :]]
        steps = len(self._steps)
        return {
            "losses": [float(loss) for loss in self.losses[:steps]],
            **{name: [int(value) for value in values[:steps]] for name, values in self._counts.items()},
            "seconds": [_seconds(before, after) for before, after in itertools.pairwise(ends)],
            "cpu_seconds": self._cpu[-1] - self._cpu[_UNTIMED - 1],
            "phases": phases,
            "startup": self.startup,
            **self._memory,
        }


def _seconds(before: Any, after: Any) -> float:
    if isinstance(before, float):
        return float(after - before)
    return float(before.elapsed_time(after)) / 1000.0
