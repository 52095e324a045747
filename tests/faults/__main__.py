"""Breaks runs of all methods in all ways and counts those that end as if nothing had happened.

python -m tests.faults --output faults.json
"""

import argparse
import itertools
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.faults import faults
from tests.faults.faults import Outcome, Whole
from tests.faults.processes import PHASES


class Plan(NamedTuple):
    """A fault, the strategy of the runs that it meets, and how many of each method it meets."""

    fault: Callable[[Whole, Path, random.Random, int], Outcome | None]
    strategy: str
    times: int


PLANS = {
    "SIGKILL": Plan(faults.killed_once, "one process", 50),
    "SIGKILL again and again": Plan(faults.killed_often, "one process", 5),
    "SIGTERM": Plan(faults.terminated, "one process", 10),
    "newest checkpoint truncated": Plan(faults.truncated, "one process", 5),
    "newest checkpoint, one bit": Plan(faults.flipped, "one process", 5),
    "disk full": Plan(faults.disk_full, "one process", 5),
    "SIGKILL to a rank, DDP": Plan(faults.rank_killed, "ddp", 5),
    "SIGKILL to a rank, FSDP2": Plan(faults.rank_killed, "fsdp2", 5),
    "newest shards truncated": Plan(faults.truncated, "fsdp2", 2),
    "newest shards, one bit": Plan(faults.flipped, "fsdp2", 2),
}
_TRIES = 30  # to meet a run that is still going on


def main() -> None:
    """Run what the command line asks for, show tables, and exit with 1 if any run ended otherwise."""
    arguments, console = _arguments(), Console()
    if "disk full" in arguments.faults and not _may_mount():
        if subprocess.run(["unshare", "-rm", "true"], check=False).returncode == 0:
            os.execvp("unshare", ["unshare", "-rm", sys.executable, "-m", "tests.faults", *sys.argv[1:]])
        arguments.faults.remove("disk full")
        console.print("disk full: left out, this user may not mount a small disk")
    with tempfile.TemporaryDirectory(prefix="rewarm-faults-", dir=arguments.folder) as folder:
        os.environ |= {
            "HF_DATASETS_CACHE": f"{folder}/cache",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore:resource_tracker",  # of the semaphores that killed processes leave
        }
        rows, failures = _meet_all(Path(folder), arguments, console)
    for table in _tables(rows):
        console.print(table)
    for row in rows:
        failures += [f"{row['method']}, {row['fault']}: {difference}" for difference in row["differences"]]
    for failure in failures[:20]:
        console.print(failure[:2000], markup=False, highlight=False)
    if arguments.output is not None:
        found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
        found |= {"machine": platform.machine(), "cores": os.cpu_count(), "jobs": arguments.jobs}
        found |= {"seed": arguments.seed, "without": arguments.without, "rows": rows}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(bool(failures))


def _meet_all(
    folder: Path, arguments: argparse.Namespace, console: Console
) -> tuple[list[dict[str, Any]], list[str]]:
    """Let the faults meet runs of the methods; return what came of it, and what could not be run at all."""
    rows, failures = [], []
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    strategies = list(dict.fromkeys(PLANS[name].strategy for name in arguments.faults))
    with Progress(*columns, console=console) as progress:
        for method, strategy in itertools.product(arguments.methods, strategies):
            names = [name for name in arguments.faults if PLANS[name].strategy == strategy]
            try:
                whole = Whole(method, folder / f"{method} {strategy}", strategy, arguments.without)
                rows += [_meet(whole, name, arguments, progress) for name in names]
            except RuntimeError as error:
                failures.append(str(error))
    return rows, failures


def _meet(whole: Whole, name: str, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Let a fault meet runs of one method."""
    times = math.ceil(PLANS[name].times * arguments.share)
    task = progress.add_task(f"{whole.name}, {name}", total=times)
    fresh, lock = itertools.count(), threading.Lock()

    def meet(number: int) -> Outcome:
        for attempt in range(_TRIES):
            with lock:
                folder = whole.folder.with_name(str(next(fresh)))
            rng = random.Random(f"{arguments.seed}/{whole.name}/{name}/{number}/{attempt}")
            outcome = PLANS[name].fault(whole, folder, rng, number)
            shutil.rmtree(folder)
            if outcome is not None:
                progress.advance(task)
                return outcome
        raise RuntimeError(f"{whole.name}: {name} came too late {_TRIES} times")

    began = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as threads:
        outcomes = list(threads.map(meet, range(times)))
    unequal = [outcome for outcome in outcomes if outcome.differences]
    return {
        "method": whole.name,
        "fault": name,
        "runs": times,
        "equal": times - len(unequal),
        "phases": Counter(phase for outcome in outcomes for phase in outcome.phases),
        "partial": sum(outcome.partial for outcome in outcomes),
        "damaged": sum(len(outcome.messages) for outcome in outcomes),
        "seconds_undisturbed": round(whole.seconds, 2),
        "seconds_median": round(median(outcome.seconds for outcome in outcomes), 2),
        "seconds": round(time.monotonic() - began, 1),
        "survivor_seconds_most": round(max(outcome.survivor_seconds for outcome in outcomes), 2),
        "differences": [outcome.differences[0] for outcome in unequal],
    }


def _tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    names = sorted(dict.fromkeys(row["fault"] for row in rows), key=list(PLANS).index)
    found = {(row["fault"], row["method"]): row for row in rows}

    def cells(fault: str, show: Callable[[dict[str, Any]], str]) -> list[str]:
        return [show(found[fault, method]) if (fault, method) in found else "-" for method in methods]

    table = Table("ended equal", *methods, "half written", "damaged found", "seconds")
    for name in names:
        of = [row for row in rows if row["fault"] == name]
        sums = [f"{sum(row[column] for row in of):.0f}" for column in ("partial", "damaged", "seconds")]
        table.add_row(name, *cells(name, lambda row: f"{row['equal']} of {row['runs']}"), *sums)
    yield table
    for name in names:
        if name.startswith("SIG") and PLANS[name].strategy == "one process":
            table = Table(f"{name} in", *methods)
            for phase in PHASES:
                table.add_row(phase, *cells(name, lambda row, phase=phase: str(row["phases"][phase])))
            yield table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    methods = list(faults.runs.RUNS)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="default: all")
    parser.add_argument("--faults", nargs="+", choices=PLANS, default=list(PLANS), help="default: all")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the number of runs that each fault meets"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments; they still depend on the machine"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--folder", help="where the runs go (default: the folder for temporary files)")
    parser.add_argument("--without", default="", help="callback to leave out, to see what is counted then")
    return parser.parse_args()


def _may_mount() -> bool:
    try:
        with tempfile.TemporaryDirectory() as folder, faults.small_disk(Path(folder)):
            return True
    except (PermissionError, FileNotFoundError):
        return False


if __name__ == "__main__":
    main()
