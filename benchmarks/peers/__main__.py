"""Measures our methods, TRL and bare loops in turns, on the same work: make bench, make bench-gpu.

It first checks that the systems have the same losses, then compares target tokens per second (of dpo: pairs,
of grpo: completions), repeat by repeat.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.peers.work import CPU, GPU, Work, write

HERE = Path(__file__).parent
_CLOSE = 2e-3  # relative; TRL logs four digits


def systems(work: Work, peer: str) -> dict[str, list[str]]:
    """How each system that can do a work is started."""
    commands = {
        "rewarm": [sys.executable, "-m", "benchmarks.peers.rewarm_worker"],
        "TRL": [peer, str(HERE / "trl_worker.py")],
        "bare loop": [sys.executable, "-m", "benchmarks.peers.loop_worker"],
    }
    if work.method in ("dpo", "grpo"):
        del commands["bare loop"]
    return commands


def run(command: list[str], job: Path) -> dict[str, Any]:
    """Run a worker; return what it printed last."""
    done = subprocess.run([*command, str(job)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def mean_loss(result: dict[str, Any]) -> float:
    """Loss per target over the whole run."""
    pairs = list(zip(result["losses"], result["targets"], strict=True))
    return sum(loss * targets for loss, targets in pairs) / sum(targets for _, targets in pairs)


def check_losses(work: Work, results: dict[str, dict[str, Any]]) -> None:
    """End with an error if the systems did not do the same."""
    if work.method == "grpo":
        return  # they sample with other random numbers
    ours = results["rewarm"]
    for name, other in results.items():
        if work.packing:
            pairs = [(mean_loss(ours), mean_loss(other))]
        else:
            pairs = list(zip(ours["losses"], other["losses"], strict=True))
        for mine, theirs in pairs:
            if not math.isclose(mine, theirs, rel_tol=_CLOSE * (5 if work.packing else 1)):
                raise SystemExit(f"{work.name}: the losses differ, {mine} of rewarm and {theirs} of {name}")


def rate(work: Work, result: dict[str, Any]) -> float:
    """Target tokens per second; pairs of dpo, completions of grpo."""
    if work.method in ("dpo", "grpo"):
        return work.batch_size / statistics.median(result["seconds"])
    # Packed steps differ in their targets.
    return sum(result["targets"][2:]) / sum(result["seconds"])


def measure(work: Work, peer: str, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each system."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        job = write(work, Path(folder) / "work")
        for _ in range(repeats):
            results = {name: run(command, job) for name, command in systems(work, peer).items()}
            check_losses(work, results)
            for name, result in results.items():
                found[name].append(result)
    rows = []
    for name, results in found.items():
        ratios = [
            rate(work, ours) / rate(work, other) for ours, other in zip(found["rewarm"], results, strict=True)
        ]
        tokens, targets = (sum(sum(r[k][2:]) for r in results) for k in ("tokens", "targets"))
        seconds = sum(sum(result["seconds"]) for result in results)
        rows.append(
            {
                "work": work.name,
                "system": name,
                "rate": statistics.median(rate(work, result) for result in results),
                "all_tokens_per_second": tokens / seconds if tokens else None,
                "target_share": targets / tokens if tokens and targets else None,
                "peak_bytes": max(result["peak_bytes"] for result in results),
                "startup": statistics.median(result["startup"] for result in results),
                "rewarm_is_faster_by": statistics.median(ratios),
                "ratios": ratios,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Show the rows."""
    columns = (
        "work",
        "system",
        "rate",
        "tokens/s",
        "peak GiB",
        "first step after",
        "rewarm is faster by",
    )
    shown = Table(*columns)
    for row in rows:
        tokens = row["all_tokens_per_second"]
        shown.add_row(
            row["work"],
            row["system"],
            f"{row['rate']:.0f}",
            "-" if tokens is None else f"{tokens:.0f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['startup']:.1f} s",
            f"{row['rewarm_is_faster_by']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})",
        )
    return shown


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    works = GPU if torch.cuda.is_available() else CPU
    names = [work.name for work in works]
    parser.add_argument("--peer-python", required=True, help="Python of the environment with TRL")
    parser.add_argument("--work", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--repeats", type=int, default=3, help="of each system, in turns")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rows = []
    for work in works:
        if work.name in args.work:
            rows += measure(work, args.peer_python, args.repeats)
            Console().print(table([row for row in rows if row["work"] == work.name]))
    if args.output is not None:
        found = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": platform.machine(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "threads": torch.get_num_threads(),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "trl": "1.16.0",
            },
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    Console().print(table(rows))


if __name__ == "__main__":
    main()
