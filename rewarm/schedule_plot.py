"""Draws learning-rate schedules."""

import csv as csv_format
from itertools import zip_longest
from pathlib import Path


def draw(curves: dict[str, list[float]], plot: Path | None = None, csv: Path | None = None) -> None:
    """Write learning-rate curves as a picture, as a table, or both. Folders are made as needed.

    The picture has steps on the x axis, the learning rate on the y axis and all curves in one frame. The
    table has a row per step and a column per curve, in full precision, with empty cells beyond the end of a
    shorter curve.

    Args:
        curves: Learning rate of every step by name of the curve, the first value being that of step 1.
        plot: File for the picture; its suffix is the format (.png, .svg, .pdf). None for none.
        csv: File for the table. None for none.

    Raises:
        ValueError: If there is no curve, one has no step, or there is no file to write.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "lr.csv")
        >>> draw({"long": [0.5, 1.0], "short": [0.25]}, csv=path)
        >>> print(path.read_text(), end="")
        step,long,short
        1,0.5,0.25
        2,1.0,

    Source: ours. Differs: nothing.
    """
    if plot is None and csv is None:
        raise ValueError("plot and csv are None; at least one must be a file to write")
    if not curves or not all(curves.values()):
        raise ValueError(
            f"curves have {[len(lrs) for lrs in curves.values()]} steps; there must be some, of one or more"
        )
    if csv is not None:
        csv.parent.mkdir(parents=True, exist_ok=True)
        with csv.open("w", newline="") as file:
            rows = csv_format.writer(file, lineterminator="\n")
            rows.writerow(["step", *curves])
            rows.writerows([step, *lrs] for step, lrs in enumerate(zip_longest(*curves.values()), start=1))
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        _picture(curves, plot)


def _picture(curves: dict[str, list[float]], path: Path) -> None:
    # A figure of its own, without pyplot, leaves the caller's windows and settings alone and needs no
    # display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, lrs in curves.items():
        marker = "o" if len(lrs) == 1 else None  # a line through one point is invisible
        axes.plot(range(1, len(lrs) + 1), lrs, label=name, marker=marker)
    axes.set(xlabel="optimizer step", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(curves), 4), frameon=False)
    figure.savefig(path, dpi=150)
