"""The results as tables and as a plot."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

_COLUMNS = (
    "work",
    "system",
    "rate",
    "tokens/s",
    "padding",
    "peak memory",
    "GFLOP/s",
    "first step after",
    "where the time goes (%)",
    "rewarm is faster by",
)


def _cells(row: dict[str, Any], peak: float | None) -> list[str]:
    memory = f"{row['rss_bytes'] / 2**30:.2f} GiB"
    if row["cuda_bytes"]:
        memory = f"{row['cuda_bytes'] / 2**30:.1f} GiB on the GPU"
    flops = "-" if row["flops_per_second"] is None else f"{row['flops_per_second'] / 1e9:.0f}"
    if peak is not None and row["flops_per_second"] is not None:
        flops += f" (MFU {row['flops_per_second'] / peak:.1%})"
    unit = {"dpo": "pairs/s", "grpo": "completions/s"}.get(row["method"], "targets/s")
    padding = "-" if row["padding_share"] is None else f"{row['padding_share']:.0%}"
    phases = ", ".join(f"{name} {100 * row['phases'].get(name, 0.0):.1f}" for name in _phases(row))
    return [
        row["work"],
        row["system"],
        f"{row['rate']:,.{0 if row['rate'] >= 100 else 1}f} {unit}",
        f"{row['tokens_per_second']:,.0f}",
        padding,
        memory,
        flops,
        f"{row['startup_seconds']:.1f} s",
        phases,
        "" if row["system"] == "rewarm" else _ratio(row),
    ]


def _peers(rows: list[dict[str, Any]]) -> list[str]:
    found = {row["system"] for row in rows}
    return [peer for peer in ("TRL", "LitGPT", "bare loop") if peer in found]


def _phases(row: dict[str, Any]) -> list[str]:
    return ["generation" if row["method"] == "grpo" else "data", "fwd+bwd", "optimizer", "rest"]


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"


def table(rows: list[dict[str, Any]], peak: float | None = None) -> Table:
    """Return all of the results, for a terminal.

    Args:
        rows: As `benchmarks.peers.__main__.summary` returns them.
        peak: FLOP/s of the device, to divide by.
    """
    shown = Table(*_COLUMNS)
    for row in rows:
        shown.add_row(*_cells(row, peak))
    return shown


def markdown(rows: list[dict[str, Any]], peak: float | None = None) -> str:
    """Return a short table of how many times as fast rewarm is as each peer, and one of everything."""
    peers = _peers(rows)
    short = [["work", *(f"against {peer}" for peer in peers)]]
    for work in dict.fromkeys(row["work"] for row in rows):
        ratios = {row["system"]: _ratio(row) for row in rows if row["work"] == work}
        short.append([work, *(ratios.get(peer, "-") for peer in peers)])
    return _markdown(short) + "\n\n" + _markdown([list(_COLUMNS), *(_cells(row, peak) for row in rows)])


def _markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw how many times as fast rewarm is as each peer; the lines span the repeats."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    peers = _peers(rows)
    figure = Figure(figsize=(8.0, 1.2 + 0.7 * len(works)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(len(peers), 1)
    for number, peer in enumerate(peers):
        shown = [row for row in rows if row["system"] == peer]
        ratios = [row["ratio"] for row in shown]
        places = [works.index(row["work"]) + (number - (len(peers) - 1) / 2) * height for row in shown]
        below = [row["ratio"] - min(row["ratios"]) for row in shown]
        above = [max(row["ratios"]) - row["ratio"] for row in shown]
        axes.barh(places, ratios, 0.9 * height, xerr=(below, above), capsize=2, label=f"than {peer}")
        for place, row in zip(places, shown, strict=True):
            axes.annotate(f"{row['ratio']:.2f}", (0.03, place), va="center", color="white", size=8)
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.set_yticks(range(len(works)), works)
    axes.invert_yaxis()
    axes.set_xlabel("rewarm is faster by (median; lines: least and most of the repeats)")
    if peers:
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
