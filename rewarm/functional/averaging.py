"""Averages of checkpoints: which weight each one gets, and how to sum them without losing small changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

# Elements cast to float32 at once: bounds the extra memory where averages and parameters differ in dtype or
# device.
_BUCKET_ELEMENTS = 2**25


def mean_weights(k: int) -> list[float]:
    """Weights of the plain mean of k checkpoints, oldest first.

    c_i = 1 / k

    Args:
        k: Number of checkpoints K, >= 1.

    Returns:
        K equal weights that sum to 1.

    Raises:
        ValueError: If k is below 1.

    Example:
        >>> mean_weights(4)
        [0.25, 0.25, 0.25, 0.25]

    Source: Sanyal et al. 2023, arXiv:2306.03241 (latest weight averaging, the mean of the last k). Differs:
    nothing.
    """
    if k < 1:
        raise ValueError(f"k is {k}; there must be at least 1 checkpoint")
    return [1.0 / k] * k


def ema_weights(alpha: float, k: int, *, debias: bool = False) -> list[float]:
    """Weights that an exponential moving average gives to k checkpoints, oldest first.

    c_1 = (1 - a)^(k-1),  c_i = a (1 - a)^(k-i)                       (starts at the first checkpoint)
    c_i = a (1 - a)^(k-i) / (1 - (1 - a)^k)                           (debias)

    Started at the first checkpoint, the average leans on the oldest one: 0.33 of six at a = 0.2. `debias`
    removes that.

    Args:
        alpha: Weight a of the newest checkpoint, in (0, 1]. The curriculum paper uses 0.2.
        k: Number of checkpoints K, >= 1.
        debias: Divide by the weights' sum in place of giving the rest to the oldest.

    Returns:
        K weights that sum to 1.

    Raises:
        ValueError: If alpha or k is out of range.

    Example:
        >>> [round(w, 3) for w in ema_weights(0.2, 6)]
        [0.328, 0.082, 0.102, 0.128, 0.16, 0.2]
        >>> [round(w, 3) for w in ema_weights(0.2, 6, debias=True)]
        [0.089, 0.111, 0.139, 0.173, 0.217, 0.271]

    Source: arXiv:2511.18903 (average of the last six checkpoints in place of a learning-rate decay). Differs:
    `debias` is ours.
    """
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must be in (0, 1]")
    if k < 1:
        raise ValueError(f"k is {k}; there must be at least 1 checkpoint")
    weights = [alpha * (1.0 - alpha) ** (k - i) for i in range(1, k + 1)]
    if debias:
        total = sum(weights)
        return [weight / total for weight in weights]
    weights[0] = (1.0 - alpha) ** (k - 1)
    return weights


def merge_decay(weights: Sequence[float], num_updates: int) -> float:
    """Decay of one update that builds a weighted mean of values in one buffer, as they come.

    d_t = (c_1 + .. + c_(i-1)) / (c_1 + .. + c_i),  i = 1 + (t - 1) mod k

    After k updates by `ema_` the buffer is sum_i c_i x_i; the next update begins another mean. With equal
    weights these are the means of consecutive windows of k values, with those of
    `rewarm.schedules.decay_weights.decay_weights` each stands for a branch with a decayed learning rate, and
    no snapshot is kept. In between it is the mean of the values so far, in the proportions of their weights.

    Args:
        weights: c_1 .. c_k, 0 or more, the sum above 0, oldest first. Only their proportions matter.
        num_updates: t >= 1, this update included.

    Returns:
        Decay for update t, in [0, 1]: 0 at the first of every k.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(merge_decay(mean_weights(3), t), 3) for t in (1, 2, 3, 4, 5)]
        [0.0, 0.5, 0.667, 0.0, 0.5]

    Source: arXiv:2405.18392 (means of windows of the constant phase), arXiv:2507.17634 (weights that stand
    for a decay). Differs: the streaming form is ours.
    """
    if not weights or min(weights) < 0.0 or not 0.0 < sum(weights) < math.inf:
        raise ValueError(f"weights is {list(weights)}; weights must be 0 or more, and not all 0")
    if num_updates < 1:
        raise ValueError(f"num_updates is {num_updates}; it counts this update, so it must be at least 1")
    place = (num_updates - 1) % len(weights)
    before = sum(weights[:place])
    return before / (before + weights[place]) if before else 0.0


def greedy_soup(scores: Sequence[float], score_mean: Callable[[list[int]], float]) -> list[int]:
    """Choose checkpoints whose plain mean scores best, adding one at a time.

    The best checkpoint is taken first; the others follow in the order of their scores, and each stays if the
    mean of what was chosen and of it scores no worse.

    Args:
        scores: Score of each of K checkpoints on data held out from all of them; higher is better.
        score_mean: Scores the plain mean of the checkpoints with these indices, at least two. Called K - 1
            times.

    Returns:
        Indices of the chosen ones, best first.

    Raises:
        ValueError: If there is no checkpoint, or a score is not finite.

    Example:
        >>> points = [0.0, 3.0, 4.0, 9.0]  # "weights", with the best in the middle of two of them
        >>> def score(chosen):
        ...     return -abs(sum(points[i] for i in chosen) / len(chosen) - 3.5)
        >>> greedy_soup([score([i]) for i in range(4)], score)
        [1, 2]

    Source: Wortsman et al. 2022, arXiv:2203.05482, recipe 1. Differs: nothing.
    """
    if not scores or not all(map(math.isfinite, scores)):
        raise ValueError(f"scores is {list(scores)}; there must be at least one, and all finite")
    first, *others = sorted(range(len(scores)), key=lambda index: -scores[index])
    chosen, best = [first], scores[first]
    for index in others:
        score = score_mean([*chosen, index])
        if not math.isfinite(score):
            raise ValueError(f"the mean of checkpoints {[*chosen, index]} scores {score}; scores are finite")
        if score >= best:
            chosen, best = [*chosen, index], score
    return chosen


def debiased_decay(decay: float, num_updates: int) -> float:
    """Decay of one update that keeps an exponential moving average free of its start value.

    d_t = d (1 - d^(t-1)) / (1 - d^t)

    The average after t updates is then sum_i d^(t-i) x_i / sum_i d^(t-i): what dividing a zero-started
    average by 1 - d^t gives, with the buffer usable as it is at any time.

    Args:
        decay: d in [0, 1).
        num_updates: t >= 1, this update included.

    Returns:
        Decay for update t: 0 at the first (the average is the first value), towards d later.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(debiased_decay(0.9, t), 4) for t in (1, 2, 3, 100)]
        [0.0, 0.4737, 0.631, 0.9]

    Source: Kingma & Ba 2014, arXiv:1412.6980, section 3 (bias correction). Differs: folded into the decay.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay is {decay}; it must be in [0, 1)")
    if num_updates < 1:
        raise ValueError(f"num_updates is {num_updates}; it counts this update, so it must be at least 1")
    if decay == 0.0 or num_updates == 1:
        return 0.0
    return 1.0 + (1.0 - decay) / math.expm1(num_updates * math.log(decay))


@torch.no_grad()
def ema_(averages: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """Move averages a step towards parameters, in place.

    average <- d average + (1 - d) parameter

    Averages stay float32: in bfloat16 a step of 0.001 is below half a unit in the last place and the average
    never moves.

    Args:
        averages: float32 tensors, written to.
        parameters: Tensors of the same shapes, of any floating dtype and device.
        decay: d in [0, 1]; 0 copies the parameters exactly.

    Raises:
        ValueError: If decay is out of range, the lists don't match, or an average is not float32.

    Example:
        >>> average = [torch.tensor([1.0, 1.0])]
        >>> ema_(average, [torch.tensor([2.0, 1.0], dtype=torch.bfloat16)], decay=0.9)
        >>> average
        [tensor([1.1000, 1.0000])]

    Source: Polyak & Juditsky 1992 (averaging of iterates), in its exponential form. Differs: nothing.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay is {decay}; it must be in [0, 1]")
    _check_match(averages, parameters)
    for average in averages:
        if average.dtype != torch.float32:
            raise ValueError(f"averages has a {average.dtype} tensor; averages are kept in float32")
    if decay == 0.0:  # whatever was there, infinities too
        torch._foreach_copy_(list(averages), list(parameters))
    else:
        _lerp_(averages, parameters, 1.0 - decay)


@torch.no_grad()
def merge(
    checkpoints: Iterable[Sequence[Tensor]],
    weights: Sequence[float],
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Weighted mean of checkpoints in float32, one checkpoint in memory at a time.

    theta = sum_i c_i theta_i,  as  theta <- theta + (c_i / (c_1 + .. + c_i)) (theta_i - theta)

    The running form makes the mean of equal checkpoints that checkpoint, to the last bit.

    Args:
        checkpoints: K lists of tensors of the same shapes, any floating dtype; may be a generator that loads
            them.
        weights: K weights >= 0 that sum to 1, in the order of `checkpoints`.
        out: float32 tensors to write the mean to. None makes new ones, where the first checkpoint is.

    Returns:
        The mean.

    Raises:
        ValueError: If the weights are not a mean, the number of checkpoints differs from theirs, tensors
            don't match, or one is not of a floating dtype.

    Example:
        >>> merge(([torch.tensor([float(i)])] for i in (1, 2, 4)), [0.5, 0.25, 0.25])
        [tensor([2.])]

    Source: arXiv:2203.05482 (model soups); arXiv:2507.17634 (merging in place of a decay). Differs: nothing.
    """
    if not weights or min(weights) < 0.0 or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ValueError(f"weights is {list(weights)}; weights must be 0 or more and sum to 1")
    merged: list[Tensor] | None = None
    total, count = 0.0, 0
    for tensors in checkpoints:
        count += 1
        if count > len(weights):
            break
        weight = weights[count - 1]
        if merged is None:
            if others := {t.dtype for t in tensors if not t.is_floating_point()}:
                raise ValueError(
                    f"checkpoints has a {others.pop()} tensor; only floating point can be averaged"
                )
            merged = [torch.empty_like(t, dtype=torch.float32) for t in tensors] if out is None else list(out)
            ema_(merged, tensors, 0.0)
        _check_match(merged, tensors)
        total += weight
        if count > 1 and weight > 0.0:
            _lerp_(merged, tensors, weight / total)
        del tensors  # else it would still be there while the next one is loaded
    if merged is None or count != len(weights):
        raise ValueError(
            f"checkpoints has {'more' if count > len(weights) else count} entries for {len(weights)} weights"
        )
    return merged


def _check_match(averages: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    if len(averages) != len(tensors):
        raise ValueError(f"there are {len(averages)} averages and {len(tensors)} tensors; they must pair up")
    for index, (average, tensor) in enumerate(zip(averages, tensors, strict=True)):
        if average.shape != tensor.shape:
            raise ValueError(
                f"tensor {index} has shape {tuple(tensor.shape)}, its average has {tuple(average.shape)}"
            )


def _lerp_(averages: Sequence[Tensor], tensors: Sequence[Tensor], weight: float) -> None:
    averages, tensors = (
        [piece for tensor in row for piece in _pieces(tensor)] for row in (averages, tensors)
    )
    for bucket in _buckets(averages):
        targets = [
            tensor.detach().to(average.device, torch.float32)
            for average, tensor in zip(averages[bucket], tensors[bucket], strict=True)
        ]
        torch._foreach_lerp_(averages[bucket], targets, weight)


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Rows of a tensor, as many at a time as a bucket holds."""
    if tensor.numel() <= _BUCKET_ELEMENTS or tensor.dim() < 2:
        return [tensor]
    return tensor.split(max(1, _BUCKET_ELEMENTS * len(tensor) // tensor.numel()))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[slice]:
    start, elements = 0, 0
    for index, tensor in enumerate(tensors):
        if elements and elements + tensor.numel() > _BUCKET_ELEMENTS:
            yield slice(start, index)
            start, elements = index, 0
        elements += tensor.numel()
    if start < len(tensors):
        yield slice(start, len(tensors))
