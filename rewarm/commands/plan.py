"""Plans for the command line: learning rate and batch size, loss of another schedule, split of a budget."""

import csv
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from rewarm.schedules.law_fits import (
    Curve,
    Law,
    fit_annealing_law,
    fit_error,
    fit_multi_power_law,
    predict_loss,
    relative_errors,
)
from rewarm.schedules.phases import Schedule
from rewarm.schedules.refined import refined
from rewarm.schedules.rules import sft_share, split_budget, step_law_batch_tokens, step_law_lr

Series = list[tuple[int, float]]


def plan_lr(parameters: float, tokens: float, sequence_length: int | None = None) -> None:
    """Print the Step Law's peak learning rate and batch size.

    Args:
        parameters: Of the model, without embeddings.
        tokens: To train on.
        sequence_length: Tokens per sequence, >= 1, to tell the batch in sequences too.

    Raises:
        ValueError: If an argument is out of range.
    """
    if sequence_length is not None and sequence_length < 1:
        raise ValueError(f"sequence_length is {sequence_length}; it must be >= 1")
    batch = step_law_batch_tokens(tokens)
    sequences = "" if sequence_length is None else f" ({batch / sequence_length:,.1f} sequences)"
    sys.stdout.write(
        f"peak learning rate {step_law_lr(parameters, tokens):.3e}\n"
        f"batch {batch:,.0f} tokens{sequences}, {tokens / batch:,.0f} steps\n"
        "Step Law, arXiv:2503.04715: for pretraining from scratch with AdamW and a cosine down to 1e-5; not"
        " for continued pretraining or fine-tuning.\n"
    )


def plan_budget(
    budget: float, share: float | None = None, sft_cost: float = 1.0, preference_cost: float = 1.0
) -> None:
    """Print how many supervised examples and preference pairs to buy.

    Args:
        budget: What may be spent, in any currency.
        share: Part of it for supervised examples, in [0, 1]. None: that of `sft_share`.
        sft_cost: Price of a supervised example.
        preference_cost: Price of a preference pair.

    Raises:
        ValueError: If an argument is out of range.
    """
    split_budget(budget, 1.0, sft_cost, preference_cost)  # refuses what cannot be
    chosen = sft_share(budget / sft_cost) if share is None else share
    examples, pairs = split_budget(budget, chosen, sft_cost, preference_cost)
    sys.stdout.write(
        f"supervised examples {examples:,} ({chosen:.0%} of the budget), preference pairs {pairs:,}\n"
    )
    if share is None:
        sys.stdout.write(
            "Balancing the Budget, arXiv:2502.11284: below 1,000 examples supervised alone is best; above, a"
            " mixture with more preference pairs the larger the budget; never none supervised. The numbers in"
            " between are ours. Found with LoRA on seven base models of 1B to 14B, four tasks, 100 to 10,000"
            " examples.\n"
        )


def plan_loss(
    logs: Sequence[str],
    configs: Sequence[str] = (),
    loss: str = "train/loss",
    lr: str = "lr",
    law: Literal["annealing", "multi-power"] = "annealing",
    decay: float | None = None,
    skip: int = 0,
    steps: int | None = None,
    held_out: Sequence[str] = (),
) -> None:
    """Fit a law to the logged curves of some runs, and print what it says of other schedules.

    Args:
        logs: A log of each run: a folder with TensorBoard files, or a CSV file with a column `step`.
        configs: Configs of `rewarm fit` whose last loss is asked for.
        loss: Name of the loss in the logs.
        lr: Name of the learning rate in the logs.
        law: "annealing" or "multi-power".
        decay: lambda of the annealing law; None chooses it.
        skip: Leave out losses of the first so many steps, >= 0.
        steps: Optimizer steps of the configs; None: as they have it.
        held_out: Logs of runs that are not fitted, to see how far off the law is.

    Raises:
        ValueError: If a log lacks what is asked of it, or the curves don't determine the law.
    """
    from rewarm.commands.schedule import config_curves

    if law not in ("annealing", "multi-power"):
        raise ValueError(f"law is {law!r}; it must be 'annealing' or 'multi-power'")
    if law == "multi-power" and decay is not None:
        raise ValueError(f"decay is {decay}, but law is 'multi-power', which has none")
    if skip < 0:
        raise ValueError(f"skip is {skip}; it must be >= 0")
    wanted = {}
    for config in configs:
        for group, curve in config_curves(config, steps).items():
            if curve.unit != "step":
                raise ValueError(f"{config}: the schedule is in tokens, but the laws are in steps")
            if not group:
                wanted[config] = curve.lrs
    curves = [read_curve(log, loss, lr, skip) for log in logs]
    others = {log: read_curve(log, loss, lr, skip) for log in held_out}
    fitted: Law = fit_annealing_law(curves, decay) if law == "annealing" else fit_multi_power_law(curves)
    sys.stdout.write(f"{fitted}\non the fitted curves {fit_error(fitted, curves):.2%} off\n")
    for log, other in others.items():
        end = float(relative_errors(fitted, other)[-1])
        sys.stdout.write(f"{log}: {fit_error(fitted, [other]):.2%} off, at its end {end:+.2%}\n")
    for config, lrs in wanted.items():
        found = predict_loss(fitted, curves, lrs, warmup_of(lrs))
        sys.stdout.write(f"{config}: {loss} {found.loss:.4f} +- {found.error:.4f} after {len(lrs)} steps\n")


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
        smoothing: As for `rewarm.schedules.refined.refined`.
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


def _named(series: dict[str, Series], name: str, log: str) -> Series:
    if name not in series:
        raise ValueError(f"{log}: there is no {name!r}; there are {', '.join(sorted(series))}")
    # Training logs count steps from 0, validation logs how many are done.
    done = 0 if name.startswith(("val/", "test/")) else 1
    return [(step + done, value) for step, value in series[name]]


def _read_log(log: str) -> dict[str, Series]:
    if Path(log).is_dir():
        from rewarm.pipelines.report import read_scalars

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
