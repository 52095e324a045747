"""Group advantages and the clipped policy gradient of GRPO, per token."""

import torch
from torch import Tensor

from rewarm.checks import above, at_least, in_range
from rewarm.functional.sequences import per_token, sequence_means


def group_advantages(rewards: Tensor, *, scale_by_std: bool, epsilon: float = 1e-4) -> Tensor:
    """How much better each completion did than the others of its prompt.

    A = r - mean(r), divided by (std(r) + epsilon) if asked; mean and unbiased standard deviation over the
    group.

    Args:
        rewards: Shape (Q, G), G >= 2.
        scale_by_std: True is GRPO; False is the centred form of Dr. GRPO, which doesn't weigh up the easiest
            and hardest prompts.
        epsilon: Added to the standard deviation.

    Returns:
        Advantages. Shape (Q, G). A group of equal rewards has advantage 0.

    Raises:
        ValueError: If a group has fewer than two completions.

    Example:
        >>> group_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), scale_by_std=False)
        tensor([[ 0.5000, -0.5000],
                [ 0.0000,  0.0000]])

    Source: Shao et al. 2024, arXiv:2402.03300 (scaled); Liu et al. 2025, arXiv:2503.20783 (centred). Differs:
    epsilon 1e-4 and the unbiased deviation are TRL's; the first paper states neither.
    """
    at_least(2, completions_per_group=rewards.shape[-1])
    # Relative to the first, equal rewards are exactly 0: the rounding of their mean would be scaled up to an
    # advantage.
    relative = rewards - rewards[..., :1]
    centred = relative - relative.mean(-1, keepdim=True)
    return centred / (relative.std(-1, keepdim=True) + epsilon) if scale_by_std else centred


def clipped_policy_loss(
    policy_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of PPO, per token.

    loss = -min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A),  rho = exp(policy_logprobs -
    sampler_logprobs)

    Args:
        policy_logprobs: Log-probabilities under the policy being trained. Shape (B, T) or any.
        sampler_logprobs: Log-probabilities under the policy that sampled; no gradient reaches them. Same
            shape.
        advantages: Advantage of each token; the same for all tokens of a completion. Same shape or
            broadcastable to it.
        clip_low: How far the ratio may fall below 1, in (0, 1]. Typical 0.2.
        clip_high: How far the ratio may rise above 1, > 0. Typical 0.2; DAPO uses 0.28.

    Returns:
        Loss per token, not reduced, and a bool tensor that is True where clipping took the gradient. Same
        shape.

    Raises:
        ValueError: If a clip range is out of range.

    Example:
        >>> policy, sampler, advantages = torch.tensor([[0.5, 0.0], [0.0, 0.0], [1.0, -1.0]])
        >>> loss, clipped = clipped_policy_loss(policy, sampler, advantages, clip_low=0.2, clip_high=0.2)
        >>> loss, clipped
        (tensor([-1.2000,  1.0000]), tensor([ True, False]))

    Source: Schulman et al. 2017, arXiv:1707.06347; separate bounds from DAPO, arXiv:2503.14476. Differs:
    nothing.
    """
    in_range("(0, 1]", clip_low=clip_low)
    above(0, clip_high=clip_high)
    ratio = torch.exp(policy_logprobs - sampler_logprobs.detach())
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return -torch.minimum(unclipped, clipped), clipped < unclipped


def kl_estimate(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per token that is never negative ("k3").

    k3 = exp(d) - d - 1,  d = reference_logprobs - policy_logprobs

    Args:
        policy_logprobs: Log-probabilities of tokens sampled from the policy. Any shape.
        reference_logprobs: Log-probabilities of the same tokens under the reference; no gradient reaches
            them. Same shape.

    Returns:
        Estimate per token in nats, >= 0. Same shape.

    Example:
        >>> kl_estimate(torch.tensor([0.0, -1.0]), torch.tensor([0.0, -2.0]))
        tensor([0.0000, 0.3679])

    Source: Schulman 2020 (blog, "Approximating KL divergence"); used by Shao et al. 2024, arXiv:2402.03300.
    Differs: nothing.
    """
    difference = reference_logprobs.detach() - policy_logprobs
    return torch.expm1(difference) - difference


def sequence_logratios(
    policy_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int
) -> Tensor:
    """Log of the importance ratio of a whole completion, the geometric mean over its tokens, at each token.

    log s = mean over the completion's tokens of policy_logprobs - sampler_logprobs

    Args:
        policy_logprobs: Log-probabilities under the policy being trained. Shape (B, T).
        sampler_logprobs: Log-probabilities under the policy that sampled; no gradient reaches them.
            Shape (B, T).
        mask: True for the completion's tokens. Shape (B, T).
        sequence_ids: Completion of each token, -1 for padding. int64, shape (B, T).
        num_sequences: Number of completions, >= 0.

    Returns:
        The same value at every position of a completion, 0 for padding. Shape (B, T).

    Example:
        >>> policy, sampler = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-2.0, -4.0, 0.0]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> sequence_logratios(policy, sampler, mask, torch.tensor([[0, 0, -1]]), 1)
        tensor([[1.5000, 1.5000, 0.0000]])

    Source: Zheng et al. 2025, arXiv:2507.18071, eq. 7. Differs: nothing.
    """
    differences = policy_logprobs - sampler_logprobs.detach()
    return per_token(sequence_means(differences, mask, sequence_ids, num_sequences), sequence_ids)
