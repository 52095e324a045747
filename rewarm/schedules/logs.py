"""What runs have logged, as curves and schedules: TensorBoard files, or the CSV files of CSVLogger."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from rewarm.schedules.law_fits import Curve
from rewarm.schedules.phases import Schedule
from rewarm.schedules.refinement import refined

Series = list[tuple[int, float]]


def read_curve(log: str, loss: str = "train/loss", lr: str = "lr", skip: int = 0) -> Curve:
    """Read the loss and the learning rate that a run logged.

    The LR between two logged steps is on the straight line between them.

    Args:
        log: A folder with TensorBoard files, or a CSV file with a column `step`, as CSVLogger writes it.
        loss: Name of the loss.
        lr: Name of the learning rate.
        skip: Leave out losses of the first so many steps.

    Returns:
        The curve up to the last loss.

    Raises:
        ValueError: If a name is not in the log, or too little is logged under it.
    """
    series = _read_log(log)
    losses = [(step, value) for step, value in _named(series, loss, log) if step > skip]
    if not losses:
        raise ValueError(f"{log}: {loss!r} has nothing after step {skip}")
    known = _named(series, lr, log)
    if len(known) < 2:
        raise ValueError(f"{log}: {lr!r} is logged only once, which tells no schedule")
    lrs = [max(0.0, value) for value in _on_lines(known, range(1, losses[-1][0] + 1))]
    return Curve(lrs, [step for step, _ in losses], [value for _, value in losses], warmup_of(lrs))


def refined_from_log(
    log: str, norm: Literal["l1", "l2"] = "l1", smoothing: float = 0.1, points: int = 200
) -> Schedule:
    """Refine a schedule from the gradient norms that `LRSchedule(gradient_norms=True)` logged.

    Args:
        log: A folder with TensorBoard files, or a CSV file with a column `step`.
        norm: "l1" for Adam, "l2" for SGD.
        smoothing: As for `rewarm.schedules.refinement.refined`.
        points: Likewise.

    Returns:
        The schedule.

    Raises:
        ValueError: If the log has no such norms, or an argument is out of range.
    """
    name = f"train/grad_norm_{norm}"
    known = [point for point in _named(_read_log(log), name, log) if math.isfinite(point[1])]
    if len(known) < 2:
        raise ValueError(f"{log}: {name!r} has {len(known)} finite values; there must be at least 2")
    even = (known[0][0] + n * (known[-1][0] - known[0][0]) / (len(known) - 1) for n in range(len(known)))
    return refined(_on_lines(known, even), norm, smoothing, points)


def warmup_of(lrs: Sequence[float]) -> int:
    """Return after how many steps a learning rate first is at its largest; 0 if that is the first step."""
    step = lrs.index(max(lrs)) + 1
    return step if step > 1 else 0


def read_scalars(folder: Path) -> dict[str, Series]:
    """Return what the TensorBoard files of a folder hold.

    Args:
        folder: Folder of the files; without any, nothing is found.

    Returns:
        (step, value) by name, steps ascending; of a step that was logged again the latest value.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    events.Reload()
    series = {}
    for name in events.Tags()["scalars"]:
        latest = {
            event.step: event.value for event in sorted(events.Scalars(name), key=lambda e: e.wall_time)
        }
        series[name] = sorted(latest.items())
    return series


def _named(series: dict[str, Series], name: str, log: str) -> Series:
    if name not in series:
        raise ValueError(f"{log}: there is no {name!r}; there are {', '.join(sorted(series))}")
    # Training logs count steps from 0, validation logs how many are done.
    done = 0 if name.startswith(("val/", "test/")) else 1
    return [(step + done, value) for step, value in series[name]]


def _read_log(log: str) -> dict[str, Series]:
    if Path(log).is_dir():
        series = read_scalars(Path(log))
        if not series:
            raise ValueError(f"{log}: there are no TensorBoard files in this folder")
        return series
    if not Path(log).is_file():
        raise ValueError(f"{log}: no such file or folder")
    found: dict[str, dict[int, float]] = {}
    with Path(log).open(newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            if not row.get("step"):
                raise ValueError(f"{log}:{line}: there is no `step`")
            for name, cell in row.items():
                if name != "step" and cell:
                    try:
                        found.setdefault(name, {})[int(row["step"])] = float(cell)
                    except ValueError as error:
                        raise ValueError(f"{log}:{line}: {name!r} is {cell!r}, no number") from error
    return {name: sorted(points.items()) for name, points in found.items()}


def _on_lines(points: Series, where: Iterable[float]) -> list[float]:
    """Values at ascending places, by straight lines through the points, the outer two lines prolonged."""
    found, place = [], 0
    for x in where:
        while place < len(points) - 2 and x > points[place + 1][0]:
            place += 1
        (x0, y0), (x1, y1) = points[place], points[place + 1]
        found.append(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    return found
