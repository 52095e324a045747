"""`rewarm schedule`: the learning rates of configs, drawn and tabulated."""

import csv as csv_format
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from jsonargparse import ArgumentParser

from rewarm.checks import above
from rewarm.commands.fit import read_config
from rewarm.curriculum.pacing import Pacing, pacing_curve
from rewarm.schedules.phases import Schedule

# Points of a curve whose positions are tokens.
_POINTS = 1000


@dataclass(frozen=True)
class LRCurve:
    """The learning rate along a run.

    Attributes:
        lrs: Learning rates at the positions every, 2 * every and so on.
        every: Distance of two positions.
        unit: "step" or "token".
        visible: What the data's pacing shows of their order at each position, as two shares; None without.

    Example:
        >>> LRCurve([0.1, 0.2]).unit
        'step'
    """

    lrs: list[float]
    every: int = 1
    unit: str = "step"
    visible: list[tuple[float, float]] | None = None


def schedule(
    config: Sequence[str],
    *,
    steps: int | None = None,
    lr: float | None = None,
    plot: str | None = None,
    csv: str | None = None,
) -> None:
    """Draw or tabulate the learning rates of some configs.

    There is one curve per config, or more where `multipliers` say so. Without a file to write, the table goes
    to the screen.

    Args:
        config: Config files of `rewarm fit`, all in one picture.
        steps: Optimizer steps from where the schedule begins, >= 1; without it, as the config has it.
        lr: Peak of the learning rate, or for a branch the LR of its checkpoint, > 0; without it, as the
            config or its checkpoint has it.
        plot: Picture to write; its suffix is the format, such as .png.
        csv: Table to write.

    Raises:
        ValueError: If a config has no `LRSchedule`, no learning rate or no number of steps.
    """
    given = {"steps": steps, "lr": lr}
    above(0, **{name: value for name, value in given.items() if value is not None})
    curves: dict[str, LRCurve] = {}
    stems = [Path(file).stem for file in config]
    for file, stem in zip(config, stems, strict=True):
        name = stem if stems.count(stem) == 1 else file
        for group, curve in config_curves(file, steps, lr).items():
            curves[name + (f" ({group})" if group else "")] = curve
    if plot is None and csv is None:
        _table(curves, _one_unit(curves), sys.stdout)
        return
    draw(curves, None if plot is None else Path(plot), None if csv is None else Path(csv))


def config_curves(config: str, steps: int | None = None, lr: float | None = None) -> dict[str, LRCurve]:
    """Find the learning rate that a config trains with.

    Args:
        config: Config file of `rewarm fit`.
        steps: As for `schedule`.
        lr: As for `schedule`.

    Returns:
        The curve under the name "", and one for each group named in `multipliers`.

    Raises:
        ValueError: As for `schedule`.
    """
    parsed = read_config(config)
    callbacks = parsed.trainer.callbacks or []
    found = [c.init_args for c in callbacks if c.class_path.rsplit(".", 1)[-1] == "LRSchedule"]
    if not found:
        raise ValueError(f"{config}: trainer.callbacks has no rewarm.LRSchedule")
    settings = found[0]
    # What comes before the schedule is needed only where it goes on from a checkpoint.
    goes_on = settings.mode != "resume" and parsed.ckpt_path is not None
    known = settings.total_steps or steps or settings.unit == "tokens"
    needs = goes_on and (not known or (settings.mode == "branch" and lr is None))
    step, checkpoint_lr = _read_checkpoint(parsed.ckpt_path) if needs else (0, None)
    if settings.mode == "branch" and lr is None and checkpoint_lr is None:
        raise ValueError(
            f"{config}: a branch begins with the LR of its checkpoint: set ckpt_path or give --lr"
        )
    peak = lr or (checkpoint_lr if settings.mode == "branch" else _peak(config, parsed.model.init_args))
    factor = _make(settings.schedule)
    if settings.unit == "tokens":
        total, unit = settings.total_tokens, "token"
        if total is None:
            raise ValueError(f"{config}: total_tokens is not set, so the schedule has no end to draw to")
    else:
        total, unit = steps or settings.total_steps or (parsed.trainer.max_steps or 0) - step, "step"
        if total < 1:
            raise ValueError(f"{config}: trainer.max_steps is not set, so give --steps")
    every = 1 if unit == "step" else max(1, total // _POINTS)
    try:
        lrs = [peak * factor(n, total) for n in range(every, total + 1, every)]
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error
    multipliers = {"": 1.0, **(settings.multipliers or {})}
    pacing = parsed.data.init_args.get("pacing") if parsed.get("data") else None
    # A pacing counts steps, and a run that rewarms or branches is a new one to it.
    shown = pacing_curve(_make(pacing, Pacing), total) if pacing and unit == "step" else None
    return {
        group: LRCurve([lr * multiplier for lr in lrs], every, unit, None if group else shown)
        for group, multiplier in multipliers.items()
    }


def _peak(config: str, model: Any) -> float:
    optimizer = model.get("optimizer")
    for section in (optimizer.get("init_args") if hasattr(optimizer, "get") else None, model):
        if section is not None and isinstance(section.get("lr"), float | int):
            if not section["lr"] > 0:
                raise ValueError(f"{config}: lr is {section['lr']}; it must be > 0")
            return float(section["lr"])
    raise ValueError(f"{config}: model.init_args has neither optimizer.init_args.lr nor lr, so give --lr")


def _make(section: Any, kind: Any = Schedule) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--made", type=kind)
    parsed = parser.parse_object({"made": section.as_dict()})
    # Versions of jsonargparse differ in the name.
    return getattr(parser, "instantiate", parser.instantiate_classes)(parsed).made


def _read_checkpoint(path: str) -> tuple[int, float]:
    """The steps of a checkpoint and the LR of its first parameter group."""
    import torch

    if not Path(path).is_file():
        raise ValueError(f"ckpt_path is {path!r}; it must be a file, or give --steps and --lr")
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not checkpoint.get("optimizer_states"):
        raise ValueError(f"ckpt_path is {path!r}, which has weights alone and no LR")
    return checkpoint["global_step"], float(checkpoint["optimizer_states"][0]["param_groups"][0]["lr"])


def draw(
    curves: Mapping[str, LRCurve | list[float]], plot: Path | None = None, csv: Path | None = None
) -> None:
    """Write learning-rate curves as a picture, as a table, or both. Folders are made as needed.

    The picture has positions on the x axis, the learning rate on the y axis and all curves in one frame. The
    table has a row per position and a column per curve, in full precision, with empty cells where a curve has
    no value.

    Args:
        curves: Curves by name; a list has the learning rate of every step, the first value that of step 1.
        plot: File for the picture; its suffix is the format (.png, .svg, .pdf). None for none.
        csv: File for the table. None for none.

    Raises:
        ValueError: If there is no curve, one has no value, their units differ, or there is no file to write.

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
    drawn = {name: curve if isinstance(curve, LRCurve) else LRCurve(curve) for name, curve in curves.items()}
    if not drawn or not all(curve.lrs for curve in drawn.values()):
        raise ValueError(
            f"curves have {[len(curve.lrs) for curve in drawn.values()]} values; there must be some, of one"
            " or more"
        )
    unit = _one_unit(drawn)
    if csv is not None:
        csv.parent.mkdir(parents=True, exist_ok=True)
        with csv.open("w", newline="") as file:
            _table(drawn, unit, file)
    if plot is not None:
        _picture(drawn, unit, plot)


def _one_unit(curves: Mapping[str, LRCurve]) -> str:
    units = {curve.unit for curve in curves.values()}
    if len(units) > 1:
        raise ValueError("curves are some in steps and some in tokens, which have no common axis")
    return units.pop()


def _table(curves: Mapping[str, LRCurve], unit: str, file: TextIO) -> None:
    rows = csv_format.writer(file, lineterminator="\n")
    rows.writerow([unit, *curves])
    cells: dict[int, dict[str, float]] = {}
    for name, curve in curves.items():
        for n, lr in enumerate(curve.lrs, start=1):
            cells.setdefault(n * curve.every, {})[name] = lr
    rows.writerows([n, *(cells[n].get(name) for name in curves)] for n in sorted(cells))


def _picture(curves: dict[str, LRCurve], unit: str, path: Path) -> None:
    # A figure of its own, without pyplot, leaves the caller's windows and settings alone and needs no
    # display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    paced = {name: curve.visible for name, curve in curves.items() if curve.visible is not None}
    figure = Figure(figsize=(8.0, 6.5 if paced else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, *below = figure.subplots(
        1 + bool(paced), sharex=True, height_ratios=[3, 1] if paced else None, squeeze=False
    )[:, 0]
    for name, curve in curves.items():
        marker = "o" if len(curve.lrs) == 1 else None  # a line through one point is invisible
        positions = range(curve.every, curve.every * len(curve.lrs) + 1, curve.every)
        axes.plot(positions, curve.lrs, label=name, marker=marker)
    lowest = below[0] if below else axes
    lowest.set(xlabel="optimizer step" if unit == "step" else "tokens")
    axes.set(ylabel="learning rate")
    for name, visible in paced.items():
        low, high = zip(*visible, strict=True)
        color = axes.lines[list(curves).index(name)].get_color()
        lowest.fill_between(range(1, len(visible) + 1), low, high, step="post", color=color, alpha=0.3)
        lowest.set(ylabel="visible share", ylim=(0, 1.02))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(curves), 4), frameon=False)
    figure.savefig(path, dpi=150)
