"""Several losses of one kind as one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewarm.functional.token_statistics import Statistic
from rewarm.objectives.pair_losses import PairLoss
from rewarm.objectives.policy_losses import PolicyLoss, Samples
from rewarm.objectives.token_losses import TokenLoss

_KINDS = (TokenLoss, PairLoss, PolicyLoss)


@dataclass(frozen=True)
class Sum:
    """The weighted sum of several losses of tokens, of pairs, or of samples.

    Each loss keeps what it is divided by: `Sum([Sigmoid(), ChosenNLL()], [1.0, 0.2])` adds the mean of the
    step's pairs and 0.2 times the mean of its chosen tokens.

    Args:
        losses: One or more, all of tokens, all of pairs or all of samples.
        weights: One finite factor for each loss.

    Raises:
        ValueError: If there are no losses, or not as many weights; if the losses are of several kinds, or
            divide the logits by different temperatures.

    Example:
        >>> from rewarm.objectives.pair_losses import ChosenNLL, Sigmoid
        >>> loss = Sum([Sigmoid(beta=0.1), ChosenNLL()], [1.0, 0.2])
        >>> loss.needs_reference, [weight for weight, _ in loss.terms]
        (True, [1.0, 0.2])

    Source: ours.   Differs: nothing.
    """

    losses: Sequence[TokenLoss | PairLoss | PolicyLoss]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if not self.losses or len(self.losses) != len(self.weights):
            raise ValueError(
                f"weights has {len(self.weights)} entries for {len(self.losses)} losses; it must be as many,"
                " and at least one"
            )
        if not torch.tensor(self.weights).isfinite().all():
            raise ValueError(f"weights is {list(self.weights)}; it must be finite")
        if not any(all(isinstance(loss, kind) for loss in self.losses) for kind in _KINDS):
            names = ", ".join(type(loss).__name__ for loss in self.losses)
            raise ValueError(f"losses has {names}; it must be all of tokens, all of pairs or all of samples")
        if len(set(self._temperatures)) > 1:
            raise ValueError(f"losses has the temperatures {self._temperatures}; it must be one for all")

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Statistics that any of the losses needs."""
        return tuple(dict.fromkeys(name for loss in self.losses for name in getattr(loss, "needs", ())))

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses on pairs reads a reference."""
        return any(getattr(loss, "needs_reference", False) for loss in self.losses)

    @property
    def temperature(self) -> float:
        """What divides the logits for losses of tokens."""
        return self._temperatures[0]

    @property
    def terms(self) -> tuple[tuple[float, PairLoss], ...]:
        """The losses on pairs, each with its weight."""
        pairs = zip(self.weights, self.losses, strict=True)
        return tuple((weight, loss) for weight, loss in pairs if isinstance(loss, PairLoss))

    def values(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the loss of each token of samples, and True where clipping took any of its gradients."""
        parts = [loss.values(samples) for loss in self.losses if isinstance(loss, PolicyLoss)]
        losses = torch.stack(
            [weight * values for weight, (values, _) in zip(self.weights, parts, strict=True)]
        )
        return losses.sum(0), torch.stack([clipped for _, clipped in parts]).any(0)

    def share(self, *arguments: Any) -> Tensor:
        """Return the part of the optimizer step's loss; the arguments are those of the losses' own."""
        shares = [loss.share(*arguments) for loss in self.losses]  # type: ignore[union-attr]
        total = self.weights[0] * shares[0]
        for weight, share in zip(self.weights[1:], shares[1:], strict=True):
            total = total + weight * share
        return total

    @property
    def _temperatures(self) -> list[float]:
        return [getattr(loss, "temperature", 1.0) for loss in self.losses]
