"""The other side of `Sandbox`: a process that imports once, and forks confined workers.

The sandbox talks with the forking process over one socket, and with each worker over another. The forking
process handles nothing that a model wrote, and has no rights taken away; it ends, and its workers with it, as
soon as the process that started it is gone. A worker has no rights from its first item on.
"""

import ctypes
import gc
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from rewarm.rollouts.confinement import NoConfinementError, confine

LENGTH = struct.Struct("!I")
"""What precedes each message between sandbox and worker: its length in bytes."""

LARGEST_RESULT = 1 << 20  # bytes

_FORK, _KILL = b"fork", b"kill"
_WORK = 3  # the descriptor of a worker's socket
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main(make: str, parent: int, memory_bytes: int, descriptor: int) -> None:
    """Import, tell the sandbox that it worked, and fork workers until the sandbox is gone.

    Args:
        make: Dotted name of a function without arguments that imports what is needed and returns the function
            of one item.
        parent: Process id of the sandbox.
        memory_bytes: What a worker may take beyond what it begins with.
        descriptor: Of the socket to the sandbox.
    """
    # A terminal's and a scheduler's signals are the sandbox's to answer: it may still need scores.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory ends, this goes before the training does
    except OSError:
        pass
    control = socket.socket(fileno=descriptor)
    try:
        module, _, name = make.rpartition(".")
        function = getattr(import_module(module), name)()
    except Exception as error:
        control.sendall(f"{type(error).__name__}: {error}".encode()[:4000])
        return
    folders = _folders()
    gc.collect()
    gc.freeze()  # the workers share these pages
    control.sendall(b"ready")
    own, workers = os.getpid(), set[int]()
    while os.getppid() == parent:
        # Also looks whether the sandbox still lives: its other children may hold its end of the socket open.
        if not select.select([control], [], [], 1.0)[0]:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if message == _FORK:
            worker = os.fork()
            if worker == 0:
                _work(function, descriptors[0], folders, memory_bytes, own)
            os.close(descriptors[0])
            workers.add(worker)
            control.sendall(str(worker).encode())
        elif message.startswith(_KILL):
            _end(int(message.removeprefix(_KILL)), workers)
            control.sendall(b"ended")
        else:
            break
    for worker in list(workers):
        _end(worker, workers)


def _end(worker: int, workers: set[int]) -> None:
    if worker in workers:  # not yet waited for, so its id is still its own
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        workers.remove(worker)


def _folders() -> list[str]:
    """Return the folders of Python and of all packages imported so far, where later imports look."""
    packages = [folder for module in list(sys.modules.values()) for folder in getattr(module, "__path__", ())]
    system = ["/usr/lib", "/lib", "/lib64", "/dev/urandom", "/dev/null"]
    sites = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    return sorted({*packages, *sites, *system, os.path.dirname(os.__file__)})


def _work(
    function: Callable[[Any], Any], descriptor: int, folders: list[str], memory_bytes: int, parent: int
) -> None:
    """Answer items for the rest of this process's life."""
    try:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            return  # it died before that
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(descriptor, _WORK)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.closerange(_WORK + 1, os.sysconf("SC_OPEN_MAX"))
        for what, limit in (("NPROC", 0), ("FSIZE", 0), ("CORE", 0), ("NOFILE", 64), ("CPU", 3600)):
            _limit(getattr(resource, f"RLIMIT_{what}"), limit)
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bytes)
        try:
            confine(folders)
        except NoConfinementError as error:
            _write({"unconfined": str(error)})
        else:
            _write({})
            while (message := _read()) is not None:
                _write(_answer(function, message))
    finally:
        os._exit(0)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _answer(function: Callable[[Any], Any], message: bytes) -> dict[str, Any]:
    try:
        return {"value": function(pickle.loads(message))}
    except MemoryError:
        return {"problem": "memory"}
    except (
        BaseException
    ) as error:  # also SystemExit and what packages derive from BaseException for time limits
        return {"problem": f"{type(error).__name__}: {error}"[:4000]}


def _write(answer: dict[str, Any]) -> None:
    try:
        content = json.dumps(answer).encode()
    except (TypeError, ValueError, RecursionError, MemoryError):
        content = b'{"problem": "the result is no JSON"}'
    if len(content) > LARGEST_RESULT:
        content = b'{"problem": "the result is too long"}'
    content = LENGTH.pack(len(content)) + content
    while content:
        content = content[os.write(_WORK, content) :]


def _read() -> bytes | None:
    header = _read_exactly(LENGTH.size)
    return None if header is None else _read_exactly(LENGTH.unpack(header)[0])


def _read_exactly(size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(_WORK, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
