"""Advantages as parts: how good each completion is beside the others of its prompt."""

from dataclasses import dataclass

from torch import Tensor

from rewarm.functional.policy_gradient import group_advantages


class Advantage:
    """Base of the advantages.

    Attributes:
        is_zero_for_equal_rewards: Whether a group of equal rewards has advantage 0, so that without a KL term
            its completions need not be computed.

    Example:
        >>> class Reward(Advantage):
        ...     def values(self, rewards):
        ...         return rewards
        >>> Reward().is_zero_for_equal_rewards
        False

    Source: ours, the contract of the parts; what each one computes has its own source.
    """

    is_zero_for_equal_rewards: bool = False

    def values(self, rewards: Tensor) -> Tensor:
        """Return the advantage of each completion.

        Args:
            rewards: Rewards of each group's completions. Shape (Q, G).

        Returns:
            Advantages. Shape (Q, G).

        Raises:
            TypeError: If a subclass defines no values.
        """
        raise TypeError(f"{type(self).__name__} has no values: an advantage defines them")


@dataclass(frozen=True)
class GroupAdvantage(Advantage):
    """How much better a completion is than its group's mean: `group_advantages`.

    Args:
        scale_by_std: Divide by the group's standard deviation, as GRPO does; False is Dr. GRPO.

    Example:
        >>> import torch
        >>> GroupAdvantage(scale_by_std=False).values(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor([[ 0.5000, -0.5000],
                [ 0.0000,  0.0000]])

    Source: Shao et al. 2024, arXiv:2402.03300; Liu et al. 2025, arXiv:2503.20783.
    """

    scale_by_std: bool = True
    is_zero_for_equal_rewards = True

    def values(self, rewards: Tensor) -> Tensor:
        """Return the advantage of each completion. Shape (Q, G)."""
        return group_advantages(rewards, scale_by_std=self.scale_by_std)
