"""How well difficulties and abilities are recovered from several models' answers.

Run: python -m benchmarks.evidence.item_response

Answers are drawn from the one-parameter model with known abilities (normal) and difficulties (normal, spread
1.5) and fitted by `fit_rasch`. Compared with the share of answers that were wrong, which orders examples as
the fit does where all models answered all of them, but not where each model answered a part: there, who
answered matters. The fit knows who that was, the share does not: it errs where the able models got the hard
examples, and is helped where the others did. The fit is made with PUDF's prior on difficulties, which says
next to nothing (a spread of 1000), and with one about as wide as they are (2).
"""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.evidence.common import arguments, interval, progress, shown, write
from rewarm.curriculum.item_response import estimate_ability, fit_rasch

EXAMPLES, SPREAD = 500, 1.5

# Who gets the hard examples: everybody all examples, or mostly the models above (below) the mean ability.
ASKED = {"all": 0.0, "the able, hard ones": 2.0, "the others, hard ones": -2.0}
CROWDS = ((3, 1), (3, 8), (8, 1), (8, 8), (20, 1), (20, 8))
"""Models, and answers of each to each example."""


def ranks(values: Tensor) -> Tensor:
    """Ranks, those of ties averaged."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[places]


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1])


def spearman(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation."""
    return correlation(ranks(one), ranks(other))


def answers(models: int, samples: int, examples: int, asked: float, seed: int) -> tuple[Tensor, ...]:
    """Abilities (J,), difficulties (N,), right answers and all answers (J, N)."""
    rng = torch.Generator().manual_seed(seed)
    abilities = torch.randn(models, generator=rng, dtype=torch.float64)
    difficulties = SPREAD * torch.randn(examples, generator=rng, dtype=torch.float64)
    p = torch.sigmoid(abilities[:, None] - difficulties)
    trials = torch.full((models, examples), float(samples), dtype=torch.float64)
    if asked:
        share = torch.sigmoid(asked * abilities[:, None].sign() * difficulties)
        kept = torch.rand(p.shape, generator=rng, dtype=torch.float64) < share
        # Each example is answered by somebody.
        kept[torch.randint(models, (examples,), generator=rng), torch.arange(examples)] = True
        trials *= kept
    return abilities, difficulties, torch.binomial(trials, p, generator=rng), trials


def recovered(models: int, samples: int, examples: int, asked: float, seed: int) -> dict[str, float]:
    """What the fit and the share of wrong answers tell."""
    abilities, difficulties, right, trials = answers(models, samples, examples, asked, seed)
    fit, narrow = fit_rasch(right, trials), fit_rasch(right, trials, difficulty_std=2.0)
    # A new model, of which only some answers to examples of fitted difficulty are known.
    rng = torch.Generator().manual_seed(seed + 1)
    errors = []
    for _ in range(20):
        ability = float(torch.randn((), generator=rng, dtype=torch.float64))
        some = torch.randperm(examples, generator=rng)[:100]
        is_right = torch.rand(len(some), generator=rng) < torch.sigmoid(ability - difficulties[some])
        # The prior puts the mean ability of the crowd at 0.
        errors.append(
            estimate_ability(is_right, narrow.difficulties[some]) + float(abilities.mean()) - ability
        )
    return {
        "fit": spearman(fit.difficulties, difficulties),
        "narrow": spearman(narrow.difficulties, difficulties),
        "wrong": spearman(1 - right.sum(0) / trials.sum(0), difficulties),
        "ability": correlation(narrow.abilities, abilities),
        "error": float(torch.tensor(errors).square().mean().sqrt()),
    }


def main() -> None:
    """Run and write."""
    args = arguments("recovery of known difficulties by item response theory", seeds=10).parse_args()
    examples = 120 if args.quick else EXAMPLES
    works = [(crowd, who) for who in ASKED for crowd in CROWDS]
    rows: list[dict[str, Any]] = []
    for (models, samples), who in progress(works, "crowds"):
        found = [recovered(models, samples, examples, ASKED[who], seed) for seed in range(args.seeds)]
        rows.append(
            {
                "models": models,
                "answers each": samples,
                "who answered": who,
                "Spearman, prior 1000": shown([one["fit"] for one in found]),
                "prior 2": shown([one["narrow"] for one in found]),
                "share wrong": shown([one["wrong"] for one in found]),
                "correlation of abilities": shown([one["ability"] for one in found]),
                "error of a new ability": shown([one["error"] for one in found]),
                **{name: [one[name] for one in found] for name in ("fit", "narrow", "wrong")},
            }
        )
    settings = {"examples": examples, "spread": SPREAD, "seeds": args.seeds, "quick": args.quick}
    write("item_response", args.output, settings, rows, picture(rows))


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Rank correlation with the true difficulty, for every crowd."""
    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    kinds = list(dict.fromkeys(row["who answered"] for row in rows))
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True), kinds, strict=True):
        chosen = [row for row in rows if row["who answered"] == kind]
        for key, label in (("fit", "fit, prior 1000"), ("narrow", "fit, prior 2"), ("wrong", "share wrong")):
            means, halves = zip(*(interval(row[key]) for row in chosen), strict=True)
            axes.errorbar(range(len(chosen)), means, halves, fmt="o-", capsize=3, label=label)
        axes.set_xticks(range(len(chosen)), [f"{row['models']} x {row['answers each']}" for row in chosen])
        axes.set(title=f"answered by: {kind}", xlabel="models x answers each")
    figure.axes[0].set_ylabel("Spearman with the true difficulty")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
