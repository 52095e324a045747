"""Losses of supervised fine-tuning, per token, from what a fused head returns of each token's distribution.

No function here sees logits. Positions without a target have log-probability 0 and, in the other inputs, 0;
then every loss is 0 there, and the caller sums and divides by one count over the whole optimizer step.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def nll_loss(logprobs: Tensor) -> Tensor:
    """Negative log-likelihood per token.

    Args:
        logprobs: Log-probabilities of the target tokens, in nats. Any shape.

    Returns:
        Loss per token in nats, not reduced. Same shape.

    Example:
        >>> nll_loss(torch.tensor([-0.5, -2.0]))
        tensor([0.5000, 2.0000])

    Source: maximum likelihood. Differs: nothing.
    """
    return -logprobs


def label_smoothing_loss(logprobs: Tensor, mean_logprobs: Tensor, *, smoothing: float) -> Tensor:
    """Cross entropy with a target distribution of which a share is spread over the vocabulary.

    loss = -(1 - s) * logprob - s * mean over v of log p_v

    Args:
        logprobs: Log-probabilities of the target tokens, in nats. Any shape.
        mean_logprobs: Mean log-probability over the vocabulary, mean(logits) - logsumexp(logits). Same shape.
        smoothing: Share s that is spread, in [0, 1). 0 is NLL. Typical 0.1.

    Returns:
        Loss per token in nats, not reduced. Same shape.

    Raises:
        ValueError: If smoothing is out of range.

    Example:
        >>> label_smoothing_loss(torch.tensor([-0.5]), torch.tensor([-3.0]), smoothing=0.1)
        tensor([0.7500])

    Source: Szegedy et al. 2016, arXiv:1512.00567. Differs: nothing.
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing is {smoothing}; it must be in [0, 1)")
    return -(1.0 - smoothing) * logprobs - smoothing * mean_logprobs


def z_loss(logsumexps: Tensor, *, coefficient: float) -> Tensor:
    """Pull of the softmax normaliser towards 1, to be added to another loss.

    loss = coefficient * logsumexp(logits)^2

    Args:
        logsumexps: Logarithms of the summed exponentials of the logits, in nats. Any shape.
        coefficient: >= 0. 0 adds nothing. Typical 1e-4.

    Returns:
        Loss per token, not reduced. Same shape.

    Raises:
        ValueError: If the coefficient is below 0.

    Example:
        >>> z_loss(torch.tensor([10.0]), coefficient=1e-4)
        tensor([0.0100])

    Source: PaLM, Chowdhery et al. 2022, arXiv:2204.02311. Differs: nothing.
    """
    if not 0.0 <= coefficient < math.inf:
        raise ValueError(f"coefficient is {coefficient}; it must be at least 0 and finite")
    return coefficient * logsumexps.square()


def dft_loss(logprobs: Tensor, *, power: float = 1.0) -> Tensor:
    """NLL weighted by the token's own probability, which carries no gradient.

    loss = -stop_gradient(p^power) * logprob

    Tokens that the model finds unlikely teach little: the gradient is that of -p.

    Args:
        logprobs: Log-probabilities of the target tokens, in nats. Any shape.
        power: 1 is DFT, 0 is NLL; in between is ours. In [0, 1].

    Returns:
        Loss per token, not reduced. Divide by the number of tokens, not by the sum of the weights. Same
        shape.

    Raises:
        ValueError: If power is out of range.

    Example:
        >>> dft_loss(torch.tensor([0.0, -0.6931]))
        tensor([-0.0000, 0.3466])

    Source: dynamic fine-tuning, arXiv:2508.05629. Differs: the power.
    """
    if not 0.0 <= power <= 1.0:
        raise ValueError(f"power is {power}; it must be in [0, 1]")
    return -(power * logprobs.detach()).exp() * logprobs


def num_selected_tokens(num_tokens: int, token_ratio: float) -> int:
    """How many of a micro-batch's tokens `select_tokens` keeps: the normaliser of Entropy-SFT.

    max(1, floor(token_ratio * num_tokens)), and 0 of 0

    Args:
        num_tokens: Target tokens of the micro-batch, >= 0.
        token_ratio: Share to keep, in (0, 1].

    Returns:
        The number. It needs no forward pass, so the count over an optimizer step is known before it.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> num_selected_tokens(11, 0.2), num_selected_tokens(3, 0.2)
        (2, 1)

    Source: Light-IF, arXiv:2508.03178, in its repository. Differs: there, gradient accumulation divides by
    floor(token_ratio * all tokens of the window); summed over the micro-batches, as here, it is what was
    kept.
    """
    if not 0.0 < token_ratio <= 1.0:
        raise ValueError(f"token_ratio is {token_ratio}; it must be in (0, 1]")
    if num_tokens < 0:
        raise ValueError(f"num_tokens is {num_tokens}; it must be at least 0")
    return min(num_tokens, max(1, int(token_ratio * num_tokens)))


@torch.no_grad()
def select_tokens(
    logprobs: Tensor,
    entropies: Tensor,
    mask: Tensor,
    *,
    token_ratio: float,
    entropy_weight: float,
    num_tokens: int | None = None,
) -> Tensor:
    """The tokens of a micro-batch that Entropy-SFT learns: errors that its own doubt does not explain.

    largest of -logprob - entropy_weight * entropy; the loss is `nll_loss` on them over their number

    The choice is made within the micro-batch of one rank, and so depends on how a batch is cut.

    Args:
        logprobs: Log-probabilities of the target tokens, in nats. Any shape.
        entropies: Entropies of the whole next-token distributions, in nats. Same shape.
        mask: True where there is a target. Same shape, bool.
        token_ratio: Share of the targets to keep, in (0, 1]. 1 is NLL. The paper's cold start has 0.8, the
            code's default is 0.2.
        entropy_weight: How much doubt excuses an error, >= 0. The paper's cold start has 0.8, the code's
            default is 1.
        num_tokens: Number of targets, if the host knows it; None counts them, for which a device is waited
            for.

    Returns:
        True where a token is learnt: at `num_selected_tokens` of them. Same shape, bool.

    Raises:
        ValueError: If an argument is out of range or shapes differ.

    Example:
        >>> logprobs, entropies = torch.tensor([-3.0, -3.0, -0.1]), torch.tensor([2.9, 0.5, 0.1])
        >>> select_tokens(logprobs, entropies, torch.ones(3) > 0, token_ratio=0.4, entropy_weight=1.0)
        tensor([False,  True, False])

    Source: Light-IF, arXiv:2508.03178, in its repository. Differs: nothing.
    """
    if not logprobs.shape == entropies.shape == mask.shape:
        raise ValueError(
            f"logprobs has shape {tuple(logprobs.shape)}, entropies {tuple(entropies.shape)} and mask"
            f" {tuple(mask.shape)}; they must agree"
        )
    if not 0.0 <= entropy_weight < math.inf:
        raise ValueError(f"entropy_weight is {entropy_weight}; it must be at least 0 and finite")
    size = num_selected_tokens(int(mask.sum()) if num_tokens is None else num_tokens, token_ratio)
    errors = torch.where(mask, -logprobs - entropy_weight * entropies, -math.inf).flatten()
    kept = errors.topk(size, sorted=False).indices
    return torch.zeros_like(mask).flatten().scatter(0, kept, True).view_as(mask)


def ditto_loss(logprobs: Tensor, earlier: Tensor, *, decay: float = 0.5, one_sided: bool = False) -> Tensor:
    """Penalty on repeating: a repeated token must be less likely than the same token one repetition earlier.

    loss = -log(1 - |p - decay * stop_gradient(p_earlier)|) for repeated tokens, NLL for all others

    Of a pseudo-repetition only the repeated tokens count; the caller gives the first time of the sentence,
    whose probabilities are needed all the same, weight 0. Ordinary rows have no repeated token.

    Args:
        logprobs: Log-probabilities of the target tokens, in nats. Shape (B, T).
        earlier: Position in the row of the same token one repetition earlier, or -1 for tokens that don't
            repeat. int64, shape (B, T).
        decay: Factor that each repetition should have over the one before, in [0, 1]. The code's script has
            0.5, its default is 0.95.
        one_sided: Whether a repeated token may be less likely than that at no cost.

    Returns:
        Loss per token, not reduced. Shape (B, T).

    Raises:
        ValueError: If decay is out of range, shapes differ, or a position is (checked on the CPU).

    Example:
        >>> logprobs = torch.tensor([[0.5, 0.8]]).log()
        >>> ditto_loss(logprobs, torch.tensor([[-1, 0]]), decay=0.5)
        tensor([[0.6931, 0.7985]])

    Source: DITTO, Xu et al. 2022, arXiv:2206.02369; one-sided is "nl_clip" of its repository. Differs: a
    difference of 1 is kept off 1 by the rounding unit instead of 1e-20, which float32 can't tell from 0.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay is {decay}; it must be in [0, 1]")
    if logprobs.shape != earlier.shape or logprobs.ndim != 2:
        raise ValueError(
            f"logprobs has shape {tuple(logprobs.shape)} and earlier {tuple(earlier.shape)};"
            " both must be (B, T)"
        )
    if earlier.device.type == "cpu" and (earlier >= torch.arange(earlier.shape[1])).any():
        raise ValueError("earlier holds a position that is not before its own")
    repeats = earlier >= 0
    probabilities = logprobs.exp()
    wanted = decay * probabilities.detach().gather(1, earlier.clamp(min=0))
    difference = probabilities - wanted
    difference = difference.clamp(min=0.0) if one_sided else difference.abs()
    difference = difference.clamp(max=1.0 - torch.finfo(logprobs.dtype).eps)
    return torch.where(repeats, -torch.log1p(-difference), -logprobs)


def task_token_weights(
    tasks: Tensor, task_weights: Sequence[float], task_counts: Sequence[int] | Tensor
) -> Tensor:
    """Weights per token that make the sum of a loss a weighted sum of each task's mean.

    sum_t weight[t] * loss[t] = sum_k w_k * (mean of the loss over the tokens of task k)

    Args:
        tasks: Task of each token, in [0, number of tasks), or -1 for none. int64, any shape.
        task_weights: w_k of each task, >= 0, such as alpha for labels and 1 - alpha for rationales.
        task_counts: Tokens of each task in the whole optimizer step, >= 0; a task without any counts for
            nothing.

    Returns:
        Weights: w_k / count_k, 0 for no task. Tokens of one task of weight 1 give NLL's mean. float32, same
        shape.

    Raises:
        ValueError: If lengths differ, a number is below 0 or a task (checked on the CPU) is out of range.

    Example:
        >>> task_token_weights(torch.tensor([0, 0, 1, -1]), [0.5, 0.5], [2, 1])
        tensor([0.2500, 0.2500, 0.5000, 0.0000])

    Source: distilling step-by-step, Hsieh et al. 2023, arXiv:2305.02301, has two tasks, each with a forward
    pass and a mean of its own, 0.5 each in its code. Differs: any number of tasks in one batch.
    """
    if len(task_weights) != len(task_counts):
        raise ValueError(f"there are {len(task_weights)} task_weights but {len(task_counts)} task_counts")
    checked = {"task_weights": task_weights}
    if not isinstance(task_counts, Tensor):  # a device's numbers are not waited for
        checked["task_counts"] = task_counts
    for name, numbers in checked.items():
        if not all(0 <= number < math.inf for number in numbers):
            raise ValueError(f"{name} is {list(numbers)}; each must be at least 0 and finite")
    if tasks.device.type == "cpu" and ((tasks < -1) | (tasks >= len(task_weights))).any():
        raise ValueError(f"tasks holds a number outside of -1 to {len(task_weights) - 1}")
    weights = torch.tensor([*task_weights, 0.0], device=tasks.device)
    counts = torch.as_tensor(task_counts, device=tasks.device)
    # The last entry is that of -1.
    counts = torch.cat([counts, counts.new_ones(1)])
    return torch.where(counts > 0, weights / counts.clamp(min=1), 0.0).float()[tasks]


def distillation_loss(
    student_logprobs: Tensor, teacher_logprobs: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Kullback-Leibler divergence from a teacher whose likeliest tokens were stored.

    loss = T^2 * (sum over k of q_k (log q_k - log p_k)  +  q_rest (log q_rest - log p_rest))

    with q the teacher, p the student, and rest the probability that the K stored tokens leave to all others.
    If a teacher's probabilities add up to 1, as when they were normalised over the K tokens, the last term is
    0.

    Args:
        student_logprobs: Log-probabilities of the stored tokens under the whole vocabulary's
            softmax(logits / T). Shape (..., K).
        teacher_logprobs: Log-probabilities of the same tokens under the teacher, stored; no gradient reaches
            them. Same shape.
        temperature: Temperature T that both were taken at, > 0. Semantic soft bootstrapping has 2.

    Returns:
        Loss per token, not reduced. With K = V it is the full divergence; with K = 1, the target as the
        teacher's only token and T = 1 it is NLL. Shape (...).

    Raises:
        ValueError: If shapes differ or the temperature is not above 0.

    Example:
        >>> student = torch.tensor([[0.5, 0.25]]).log()
        >>> distillation_loss(student, torch.tensor([[0.75, 0.25]]).log())
        tensor([0.3041])

    Source: Hinton et al. 2015, arXiv:1503.02531; as the only loss, on a teacher that had seen hints: semantic
    soft bootstrapping, arXiv:2512.05105. Differs: they store all logits; the rest as one more token is ours.
    """
    if student_logprobs.shape != teacher_logprobs.shape or not student_logprobs.ndim:
        raise ValueError(
            f"student_logprobs has shape {tuple(student_logprobs.shape)} and teacher_logprobs"
            f" {tuple(teacher_logprobs.shape)}; both must be (..., K)"
        )
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be above 0 and finite")
    teacher = teacher_logprobs.detach().to(student_logprobs.dtype)
    q = teacher.exp()
    # A stored probability of 0 contributes nothing; 0 * -inf would be NaN.
    stored = torch.where(q > 0, q * (teacher - student_logprobs), 0.0).sum(-1)
    tiny = torch.finfo(student_logprobs.dtype).eps
    q_rest = 1.0 - q.sum(-1)
    q_rest = torch.where(q_rest > 4 * tiny, q_rest, 0.0)  # what is left by rounding is none
    p_rest = (1.0 - student_logprobs.exp().sum(-1)).clamp(min=tiny)
    rest = torch.xlogy(q_rest, q_rest) - q_rest * p_rest.log()
    return temperature**2 * (stored + rest)
