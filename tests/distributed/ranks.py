"""Functions called on several ranks, in processes forked from one that has imported everything."""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.distributed.runs"])


def on_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, within_seconds: float = 240.0
) -> list[Any]:
    """Call a function of a module on every rank, as torchrun would; return what each rank returned.

    When one fails the others are ended, and the error says what that one said.
    """
    with tempfile.TemporaryDirectory(prefix="rewarm-ranks-") as name:
        folder, port = Path(name), _free_port()
        ranks = [
            _FORKS.Process(target=_work, args=(folder, rank, size, port, function, arguments))
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + within_seconds
        running = list(ranks)
        while running and not any(rank.exitcode for rank in ranks):
            if not wait([rank.sentinel for rank in running], deadline - time.monotonic()):
                break
            running = [rank for rank in running if rank.is_alive()]
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
        for rank, code in enumerate(codes):
            if code != 0 and (code is not None or not any(codes)):
                said = (folder / f"{rank}.txt").read_text(errors="replace")
                how = "hangs" if code is None else f"ended with {code}"
                raise AssertionError(f"rank {rank} of {size} {how}:\n{said}")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _work(
    folder: Path, rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", "FSDP")
    with (folder / f"{rank}.txt").open("wb") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(output.fileno(), stream.fileno())
    try:
        torch.save(function(*arguments), folder / f"{rank}.pt")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the first rank keeps the store that all need
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # Without a farewell to the other ranks, which may wait for this one.
        os._exit(1)
