"""Losses of reinforcement learning as parts: the formulas are in `rewarm.functional.policy_gradient`.

A loss says which statistics it needs, and gives a value per token and where clipping took the gradient. How
much each token's value weighs in the step is a part of its own: `PerToken`, `PerSequence`, `PerConstant`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewarm.checks import at_least
from rewarm.functional.policy_gradient import clipped_policy_loss, sequence_logratios
from rewarm.functional.sequences import sequence_sums
from rewarm.functional.token_statistics import Statistic


@dataclass(frozen=True)
class Samples:
    """What a loss sees of sampled completions.

    Attributes:
        logprobs: Log-probability of each token under the policy, in nats, 0 without a target. Shape (B, T).
        sampler_logprobs: Log-probability of each token when it was sampled, likewise. Shape (B, T).
        advantages: Advantage of each token. Shape (B, T).
        mask: True for the completions' tokens. Shape (B, T).
        sequence_ids: Completion of each token, -1 for padding. int64, shape (B, T).
        num_sequences: Number of completions.
        statistics: Statistics of each token's distribution that the loss needs, by name. Each of shape
            (B, T).

    Example:
        >>> zeros = torch.zeros(1, 2)
        >>> samples = Samples(zeros - 1.0, zeros - 1.5, zeros, zeros == 0, zeros.long(), num_sequences=1)
        >>> (samples.logprobs - samples.sampler_logprobs).exp()
        tensor([[1.6487, 1.6487]])

    Source: ours.
    """

    logprobs: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    sequence_ids: Tensor
    num_sequences: int
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


class PolicyLoss:
    """Base of the losses on samples.

    Attributes:
        needs: Statistics of each token's distribution, see `rewarm.functional.token_statistics`.

    Example:
        >>> class Reinforce(PolicyLoss):
        ...     def values(self, samples):
        ...         return -samples.advantages * samples.logprobs, torch.zeros_like(samples.mask)
        >>> zeros = torch.zeros(1, 2)
        >>> Reinforce().values(Samples(zeros - 1.5, zeros, zeros + 2.0, zeros == 0, zeros.long(), 1))[0]
        tensor([[3., 3.]])

    Source: ours, the contract of the parts; what each one computes has its own source.
    """

    needs: tuple[Statistic, ...] = ()

    def values(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the loss of each token, and True where clipping took its gradient. Both of shape (B, T).

        Args:
            samples: The completions of one micro-batch.

        Raises:
            TypeError: If a subclass defines no values.
        """
        raise TypeError(f"{type(self).__name__} has no values: a loss on samples defines them")


@dataclass(frozen=True)
class Clipped(PolicyLoss):
    """The clipped surrogate of PPO and GRPO, with a ratio per token: `clipped_policy_loss`.

    Args:
        low: How far the ratio to the sampler may fall below 1, in (0, 1].
        high: How far the ratio may rise above 1, > 0. DAPO takes 0.28.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> logprobs, zeros, mask = torch.tensor([[0.5, 0.1]]), torch.zeros(1, 2), torch.ones(1, 2).bool()
        >>> Clipped().values(Samples(logprobs, zeros, zeros + 1, mask, zeros.long(), 1))
        (tensor([[-1.2000, -1.1052]]), tensor([[ True, False]]))

    Source: Shao et al. 2024, arXiv:2402.03300, eq. 3; separate bounds: DAPO, arXiv:2503.14476.
    """

    low: float = 0.2
    high: float = 0.2

    def __post_init__(self) -> None:
        clipped_policy_loss(_NONE, _NONE, _NONE, clip_low=self.low, clip_high=self.high)

    def values(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the loss of each token, and where clipping took its gradient."""
        return clipped_policy_loss(
            samples.logprobs,
            samples.sampler_logprobs,
            samples.advantages,
            clip_low=self.low,
            clip_high=self.high,
        )


@dataclass(frozen=True)
class GSPO(PolicyLoss):
    """The clipped surrogate with one ratio for a whole completion: `sequence_logratios`.

    Pair it with `weights=PerSequence()`, as the paper does.

    Args:
        low: How far the ratio to the sampler may fall below 1, in (0, 1].
        high: How far the ratio may rise above 1, > 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> logprobs, zeros, mask = torch.tensor([[0.5, 0.1]]), torch.zeros(1, 2), torch.ones(1, 2).bool()
        >>> GSPO().values(Samples(logprobs, zeros, zeros + 1, mask, zeros.long(), 1))[0]
        tensor([[-1.0004, -1.0004]])

    Source: Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7; the bounds are its section 5.1's.
    """

    low: float = 3e-4
    high: float = 4e-4

    def __post_init__(self) -> None:
        clipped_policy_loss(_NONE, _NONE, _NONE, clip_low=self.low, clip_high=self.high)

    def values(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the loss of each token, and where clipping took its gradient."""
        s = samples
        ratios = sequence_logratios(s.logprobs, s.sampler_logprobs, s.mask, s.sequence_ids, s.num_sequences)
        return clipped_policy_loss(
            ratios, torch.zeros_like(ratios), s.advantages, clip_low=self.low, clip_high=self.high
        )


class Weights:
    """Base of the ways in which the tokens' losses are added up.

    Example:
        >>> class Total(Weights):
        ...     def share(self, losses, samples, counts):
        ...         return losses.sum()
        >>> Total().share(torch.tensor([[1.0, 2.0]]), None, {})
        tensor(3.)

    Source: ours, the contract of the parts; what each one computes has its own source.
    """

    def share(self, losses: Tensor, samples: Samples, counts: Mapping[str, Tensor]) -> Tensor:
        """Return the part of the optimizer step's loss that these completions are. Shape ().

        Args:
            losses: Loss of each token, 0 without a target. Shape (B, T).
            samples: The completions with these tokens.
            counts: Counts of the whole step, over all micro-batches and ranks.

        Raises:
            TypeError: If a subclass defines no share.
        """
        raise TypeError(f"{type(self).__name__} has no share: weights define it")


@dataclass(frozen=True)
class PerToken(Weights):
    """Every token of the step weighs the same, as in DAPO.

    Example:
        >>> PerToken().share(torch.tensor([[1.0, 2.0]]), None, {"tokens": torch.tensor(6.0)})
        tensor(0.5000)

    Source: DAPO, arXiv:2503.14476.
    """

    def share(self, losses: Tensor, samples: Samples, counts: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over the step's number of tokens."""
        return losses.sum() / counts["tokens"]


@dataclass(frozen=True)
class PerSequence(Weights):
    """Every completion of the step weighs the same, with the mean over its tokens, as in GRPO.

    Example:
        >>> losses, zeros = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
        >>> samples = Samples(zeros, zeros, zeros, zeros == 0, zeros.long(), 1)
        >>> PerSequence().share(losses, samples, {"sequences": torch.tensor(3.0)})
        tensor(0.5000)

    Source: Shao et al. 2024, arXiv:2402.03300.
    """

    def share(self, losses: Tensor, samples: Samples, counts: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the completions' means over the step's number of completions."""
        ids, sequences = samples.sequence_ids, samples.num_sequences
        lengths = sequence_sums(samples.mask.float(), ids, sequences).clamp(min=1.0)
        return (sequence_sums(losses, ids, sequences) / lengths).sum() / counts["sequences"]


@dataclass(frozen=True)
class PerConstant(Weights):
    """Every token weighs one over a constant, whatever the completions' lengths, as in Dr. GRPO.

    Args:
        tokens: The constant, usually the longest completion allowed, >= 1.

    Raises:
        ValueError: If the constant is below 1.

    Example:
        >>> PerConstant(10).share(torch.tensor([[1.0, 4.0]]), None, {"sequences": torch.tensor(5.0)})
        tensor(0.1000)

    Source: Liu et al. 2025, arXiv:2503.20783.
    """

    tokens: int

    def __post_init__(self) -> None:
        at_least(1, tokens=self.tokens)

    def share(self, losses: Tensor, samples: Samples, counts: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over the constant times the step's number of completions."""
        return losses.sum() / (counts["sequences"] * self.tokens)


_NONE = torch.zeros(0)
