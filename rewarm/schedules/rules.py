"""Numbers to settle before training: learning rate and batch size, and how to spend an annotation budget."""

import math


def step_law_lr(parameters: float, tokens: float) -> float:
    """Peak learning rate for pretraining from scratch.

    lr = 1.79 * N ** -0.713 * D ** 0.307

    Args:
        parameters: N, the model's parameters without embeddings, > 0.
        tokens: D, tokens to train on, > 0.

    Returns:
        The peak LR of AdamW.

    Raises:
        ValueError: If an argument is not finite and > 0.

    Example:
        >>> round(step_law_lr(1e9, 1e11), 6)
        0.001632

    Source: Li et al. 2025 (Step Law), arXiv:2503.04715: a fit to pretraining from random weights with AdamW,
    cosine to a fixed LR of 1e-5. Differs: that N leaves out embeddings is not confirmed. Not for continued
    pretraining, fine-tuning or schedules with another end.
    """
    _check(parameters=parameters, tokens=tokens)
    return 1.79 * parameters**-0.713 * tokens**0.307


def step_law_batch_tokens(tokens: float) -> float:
    """Batch size for pretraining from scratch, in tokens.

    batch = 0.58 * D ** 0.571

    Args:
        tokens: D, tokens to train on, > 0.

    Returns:
        Tokens per optimizer step; divide by the sequence length for sequences.

    Raises:
        ValueError: If tokens is not finite and > 0.

    Example:
        >>> round(step_law_batch_tokens(1e11))
        1107715

    Source: as for `step_law_lr`. Differs: nothing.
    """
    _check(tokens=tokens)
    return 0.58 * tokens**0.571


def sft_share(examples: float) -> float:
    """Share of an annotation budget for supervised examples, the rest being for preference pairs.

    1 below 1,000 examples; from there 0.5, in the logarithm straight down to 0.1 at 10,000; then 0.1

    Args:
        examples: Supervised examples that the whole budget would buy, > 0.

    Returns:
        The share, in [0.1, 1].

    Raises:
        ValueError: If examples is not finite and > 0.

    Example:
        >>> [round(sft_share(n), 2) for n in (500, 1000, 3000, 10_000, 100_000)]
        [1.0, 0.5, 0.31, 0.1, 0.1]

    Source: Raghavendra et al. 2025 (Balancing the Budget), arXiv:2502.11284: below 1,000 annotated examples
    supervised tuning alone is best; above, a mixture whose preference part grows with the budget; without any
    supervised part preference tuning starts cold, and less than a tenth repairs that. Differs: the line
    between these findings is ours. They are of LoRA on seven base models of 1B to 14B, four tasks and 100 to
    10,000 examples; the paper's tables, and so how much is lost by another share, are not known to us.
    """
    _check(examples=examples)
    if examples < 1_000:
        return 1.0
    return max(0.1, 0.5 - 0.4 * math.log10(examples / 1_000))


def split_budget(
    budget: float, share: float, sft_cost: float = 1.0, preference_cost: float = 1.0
) -> tuple[int, int]:
    """How many supervised examples and how many preference pairs a budget buys.

    (floor(share * budget / sft_cost), floor(what is left / preference_cost))

    Args:
        budget: What may be spent, in any currency, > 0.
        share: Part of the budget for supervised examples, in [0, 1], such as that of `sft_share`.
        sft_cost: Price of a supervised example, > 0.
        preference_cost: Price of a preference pair, > 0.

    Returns:
        Supervised examples and preference pairs, which together cost no more than the budget.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> split_budget(1000.0, share=0.25, sft_cost=2.0, preference_cost=1.0)
        (125, 750)

    Source: Raghavendra et al. 2025, arXiv:2502.11284, with several prices. Differs: nothing.
    """
    _check(budget=budget, sft_cost=sft_cost, preference_cost=preference_cost)
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must be in [0, 1]")
    # The small number keeps a share like 0.1 of a budget of 30 from losing an example to rounding.
    supervised = math.floor(share * budget / sft_cost * (1 + 1e-12))
    if share == 1:
        return supervised, 0
    return supervised, max(0, math.floor((budget - supervised * sft_cost) / preference_cost * (1 + 1e-12)))


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be finite and > 0")
