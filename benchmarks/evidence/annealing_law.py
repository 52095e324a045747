"""How far off the annealing law and the multi-power law are on schedules that they were not fitted to.

Run: python -m benchmarks.evidence.annealing_law

Both laws are fitted to the validation curves of a cosine and a constant run, and predict those of other
schedules, some of them longer. The error is relative to the measured loss: over the curve after the first
tenth, and at its end. As a measure for it: the gap between the ends of the fitted curves, and the error of
saying that the loss ends where the cosine's did.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.evidence.common import (
    BATCH,
    TOKENS,
    Source,
    arguments,
    evaluate,
    lrs_of,
    new_run,
    progress,
    shown,
    train,
    write,
)
from rewarm.schedules.law_fits import (
    Curve,
    Law,
    fit_annealing_law,
    fit_error,
    fit_multi_power_law,
    relative_errors,
)
from rewarm.schedules.phases import Phase, Schedule
from rewarm.schedules.published import constant, cosine, linear, wsd, wsds

PEAK, WARMUP, STEPS, EVERY = 3e-3, 20, 800, 20


def schedules(steps: int) -> tuple[dict[str, tuple[Schedule, int]], dict[str, tuple[Schedule, int]]]:
    """Those that the laws are fitted to, and those held out, each with its length."""
    half = steps // 2
    drop = Schedule(
        [Phase("linear", WARMUP, 1.0), Phase("constant", half), Phase("jump", 0, 0.3), Phase("constant")], 0.0
    )
    fitted = {"cosine": (cosine(WARMUP, 0.1), steps), "constant": (constant(WARMUP), steps)}
    held_out = {
        "WSD, 1-sqrt over a fifth": (wsd(WARMUP, 0.2, 0.0), steps),
        "WSD, twice as long": (wsd(WARMUP, 0.2, 0.1), 2 * steps),
        "linear to 0": (linear(WARMUP, 0.0), steps),
        "sudden drop to 0.3": (drop, steps),
        "WSD-S, two periods": (wsds([half, steps - half], WARMUP, 0.2), steps),
    }
    return fitted, held_out


def measured(
    seed: int, schedule: Schedule, steps: int, every: int, batches: Sequence[Tensor], held_out: Tensor
) -> Curve:
    """Validation curve of a run."""
    model, optimizer = new_run(seed)
    lrs, at, losses = lrs_of(schedule, steps, PEAK), [], []
    for done in range(0, steps, every):
        train(model, optimizer, batches[done : done + every], lrs[done : done + every])
        at.append(min(done + every, steps))
        losses.append(evaluate(model, held_out))
    # Early on, the loss is not yet what the laws are about.
    kept = [place for place, step in enumerate(at) if step > steps // 10]
    return Curve(lrs, [at[place] for place in kept], [losses[place] for place in kept], WARMUP)


def main() -> None:
    """Run and write."""
    args = arguments("prediction errors of the laws for the loss under annealing", seeds=4).parse_args()
    steps, every, sequences = (60, 5, 16) if args.quick else (STEPS, EVERY, 128)
    fitted_to, held_out = schedules(steps)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    fits: dict[str, list[float]] = {}
    gaps, drawn = [], {}
    for seed in progress(range(args.seeds), "seeds"):
        source = Source(5000 + seed)
        batches, validation = source.batches(2 * steps, seed=2), source.sample(sequences, TOKENS + 1, seed=1)
        curves = {
            name: measured(seed, schedule, length, every, batches, validation)
            for name, (schedule, length) in {**fitted_to, **held_out}.items()
        }
        known = [curves[name] for name in fitted_to]
        gaps.append(known[1].losses[-1] / known[0].losses[-1] - 1)
        for name, fit in (("annealing", fit_annealing), ("multi-power", fit_multi_power_law)):
            began = time.perf_counter()
            law = fit(known)
            fits.setdefault(f"{name}: seconds", []).append(time.perf_counter() - began)
            fits.setdefault(f"{name}: error on the fitted curves", []).append(fit_error(law, known))
            for other in held_out:
                end = abs(float(relative_errors(law, curves[other])[-1]))
                found.setdefault((other, name), []).append((fit_error(law, [curves[other]]), end))
                drawn[other, name] = law
        for other in held_out:
            naive = [known[0].losses[-1] / loss - 1 for loss in curves[other].losses]
            found.setdefault((other, "where the cosine ended"), []).append((abs(naive[-1]), abs(naive[-1])))
    rows: list[dict[str, Any]] = [
        {
            "held out": other,
            "prediction": name,
            "error at the end, %": shown([100 * end for _, end in errors], 2),
            "over the curve, %": "-" if "cosine" in name else shown([100 * whole for whole, _ in errors], 2),
            "ends": [end for _, end in errors],
        }
        for (other, name), errors in found.items()
    ]
    settings = {
        "peak": PEAK,
        "steps": steps,
        "warmup": WARMUP,
        "tokens per step": BATCH * TOKENS,
        "fitted to": list(fitted_to),
        "constant above cosine at the end": shown(gaps, 4),
        **{name: statistics.fmean(values) for name, values in fits.items()},
        "seeds": args.seeds,
        "quick": args.quick,
    }
    write("annealing_law", args.output, settings, rows, picture(curves, drawn))


def fit_annealing(curves: Sequence[Curve]) -> Law:
    """The annealing law with the best lambda: the paper's 0.999 is for runs of many thousand steps."""
    return fit_annealing_law(curves, decay=None)


def picture(curves: dict[str, Curve], laws: dict[tuple[str, str], Law]) -> Figure:
    """Measured and predicted curves of the last seed."""
    figure = Figure(figsize=(12.0, 4.0), layout="constrained")
    names = list(dict.fromkeys(name for name, _ in laws))
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        curve = curves[name]
        axes.plot(curve.steps, curve.losses, "k.", ms=4, label="measured")
        for law in ("annealing", "multi-power"):
            predicted = laws[name, law](curve.lrs, curve.warmup, curve.steps)
            axes.plot(curve.steps, predicted, label=law)
        axes.set(title=name, xlabel="step")
        axes.title.set_fontsize(9)
    figure.axes[0].set_ylabel("validation loss, nats")
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    main()
