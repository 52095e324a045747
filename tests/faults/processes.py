"""Processes forked from one that has imported everything, and ended by signals at chosen moments."""

import contextlib
import multiprocessing
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

PHASES = (
    "starting",
    "restoring",
    "forward and backward",
    "optimizer step",
    "between steps",
    "saving",
    "validation",
    "rollout",
    "ending",
)
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.faults.runs"])
_LOCK = (
    threading.Lock()
)  # multiprocessing looks after the processes of all threads whenever one starts another
_POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class Moment:
    """So many seconds after the n-th change of phase of a process, n >= 1."""

    change: int
    seconds: float


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        exit_code: Minus the signal if one ended it.
        phase: Its last one; that in which a signal came, if it answered one.
        output: What it printed.
        is_late: Whether it had to be killed because it did not end in time.
    """

    exit_code: int
    phase: str
    output: str
    is_late: bool


class Process:
    """A function at work in a process.

    Args:
        folder: Where the process writes its phase and what it prints.
        function: Of a module, so that the process finds it.
        arguments: What it is called with.
        rank: Of several processes that work together.
        environment: Set in the process.
    """

    def __init__(
        self,
        folder: Path,
        function: Callable[..., None],
        *arguments: Any,
        rank: int = 0,
        environment: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._phase, self._output = folder / f"phase{rank}", folder / f"output{rank}"
        self._phase.write_bytes(bytes(8))
        self._output.write_text("")
        work = (self._output, environment or {}, function, arguments)
        with _LOCK:
            self._process = _FORKS.Process(target=_work, args=work)
            self._process.start()
        self._struck: int | None = None  # the phase in which a signal came

    def reaches(self, moment: Moment) -> bool:
        """Wait for a moment; return whether it comes before the end of the process."""
        while self._changes()[1] < moment.change and not self.is_over(_POLL_SECONDS):
            pass
        return not self.is_over(moment.seconds)

    def interrupt(self, moment: Moment, number: signal.Signals) -> None:
        """Send a signal at a moment, unless the process has ended by then."""
        if self.reaches(moment):
            self._struck = self._changes()[0]
            self._send(number)

    def is_over(self, within_seconds: float) -> bool:
        """Wait for the end of the process, no longer than that; return whether it has come."""
        return bool(wait([self._process.sentinel], within_seconds))

    def end(self, within_seconds: float) -> Ended:
        """Wait for the end of the process, or bring it about, and leave no worker of its loader behind."""
        is_late = not self.is_over(within_seconds)
        if is_late:
            self._send(signal.SIGKILL)
            self.is_over(10.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with _LOCK:
            code = self._process.exitcode
        phase, _ = self._changes()
        if code > 0 and self._struck is not None:
            phase = self._struck
        return Ended(code, PHASES[phase], self._output.read_text(errors="replace"), is_late)

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def _changes(self) -> tuple[int, int]:
        return struct.unpack("<II", self._phase.read_bytes())


def _work(
    output: Path, environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # or a loader's workers would import everything anew
    os.environ.update(environment)
    with output.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    function(*arguments)
