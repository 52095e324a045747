"""Processes of a pipeline: how one is started, signalled and waited for, and how several ranks meet."""

import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# In a working folder that has a folder `rewarm`, such as a clone, the installed package is meant.
REWARM = (sys.executable, "-P", "-m", "rewarm")
"""How `rewarm` is started, whatever the working folder holds."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code of what SIGTERM has stopped, also of `rewarm.Preemption`."""

_POLL_SECONDS = 0.2
_ROLL_CALL_SECONDS = 300.0  # network file systems show new files up to a minute late


def launched_as() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, by what torchrun or srun has set.

    Example:
        >>> rank, ranks = launched_as()
        >>> 0 <= rank < ranks
        True
    """
    if "RANK" in os.environ:
        return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_NTASKS", "1"))
    return 0, 1


def environment_of(port: int | None) -> dict[str, str]:
    """Return the environment of a stage whose ranks are to meet at a port of rank 0's.

    A port for each stage: in the store that torchrun keeps for them all, ranks would find the addresses that
    those of the stage before have left.

    Example:
        >>> environment_of(29500)["MASTER_PORT"]
        '29500'
    """
    meeting = {} if port is None else {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return {**os.environ, **meeting}


def when_parent_ends(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # 1 is PR_SET_PDEATHSIG


def signals() -> list[int]:
    """Return what a training answers to.

    SLURM sends SIGUSR1 to all processes of a job that it is about to end.

    Example:
        >>> signal.SIGTERM in signals()
        True
    """
    return [signal.SIGTERM, signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [signal.SIGTERM]


def wait(
    command: list[str], environment: dict[str, str], numbers: list[int], meanwhile: Callable[[], None]
) -> tuple[int, bool]:
    """Run a command, passing some signals on; return its exit code, and whether SIGTERM was among them.

    Args:
        command: Program with its arguments.
        environment: Environment of the program.
        numbers: Signals that are passed on.
        meanwhile: Function that is called several times a second.

    Raises:
        BaseException: What `meanwhile` raises, once the program has ended.

    Example:
        >>> wait([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), [], lambda: None)
        (3, False)
    """
    process: subprocess.Popen[bytes] | None = None
    got: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        got.append(number)
        if process is not None:
            process.send_signal(number)

    with answering(dict.fromkeys(numbers, pass_on)):
        process = subprocess.Popen(
            command, env=environment, preexec_fn=lambda: when_parent_ends(signal.SIGKILL)
        )
        try:
            for number in got:  # while it was being started
                process.send_signal(number)
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                meanwhile()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return process.returncode, signal.SIGTERM in got


@contextmanager
def answering(handlers: Mapping[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Answer signals by some handlers for a while; not outside of the main thread, where none arrives.

    Example:
        >>> with answering({signal.SIGUSR2: ignore}):
        ...     signal.getsignal(signal.SIGUSR2) is ignore
        True
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def leave(number: int, frame: FrameType | None) -> None:
    """End this process as SIGTERM asks it to.

    Raises:
        SystemExit: With code 143.

    Example:
        >>> try:
        ...     leave(signal.SIGTERM, None)
        ... except SystemExit as end:
        ...     print(end.code)
        143
    """
    raise SystemExit(TERMINATED)


def ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing.

    Example:
        >>> ignore(signal.SIGTERM, None)
    """


def roll_call(folder: Path, ranks: int) -> list[str]:
    """Wait until the other ranks of this launch have put their names down; those of earlier ones are void.

    Raises:
        ValueError: If they are not there within five minutes.

    Example:
        >>> roll_call(Path("nowhere"), 1)
        []
    """
    for name in folder.glob(".rank-*"):
        name.unlink(missing_ok=True)
    began, told = time.monotonic(), False
    while len(names := [path.name for path in folder.glob(".rank-*")]) < ranks - 1:
        time.sleep(_POLL_SECONDS)
        here, seconds = f"{len(names)} of {ranks - 1} are here", time.monotonic() - began
        if seconds > _ROLL_CALL_SECONDS:
            raise ValueError(
                f"{folder}: after {seconds:.0f} s {here}: it must be on a file system that all nodes share"
            )
        if seconds > 10.0 and not told:
            say(0, f"waiting for the other ranks in {folder}: {here}")
            told = True
    return names


def free_port() -> int:
    """Return a port of this machine that nobody listens at.

    Example:
        >>> 0 < free_port() < 65536
        True
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def polls() -> Iterator[None]:
    """Go round as long as there is a rank 0 to wait for.

    Under torchrun the agent of rank 0 has a port open as long as it lives. SLURM ends all ranks when one has
    failed.

    Raises:
        ValueError: If that port cannot be reached any more.

    Example:
        >>> next(polls())
    """
    for count in itertools.count(1):
        yield
        time.sleep(_POLL_SECONDS)
        if count % 25 == 0 and "TORCHELASTIC_RUN_ID" in os.environ:
            host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
            try:
                socket.create_connection((host, int(port)), timeout=10.0).close()
            except OSError as error:
                raise ValueError(
                    f"rank 0 ({host}, port {port}) has ended or cannot be reached: {error}"
                ) from error


def say(rank: int, line: str) -> None:
    """Print a line, once for all ranks.

    Example:
        >>> say(0, "told once")
        told once
        >>> say(1, "not told again")
    """
    if rank == 0:
        print(line, flush=True)  # noqa: T201
