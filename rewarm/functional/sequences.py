"""Values of tokens brought together by the sequence they are in, and handed back to its tokens."""

import torch
from torch import Tensor


def sequence_sums(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Sum of per-token values over each sequence of a batch of packed or padded rows.

    sums[s] = sum over (b, t) with sequence_ids[b, t] == s of values[b, t]

    Args:
        values: One value per token. Shape (B, T).
        sequence_ids: Sequence of each token, in [0, num_sequences), or -1 for padding. int64, shape (B, T).
        num_sequences: Number of sequences in the batch, >= 0.

    Returns:
        Sums, 0 for a sequence without tokens; differentiable. float32 (float64 for float64 values), shape
        (num_sequences,).

    Raises:
        ValueError: Shapes differ, or (checked on the CPU; a device reports it itself) an id is out of range.

    Example:
        >>> sequence_sums(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[0, 0, 1, -1]]), 2)
        tensor([3., 4.])

    Source: ours.   Differs: nothing.
    """
    if values.shape != sequence_ids.shape:
        raise ValueError(
            f"sequence_ids has shape {tuple(sequence_ids.shape)}; allowed: values' {tuple(values.shape)}"
        )
    if num_sequences < 0:
        raise ValueError(f"num_sequences is {num_sequences}; allowed: >= 0")
    if sequence_ids.device.type == "cpu" and sequence_ids.numel():
        lowest, highest = (int(bound) for bound in sequence_ids.aminmax())
        if lowest < -1 or highest >= num_sequences:
            raise ValueError(
                f"sequence_ids go from {lowest} to {highest}; allowed: -1 to {num_sequences - 1}"
            )
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    # Padding is added up in an entry of its own, which is cut off: no synchronisation, and NaN does no harm.
    sums = values.new_zeros(num_sequences + 1).index_add(0, sequence_ids.flatten() + 1, values.flatten())
    return sums[1:]


def sequence_means(values: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Mean of the masked per-token values of each sequence.

    means[s] = sum over (b, t) of values[b, t] * mask[b, t] / sum of mask[b, t],  sequence_ids[b, t] == s

    Args:
        values: One value per token. Shape (B, T).
        mask: True where a token counts. Shape (B, T).
        sequence_ids: Sequence of each token, in [0, num_sequences), or -1 for padding. int64, shape (B, T).
        num_sequences: Number of sequences in the batch, >= 0.

    Returns:
        Means, 0 for a sequence without tokens that count; differentiable. Shape (num_sequences,).

    Raises:
        ValueError: As in `sequence_sums`.

    Example:
        >>> values, ids = torch.tensor([[1.0, 3.0, 5.0, 8.0]]), torch.tensor([[0, 0, 1, -1]])
        >>> sequence_means(values, torch.tensor([[True, True, False, True]]), ids, 2)
        tensor([2., 0.])

    Source: ours.   Differs: nothing.
    """
    totals = sequence_sums(values * mask, sequence_ids, num_sequences)
    return totals / sequence_sums(mask.float(), sequence_ids, num_sequences).clamp(min=1.0)


def per_token(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Give each token the value of its sequence.

    Args:
        values: One value per sequence. Shape (num_sequences,).
        sequence_ids: Sequence of each token, -1 for padding. int64, shape (B, T).

    Returns:
        The values, 0 for padding. Shape (B, T).

    Example:
        >>> per_token(torch.tensor([2.0, 7.0]), torch.tensor([[0, 0, 1, -1]]))
        tensor([[2., 2., 7., 0.]])

    Source: ours.   Differs: nothing.
    """
    # The entry of padding, -1, is the last one.
    return torch.cat([values, values.new_zeros(1)])[sequence_ids]
