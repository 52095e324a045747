"""`rewarm plan`: learning rate and batch size, loss of another schedule, split of a budget."""

import sys
from collections.abc import Sequence
from typing import Literal

from rewarm.checks import at_least, one_of
from rewarm.schedules.law_fits import (
    Law,
    fit_annealing_law,
    fit_error,
    fit_multi_power_law,
    predict_loss,
    relative_errors,
)
from rewarm.schedules.logs import read_curve, warmup_of
from rewarm.schedules.rules import sft_share, split_budget, step_law_batch_tokens, step_law_lr


def plan_lr(*, parameters: float, tokens: float, sequence_length: int | None = None) -> None:
    """Print the peak learning rate and the batch size of the Step Law, for pretraining.

    Args:
        parameters: Parameters of the model, without embeddings.
        tokens: Tokens to train on.
        sequence_length: Tokens per sequence, >= 1, to tell the batch in sequences too.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> plan_lr(parameters=1e9, tokens=1e11, sequence_length=4096)  # doctest: +ELLIPSIS
        peak learning rate 1.632e-03
        batch 1,107,715 tokens (270.4 sequences), 90,276 steps
        Step Law, ...
    """
    if sequence_length is not None:
        at_least(1, sequence_length=sequence_length)
    batch = step_law_batch_tokens(tokens)
    sequences = "" if sequence_length is None else f" ({batch / sequence_length:,.1f} sequences)"
    sys.stdout.write(
        f"peak learning rate {step_law_lr(parameters, tokens):.3e}\n"
        f"batch {batch:,.0f} tokens{sequences}, {tokens / batch:,.0f} steps\n"
        "Step Law, arXiv:2503.04715: for pretraining from scratch with AdamW and a cosine down to 1e-5; not"
        " for continued pretraining or fine-tuning.\n"
    )


def plan_budget(
    budget: float, *, share: float | None = None, sft_cost: float = 1.0, preference_cost: float = 1.0
) -> None:
    """Print how many supervised examples and preference pairs to have annotated.

    Args:
        budget: What may be spent, in any currency.
        share: Part of it for supervised examples, in [0, 1]; without it, by published findings.
        sft_cost: Price of a supervised example, > 0.
        preference_cost: Price of a preference pair, > 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> plan_budget(3000, share=0.5)
        supervised examples 1,500 (50% of the budget), preference pairs 1,500
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
    *,
    configs: Sequence[str] = (),
    held_out: Sequence[str] = (),
    law: Literal["annealing", "multi-power"] = "annealing",
    loss: str = "train/loss",
    lr: str = "lr",
    decay: float | None = None,
    skip: int = 0,
    steps: int | None = None,
) -> None:
    """Fit a law to the logged losses of some runs, and predict those of other schedules.

    Args:
        logs: A log of each run: a folder with TensorBoard files, or a CSV file with a column `step`.
        configs: Configs of `rewarm fit` whose last loss to predict.
        held_out: Logs of runs that are not fitted, to see how far off the law is on them.
        law: Law to fit.
        loss: Name of the loss in the logs.
        lr: Name of the learning rate in the logs.
        decay: lambda of the annealing law, in (0, 1); without it, the best of several.
        skip: Leave out the losses of the first so many steps, >= 0.
        steps: Optimizer steps of the configs, >= 1; without it, as the configs have it.

    Raises:
        ValueError: If a log lacks what is asked of it, or the curves don't determine the law.
    """
    from rewarm.commands.schedule import config_curves

    one_of(("annealing", "multi-power"), law=law)
    at_least(0, skip=skip)
    if law == "multi-power" and decay is not None:
        raise ValueError(f"decay is {decay}, but law is 'multi-power', which has none")
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
