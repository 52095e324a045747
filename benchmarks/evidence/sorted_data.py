"""Data sorted by quality under a decaying LR against a constant LR with averaged checkpoints.

Run: python -m benchmarks.evidence.sorted_data

How learning-rate decay wastes the best data (arXiv:2511.18903): sorted so that the best come last, they are
learned from at a learning rate of next to nothing. Here a document's quality is the share of its tokens that
were not replaced by random ones; each is seen once. Losses are on documents of the best quality, in nats
above the entropy of the text's law.
"""

from collections.abc import Sequence
from typing import Any

import torch
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
from rewarm.functional.averaging import ema_weights, mean_weights, merge, shape_weights
from rewarm.schedules.phases import Schedule
from rewarm.schedules.published import constant, wsd

PEAK, LENGTH, WORST = 3e-3, 600, 0.6

ORDERS = ("shuffled", "best last")
SCHEDULES = {
    "decay to 1/300": wsd(0.02, 0.2, 1 / 300),
    "decay to 1/3": wsd(0.02, 0.2, 1 / 3),
    "constant": constant(0.02),
}
# Of six checkpoints: how far apart, as a share of the run, and the weight of each, oldest first.
AVERAGES = {
    "none": (0.0, [1.0]),
    "mean, 1 % apart": (0.01, mean_weights(6)),
    "mean, 4 % apart": (0.04, mean_weights(6)),
    "EMA 0.2, 4 % apart": (0.04, ema_weights(0.2, 6)),
    "as 1-sqrt, 4 % apart": (0.04, shape_weights("sqrt", 6)),
}

Way = tuple[str, str, str]


def documents(source: Source, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Documents (N, T) and the share of random tokens in each (N,), in no order."""
    drawn = source.sample(count, TOKENS + 1, seed)
    rng = torch.Generator().manual_seed(seed)
    noise = WORST * torch.rand(count, generator=rng)
    replaced = torch.rand(drawn.shape, generator=rng) < noise[:, None]
    return torch.where(replaced, torch.randint(len(source.law), drawn.shape, generator=rng), drawn), noise


def averaged(seed: int, batches: Sequence[Tensor], schedule: Schedule, held_out: HeldOut) -> dict[str, float]:
    """Train once, and return the loss of every average of its checkpoints."""
    model, optimizer = new_run(seed)
    weights: list[Tensor] = list(model.parameters())
    length = len(batches)
    steps = {
        average: [length - max(1, round(apart * length)) * back for back in reversed(range(len(shares)))]
        for average, (apart, shares) in AVERAGES.items()
    }
    saved: dict[int, list[Tensor]] = {step: [] for some in steps.values() for step in some}

    def keep(step: int) -> None:
        if step in saved:
            saved[step] = [weight.detach().clone() for weight in weights]

    train(model, optimizer, batches, lrs_of(schedule, length, PEAK), keep)
    found = {}
    for average, (_, shares) in AVERAGES.items():
        mean = merge([saved[step] for step in steps[average]], shares)
        with torch.no_grad():
            torch._foreach_copy_(weights, mean)
        found[average] = held_out.loss(model)
    return found


def run(seed: int, length: int) -> dict[Way, float]:
    """Loss in the end for every order, schedule and average."""
    source = Source(1000 + seed)
    held_out = HeldOut(source)
    text, noise = documents(source, length * BATCH, seed=2)
    found: dict[Way, float] = {}
    for order in ORDERS:
        batches = (text if order == "shuffled" else text[noise.argsort(descending=True)]).split(BATCH)
        for name, schedule in SCHEDULES.items():
            losses = averaged(seed, batches, schedule, held_out)
            found |= {(order, name, average): loss for average, loss in losses.items()}
    return found


def main() -> None:
    """Run and write."""
    args = arguments("data sorted by quality under a decaying and a constant LR", seeds=6).parse_args()
    length = 50 if args.quick else LENGTH
    runs = [run(seed, length) for seed in progress(range(args.seeds), "seeds")]
    losses = {way: [run[way] for run in runs] for way in runs[0]}
    base = losses["shuffled", "decay to 1/300", "none"]
    rows: list[dict[str, Any]] = []
    for (order, schedule, average), values in losses.items():
        against = "-" if values is base else differences(values, base)
        gain = differences(values, losses["shuffled", schedule, average]) if order != "shuffled" else "-"
        rows.append(
            {
                "order": order,
                "LR": schedule,
                "average of 6": average,
                "loss": shown(values),
                "against the first": against,
                "what sorting changes": gain,
                "seeds": values,
            }
        )
    settings = {
        "peak": PEAK,
        "steps": length,
        "tokens per step": BATCH * TOKENS,
        "most random tokens": WORST,
        "seeds": args.seeds,
        "quick": args.quick,
    }
    write("sorted_data", args.output, settings, rows, picture(losses))


def picture(losses: dict[Way, list[float]]) -> Figure:
    """Loss of every schedule and average against the first, seed by seed, for both orders."""
    figure = Figure(figsize=(10.0, 4.5), layout="constrained")
    base = next(iter(losses.values()))
    for place, (order, axes) in enumerate(zip(ORDERS, figure.subplots(1, 2, sharex=True), strict=True)):
        for row, schedule in enumerate(SCHEDULES):
            for offset, average in enumerate(AVERAGES):
                values = losses[order, schedule, average]
                mean, half = interval([value - other for value, other in zip(values, base, strict=True)])
                y = -row - 0.15 * (offset - 2)
                label = average if row == 0 and place == 0 else None
                axes.errorbar(mean, y, xerr=half, fmt="o", color=f"C{offset}", markersize=4, label=label)
        axes.set_yticks([0, -1, -2], SCHEDULES if place == 0 else [""] * 3)
        axes.set(title=order, xlabel="loss on the best data against shuffled, decay to 1/300 (nats)")
        axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, title="average of six checkpoints")
    return figure


if __name__ == "__main__":
    main()
