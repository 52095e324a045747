"""Re-warming the learning rate against not doing so, and repeated cosines against the infinite schedule.

Run: python -m benchmarks.evidence.rewarming

First question: a run ended its cosine at a tenth of the peak; new data come. Re-warm (optimizer reset or
kept), stay at the low LR, or start from nothing? Second question: three data sets one after the other, in as
many steps: a cosine for each, or the infinite schedule with its anneal on the last one? Losses are in nats
above the entropy of the text's law.
"""

import copy
import statistics
from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence.common import (
    BATCH,
    TOKENS,
    HeldOut,
    Source,
    adamw,
    arguments,
    differences,
    interval,
    lrs_of,
    new_run,
    progress,
    shown,
    train,
    write,
)
from rewarm.schedules.published import constant, cosine, infinite, rewarmed

Row = dict[str, Any]

PEAK, LENGTH = 3e-3, 300

# Correlation of the log-probabilities of the new data's law with the old one's.
SHIFTS = {"none": 1.0, "weak": 0.9, "strong": 0.0}


def continued(seed: int, length: int, shifts: dict[str, float]) -> list[Row]:
    """One cosine run, and all ways to go on from it with new data."""
    old = Source(1000 + seed)
    held_out_old = HeldOut(old)
    begun = new_run(seed)
    train(*begun, old.batches(length, seed=2), lrs_of(cosine(), length, PEAK))
    ways = {
        "re-warm, optimizer reset": (lrs_of(rewarmed(), length, PEAK), "reset"),
        "re-warm, optimizer kept": (lrs_of(rewarmed(start=0.1), length, PEAK), "kept"),
        "re-warm to half the peak, reset": (lrs_of(rewarmed(), length, PEAK / 2), "reset"),
        "none: the last LR held, kept": (lrs_of(constant(), length, 0.1 * PEAK), "kept"),
        "from nothing": (lrs_of(cosine(), length, PEAK), "fresh"),
    }
    rows = []
    early = length // 10
    for shift, likeness in shifts.items():
        new = Source(2000 + seed, like=old, likeness=likeness)
        held_out_new = HeldOut(new)
        batches = new.batches(length, seed=4)
        for way, (lrs, optimizer) in ways.items():
            model, state = new_run(seed + 500) if optimizer == "fresh" else copy.deepcopy(begun)
            if optimizer == "reset":
                state = adamw(model)
            before = held_out_new.loss(model)
            train(model, state, batches, lrs[:early])
            rise = held_out_new.loss(model) - before
            train(model, state, batches[early:], lrs[early:])
            losses = {"old": held_out_old.loss(model), "new": held_out_new.loss(model), "first tenth": rise}
            rows.append({"shift": shift, "way": way, **losses})
    return rows


def three_data_sets(seed: int, length: int, shifts: dict[str, float]) -> list[Row]:
    """Three data sets in a row under several schedules of the same total length and peak."""
    total = 3 * length
    schedules = {
        "repeated cosine": rewarmed([length] * 3),
        "infinite, cosine": infinite(0.01, 0.3, 0.5, 0.55, 0.1),
        "infinite, inv-sqrt": infinite(0.01, 0.3, 0.5, 0.55, 0.1, shape="inv-sqrt"),
        "one cosine": cosine(),
    }
    rows = []
    for shift, likeness in shifts.items():
        first = Source(3000 + seed)
        sources = [first, *(Source(3000 + 97 * n + seed, like=first, likeness=likeness) for n in (1, 2))]
        held_out = [HeldOut(source) for source in sources]
        parts = [source.batches(length, seed=6 + n) for n, source in enumerate(sources)]
        for name, schedule in schedules.items():
            model, optimizer = new_run(seed)
            lrs = lrs_of(schedule, total, PEAK)
            when_new = []
            for number, part in enumerate(parts):
                train(model, optimizer, part, lrs[number * length : (number + 1) * length])
                when_new.append(held_out[number].loss(model))
            losses = [held.loss(model) for held in held_out]
            rows.append(
                {
                    "shift": shift,
                    "way": name,
                    "mean of all": statistics.fmean(losses),
                    "last": losses[-1],
                    "first": losses[0],
                    "each when new": statistics.fmean(when_new),
                }
            )
    return rows


def main() -> None:
    """Run and write."""
    args = arguments("re-warming the LR, and the infinite schedule", seeds=4).parse_args()
    length, shifts = (10, {"weak": 0.9}) if args.quick else (LENGTH, SHIFTS)
    found: dict[str, dict[tuple[str, str], list[Row]]] = {"one change": {}, "three sets": {}}
    for seed in progress(range(args.seeds), "seeds"):
        for question, run in zip(found, (continued, three_data_sets), strict=True):
            for row in run(seed, length, shifts):
                found[question].setdefault((row["shift"], row["way"]), []).append(row)
    rows = []
    for question, ways in found.items():
        for (shift, way), runs in ways.items():
            base = next(other for (of, _), other in ways.items() if of == shift)
            for measure in list(runs[0])[2:]:
                values, others = ([run[measure] for run in some] for some in (runs, base))
                against = differences(values, others) if runs is not base else "-"
                key = {"question": question, "shift": shift, "way": way, "measure": measure}
                rows.append({**key, "loss": shown(values), "against the first way": against, "seeds": values})
    settings = {
        "peak": PEAK,
        "steps per data set": length,
        "tokens per step": BATCH * TOKENS,
        "seeds": args.seeds,
        "likeness": shifts,
        "quick": args.quick,
    }
    write("rewarming", args.output, settings, rows, picture(list(shifts), *found.values()))


def picture(
    shifts: list[str], ones: dict[tuple[str, str], list[Row]], threes: dict[tuple[str, str], list[Row]]
) -> Figure:
    """Losses less those of the first way, seed by seed: one change of data above, three data sets below."""
    figure = Figure(figsize=(11.0, 7.0), layout="constrained")
    axes = figure.subplots(2, len(shifts), squeeze=False)
    for column, shift in enumerate(shifts):
        for row, found, measures in ((0, ones, ("old", "new")), (1, threes, ("mean of all", "last"))):
            ways = {way: runs for (of, way), runs in found.items() if of == shift}
            first, *others = ways
            plot = axes[row, column]
            for measure, color, raised in zip(measures, ("C0", "C1"), (-0.1, 0.1), strict=True):
                for place, way in enumerate(others):
                    pairs = zip(ways[way], ways[first], strict=True)
                    mean, half = interval([run[measure] - base[measure] for run, base in pairs])
                    label = measure if place == 0 else None
                    plot.errorbar(mean, place + raised, xerr=half, fmt="o", color=color, label=label)
            plot.axvline(0.0, color="gray", lw=0.8)
            plot.set_yticks(range(len(others)), others if column == 0 else [""] * len(others))
            plot.set(title=f"shift: {shift}", xlabel=f"loss less that of '{first}'")
            plot.set_ylim(-0.5, len(others) + 0.1)
            plot.legend(fontsize=8, loc="upper right", ncols=2)
            for text in (plot.title, plot.xaxis.label):
                text.set_fontsize(9)
    return figure


if __name__ == "__main__":
    main()
