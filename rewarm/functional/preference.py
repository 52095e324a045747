"""Losses on pairs of a chosen and a rejected completion, from log-probabilities summed over their tokens."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from rewarm.checks import above, in_range


def dpo_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Logistic loss on how much further the policy separates a pair than the reference does.

    loss = -(1 - s) * logsigmoid(z) - s * logsigmoid(-z),  z = beta * (chosen_logratios - rejected_logratios)

    Args:
        chosen_logratios: log pi(chosen) - log pi_ref(chosen), summed over completion tokens, in nats. Shape
            (P,).
        rejected_logratios: The same difference for the rejected completion. Shape (P,).
        beta: Strength of the pull to the reference, > 0. Typical 0.1.
        label_smoothing: Probability s that a label is flipped, in [0, 0.5).

    Returns:
        Loss per pair, not reduced. Shape (P,).

    Raises:
        ValueError: If beta or label_smoothing is out of range.

    Example:
        >>> import torch
        >>> dpo_loss(torch.tensor([0.0, 1.0]), torch.tensor([0.0, -1.0]), beta=0.1)
        tensor([0.6931, 0.5981])

    Source: Rafailov et al. 2023, arXiv:2305.18290; the smoothed form is the conservative DPO of its authors'
    repository.
    Differs: nothing.
    """
    above(0, beta=beta)
    in_range("[0, 0.5)", label_smoothing=label_smoothing)
    z = beta * (chosen_logratios - rejected_logratios)
    return -(1.0 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def nca_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Noise-contrastive loss that also holds up the chosen completion's absolute likelihood.

    loss = -logsigmoid(r_w) - logsigmoid(-r_w) / 2 - logsigmoid(-r_l) / 2,  r = beta * logratios

    Args:
        chosen_logratios: log pi(chosen) - log pi_ref(chosen), summed over completion tokens, in nats. Shape
            (P,).
        rejected_logratios: The same difference for the rejected completion. Shape (P,).
        beta: Scale of the log-ratios, > 0. Light-R1 (arXiv:2503.10460) uses 0.3.

    Returns:
        Loss per pair, not reduced. Shape (P,).

    Raises:
        ValueError: If beta is not above 0.

    Example:
        >>> import torch
        >>> nca_pair_loss(torch.tensor([1.0]), torch.tensor([-1.0]), beta=0.1)
        tensor([1.3388])

    Source: Chen et al. 2024, arXiv:2402.05369, in its form for pairs. Differs: nothing.
    """
    above(0, beta=beta)
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def ipo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, tau: float) -> Tensor:
    """Squared distance of the margin from a finite goal, so that certain preferences are not overfitted.

    loss = (chosen_logratios - rejected_logratios - 1 / (2 * tau))^2

    Args:
        chosen_logratios: log pi(chosen) - log pi_ref(chosen), in nats: summed over the completion's tokens as
            in the paper, or its mean per token as its authors apply it. Shape (P,).
        rejected_logratios: The same difference for the rejected completion. Shape (P,).
        tau: Strength of the pull to the reference, > 0. Typical 0.1.

    Returns:
        Loss per pair, not reduced. Shape (P,).

    Raises:
        ValueError: If tau is not above 0.

    Example:
        >>> import torch
        >>> ipo_loss(torch.tensor([1.0]), torch.tensor([-1.0]), tau=0.1)
        tensor([9.])

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17. Differs: nothing.
    """
    above(0, tau=tau)
    return (chosen_logratios - rejected_logratios - 1.0 / (2.0 * tau)).square()
