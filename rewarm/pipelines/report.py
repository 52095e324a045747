"""The report of a pipeline: one table, one picture, one JSON file, from what the stages logged."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from rewarm.checkpoints.placing import put_in_place
from rewarm.functional.forgetting import loss_history
from rewarm.schedules.logs import Series, read_scalars


def write_report(output: Path, stages: list[str]) -> list[dict[str, Any]]:
    """Write `report.json`, `report.md` and `curves.png`, and print the table.

    Args:
        output: Folder of the pipeline.
        stages: Names of the stages that train, in order.

    Returns:
        One entry per stage: name, method, steps, wall seconds, tokens per second, losses by domain and how
        much of the best ones was forgotten, pass rate with its 95 % interval and by group, and the reward of
        the last rollouts.
    """
    logs = {stage: read_scalars(output / stage / "logs") for stage in stages}
    report = [_entry(output / stage, stage, logs[stage]) for stage in stages]
    forgetting = _forgetting(output, logs)
    for entry in report:
        entry["forgetting"] = forgetting[entry["name"]]
    with put_in_place(output / "report.json", replace=True) as place:
        place.write_text(json.dumps(report, indent=2) + "\n")
    rows = [_cells(entry) for entry in report]
    lines = [" | ".join(row) for row in (_HEADINGS, ["---"] * len(_HEADINGS), *rows)]
    groups = sorted(
        {group for entry in report for group in entry["pass_rate"].get("groups", {})}, key=_numeric
    )
    lines = [f"| {line} |" for line in lines]
    if groups:
        by_group = [["stage", *groups], ["---"] * (len(groups) + 1)]
        for entry in report:
            if rates := entry["pass_rate"].get("groups"):
                by_group.append(
                    [entry["name"], *(f"{100 * rates[g]:.1f} %" if g in rates else "" for g in groups)]
                )
        lines += ["", "Pass rate by group of prompts:", ""] + [f"| {' | '.join(row)} |" for row in by_group]
    forgotten = [cells for entry in report for cells in _forgetting_cells(entry)]
    if forgotten:
        lines += [
            "",
            "Validation loss by domain, its best since the first stage that led here, and its rise:",
            "",
        ]
        rule = ["---"] * len(_FORGETTING)
        lines += [f"| {' | '.join(cells)} |" for cells in (_FORGETTING, rule, *forgotten)]
    with put_in_place(output / "report.md", replace=True) as place:
        place.write_text("\n".join(["# Report", "", *lines, "", "![curves](curves.png)", ""]))
    _draw(output / "curves.png", logs, report)
    console = Console()
    # Not a terminal: a file has room.
    console = console if console.is_terminal else Console(width=150)
    console.print(_table(f"report: {output / 'report.md'}", _HEADINGS, rows))
    if forgotten:
        console.print(_table("forgetting", _FORGETTING, forgotten))
    return report


_HEADINGS = [
    "stage",
    "method",
    "steps",
    "seconds",
    "tokens/s",
    "train loss",
    "val loss by domain",
    "pass rate (95 %)",
    "other rates",
]


_FORGETTING = ["stage", "domain", "before", "best", "now", "forgotten"]


def _table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("stage", "method", "domain") else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _entry(folder: Path, stage: str, scalars: dict[str, Series]) -> dict[str, Any]:
    def last(name: str) -> float | None:
        return scalars[name][-1][1] if name in scalars else None

    def prefixed(prefix: str) -> dict[str, float]:
        return {
            name.removeprefix(prefix): points[-1][1]
            for name, points in scalars.items()
            if name.startswith(prefix)
        }

    rates: dict[str, Any] = {}
    for name in [match[1] for match in map(re.compile(r"val/(\w+)_low").fullmatch, scalars) if match]:
        interval = [last(f"val/{name}_low"), last(f"val/{name}_high")]
        rates[name] = {
            "mean": last(f"val/{name}"),
            "interval_95": interval,
            "groups": prefixed(f"val/{name}/"),
        }
    speed = [value for _, value in scalars.get("throughput/tokens_per_s", [])]
    rewards = [value for _, value in scalars.get("rollout/reward", [])][-10:]
    return {
        "name": stage,
        "method": _method(folder),
        "steps": _steps(scalars),
        "seconds": json.loads((folder / "stage.json").read_text())["seconds"],
        "tokens_per_s": sorted(speed)[len(speed) // 2] if speed else None,
        "train_loss": last("train/loss"),
        "losses": prefixed("val/loss/") or ({"": last("val/loss")} if "val/loss" in scalars else {}),
        "pass_rate": rates.pop("pass_rate", {}),
        "other_rates": rates,
        "rollout_reward_last_10": sum(rewards) / len(rewards) if rewards else None,
    }


def _steps(scalars: dict[str, Series]) -> int:
    """Optimizer steps taken: training logs count them from 0, validation logs how many are done."""
    last = {name: points[-1][0] for name, points in scalars.items()}
    trained = [step + 1 for name, step in last.items() if name.startswith("train/")]
    return max(trained + [step for name, step in last.items() if name.startswith("val/")], default=0)


def _method(folder: Path) -> str:
    return str(_model(folder)["class_path"]).rsplit(".", 1)[-1]


def _model(folder: Path) -> dict[str, Any]:
    model: dict[str, Any] = yaml.safe_load((folder / "logs" / "config.yaml").read_text())["model"]
    return model


def _forgetting(output: Path, logs: dict[str, dict[str, Series]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Compare each stage's losses by domain with those of the stages that its weights have been through."""
    passed: dict[str, dict[str, list[tuple[str, float]]]] = {}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for stage, scalars in logs.items():
        start = Path(str(_model(output / stage).get("init_args", {}).get("model"))).parent.resolve()
        (before,) = [name for name in passed if (output / name).resolve() == start] or [""]
        inherited = passed.get(before, {})
        own = {
            name.removeprefix("val/loss/"): [(stage, loss) for _, loss in points]
            for name, points in scalars.items()
            if name.startswith("val/loss/")
        }
        passed[stage] = {
            domain: [*inherited.get(domain, ()), *own.get(domain, ())] for domain in inherited | own
        }
        found[stage] = {}
        for domain, points in own.items():
            history = loss_history(passed[stage][domain])
            found[stage][domain] = {
                "before": (inherited.get(domain) or points[:1])[-1][1],
                "best": history.best[1],
                "best_in": history.best[0],
                "now": history.now[1],
                "forgotten": history.forgotten,
            }
    return found


def _forgetting_cells(entry: dict[str, Any]) -> list[list[str]]:
    return [
        [
            entry["name"],
            domain,
            f"{loss['before']:.3f}",
            f"{loss['best']:.3f} ({loss['best_in']})",
            f"{loss['now']:.3f}",
            f"{loss['forgotten']:.3f}",
        ]
        for domain, loss in entry["forgetting"].items()
    ]


def _cells(entry: dict[str, Any]) -> list[str]:
    rate = entry["pass_rate"]
    losses = ", ".join(f"{name} {loss:.3f}".strip() for name, loss in entry["losses"].items())
    shown = ""
    if rate:
        low, high = rate["interval_95"]
        shown = f"{100 * rate['mean']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    return [
        entry["name"],
        entry["method"],
        str(entry["steps"]),
        f"{entry['seconds']:.0f}",
        "" if entry["tokens_per_s"] is None else f"{entry['tokens_per_s']:.0f}",
        "" if entry["train_loss"] is None else f"{entry['train_loss']:.3f}",
        losses,
        shown,
        ", ".join(f"{name} {100 * other['mean']:.1f} %" for name, other in entry["other_rates"].items()),
    ]


def _numeric(text: str) -> tuple[float, str]:
    number = re.match(r"-?\d+(\.\d+)?", text)
    return (float(number[0]) if number else float("inf"), text)


def _draw(path: Path, logs: dict[str, dict[str, Series]], report: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    loss, rate, domains, reward = axes.flat
    start = 0
    for stage, scalars in logs.items():
        for axis, name in ((loss, "train/loss"), (rate, "lr"), (reward, "rollout/reward")):
            if name in scalars:
                steps, values = zip(*scalars[name], strict=True)
                axis.plot([start + step for step in steps], values, label=stage, linewidth=1)
        for name, points in scalars.items():
            if name.startswith("val/loss/"):
                steps, values = zip(*points, strict=True)
                label = f"{stage}: {name.removeprefix('val/loss/')}"
                domains.plot(
                    [start + step for step in steps], values, "o-", markersize=3, label=label, linewidth=1
                )
        start += max((points[-1][0] for points in scalars.values()), default=0) + 1
    loss.set(title="training loss", ylabel="nats per token", xlabel="optimizer step")
    rate.set(title="learning rate", xlabel="optimizer step", yscale="log")
    domains.set(title="validation loss by domain", ylabel="nats per token", xlabel="optimizer step")
    measured = [entry for entry in report if entry["pass_rate"]]
    if measured:
        reward.clear()
        means = [entry["pass_rate"]["mean"] for entry in measured]
        ends = [entry["pass_rate"]["interval_95"] for entry in measured]
        errors = [
            [m - low for m, (low, _) in zip(means, ends, strict=True)],
            [high - m for m, (_, high) in zip(means, ends, strict=True)],
        ]
        reward.bar(
            [entry["name"] for entry in measured], means, yerr=errors, capsize=4, color="tab:blue", alpha=0.7
        )
        reward.set(title="pass rate on held-out prompts, 95 % interval", ylim=(0, 1))
    else:
        reward.set(title="reward of rollouts", xlabel="optimizer step")
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
