"""Log-probabilities of target tokens straight from hidden states, without holding the (N, V) logits.

Every loss of the project is arithmetic on what `token_logprobs` returns.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from typing import Any, Literal, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["IGNORE_INDEX", "Backend", "rows_per_chunk", "target_places", "token_logprobs"]

IGNORE_INDEX = -100
"""The target of a position that has none."""

Backend = Literal["auto", "torch", "liger", "dense"]

# Bytes of one chunk of float32 logits: on a CPU from what its caches hold up to the larger, see
# `rows_per_chunk`. An accelerator needs larger chunks to multiply at full speed.
_CPU_CHUNK_BYTES = (2**24, 2**26)
_ACCELERATOR_CHUNK_BYTES = 2**29
# Logits smaller than this in total (a small vocabulary) are kept for backward, not computed twice.
_KEEP_BYTES = 2**26
# Logits (targets x vocabulary) from which on "auto" takes Liger. The more tokens, the larger its chunks: it
# took 2.2 times as long as dense logits at 2^29 and 1.13 times at 2^32 (its own table for 0.4.2: A100,
# D 4096, V 128256), where logits computed twice cost 4/3 of dense products. `python -m benchmarks.head` on a
# GPU prints what to put here for that one.
_LIGER_LOGITS = 2**32

_logger = logging.getLogger(__name__)


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: Literal[False] = False,
    backend: Backend = "torch",
    chunk_size: int | None = None,
    num_targets: int | None = None,
) -> Tensor: ...


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: Literal[True],
    backend: Backend = "torch",
    chunk_size: int | None = None,
    num_targets: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    backend: Backend = "torch",
    chunk_size: int | None = None,
    num_targets: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token under softmax(head(hidden)), differentiable, in float32.

    z = hidden @ weight.T + bias
    l = z / temperature                              without softcap
    l = softcap * tanh(z / softcap) / temperature    with softcap
    logprob[n] = l[n, targets[n]] - logsumexp(l[n, :])
    entropy[n] = -sum_v p[n, v] * log p[n, v],  p = softmax(l)

    Positions without a target are dropped before the head's matrix product, so a prompt-heavy batch pays only
    for its completion tokens. On CUDA that costs one host synchronisation, unless `num_targets` is given: the
    number of targets is a shape.

    Args:
        hidden: Last hidden states, any floating dtype. Shape (N, D).
        weight: Weight of the head, of hidden's dtype unless autocast is on; may be the tied embedding.
            Shape (V, D).
        targets: Token ids in [0, V), or `IGNORE_INDEX` where there is no target. int64, shape (N,).
        bias: Bias of the head. Shape (V,).
        temperature: Sampling temperature that divides the logits, > 0.
        softcap: Bound of the tanh soft cap on the logits, > 0, or None.
        with_entropy: Also return the entropy of the next-token distribution in nats. It carries no gradient.
        backend: "torch" goes over the tokens in chunks and computes the logits again in backward; runs
            everywhere. Its products add up in float32, under autocast and for bfloat16 too. "liger" is
            Liger-Kernel's fused linear cross entropy: CUDA with Triton, no entropy, synchronises more often.
            "dense" builds the full logits: the reference. "liger" and "dense" round logits to the products'
            dtype, "torch" does not. "auto" is "liger" on CUDA from 2^32 logits (targets x vocabulary) on
            where it can do what is asked, else "torch"; it logs each choice once.
        chunk_size: Tokens per chunk of the "torch" backend, >= 1. None: from the shapes and a memory budget.
        num_targets: Number of targets that are not `IGNORE_INDEX`, if the host knows it, in [0, N]; a wrong
            one is an error (on CUDA an assertion of the device). None: they are counted.

    Returns:
        Log-probabilities in nats, 0 without gradient where there is no target; or (logprobs, entropy).
        float32 (float64 for float64 input), shape (N,) each. With no target at all they are zeros that still
        depend on hidden and weight, so that backward runs on every rank.

    Raises:
        ValueError: If a shape, dtype, value or combination of arguments is not allowed.
        RuntimeError: If the backend is "liger" and it cannot run here.

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> token_logprobs(hidden, weight, torch.tensor([0, IGNORE_INDEX]))
        tensor([-0.1269,  0.0000])

    Source: Hsu et al. 2024, arXiv:2410.10989 (chunks over tokens); Wijmans et al. 2024, arXiv:2411.09009
    (logits computed again in backward); Gemma Team 2024, arXiv:2408.00118 (soft cap).   Differs: any upstream
    gradient per token, a weight gradient that adds up in float32, and no gradient left out for being small.
    """
    _check_arguments(hidden, weight, targets, bias, temperature, softcap, backend, chunk_size, num_targets)
    if backend not in ("auto", "torch") and chunk_size is not None:
        raise ValueError(f"chunk_size={chunk_size} is for the 'torch' backend only, backend is {backend!r}")
    if backend == "liger" and with_entropy:
        raise ValueError(
            "with_entropy=True is not possible with backend 'liger'; allowed: 'torch', 'dense', 'auto'"
        )
    if backend == "liger" and (problem := _liger_problem(hidden.device.type, hidden.dtype)):
        raise RuntimeError(f"backend 'liger' cannot run: {problem}")

    num_rows = len(targets)
    kept = target_places(targets, num_targets)
    if backend == "auto":
        needs_torch = with_entropy or chunk_size is not None
        num_logits = len(kept) * len(weight)
        backend = _choose_backend(hidden.device.type, hidden.dtype, num_logits, needs_torch=needs_torch)
    if len(kept) < num_rows:
        hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
    # Elsewhere a look at the values would be one more synchronisation, and gather checks them on the device.
    if (backend == "liger" or targets.device.type == "cpu") and len(kept):
        lowest, highest = (int(bound) for bound in targets.aminmax())
        if lowest < 0 or highest >= len(weight):
            raise ValueError(
                f"targets go from {lowest} to {highest}; allowed: 0 to {len(weight) - 1}, "
                f"or {IGNORE_INDEX} for none"
            )

    head = (weight, bias, targets, temperature, softcap)
    results: tuple[Tensor, ...]
    if backend == "dense":
        results = _dense_logprobs(hidden, *head)
    elif backend == "liger" and len(kept):
        results = (_liger_logprobs(hidden, *head),)
    else:
        small = chunk_size is None and 4 * len(kept) * len(weight) <= _KEEP_BYTES
        chunk_size = chunk_size or rows_per_chunk(len(kept), len(weight), weight.shape[1], hidden.device.type)
        keep = small and softcap is None and torch.is_grad_enabled()
        options = (with_entropy, chunk_size, keep, _operand_dtype(hidden))
        results = _ChunkedLogprobs.apply(hidden, *head, *options)
    if len(kept) < num_rows:
        results = tuple(value.new_zeros(num_rows).index_copy(0, kept, value) for value in results)
    return (results[0], results[1]) if with_entropy else results[0]


class _ChunkedLogprobs(torch.autograd.Function):
    """The "torch" backend: no chunk's logits outlive it, unless all of them are small and `keep` is set."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        with_entropy: bool,
        chunk_size: int,
        keep: bool,
        operand_dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        wide = _wide(hidden.dtype)
        rows_at_once = len(hidden) if keep else min(chunk_size, len(hidden))
        buffer = hidden.new_empty((rows_at_once, len(weight)), dtype=wide)
        chosen, entropy = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(2))
        weight_operand = weight.to(operand_dtype)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            chunk = hidden[rows].to(operand_dtype)
            logits = buffer[rows] if keep else buffer[: len(chunk)]
            _write_logits(logits, chunk, weight_operand, bias, temperature, softcap)
            # In place: of the row's other elements the softmax needs the maximum and the sum only.
            logprobs = torch.log_softmax(logits, 1, out=logits)
            chosen[rows] = logprobs.gather(1, targets[rows, None]).squeeze(1)
            if with_entropy:
                probabilities = torch.exp(logprobs, out=None if keep else logprobs)
                entropy[rows] = torch.special.entr(probabilities, out=probabilities).sum(1)
        ctx.save_for_backward(hidden, weight, bias, targets, buffer if keep else None)
        ctx.settings = (temperature, softcap, chunk_size, operand_dtype)
        if not with_entropy:
            return (chosen,)
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, kept_logprobs = ctx.saved_tensors
        temperature, softcap, chunk_size, operand_dtype = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide = _wide(hidden.dtype)
        buffer = hidden.new_empty((min(chunk_size, len(hidden)), len(weight)), dtype=wide)
        # The slope of the soft cap needs the logits beside their softmax.
        scratch = buffer if softcap is None else torch.empty_like(buffer)
        operand_buffer = scratch if operand_dtype == wide else torch.empty_like(buffer, dtype=operand_dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        weight_operand = weight.to(operand_dtype)
        # d logprob / d logits = onehot - softmax. Sign, upstream gradient, temperature: one factor per row.
        row_factor = (upstream.to(wide) / -temperature).unsqueeze(1)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            chunk, target = hidden[rows].to(operand_dtype), targets[rows, None]
            if kept_logprobs is not None:
                softmax = torch.exp(kept_logprobs[rows], out=scratch[: len(chunk)])
            else:
                logits = buffer[: len(chunk)]
                _write_logits(logits, chunk, weight_operand, bias, temperature, softcap)
                softmax = torch.softmax(logits, 1, out=scratch[: len(chunk)])
            difference = softmax.scatter_(1, target, softmax.gather(1, target) - 1)
            if softcap is not None:
                tanh_slope = logits.mul_(temperature / softcap).square_().neg_().add_(1)
                difference.mul_(tanh_slope)
            # Factor and cast in one pass over the (rows, V) matrix.
            operand = torch.mul(difference, row_factor[rows], out=operand_buffer[: len(chunk)])
            if grad_hidden is not None:
                row_grads = grad_hidden[rows]
                product = row_grads if row_grads.dtype == wide else torch.empty_like(row_grads, dtype=wide)
                row_grads.copy_(_add_product(product, operand, weight_operand, beta=0))
            if grad_weight is not None:
                _add_product(grad_weight, operand.t(), chunk)
            if grad_bias is not None:
                grad_bias += operand.sum(0, dtype=wide)
        pairs = ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
        grads = (None if grad is None else grad.to(tensor.dtype) for grad, tensor in pairs)
        return (*grads, None, None, None, None, None, None, None)


def target_places(targets: Tensor, num_targets: int | None = None) -> Tensor:
    """Places of a row that have a target.

    Args:
        targets: Token ids, or `IGNORE_INDEX` where there is no target. int64, shape (N,).
        num_targets: Number of targets, if the host knows it, as in `token_logprobs`.

    Returns:
        int64, shape (number of targets,).

    Raises:
        ValueError: If num_targets is not the number of targets (on CUDA an assertion of the device).

    Example:
        >>> target_places(torch.tensor([IGNORE_INDEX, 5, 0]))
        tensor([1, 2])

    Source: ours.   Differs: nothing.
    """
    is_target = targets != IGNORE_INDEX
    if num_targets is not None and is_target.device.type == "cuda":
        return _known_places(is_target, num_targets)
    places = is_target.nonzero().squeeze(1)
    if num_targets not in (None, len(places)):
        raise ValueError(f"num_targets is {num_targets}, but targets has {len(places)}")
    return places


def _known_places(is_target: Tensor, num_targets: int) -> Tensor:
    """Places of a known number of targets, without waiting for the device."""
    torch._assert_async(is_target.sum() == num_targets, "num_targets is not the number of targets")
    return torch.nonzero_static(is_target, size=num_targets).squeeze(1)


def _write_logits(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> None:
    if bias is not None:
        logits.copy_(bias.to(logits.dtype) / temperature)
    _add_product(logits, hidden, weight.t(), beta=0 if bias is None else 1, alpha=1 / temperature)
    if softcap is not None:
        # softcap * tanh(z / softcap) / temperature, written in terms of z / temperature
        bound = softcap / temperature
        logits.div_(bound).tanh_().mul_(bound)


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Write beta * out + alpha * left @ right to out, without rounding to the dtype of narrower operands."""
    if left.dtype == out.dtype:
        return torch.addmm(out, left, right, beta=beta, alpha=alpha, out=out)
    return torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)


def _operand_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the products' operands: narrow only where the hardware then adds up in float32."""
    device_type, dtype = hidden.device.type, hidden.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    tensor_cores = device_type == "cuda" and torch.cuda.get_device_capability(hidden.device)[0] >= 8
    return dtype if tensor_cores else _wide(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rows_per_chunk(num_rows: int, vocab_size: int, width: int, device_type: str) -> int:
    """Tokens whose logits the "torch" backend holds at once.

    Args:
        num_rows: Tokens with a target, >= 0.
        vocab_size: V, >= 1.
        width: D, the size of a hidden state, >= 1.
        device_type: Such as `cuda`.

    Returns:
        Tokens per chunk, >= 1.

    Example:
        >>> rows_per_chunk(10_000, vocab_size=32_000, width=1024, device_type="cpu")
        500

    Source: ours.
    """
    budget = _ACCELERATOR_CHUNK_BYTES
    if device_type == "cpu":
        # Each chunk passes over the weight gradient once: that many rows make it cheap beside the products.
        lowest, highest = _CPU_CHUNK_BYTES
        budget = min(max(4 * vocab_size * 2 * width, lowest), highest)
    most = max(1, budget // (4 * vocab_size))
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // num_chunks))


def _dense_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(_wide(logits.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = F.log_softmax(logits / temperature, dim=-1)
    entropy = torch.special.entr(logprobs.detach().exp()).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


def _liger_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    function, _ = _load_liger()
    if temperature != 1.0:
        # (s / T) * tanh((z / T) / (s / T)) = s * tanh(z / s) / T: scaling the inputs and the bound is exact.
        hidden = hidden / temperature
        bias = None if bias is None else bias / temperature
        softcap = None if softcap is None else softcap / temperature
    # In order: ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss,
    # accum_dtype. With any reduction but "none" the backward takes its upstream gradient for one scalar.
    options = (None, IGNORE_INDEX, 0.0, 0.0, "none", softcap, False, torch.float32)
    return -function.apply(hidden, weight, targets, bias, *options)[0]


@functools.cache
def _load_liger() -> tuple[Any, str | None]:
    """Liger's autograd function and None, or None and why it cannot be used."""
    try:
        from liger_kernel.ops import fused_linear_cross_entropy as liger
    except ImportError as error:
        return None, f"liger-kernel cannot be imported ({error})"
    if "token_grad_output" not in inspect.signature(liger.fused_linear_cross_entropy_forward).parameters:
        return None, "this liger-kernel has wrong gradients for per-token losses; allowed: 0.8.5 or newer"
    return liger.LigerFusedLinearCrossEntropyFunction, None


def _liger_problem(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"hidden is on device {device_type!r}; allowed: 'cuda', or any with TRITON_INTERPRET=1 set"
    if dtype == torch.float64:
        return "hidden is float64, and its kernel works in float32"
    return _load_liger()[1]


def _choose_backend(
    device_type: str, dtype: torch.dtype, num_logits: int, *, needs_torch: bool
) -> Literal["torch", "liger"]:
    if needs_torch:
        problem: str | None = "entropy or chunk_size was asked for"
    elif device_type != "cuda":
        problem = f"hidden is on device {device_type!r}"
    elif num_logits < _LIGER_LOGITS:
        problem = f"fewer than {_LIGER_LOGITS} logits"
    else:
        problem = _liger_problem(device_type, dtype)
    _log_choice("torch" if problem else "liger", problem)
    return "torch" if problem else "liger"


@functools.cache
def _log_choice(choice: str, reason: str | None) -> None:
    _logger.info("log-probabilities: backend 'auto' is %r%s", choice, f" ({reason})" if reason else "")


def _check_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    backend: str,
    chunk_size: int | None,
    num_targets: int | None,
) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(map(repr, get_args(Backend)))}")
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype} of shape {tuple(hidden.shape)}; allowed: floating, (N, D)"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or len(weight) == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; allowed: (V, {hidden.shape[1]}) with V >= 1"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {targets.dtype} of shape {tuple(targets.shape)}; allowed: int64, ({len(hidden)},)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; allowed: ({len(weight)},)")
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"weight is {weight.dtype}; allowed without autocast: hidden's dtype, {hidden.dtype}"
        )
    for name, value in (("temperature", temperature), ("softcap", softcap), ("chunk_size", chunk_size)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; allowed: > 0 and finite")
    if num_targets is not None and not 0 <= num_targets <= len(targets):
        raise ValueError(f"num_targets is {num_targets}; allowed: 0 to {len(targets)}, or None")
