"""Losses on preference pairs as parts: the formulas are in `rewarm.functional.preference`.

A loss says whether it needs a reference, gives a value per pair, and with the counts of the whole optimizer
step its share of the step's loss, however that step is cut into batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewarm.functional.preference import dpo_loss, ipo_loss, nca_pair_loss


@dataclass(frozen=True)
class Pairs:
    """What a loss sees of P pairs.

    Attributes:
        chosen: Log-probability of each chosen completion under the policy, summed over its tokens, in nats.
            Shape (P,).
        rejected: Log-probability of each rejected completion under the policy, likewise. Shape (P,).
        chosen_tokens: Number of tokens of each chosen completion. float32, shape (P,).
        rejected_tokens: Number of tokens of each rejected completion. float32, shape (P,).
        reference_chosen: Log-probability of the chosen completions under the reference, without a gradient;
            None if no loss needs one. Shape (P,).
        reference_rejected: Log-probability of the rejected completions under the reference, likewise.
            Shape (P,).
        columns: Numeric columns of the pairs by name. Each of shape (P,).

    Example:
        >>> chosen, rejected, tokens = torch.tensor([[-12.0], [-15.0], [6.0]])
        >>> pairs = Pairs(chosen, rejected, tokens, tokens, torch.tensor([-13.0]), torch.tensor([-14.0]))
        >>> pairs.chosen_logratios, pairs.rejected_logratios
        (tensor([1.]), tensor([-1.]))

    Source: ours.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def chosen_logratios(self) -> Tensor:
        """How much likelier the chosen completions are under the policy than under the reference, (P,).

        Raises:
            ValueError: If there is no reference.
        """
        return self.chosen - _given(self.reference_chosen)

    @property
    def rejected_logratios(self) -> Tensor:
        """How much likelier the rejected completions are under the policy than under the reference, (P,).

        Raises:
            ValueError: If there is no reference.
        """
        return self.rejected - _given(self.reference_rejected)


class PairLoss:
    """Base of the losses on pairs.

    Attributes:
        needs_reference: Whether the loss reads log-probabilities under the reference.
        counted_in: What of the optimizer step its values are divided by, a key of
            `rewarm.objectives.batch.Counts`.

    Example:
        >>> class Hinge(PairLoss):
        ...     needs_reference = False
        ...     def values(self, pairs):
        ...         return (1.0 - (pairs.chosen - pairs.rejected)).clamp(min=0.0)
        >>> chosen, rejected, tokens = torch.tensor([[-12.0], [-12.5], [6.0]])
        >>> Hinge().share(Pairs(chosen, rejected, tokens, tokens), {"pairs": torch.tensor(2.0)})
        tensor(0.2500)

    Source: ours, the contract of the parts; what each one computes has its own source.
    """

    needs_reference: bool = True
    counted_in: str = "pairs"

    @property
    def terms(self) -> tuple[tuple[float, "PairLoss"], ...]:
        """The losses that this one is the sum of, each with its weight."""
        return ((1.0, self),)

    def values(self, pairs: Pairs) -> Tensor:
        """Return the loss of each pair. Shape (P,).

        Args:
            pairs: The pairs of one micro-batch.

        Raises:
            TypeError: If a subclass defines no values.
        """
        raise TypeError(f"{type(self).__name__} has no values: a loss on pairs defines them")

    def share(self, pairs: Pairs, counts: Mapping[str, Tensor]) -> Tensor:
        """Return the part of the optimizer step's loss that these pairs are. Shape ().

        Args:
            pairs: The pairs of one micro-batch.
            counts: Counts of the whole step, over all micro-batches and ranks.
        """
        return self.values(pairs).sum() / counts[self.counted_in]


@dataclass(frozen=True)
class Sigmoid(PairLoss):
    """The loss of DPO: `rewarm.functional.preference.dpo_loss`.

    Args:
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> chosen, rejected, tokens = torch.tensor([[-12.0], [-15.0], [6.0]])
        >>> pairs = Pairs(chosen, rejected, tokens, tokens, torch.tensor([-13.0]), torch.tensor([-14.0]))
        >>> Sigmoid(beta=0.1).values(pairs)
        tensor([0.5981])

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        dpo_loss(_NONE, _NONE, beta=self.beta, label_smoothing=self.label_smoothing)

    def values(self, pairs: Pairs) -> Tensor:
        """Return the loss of each pair."""
        return dpo_loss(
            pairs.chosen_logratios,
            pairs.rejected_logratios,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )


@dataclass(frozen=True)
class NCA(PairLoss):
    """Holds up the chosen completion's own likelihood: `rewarm.functional.preference.nca_pair_loss`.

    Args:
        beta: Scale of the log-ratios, > 0.

    Raises:
        ValueError: If beta is not above 0.

    Example:
        >>> chosen, rejected, tokens = torch.tensor([[-12.0], [-15.0], [6.0]])
        >>> pairs = Pairs(chosen, rejected, tokens, tokens, torch.tensor([-13.0]), torch.tensor([-14.0]))
        >>> NCA(beta=0.1).values(pairs)
        tensor([1.3388])

    Source: Chen et al. 2024, arXiv:2402.05369, in its form for pairs.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        nca_pair_loss(_NONE, _NONE, beta=self.beta)

    def values(self, pairs: Pairs) -> Tensor:
        """Return the loss of each pair."""
        return nca_pair_loss(pairs.chosen_logratios, pairs.rejected_logratios, beta=self.beta)


@dataclass(frozen=True)
class IPO(PairLoss):
    """Draws the margin to a finite goal: `rewarm.functional.preference.ipo_loss`.

    Args:
        tau: Strength of the pull to the reference, > 0; the goal is 1 / (2 tau).
        average: Take mean log-ratios per token, as the paper's authors apply it; False sums them, as its
            formula says.

    Raises:
        ValueError: If tau is not above 0.

    Example:
        >>> chosen, rejected = torch.tensor([[-12.0], [-15.0]])
        >>> lengths = torch.tensor([6.0]), torch.tensor([5.0])
        >>> pairs = Pairs(chosen, rejected, *lengths, torch.tensor([-13.0]), torch.tensor([-14.0]))
        >>> IPO(tau=0.1).values(pairs), IPO(tau=0.1, average=False).values(pairs)
        (tensor([21.4678]), tensor([9.]))

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17. Differs: the mean per token is what its authors told
    the maintainers of TRL that they take.
    """

    tau: float = 0.1
    average: bool = True

    def __post_init__(self) -> None:
        ipo_loss(_NONE, _NONE, tau=self.tau)

    def values(self, pairs: Pairs) -> Tensor:
        """Return the loss of each pair."""
        chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
        if self.average:
            chosen = chosen / pairs.chosen_tokens.clamp(min=1.0)
            rejected = rejected / pairs.rejected_tokens.clamp(min=1.0)
        return ipo_loss(chosen, rejected, tau=self.tau)


@dataclass(frozen=True)
class ChosenNLL(PairLoss):
    """Negative log-likelihood of the chosen completions, over the number of their tokens in the whole step.

    A term to add to another loss by `rewarm.Sum`, so that the chosen answers are not unlearnt.

    Example:
        >>> chosen, rejected, tokens = torch.tensor([[-12.0], [-15.0], [6.0]])
        >>> ChosenNLL().share(Pairs(chosen, rejected, tokens, tokens), {"chosen_tokens": torch.tensor(6.0)})
        tensor(2.)

    Source: ours; the same term is the `sft` loss of TRL.   Differs: nothing.
    """

    needs_reference = False
    counted_in = "chosen_tokens"

    def values(self, pairs: Pairs) -> Tensor:
        """Return the sum over each chosen completion's tokens."""
        return -pairs.chosen

    def share(self, pairs: Pairs, counts: Mapping[str, Tensor]) -> Tensor:
        """Return the part of the optimizer step's loss, rounded as the `train/nll` that is logged."""
        return -pairs.chosen.sum() / counts[self.counted_in]


def _given(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ValueError("the pairs have no log-probabilities of a reference, which the loss needs")
    return reference


_NONE = torch.zeros(0)
