"""What a batch holds: every key that is read from one, with its shape, its type and who writes it.

Loaders of this project write all keys of their kind of batch. Any other loader's batch with `input_ids` and
`labels` becomes one by `as_batch`.
"""

from collections.abc import Collection, Mapping
from typing import Any, Required, TypedDict

import torch
from torch import Tensor

from rewarm.functional.document_attention import Documents
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.functional.sequences import sequence_sums


class Counts(TypedDict, total=False):
    """What losses divide by: numbers of a batch (int), or of a whole optimizer step (float64, shape ()).

    Attributes:
        tokens: Targets that weigh something. Written by `collate_rows` and `RolloutLoader`.
        sequences: Sequences. Written by `collate_rows` and `RolloutLoader`.
        pairs: Preference pairs. Written by `PreferenceData`.
        chosen_tokens: Targets of chosen completions. Written by `PreferenceData`.
        trained_tokens: Targets of completions that are computed, without those whose advantage is 0. Written
            by `RolloutLoader`.

    Example:
        >>> counts: Counts = {"tokens": 9, "sequences": 3}
        >>> counts["tokens"] / counts["sequences"]
        3.0

    Source: ours.
    """

    tokens: Required[Any]
    sequences: Required[Any]
    pairs: Any
    chosen_tokens: Any
    trained_tokens: Any


class Batch(TypedDict, total=False):
    """B rows of T positions, in which sequences lie one after the other or alone.

    Attributes:
        input_ids: Tokens that the model reads. int64, shape (B, T). Written by `collate_rows`.
        position_ids: Place of each token in its document. It restarts at 0 where a packed document begins,
            and at more where a branch goes on from one. int64, shape (B, T). Written by `collate_rows`.
        targets: The token that follows each position, -100 where there is none to learn. int64, shape (B, T).
            Written by `collate_rows`.
        sequence_ids: Number of the sequence that each position is of, -1 for padding. int64, shape (B, T).
            Written by `collate_rows`.
        documents: What `position_ids` say, on the host, perhaps with the positions to compute: `Documents`.
            Written by `collate_rows`.
        num_targets: How many targets there are, on the host: an int. Written by `collate_rows`.
        ids: Number of each sequence's example in the data: a list of ints. Written by `Collate` and
            `RolloutLoader`.
        counts: Numbers of this batch: `Counts`. Written by `collate_rows`.
        window: Numbers of all batches of this rank's optimizer step: `Counts`. Written by `WindowLoader`.
        domain: Name of the source that all rows are from: a str. Written by `CorpusData`.
        weights: Factor of each target's loss. float32, shape (B, T). Written by `InstructionData`.
        tasks: Number of each target's task, -1 for none. int64, shape (B, T). Written by `InstructionData`.
        repeats: How many positions before each target the token stands that it repeats, 0 for none. int64,
            shape (B, T). Written by `InstructionData`.
        teacher_ids: A teacher's K likeliest tokens for each target. int64, shape (B, T, K). Written by
            `InstructionData`.
        teacher_logprobs: Log-probabilities of these tokens under the teacher, in nats. float32, shape (B, T,
            K). Written by `InstructionData`.

    Example:
        >>> ids, labels = torch.tensor([[5, 6, 7]]), torch.tensor([[-100, 6, 7]])
        >>> batch: Batch = as_batch({"input_ids": ids, "labels": labels})
        >>> batch["targets"], batch["position_ids"]
        (tensor([[   6,    7, -100]]), tensor([[0, 1, 2]]))

    Source: ours.
    """

    input_ids: Required[Tensor]
    position_ids: Required[Tensor]
    targets: Required[Tensor]
    sequence_ids: Required[Tensor]
    documents: Documents
    num_targets: int
    ids: list[int]
    counts: Required[Counts]
    window: Counts
    domain: str
    weights: Tensor
    tasks: Tensor
    repeats: Tensor
    teacher_ids: Tensor
    teacher_logprobs: Tensor


class PairBatch(Batch, total=False):
    """P preference pairs: the sequences are, in turns, a chosen completion and the rejected one to it.

    Attributes:
        columns: Numeric columns of the pairs, which `PreferenceData` reads. float32, shape (P, number of
            columns). Written by `Collate`.
        column_names: Names of these columns: a tuple of str. Written by `Collate`.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [5, 6, 9]])
        >>> batch: PairBatch = as_pair_batch({"input_ids": ids, "labels": ids})
        >>> batch["counts"]["pairs"]
        1

    Source: ours.
    """

    columns: Tensor
    column_names: tuple[str, ...]


class RolloutBatch(Batch, total=False):
    """B completions of groups of G that were sampled from the same prompt, one a row.

    Attributes:
        sampler_logprobs: Log-probability of each target when it was sampled, in nats, 0 elsewhere. float32,
            shape (B, T). Written by `RolloutLoader`.
        group_rewards: Rewards of the group that each completion is of. float32, shape (B, G). Written by
            `RolloutLoader`.
        group_places: Place of each completion in its group. int64, shape (B,). Written by `RolloutLoader`.
        temperature: What divided the logits when they were sampled: a float. Written by `RolloutLoader`.
        rollout_metrics: Numbers about the whole rollout by name: a dict of floats. Written by
            `RolloutLoader`.
        rewards: Rewards of completions sampled for validation. float32, any shape. Written by `PromptData`.

    Example:
        >>> sorted(RolloutBatch.__required_keys__ - Batch.__required_keys__)
        ['group_places', 'group_rewards', 'sampler_logprobs', 'temperature']

    Source: ours.
    """

    sampler_logprobs: Required[Tensor]
    group_rewards: Required[Tensor]
    group_places: Required[Tensor]
    temperature: Required[float]
    rollout_metrics: dict[str, float]
    rewards: Tensor


class ForeignBatch(TypedDict, total=False):
    """A batch of any other loader, such as a collator of transformers.

    Attributes:
        input_ids: Tokens that the model reads. int64, shape (B, T).
        labels: The token at each position that is to be learnt, else -100. int64, shape (B, T).
        attention_mask: 1 for tokens, 0 for padding on either side. Any type of number, shape (B, T).
        position_ids: Restarts at 0 where a packed document begins. int64, shape (B, T).

    Example:
        >>> ids = torch.tensor([[5, 6, 0]])
        >>> foreign: ForeignBatch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        >>> sorted(as_batch(foreign))  # doctest: +NORMALIZE_WHITESPACE
        ['counts', 'documents', 'input_ids', 'num_targets', 'position_ids', 'sequence_ids', 'targets']

    Source: the labels and the mask are those of the collators of transformers.
    """

    input_ids: Required[Tensor]
    labels: Required[Tensor]
    attention_mask: Tensor
    position_ids: Tensor


def as_batch(batch: Any, needs: Collection[str] = ()) -> Any:
    """Complete a batch of any loader that has `input_ids`, and `labels` as transformers means them.

    Labels stand at the token that they name, as in the collators of transformers: the target of a position is
    the label of the next one. Rows padded on either side need an `attention_mask`; packed rows need
    `position_ids` that restart. The function looks at values, for which a device waits;
    `rewarm.WindowLoader` calls it on the host.

    Args:
        batch: `input_ids` of shape (B, T), with `targets`, or `labels` of the same shape. `attention_mask`,
            `position_ids` and what else is declared in `Batch` may come along. A complete batch is returned
            as it is.
        needs: Further keys that the batch must have, such as `sampler_logprobs`.

    Returns:
        A batch with all keys that are required of one. Each row is one sequence if it was incomplete.

    Raises:
        ValueError: If the batch is no mapping, or lacks keys, which the error names; if its `attention_mask`
            holds anything but 0 and 1, or `labels` has tokens where the mask is 0.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
        >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> labels = ids.masked_fill(mask == 0, -100)
        >>> batch = as_batch({"input_ids": ids, "labels": labels, "attention_mask": mask})
        >>> batch["targets"].tolist(), batch["counts"]
        ([[6, 7, -100], [9, -100, -100]], {'tokens': 3, 'sequences': 2})

    Source: ours; what the labels mean is what transformers means by them.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch is a {type(batch).__name__}; it must be a mapping with 'input_ids' and 'labels'"
        )
    lacking = [name for name in ("input_ids", *needs) if name not in batch]
    if "targets" not in batch and "labels" not in batch:
        lacking.append("labels")
    if lacking:
        raise ValueError(
            f"a batch lacks {', '.join(map(repr, lacking))}; it has {', '.join(map(repr, sorted(batch)))}"
        )
    if Batch.__required_keys__ <= batch.keys():
        return batch
    completed = {name: value for name, value in batch.items() if name not in ("labels", "attention_mask")}
    input_ids = batch["input_ids"]
    mask = _checked_mask(batch.get("attention_mask"), input_ids)
    if "targets" not in batch:
        labels = batch["labels"]
        if bool(((labels != IGNORE_INDEX) & ~mask).any()):
            raise ValueError(f"labels has tokens where attention_mask is 0; it must be {IGNORE_INDEX} there")
        completed["targets"] = torch.full_like(input_ids, IGNORE_INDEX)
        completed["targets"][:, :-1] = labels[:, 1:]
    if "position_ids" not in batch:
        # Padding is a document of its own wherever it stands, and is never attended to.
        completed["position_ids"] = ((mask.cumsum(1) - 1) * mask).long()
    if "sequence_ids" not in batch:
        rows = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)
        completed["sequence_ids"] = rows.masked_fill(~mask, -1)
    if "documents" not in batch:
        completed["documents"] = Documents(completed["position_ids"])
    if "num_targets" not in batch:
        completed["num_targets"] = int((completed["targets"] != IGNORE_INDEX).sum())
    if "counts" not in batch:
        completed["counts"] = {"tokens": completed["num_targets"], "sequences": len(input_ids)}
    return completed


def as_pair_batch(batch: Any) -> Any:
    """Complete a batch of preference pairs of any loader, whose rows are chosen and rejected in turns.

    Args:
        batch: A batch that `as_batch` takes, with an even number of rows.

    Returns:
        The batch, whose `counts` have `pairs` and `chosen_tokens`.

    Raises:
        ValueError: As in `as_batch`, and for an odd number of rows.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [5, 6, 9]])
        >>> as_pair_batch({"input_ids": ids, "labels": ids})["counts"]
        {'tokens': 4, 'sequences': 2, 'pairs': 1, 'chosen_tokens': 2}

    Source: ours.
    """
    batch = as_batch(batch)
    if "pairs" in batch["counts"]:
        return batch
    targets = batch["targets"]
    if len(targets) % 2:
        raise ValueError(
            f"a batch has {len(targets)} rows; it must be pairs of a chosen and a rejected completion"
        )
    chosen = int((targets[::2] != IGNORE_INDEX).sum())
    return {**batch, "counts": {**batch["counts"], "pairs": len(targets) // 2, "chosen_tokens": chosen}}


def _checked_mask(mask: Tensor | None, input_ids: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if mask.shape != input_ids.shape or bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be 0 for padding and 1 for tokens, of the"
            f" shape of input_ids, {tuple(input_ids.shape)}"
        )
    return mask.bool()


def num_sequences(batch: Mapping[str, Any]) -> int:
    """Return how many sequences a batch has, those of padding not counted.

    Args:
        batch: A batch of this project's loaders, or what `as_batch` returns.

    Example:
        >>> num_sequences({"ids": [4, 4], "counts": {"tokens": 9, "sequences": 3}})
        2

    Source: ours.
    """
    # A rollout's counts are also those of completions that are not computed.
    return len(batch["ids"]) if "ids" in batch else int(batch["counts"]["sequences"])


@torch.no_grad()
def example_losses(logprobs: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Return the mean negative log-likelihood of each sequence of a batch.

    Args:
        logprobs: Log-probabilities of the targets, in nats, 0 where there is none. Shape (B, T).
        batch: The batch with these targets.

    Returns:
        Means in nats, 0 for a sequence without targets. Shape (sequences,).

    Example:
        >>> batch = {"targets": torch.tensor([[4, 5, -100]]), "ids": [7]}
        >>> batch["sequence_ids"] = torch.tensor([[0, 0, -1]])
        >>> example_losses(torch.tensor([[-1.0, -2.0, 0.0]]), batch)
        tensor([1.5000])

    Source: ours, the definition of a mean.
    """
    ids, sequences = batch["sequence_ids"], num_sequences(batch)
    totals = sequence_sums(-logprobs, ids, sequences)
    lengths = sequence_sums((batch["targets"] != IGNORE_INDEX).float(), ids, sequences)
    return totals / lengths.clamp(min=1.0)


def with_ids(batch: Mapping[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    """Add the `ids` of a batch's examples to what a step returns, if its loader tells them.

    Args:
        batch: The batch of the step.
        outputs: What the step returns.

    Example:
        >>> with_ids({"ids": [3]}, {"scores": 0.5}), with_ids({}, {"scores": 0.5})
        ({'scores': 0.5, 'ids': [3]}, {'scores': 0.5})

    Source: ours.
    """
    return outputs | {"ids": batch["ids"]} if "ids" in batch else outputs
