"""What losses need of each token's distribution beside its log-probability, without the (N, V) logits."""

from collections.abc import Collection
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rewarm.functional.logprob import Backend, _operand_dtype, target_places, token_logprobs

Statistic = Literal["entropy", "logsumexp", "mean_logprobs", "candidates"]

# Bytes of one chunk of the head's gathered rows.
_CHUNK_BYTES = 2**27


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Collection[Statistic],
    *,
    candidates: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: Backend = "auto",
    num_targets: int | None = None,
) -> dict[str, Tensor]:
    """Log-probabilities of the targets, and more of their distributions.

    The logits l are those of `rewarm.functional.logprob.token_logprobs`. With a target's own logit, which
    costs one product of two vectors, and its log-probability,

    logsumexp[n] = l[n, targets[n]] - logprob[n]
    mean_logprobs[n] = mean over v of l[n, v] - logsumexp[n],  where the mean of the logits is one product
        with the mean row of the head
    candidates[n, k] = l[n, ids[n, k]] - logsumexp[n]

    Args:
        hidden: Last hidden states, any floating dtype. Shape (N, D).
        weight: Weight of the head. Shape (V, D).
        targets: Token ids in [0, V), or -100 where there is no target. int64, shape (N,).
        statistics: Names of the statistics to return. `entropy` carries no gradient, the others do.
        candidates: Token ids in [0, V) whose log-probabilities are wanted. int64, shape (N, K).
        bias: Bias of the head. Shape (V,).
        temperature: Temperature that divides the logits, > 0.
        softcap: Bound of the tanh soft cap on the logits, > 0, or None.
        backend: Backend of the log-probabilities, see `token_logprobs`.
        num_targets: Number of targets, if the host knows it, as in `token_logprobs`.

    Returns:
        `logprobs` and each statistic by its name, 0 where there is no target. float32 (float64 for float64
        input), shape (N,); `candidates` (N, K).

    Raises:
        ValueError: For an unknown statistic, `candidates` without ids, or `mean_logprobs` with a soft cap,
            after which the mean of the logits is no product any more.

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> token_statistics(hidden, weight, torch.tensor([0]), ["logsumexp"])
        {'logprobs': tensor([-0.1269]), 'logsumexp': tensor([2.1269])}

    Source: ours.   Differs: nothing.
    """
    for wanted in statistics:
        if wanted not in get_args(Statistic):
            known = ", ".join(map(repr, get_args(Statistic)))
            raise ValueError(f"statistics holds {wanted!r}; known are {known}")
    if "candidates" in statistics and (candidates is None or candidates.shape[:1] != targets.shape):
        shape = None if candidates is None else tuple(candidates.shape)
        raise ValueError(f"candidates has shape {shape}; it must be ({len(targets)}, K)")
    if "mean_logprobs" in statistics and softcap is not None:
        raise ValueError(f"mean_logprobs (label smoothing) is not possible with softcap {softcap}")
    results: dict[str, Tensor] = {}
    options: dict[str, Any] = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "backend": backend,
        "num_targets": num_targets,
    }
    if "entropy" in statistics:
        logprobs, results["entropy"] = token_logprobs(hidden, weight, targets, **options, with_entropy=True)
    else:
        logprobs = token_logprobs(hidden, weight, targets, **options)
    if not set(statistics) - {"entropy"}:
        return {"logprobs": logprobs, **results}
    kept = target_places(targets, num_targets)
    hidden = hidden.index_select(0, kept)
    own = _chosen_logits(hidden, weight, targets[kept, None], bias, temperature, softcap).squeeze(1)
    logsumexp = own - logprobs.index_select(0, kept)
    values = {}
    if "logsumexp" in statistics:
        values["logsumexp"] = logsumexp
    if "mean_logprobs" in statistics:
        dtype = _operand_dtype(hidden)
        row = weight.to(dtype).to(logprobs.dtype).mean(0)
        mean = hidden.to(dtype).to(logprobs.dtype) @ row + (0.0 if bias is None else bias.mean())
        values["mean_logprobs"] = mean / temperature - logsumexp
    if "candidates" in statistics:
        assert candidates is not None
        chosen = _chosen_logits(hidden, weight, candidates[kept], bias, temperature, softcap)
        values["candidates"] = chosen - logsumexp[:, None]
    for name, value in values.items():
        results[name] = value.new_zeros((len(targets), *value.shape[1:])).index_copy(0, kept, value)
    return {"logprobs": logprobs, **results}


def _chosen_logits(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """Logits of some tokens of each position: in chunks whose gathered rows of the head are not kept."""
    dtype = _operand_dtype(hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        rows = weight[ids].to(dtype).to(wide)
        logits = torch.einsum("nd,nkd->nk", hidden.to(dtype).to(wide), rows)
        logits = logits if bias is None else logits + bias[ids]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return logits / temperature

    size = max(1, _CHUNK_BYTES // (4 * ids.shape[1] * weight.shape[1]))
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [
            checkpoint(
                chunk,
                hidden[start : start + size],
                weight,
                bias,
                ids[start : start + size],
                use_reentrant=False,
                preserve_rng_state=False,  # nothing is drawn
            )
            for start in range(0, max(1, len(ids)), size)
        ]
    return torch.cat(parts)
