"""Branches of one stable run against a separately tuned cosine for each budget, and WSD-S along one run.

Run: python -m benchmarks.evidence.branches

A model is wanted after each of four budgets. Cosine: a run of its own for each, with the best of four
peaks for each. WSD: one stable run, from which a branch decays over the last fifth of each budget; one peak
for all, as there is one run. WSD-S: one run that decays at each budget and jumps back. Losses are in nats
above the entropy of the text's law.
"""

import copy
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.evidence.common import (
    BATCH,
    TOKENS,
    HeldOut,
    Source,
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
from rewarm.schedules.published import branch, constant, cosine, wsds

PEAKS, BUDGETS, DECAY, WARMUP = (1e-3, 2e-3, 4e-3, 8e-3), (150, 300, 600, 1200), 0.2, 15
WAYS = ("cosine", "WSD", "WSD-S")


def cosines(
    seed: int, peak: float, budgets: list[int], batches: Sequence[Tensor], held: HeldOut
) -> list[float]:
    """Losses at the budgets, each after a run of its own."""
    losses = []
    for budget in budgets:
        model, optimizer = new_run(seed)
        train(model, optimizer, batches[:budget], lrs_of(cosine(WARMUP, 0.0), budget, peak))
        losses.append(held.loss(model))
    return losses


def branches(
    seed: int, peak: float, budgets: list[int], batches: Sequence[Tensor], held: HeldOut
) -> list[float]:
    """Losses at the budgets, each after a branch of one stable run."""
    model, optimizer = new_run(seed)
    lrs = lrs_of(constant(WARMUP), budgets[-1], peak)
    done, losses = 0, []
    for budget in budgets:
        start = round((1 - DECAY) * budget)
        train(model, optimizer, batches[done:start], lrs[done:start])
        done = start
        decayed, its_optimizer = copy.deepcopy((model, optimizer))
        train(decayed, its_optimizer, batches[start:budget], lrs_of(branch(), budget - start, peak))
        losses.append(held.loss(decayed))
    return losses


def one_run(
    seed: int, peak: float, budgets: list[int], batches: Sequence[Tensor], held: HeldOut
) -> list[float]:
    """Losses at the budgets, along one run that decays at each and jumps back to the peak."""
    model, optimizer = new_run(seed)
    periods = [after - before for before, after in zip([0, *budgets], budgets, strict=False)]
    lrs = lrs_of(wsds(periods, WARMUP, DECAY, end=0.1), budgets[-1], peak)
    done, losses = 0, []
    for budget in budgets:
        train(model, optimizer, batches[done:budget], lrs[done:budget])
        done = budget
        losses.append(held.loss(model))
    return losses


def main() -> None:
    """Run and write."""
    args = arguments("branches of a stable run against separately tuned cosines", seeds=4).parse_args()
    budgets = [20, 25] if args.quick else list(BUDGETS)
    runs = dict(zip(WAYS, (cosines, branches, one_run), strict=True))
    # way, peak, budget: a loss per seed
    found: dict[tuple[str, float, int], list[float]] = {}
    for seed in progress(range(args.seeds), "seeds"):
        source = Source(4000 + seed)
        batches, held_out = source.batches(budgets[-1], seed=2), HeldOut(source, 512)
        for way, run in runs.items():
            for peak in PEAKS:
                losses = run(seed, peak, budgets, batches, held_out)
                for budget, loss in zip(budgets, losses, strict=True):
                    found.setdefault((way, peak, budget), []).append(loss)

    def best_peak(way: str, some: Sequence[int]) -> float:
        return min(PEAKS, key=lambda peak: sum(statistics.fmean(found[way, peak, one]) for one in some))

    steps = {
        "cosine": sum(budgets),
        "WSD": round((1 - DECAY) * budgets[-1]) + sum(b - round((1 - DECAY) * b) for b in budgets),
        "WSD-S": budgets[-1],
    }
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        tuned = best_peak("cosine", [budget])
        base = found["cosine", tuned, budget]
        for way in WAYS:
            peak = tuned if way == "cosine" else best_peak(way, budgets)
            values = found[way, peak, budget]
            rows.append(
                {
                    "budget": budget,
                    "way": way,
                    "peak": peak,
                    "loss": shown(values),
                    "against cosine": "-" if way == "cosine" else differences(values, base),
                    "steps for all budgets": steps[way],
                    "seeds": values,
                    "mean at each peak": [statistics.fmean(found[way, one, budget]) for one in PEAKS],
                }
            )
    settings = {
        "peaks tried": PEAKS,
        "peak chosen": "by the mean over the same seeds: cosine per budget, the others over all budgets",
        "decay": DECAY,
        "warmup": WARMUP,
        "tokens per step": BATCH * TOKENS,
        "seeds": args.seeds,
        "quick": args.quick,
    }
    write("branches", args.output, settings, rows, picture(rows))


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Loss against budget."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for way in WAYS:
        points = [(row["budget"], *interval(row["seeds"])) for row in rows if row["way"] == way]
        budgets, means, halves = zip(*points, strict=True)
        axes.errorbar(budgets, means, halves, fmt="o-", capsize=3, label=way)
    axes.set(xscale="log", xlabel="budget in steps", ylabel="loss above the entropy, in nats")
    axes.set_xticks(budgets, [str(budget) for budget in budgets], minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
