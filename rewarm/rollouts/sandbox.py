"""Computes with what a model wrote, in processes that can do nothing else."""

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rewarm.checks import above, at_least
from rewarm.rollouts.sandbox_child import LARGEST_RESULT, LENGTH

_KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")  # of the environment; the rest may hold secrets
# Scores must be the same in every run, and threads would keep rights that the worker has given up.
_SET = {"PYTHONHASHSEED": "0"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from rewarm.rollouts.sandbox_child import main; main(sys.argv[2], *map(int, sys.argv[3:]))"
)
_CLOCK_FACTOR = (
    10  # by the clock an item may take so many times its processor time, as the machine may be busy
)
_MOST_WORKERS = 16


class SandboxError(RuntimeError):
    """Processes cannot be confined here, or the function cannot be imported in one."""


@dataclass(frozen=True)
class Outcome:
    """What became of one item.

    Attributes:
        value: What the function returned, as JSON keeps it; None if there is a problem.
        problem: None, or why there is no value: `time` and `memory` where the item went beyond its limits,
            `died` where its process ended, or else the exception as `Type: message`.
    """

    value: Any = None
    problem: str | None = None


@dataclass
class _Worker:
    pid: int
    socket: socket.socket
    has_served: bool = False


class Sandbox:
    """A pool of processes without rights, each of which calls one function on one item at a time.

    A worker can compute, and read the files of Python; it cannot start processes, open sockets, write, make
    or remove files, signal or trace others, or see this process's environment
    (`rewarm.rollouts.confinement`). Nothing that it sends is unpickled here. The first call of `map` starts
    the pool: a fresh interpreter imports what is needed once, workers are forked from it and kept, and one
    that goes beyond its limits is killed and replaced. All of them end with this process, however it ends.
    Threads may share a pool; a process forked from this one starts its own.

    Args:
        make: Dotted name of a function without arguments, called once in the fresh interpreter: it imports
            what is needed and returns the function of one item. What that one returns must fit into JSON.
        memory_bytes: What a worker may take beyond what it begins with, > 0.
        num_workers: Most workers at a time, >= 1; None is the number of cores, shared by the ranks of this
            host, and at most 16.

    Raises:
        ValueError: If a limit is out of range.

    Example:
        >>> with Sandbox("rewarm.rollouts.sandbox.make_square") as sandbox:
        ...     sandbox.map([3, "a"], timeout=2.0)
        [Outcome(value=9, problem=None), Outcome(value=None, problem="TypeError: 'a' is no number")]

    Source: none (ours).   Differs: nothing.
    """

    def __init__(self, make: str, *, memory_bytes: int = 1 << 30, num_workers: int | None = None) -> None:
        above(0, memory_bytes=memory_bytes)
        self._make, self._memory_bytes = make, memory_bytes
        self._num_workers = _cores() if num_workers is None else num_workers
        at_least(1, num_workers=self._num_workers)
        self._forget()

    def __enter__(self) -> "Sandbox":
        """Return the sandbox, whose processes end with the block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End all processes."""
        self.close()

    def map(self, items: Sequence[Any], timeout: float = 5.0) -> list[Outcome]:
        """Call the function on each item.

        An item that had not enough memory, or whose process died, in a worker that had served others before
        is tried once more in a fresh one, so that no outcome depends on what came before.

        Args:
            items: Anything that can be pickled.
            timeout: Seconds of processor time that one item may take, > 0; ten times as many by the clock.

        Returns:
            One outcome per item, in order.

        Raises:
            SandboxError: If processes cannot be confined here, or the function cannot be imported.
            ValueError: If the timeout is not above 0.
        """
        above(0, timeout=timeout)
        if self._owner != os.getpid():
            self._forget()  # forked: the pool is the other process's
        waiting = deque(enumerate(items))
        outcomes: list[Outcome] = [Outcome()] * len(items)

        def serve() -> None:
            while True:
                try:
                    place, item = waiting.popleft()
                except IndexError:
                    return
                outcomes[place] = self._outcome(pickle.dumps(item), timeout)

        with self._in_use:
            self._interrupted = False
            num_threads = min(self._num_workers, len(items))
            with ThreadPoolExecutor(max(num_threads, 1)) as threads:
                try:
                    for served in [threads.submit(serve) for _ in range(num_threads)]:
                        served.result()
                except BaseException:
                    waiting.clear()
                    with self._starting:
                        self._interrupted = True
                        self._end()  # the other threads wait for workers
                    raise
        return outcomes

    def close(self) -> None:
        """End all processes; `map` would start them again."""
        if self._owner == os.getpid():
            with self._in_use:
                self._end()

    def __del__(self) -> None:
        """End all processes."""
        if getattr(self, "_owner", None) == os.getpid():
            self._end()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._in_use, self._starting = threading.Lock(), threading.Lock()
        self._interrupted = False
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._idle: list[_Worker] = []

    def _outcome(self, item: bytes, timeout: float) -> Outcome:
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = self._fork()
        outcome = _ask(worker, item, timeout)
        if outcome.problem in ("memory", "died") and worker.has_served:
            self._kill(worker)
            worker = self._fork()
            outcome = _ask(worker, item, timeout)
        if outcome.problem in ("memory", "died", "time"):
            self._kill(worker)
        else:
            worker.has_served = True
            self._idle.append(worker)
        return outcome

    def _fork(self) -> _Worker:
        with self._starting:
            if self._interrupted:
                raise SandboxError("interrupted")
            for _ in range(2):  # anew if the process that forks has been killed, as for lack of memory
                control = self._start() if self._control is None else self._control
                ours, theirs = socket.socketpair()
                with theirs:
                    try:
                        socket.send_fds(control, [b"fork"], [theirs.fileno()])
                        worker = _Worker(int(control.recv(64)), ours)
                        break
                    except (OSError, ValueError):
                        ours.close()
                        self._end()
            else:
                raise SandboxError(f"the sandbox of {self._make} ended while it was starting a worker")
        hello = _receive(worker, lambda: False)
        if hello != {}:
            self._kill(worker)
            why = hello.get("unconfined", "it died") if hello else "it died"
            raise SandboxError(f"a process cannot be confined: {why}")
        return worker

    def _start(self) -> socket.socket:
        if not hasattr(socket, "send_fds"):
            raise SandboxError(f"processes cannot be confined on {sys.platform}; this needs Linux")
        ours, theirs = socket.socketpair()
        path = json.dumps([os.path.abspath(folder) for folder in sys.path])
        arguments = [path, self._make, str(os.getpid()), str(self._memory_bytes), str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in _KEPT if name in os.environ} | _SET,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is this process's to answer
            )
        self._control = ours
        ready = ours.recv(4096)
        if ready != b"ready":
            self._end()
            raise SandboxError(f"{self._make} cannot be used in a sandbox: {ready.decode() or 'it died'}")
        return ours

    def _kill(self, worker: _Worker) -> None:
        worker.socket.close()
        with self._starting:
            if self._control is not None:
                try:
                    self._control.sendall(b"kill%d" % worker.pid)
                    self._control.recv(64)
                except OSError:
                    self._end()

    def _end(self) -> None:
        process, self._process, control, self._control = self._process, None, self._control, None
        idle, self._idle = self._idle, []
        for worker in idle:
            worker.socket.close()
        if control is not None:
            control.close()
        if process is not None:
            process.kill()  # the kernel ends its workers
            process.wait()


def make_square() -> Callable[[Any], float]:
    """Return the function of `Sandbox`'s example."""

    def square(number: Any) -> float:
        if not isinstance(number, int | float):
            raise TypeError(f"{number!r} is no number")
        return number * number

    return square


def _ask(worker: _Worker, item: bytes, timeout: float) -> Outcome:
    began, cpu_began = time.monotonic(), _cpu_seconds(worker.pid)

    def is_late() -> bool:
        beyond = _cpu_seconds(worker.pid) - cpu_began > timeout
        return beyond or time.monotonic() - began > _CLOCK_FACTOR * timeout

    worker.socket.settimeout(_CLOCK_FACTOR * timeout)
    try:
        worker.socket.sendall(LENGTH.pack(len(item)) + item)
    except OSError:
        return Outcome(problem="died")
    worker.socket.settimeout(min(timeout, 0.1))
    answer = _receive(worker, is_late)
    if answer is None:
        return Outcome(problem="time" if is_late() else "died")
    return Outcome(answer.get("value"), answer.get("problem"))


def _receive(worker: _Worker, is_late: Callable[[], bool]) -> dict[str, Any] | None:
    """Return what a worker sends; None if it is late, has died, or sends something else than an answer."""
    received = bytearray()
    size = LENGTH.size
    while len(received) < size:
        try:
            part = worker.socket.recv(1 << 16)
        except TimeoutError:
            part = b""
            if not is_late():
                continue
        except OSError:
            return None
        if not part or is_late():
            return None
        received += part
        if len(received) >= LENGTH.size:
            size = LENGTH.size + LENGTH.unpack_from(received)[0]
            if size > LENGTH.size + LARGEST_RESULT:
                return None
    try:
        answer = json.loads(received[LENGTH.size :])
    except (ValueError, RecursionError):
        return None
    problem = answer.get("problem") if isinstance(answer, dict) else 0
    return answer if problem is None or isinstance(problem, str) else None


def _cpu_seconds(pid: int) -> float:
    """Return the processor time that another process has used; 0 if it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # how Linux numbers the clocks of processes
    except OSError:
        return 0.0


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
