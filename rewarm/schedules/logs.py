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
    r"""Read the loss and the learning rate that a run logged.

    The LR between two logged steps is on the straight line between them.

    Args:
        log: A folder with TensorBoard files, or a CSV file with a column `step`, as CSVLogger writes it.
        loss: Name of the loss in the log.
        lr: Name of the learning rate in the log.
        skip: Number of steps at the start whose losses are left out.

    Returns:
        The curve up to the last loss.

    Raises:
        ValueError: If a name is not in the log, or too little is logged under it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     log = Path(folder, "metrics.csv")
        ...     _ = log.write_text("step,lr,train/loss\n0,0.5,4.0\n1,1.0,3.5\n2,0.5,3.25\n")
        ...     read_curve(str(log))
        Curve(lrs=[0.5, 1.0, 0.5], steps=[1, 2, 3], losses=[4.0, 3.5, 3.25], warmup=2)

    Source: ours.
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
    r"""Refine a schedule from the gradient norms that `LRSchedule(gradient_norms=True)` logged.

    Args:
        log: A folder with TensorBoard files, or a CSV file with a column `step`.
        norm: "l1" for Adam, "l2" for SGD.
        smoothing: Width of the median filter, see `rewarm.schedules.refinement.refined`.
        points: Number of straight pieces of the schedule, see there.

    Returns:
        The schedule.

    Raises:
        ValueError: If the log has no such norms, or an argument is out of range.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     log = Path(folder, "metrics.csv")
        ...     _ = log.write_text("step,train/grad_norm_l1\n0,1.0\n100,1.0\n")
        ...     schedule = refined_from_log(str(log), points=4)
        >>> [round(schedule(n, 100), 2) for n in (1, 50, 100)]
        [0.99, 0.5, 0.0]

    Source: Defazio et al. 2023, arXiv:2310.07831. Differs: see `rewarm.schedules.refinement.refined`.
    """
    name = f"train/grad_norm_{norm}"
    known = [point for point in _named(_read_log(log), name, log) if math.isfinite(point[1])]
    if len(known) < 2:
        raise ValueError(f"{log}: {name!r} has {len(known)} finite values; there must be at least 2")
    even = (known[0][0] + n * (known[-1][0] - known[0][0]) / (len(known) - 1) for n in range(len(known)))
    return refined(_on_lines(known, even), norm, smoothing, points)


def warmup_of(lrs: Sequence[float]) -> int:
    """Return after how many steps a learning rate first is at its largest; 0 if that is the first step.

    Raises:
        ValueError: If there is no learning rate.

    Example:
        >>> warmup_of([0.5, 1.0, 1.0, 0.5]), warmup_of([1.0, 0.5])
        (2, 0)

    Source: ours.
    """
    step = lrs.index(max(lrs)) + 1
    return step if step > 1 else 0


def read_scalars(folder: Path) -> dict[str, Series]:
    """Return what the TensorBoard files of a folder hold.

    Args:
        folder: Folder of the files; without any, nothing is found.

    Returns:
        (step, value) by name, steps ascending; of a step that was logged again the latest value.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> with TemporaryDirectory() as folder:
        ...     with SummaryWriter(folder) as writer:
        ...         writer.add_scalar("train/loss", 2.5, global_step=10)
        ...     read_scalars(Path(folder))
        {'train/loss': [(10, 2.5)]}

    Source: ours.
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
