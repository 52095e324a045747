"""Sums of graded difficulty in order against shuffled, at equal tokens: pacings, with and without averaging.

Run: python -m benchmarks.evidence.ordering

The task is that of `rewarm.sums`, worked steps included, in six levels of difficulty. Every run sees the same
number of tokens under a constant LR; where the order is not shuffled it is by level. Averaged are the last
six checkpoints, with the newest weighing 0.2 (arXiv:2511.18903). Losses are in nats per token of completions
to held-out prompts, all levels alike; right is the share of these whose every token is the likeliest.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from benchmarks.evidence.common import (
    TinyModel,
    adamw,
    arguments,
    differences,
    interval,
    lrs_of,
    progress,
    shown,
    write,
)
from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.pacing import ExponentialStepPacing, LinearPacing, RootPacing
from rewarm.functional.averaging import ema_weights, merge
from rewarm.schedules.published import constant
from rewarm.sums import LEVELS, problems

STEPS, TOKENS, PEAK, HELD_OUT = 1200, 512, 3e-3, 600
CHARACTERS = "0123456789+-=#"
PAD, EOS = len(CHARACTERS), len(CHARACTERS) + 1
CHECKPOINTS, APART = 6, 0.04

Sample = tuple[list[int], int]
"""Tokens, and how many of them are the prompt's."""


def samples(rows: list[dict[str, Any]]) -> list[Sample]:
    """Tokens of problems with their worked steps and answers."""
    texts = [(row["prompt"], f"{row['steps']}#{row['answer']}") for row in rows]
    return [([*map(CHARACTERS.index, prompt + rest), EOS], len(prompt)) for prompt, rest in texts]


def batch(chosen: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T); targets of prompts and padding are -100."""
    width = max(len(tokens) for tokens, _ in chosen)
    rows = torch.tensor([tokens + [PAD] * (width - len(tokens)) for tokens, _ in chosen])
    places = torch.arange(width)
    learnt = torch.stack([(places >= start) & (places < len(tokens)) for tokens, start in chosen])
    return rows[:, :-1], torch.where(learnt, rows, -100)[:, 1:]


def orders(levels: list[float], steps: int, seed: int) -> dict[str, Curriculum]:
    """All ways to go through the data; the pacings show everything after half the steps."""
    half = steps // 2
    pacings = {
        "linear pacing": LinearPacing(half),
        "root pacing": RootPacing(half),
        "exponential steps": ExponentialStepPacing(half // 6, 1 / 6, 6 ** (1 / 6)),
    }
    made = {"shuffled": Curriculum(len(levels), seed=seed)}
    for name in ("ascending", "descending"):
        made[name] = Curriculum(len(levels), scores=levels, order=name, seed=seed)
    for name, pacing in pacings.items():
        made[name] = Curriculum(len(levels), scores=levels, order="ascending", pacing=pacing, seed=seed)
    return made


def batches(data: list[Sample], curriculum: Curriculum, steps: int) -> Iterator[list[Sample]]:
    """One batch per step, each filled up to the same number of tokens."""
    left = 0
    for step in range(steps):
        left += TOKENS
        chosen = []
        while left > 0:
            (number,) = curriculum.propose(1, step)
            chosen.append(data[number])
            left -= len(data[number][0])
        yield chosen


@torch.no_grad()
def measure(model: TinyModel, held_out: Sequence[Sample]) -> tuple[float, float]:
    """Mean loss per token, and the share of samples that are right."""
    total, tokens, right = 0.0, 0, 0
    for start in range(0, len(held_out), 200):
        inputs, targets = batch(held_out[start : start + 200])
        logits = model(inputs)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        tokens += int((targets != -100).sum())
        right += int(((logits.argmax(-1) == targets) | (targets == -100)).all(1).sum())
    return total / tokens, right / len(held_out)


def averaged(
    seed: int, data: list[Sample], curriculum: Curriculum, steps: int, held_out: Sequence[Sample]
) -> dict[str, tuple[float, float]]:
    """Train once; return what the last weights and the averaged ones are worth."""
    torch.manual_seed(seed)
    model = TinyModel(len(CHARACTERS) + 2)
    weights: list[Tensor] = list(model.parameters())
    optimizer = adamw(model)
    apart, kept = max(1, round(APART * steps)), list[list[Tensor]]()
    lrs = lrs_of(constant(0.02), steps, PEAK)
    for step, chosen in enumerate(batches(data, curriculum, steps)):
        for group in optimizer.param_groups:
            group["lr"] = lrs[step]
        inputs, targets = batch(chosen)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        left = steps - 1 - step
        if left % apart == 0 and left // apart < CHECKPOINTS:
            kept.append([weight.detach().clone() for weight in weights])
    last = measure(model, held_out)
    with torch.no_grad():
        torch._foreach_copy_(weights, merge(kept, ema_weights(0.2, len(kept))))
    return {"none": last, "EMA 0.2 of 6": measure(model, held_out)}


def one_pass(seed: int, steps: int) -> tuple[list[Sample], list[float]]:
    """As many problems as fill all steps, and their levels; the levels in turn."""
    rows = problems(steps * TOKENS // 14, seed, held=False)
    data, levels, left = samples(rows), [float(row["difficulty"]) for row in rows], steps * TOKENS
    for place, (tokens, _) in enumerate(data):
        left -= len(tokens)
        if left <= 0:
            return data[: place + 1], levels[: place + 1]
    raise ValueError(f"{len(rows)} problems do not fill {steps} steps")


def main() -> None:
    """Run and write."""
    args = arguments("graded sums in order against shuffled, at equal tokens", seeds=5).parse_args()
    steps, count = (15, 60) if args.quick else (STEPS, HELD_OUT)
    held_out = samples(problems(count, 2026, held=True))
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in progress(range(args.seeds), "seeds"):
        data, levels = one_pass(seed, steps)
        for name, curriculum in orders(levels, steps, seed).items():
            for average, worth in averaged(seed, data, curriculum, steps, held_out).items():
                found.setdefault((name, average), []).append(worth)
    rows: list[dict[str, Any]] = []
    for (name, average), values in found.items():
        losses, rights = zip(*values, strict=True)
        base = [loss for loss, _ in found["shuffled", average]]
        rows.append(
            {
                "order": name,
                "average": average,
                "loss": shown(losses),
                "against shuffled": "-" if name == "shuffled" else differences(losses, base),
                "right": shown(rights),
                "losses": list(losses),
                "rights": list(rights),
            }
        )
    settings = {
        "peak": PEAK,
        "steps": steps,
        "tokens per step": TOKENS,
        "levels": {level: list(terms) for level, terms in LEVELS.items()},
        "all visible after": "half the steps",
        "checkpoints averaged": f"{CHECKPOINTS}, {APART:.0%} of the steps apart",
        "held-out prompts": len(held_out),
        "seeds": args.seeds,
        "quick": args.quick,
    }
    write("ordering", args.output, settings, rows, picture(rows))


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Loss and share of right answers for every order, with and without averaging."""
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    names = list(dict.fromkeys(row["order"] for row in rows))
    averages = list(dict.fromkeys(row["average"] for row in rows))
    for axes, key, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("losses", "rights"),
        ("loss on held-out sums, nats per token", "right"),
        strict=True,
    ):
        for row in rows:
            place = averages.index(row["average"])
            mean, half = interval(row[key])
            y = -names.index(row["order"]) - 0.15 * place
            shown_label = row["average"] if row["order"] == names[0] else None
            axes.errorbar(mean, y, xerr=half, fmt="o", color=f"C{place}", markersize=4, label=shown_label)
        axes.set_yticks([-place for place in range(len(names))], names)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3, axis="x")
    figure.axes[0].set_xscale("log")
    figure.axes[0].legend(frameon=False, title="average", fontsize=8)
    return figure


if __name__ == "__main__":
    main()
