"""Item response theory: how hard each example is, and how able each model, from who answered what."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rewarm.checks import in_range


class RaschFit(NamedTuple):
    """Abilities and difficulties on one scale.

    Attributes:
        abilities: One per model. float64, shape (J,).
        difficulties: One per example; a model of this ability answers it correctly every other time. float64,
            shape (N,).

    Example:
        >>> fit = RaschFit(torch.tensor([0.0]), torch.tensor([0.0, 1.0]))
        >>> torch.sigmoid(fit.abilities[:, None] - fit.difficulties)
        tensor([[0.5000, 0.2689]])

    Source: Rasch 1960.   Differs: nothing.
    """

    abilities: Tensor
    difficulties: Tensor


@torch.no_grad()
def fit_rasch(
    num_correct: Tensor,
    num_trials: Tensor,
    *,
    ability_std: float = 1.0,
    difficulty_std: float = 1000.0,
    tolerance: float = 1e-9,
) -> RaschFit:
    """Fit the one-parameter logistic model to several models' answers.

    num_correct[j, i] ~ Binomial(num_trials[j, i], sigmoid(ability[j] - difficulty[i])),
    ability ~ Normal(0, ability_std), difficulty ~ Normal(0, difficulty_std)

    The most probable parameters, by Newton's method on all of them at once: the logarithm of their density is
    concave, so there is one answer. Examples that all models got right, or none, are extreme but finite. If
    all models answered all examples once, those with as many correct answers tie: J models tell J + 1
    difficulties apart, and several answers of each help as much as more models. Takes memory for a few J x N
    matrices.

    Args:
        num_correct: Correct answers of each model to each example, in [0, num_trials]. Shape (J, N).
        num_trials: Answers that were looked at, 0 where there is none. Shape (J, N).
        ability_std: Prior spread of the abilities, > 0. It sets the scale's zero at the models' middle.
        difficulty_std: Prior spread of the difficulties, > 0.
        tolerance: Largest change of a parameter in the last step, > 0.

    Returns:
        The fit.

    Raises:
        ValueError: If shapes differ, counts are out of range or no model answered an example, or an argument
            is not above 0.

    Example:
        >>> right = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0]])
        >>> fit = fit_rasch(right, torch.ones_like(right), difficulty_std=2.0)
        >>> fit.difficulties.argsort().tolist(), fit.abilities.argmax().item()
        ([0, 1, 2], 2)

    Source: Rasch 1960; the priors of PUDF, arXiv:2408.05326, are those of py-irt. Differs: they take the mean
    of a variational posterior, this its mode; and counts of several answers will do.
    """
    if num_correct.shape != num_trials.shape or num_correct.ndim != 2:
        raise ValueError(
            f"num_correct has shape {tuple(num_correct.shape)} and num_trials {tuple(num_trials.shape)};"
            " both must be (J, N)"
        )
    in_range("(0, inf)", ability_std=ability_std, difficulty_std=difficulty_std, tolerance=tolerance)
    right, trials = num_correct.double(), num_trials.double()
    if not ((right >= 0) & (right <= trials)).all():
        raise ValueError("num_correct must be in [0, num_trials] everywhere")
    if (trials.sum(0) == 0).any():
        example = int((trials.sum(0) == 0).nonzero()[0])
        raise ValueError(f"example {example} has no answer; each needs one")

    precisions = ability_std**-2, difficulty_std**-2

    def log_density(theta: Tensor, b: Tensor) -> Tensor:
        logits = theta[:, None] - b
        likelihood = (right * logsigmoid(logits) + (trials - right) * logsigmoid(-logits)).sum()
        return likelihood - (precisions[0] * theta.square().sum() + precisions[1] * b.square().sum()) / 2

    theta, b = right.new_zeros(len(right)), right.new_zeros(right.shape[1])
    density = log_density(theta, b)
    while True:
        logits = theta[:, None] - b
        p, q = torch.sigmoid(logits), torch.sigmoid(-logits)
        surplus, weight = right * q - (trials - right) * p, trials * p * q
        gradient_theta = surplus.sum(1) - precisions[0] * theta
        gradient_b = -surplus.sum(0) - precisions[1] * b
        # The Hessian is [[diagonal, weight], [weight^T, diagonal]]: with b eliminated it is J x J.
        diagonal_theta, diagonal_b = weight.sum(1) + precisions[0], weight.sum(0) + precisions[1]
        scaled = weight / diagonal_b
        schur = diagonal_theta.diag() - scaled @ weight.T
        step_theta = torch.linalg.solve(schur, gradient_theta + scaled @ gradient_b)
        step_b = (gradient_b + weight.T @ step_theta) / diagonal_b
        largest = max(float(step_theta.abs().max()), float(step_b.abs().max()))
        if largest < tolerance:
            return RaschFit(theta + step_theta, b + step_b)
        # From afar a full step may overshoot.
        size, rounding = min(1.0, 4.0 / largest), 1e-12 * (1.0 + float(density.abs()))
        while (new := log_density(theta + size * step_theta, b + size * step_b)) < density - rounding:
            size /= 2
        theta, b, density = theta + size * step_theta, b + size * step_b, new


@torch.no_grad()
def estimate_ability(correct: Tensor, difficulties: Tensor, *, prior_std: float = 1.0) -> float:
    """Most probable ability of a model that answered examples of known difficulty.

    argmax over theta of -theta^2 / (2 prior_std^2) + sum_i log sigmoid(s_i (theta - b_i)),
    s_i = +1 if correct, -1 if not

    The derivative falls with theta; Newton's method, kept within the bracket of its root.

    Args:
        correct: 1 (or True) where the answer was correct, 0 where not. Shape (N,).
        difficulties: Difficulties of the examples, finite. Shape (N,).
        prior_std: Spread of the prior around 0, > 0. It keeps the ability finite when all answers are alike.

    Returns:
        The ability; 0 without any answer.

    Raises:
        ValueError: If shapes differ, prior_std is out of range, an answer is neither 0 nor 1, or a difficulty
            is not finite.

    Example:
        >>> round(estimate_ability(torch.tensor([1, 1, 0]), torch.tensor([-1.0, 0.0, 1.0])), 4)
        0.3048

    Source: PUDF, arXiv:2408.05326. Differs: Newton's method in place of Nelder and Mead's; same maximum.
    """
    if correct.shape != difficulties.shape or correct.ndim != 1:
        raise ValueError(
            f"correct has shape {tuple(correct.shape)} and difficulties {tuple(difficulties.shape)};"
            " both must be (N,)"
        )
    in_range("(0, inf)", prior_std=prior_std)
    if not ((correct == 0) | (correct == 1)).all():
        raise ValueError("correct holds something else than 0 and 1")
    if not difficulties.isfinite().all():
        raise ValueError("difficulties holds a number that is not finite")
    signs, b, precision = 2 * correct.double() - 1, difficulties.double(), prior_std**-2
    low, high = -len(b) / precision, len(b) / precision
    theta = 0.0
    while True:
        wrong = torch.sigmoid(-signs * (theta - b))  # the probability of the other answer, without 1 - p
        slope = float((signs * wrong).sum()) - precision * theta
        step = slope / (precision + float((wrong * torch.sigmoid(signs * (theta - b))).sum()))
        low, high = (theta, high) if slope > 0 else (low, theta)
        if min(abs(step), high - low) <= 1e-12 * (1.0 + abs(theta)):
            return theta + step
        theta = theta + step if low < theta + step < high else (low + high) / 2


def margin_of_pass_rate(pass_rate: float) -> float:
    """How far above a model's ability examples are that it passes at some rate.

    difficulty - ability = log(1 / pass_rate - 1)

    Args:
        pass_rate: Rate at which the examples are passed, in (0, 1).

    Returns:
        The margin: 0 at one half, above it for lower rates.

    Raises:
        ValueError: If the rate is out of range.

    Example:
        >>> round(margin_of_pass_rate(0.25), 4)
        1.0986

    Source: PUDF, arXiv:2408.05326, in its repository. Differs: nothing.
    """
    in_range("(0, 1)", pass_rate=pass_rate)
    return math.log(1.0 / pass_rate - 1.0)
