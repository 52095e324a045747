"""How full packed rows are, and how far packing moves an example from its place in the order.

Run: python -m benchmarks.evidence.packing_fill

Lengths are log-normal with the given median, cut at the row. They come in no order, as they do where length
and difficulty have nothing to do with each other; or by length, the worst case.
"""

import random
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence.common import arguments, interval, progress, shown, write
from rewarm.curriculum.packing import Packer

CAPACITY, EXAMPLES, SIGMA = 4096, 20_000, 0.8
MEDIANS = (2000, 900, 300)
OPEN = (1, 4, 16, 64)


def lengths(count: int, median: int, seed: int) -> list[int]:
    """Log-normal lengths in 1 to the row's."""
    rng = random.Random(f"{seed}-{median}")
    return [min(CAPACITY, max(1, round(median * rng.lognormvariate(0.0, SIGMA)))) for _ in range(count)]


def packed(drawn: Sequence[int], open_bins: int) -> tuple[float, int]:
    """The share of the rows' positions that is filled, and the most rows that an example is off its place.

    Its place is the row that the first example not before it in the order was put in.
    """
    packer = Packer(CAPACITY, open_bins)
    rows = [row for number, length in enumerate(drawn) for row in packer.add(number, length)]
    rows += packer.flush()
    row_of = [0] * len(drawn)
    for place, row in enumerate(rows):
        for number in row:
            row_of[number] = place
    if sorted(number for row in rows for number in row) != list(range(len(drawn))):
        raise ValueError("an example was lost or doubled")
    moved, furthest = 0, 0
    for place in row_of:
        moved, furthest = max(moved, furthest - place), max(furthest, place)
    return sum(drawn) / (len(rows) * CAPACITY), moved


def main() -> None:
    """Run and write."""
    args = arguments("fill of rows packed in order", seeds=5).parse_args()
    count = 1000 if args.quick else EXAMPLES
    rows: list[dict[str, Any]] = []
    works = [(median, order, bins) for median in MEDIANS for order in ("none", "by length") for bins in OPEN]
    for median, order, open_bins in progress(works, "packing"):
        fills, moves = [], []
        for seed in range(args.seeds):
            drawn = lengths(count, median, seed)
            fill, moved = packed(sorted(drawn) if order == "by length" else drawn, open_bins)
            fills.append(fill)
            moves.append(moved)
        rows.append(
            {
                "median length": median,
                "order of lengths": order,
                "open rows": open_bins,
                "fill": shown(fills),
                "most rows moved": max(moves),
                "unpacked": shown(
                    [sum(lengths(count, median, s)) / (count * CAPACITY) for s in range(args.seeds)]
                ),
                "fills": fills,
            }
        )
    settings = {"row": CAPACITY, "examples": count, "sigma": SIGMA, "seeds": args.seeds, "quick": args.quick}
    write("packing_fill", args.output, settings, rows, picture(rows))


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Fill against the number of open rows."""
    figure = Figure(figsize=(8.0, 3.8), layout="constrained")
    orders = list(dict.fromkeys(row["order of lengths"] for row in rows))
    for axes, order in zip(figure.subplots(1, len(orders), sharey=True), orders, strict=True):
        for median in MEDIANS:
            chosen = [r for r in rows if r["order of lengths"] == order and r["median length"] == median]
            means, halves = zip(*(interval(row["fills"]) for row in chosen), strict=True)
            axes.errorbar(OPEN, means, halves, fmt="o-", capsize=3, label=f"median {median}")
        axes.set(xscale="log", title=f"order of lengths: {order}", xlabel="open rows")
        axes.set_xticks(OPEN, OPEN)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("fill")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
