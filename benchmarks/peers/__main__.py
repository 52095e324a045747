"""Measures rewarm, TRL, LitGPT and a bare loop in turns, on the same work: make bench, make bench-gpu.

Each does the same work from the same folder of weights and rows, in a process of its own. Their losses are
compared first, then their target tokens per second (of dpo: pairs, of grpo: completions), repeat by repeat.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from benchmarks.peers.report import markdown, plot, table
from benchmarks.peers.work import CPU, GPU, Work, quick, write
from rewarm.functional.flops import matmul_parameters, peak_flops, training_flops_per_token
from rewarm.lightning_modules.policy import build_empty

HERE = Path(__file__).parent
# Relative, of a step's loss: bfloat16 with other kernels, and float32. Where rows are packed in another way,
# means over the run are compared, of other rows.
_CLOSE = 2e-2 if torch.cuda.is_available() else 2e-3
_CLOSE_MEAN = 1e-2

Result = dict[str, Any]


def systems(work: Work, peers: dict[str, str]) -> dict[str, list[str]]:
    """How each system that can do a work is started; `peers` has the Python of each."""
    commands = {"rewarm": [sys.executable, "-m", "benchmarks.peers.rewarm_worker"]}
    if "TRL" in peers:
        commands["TRL"] = [peers["TRL"], str(HERE / "trl_worker.py")]
    if "LitGPT" in peers and (work.method == "pretraining" or (work.method == "sft" and not work.packing)):
        commands["LitGPT"] = [peers["LitGPT"], str(HERE / "litgpt_worker.py")]
    if work.method in ("sft", "pretraining"):
        commands["bare loop"] = [sys.executable, "-m", "benchmarks.peers.loop_worker"]
    return commands


def run(command: list[str], job: Path) -> Result:
    """Run a worker that finds no cache of an earlier one; return what it printed last.

    Raises:
        ValueError: If it failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [*command, str(job)],
            env=os.environ | {"HF_DATASETS_CACHE": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def check_losses(work: Work, ours: Result, other: Result) -> None:
    """Compare the losses, step by step if the steps had the same rows; grpo samples other completions.

    Raises:
        ValueError: If they differ.
    """
    pairs = list(zip(ours["losses"], other["losses"], strict=True))
    close = _CLOSE
    if ours["targets"] != other["targets"]:
        pairs, close = [(statistics.fmean(ours["losses"]), statistics.fmean(other["losses"]))], _CLOSE_MEAN
    for mine, theirs in pairs:
        if work.method != "grpo" and not math.isclose(mine, theirs, rel_tol=close):
            raise ValueError(f"the losses differ, {theirs:.5f} and {mine:.5f} of rewarm")


def rate(work: Work, result: Result, cpu_time: bool) -> float:
    """Target tokens per second; pairs of dpo, completions of grpo."""
    seconds = result["cpu_seconds"] if cpu_time else sum(result["seconds"])
    done = sum(result["targets"][2:])
    return float(work.batch_size * work.steps if work.method in ("dpo", "grpo") else done) / seconds


def summary(
    work: Work, found: dict[str, list[Result]], flops_per_token: float, cpu_time: bool
) -> list[dict[str, Any]]:
    """Return a row for each system, from its results in each repeat."""
    rows: list[dict[str, Any]] = []
    for name, results in found.items():
        ours = found["rewarm"][: len(results)]
        ratios = [
            rate(work, a, cpu_time) / rate(work, b, cpu_time) for a, b in zip(ours, results, strict=True)
        ]
        seconds = sum(sum(result["seconds"]) for result in results)
        positions, tokens = (sum(sum(r[key][2:]) for r in results) for key in ("positions", "tokens"))
        phases: dict[str, float] = defaultdict(float)
        for result in results:
            for phase, value in result["phases"].items():
                phases[phase] += value / seconds
        rows.append(
            {
                "work": work.name,
                "method": work.method,
                "system": name,
                "rate": statistics.median(rate(work, result, cpu_time) for result in results),
                "tokens_per_second": tokens / seconds,
                "padding_share": 1.0 - tokens / positions if positions else None,
                "flops_per_second": tokens * flops_per_token / seconds if work.method != "grpo" else None,
                "rss_bytes": max(result["rss_bytes"] for result in results),
                "cuda_bytes": max(result.get("cuda_bytes", 0) for result in results),
                "startup_seconds": statistics.median(result["startup"] for result in results),
                "phases": phases,
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "results": results,
            }
        )
    return rows


def measure(
    work: Work, peers: dict[str, str], repeats: int, cpu_time: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each system, and what went wrong; a system that fails is left out from then on."""
    found: dict[str, list[Result]] = defaultdict(list)
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        job, attended = write(work, Path(folder) / "work")
        commands = systems(work, peers)
        for _ in range(repeats):
            for name, command in list(commands.items()):
                try:
                    result = run(command, job)
                    check_losses(work, found["rewarm"][-1] if found else result, result)
                except ValueError as problem:
                    problems.append(f"{work.name}, {name}: {problem}")
                    if name == "rewarm":
                        return [], problems
                    del commands[name]
                else:
                    found[name].append(result)
    model = build_empty(work.model)
    config = model.config
    width = config.num_attention_heads * config.head_dim
    layers = config.num_hidden_layers
    per_token = training_flops_per_token(matmul_parameters(model), layers, width, attended)
    return summary(work, found, per_token, cpu_time), problems


def installed(name: str, module: str, python: str | None, console: Console) -> dict[str, str]:
    """The Python of a peer by the peer's name, if it can import it; else say that it is left out."""
    if python is None:
        console.print(f"{name} is left out: its Python was not given")
    elif subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
        console.print(f"{name} is left out: {python} cannot import {module}")
    else:
        return {name: python}
    return {}


def option(text: str) -> tuple[str, Any]:
    """Return the name and the value of `name=value`; the value is JSON, or a string."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    """Measure what the command line asks for."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=__doc__, formatter_class=raw)
    lists = {"cpu": CPU, "gpu": GPU}
    default = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--peer-python", help="Python with TRL; may be this one")
    parser.add_argument("--litgpt-python", help="Python with LitGPT")
    parser.add_argument(
        "--works", choices=lists, default=default, help="which list; default: as there is a GPU"
    )
    parser.add_argument("--work", nargs="+", help="names of that list; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="of each system, in turns")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and two steps, to see that it runs"
    )
    parser.add_argument("--ours", nargs="+", type=option, default=[], help="name=value, for our modules")
    parser.add_argument("--trl", nargs="+", type=option, default=[], help="name=value, for TRL's config")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds, for a machine with other load"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables for README and RESULTS")
    parser.add_argument("--output", type=Path, help="JSON file to write, and beside it a plot")
    args = parser.parse_args()
    known = {work.name: work for work in lists[args.works]}
    if unknown := [name for name in args.work or [] if name not in known]:
        parser.error(f"--work {' '.join(unknown)}: known are {', '.join(known)}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    peers = installed("TRL", "trl", args.peer_python, console)
    peers |= installed("LitGPT", "litgpt", args.litgpt_python, console)
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "versions": versions,
        "peak_flops": peak,
        "settings": {key: str(value) for key, value in vars(args).items()},
        "rows": rows,
        "problems": problems,
    }
    for name in args.work or known:
        work = quick(known[name]) if args.quick else known[name]
        work = replace(work, ours=work.ours | dict(args.ours), trl=work.trl | dict(args.trl))
        more, wrong = measure(work, peers, 1 if args.quick else args.repeats, args.cpu_time)
        rows += more
        problems += wrong
        console.print(table(more, peak))
        for problem in wrong:
            console.print(problem, style="red", markup=False)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=1) + "\n")
            plot(rows, args.output.with_suffix(".png"))
    if args.markdown:
        print(markdown(rows, peak))
    if problems:
        raise SystemExit(f"{len(problems)} did not run, or did something else")


if __name__ == "__main__":
    main()
