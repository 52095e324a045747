"""`rewarm export`: from a checkpoint to a Hugging Face folder, on the CPU, the weights in memory once."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rewarm.checkpoints.placing import check_free, put_in_place
from rewarm.checkpoints.weights import (
    DTYPES,
    CheckpointWeights,
    empty_model,
    load_tokenizer,
    open_weights,
    tied_names,
)
from rewarm.checkpoints.whole import is_sharded
from rewarm.checks import one_of
from rewarm.functional.averaging import merge


def export(
    checkpoint: str,
    *,
    output: str,
    tokenizer: str | None = None,
    average: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Write the policy of a checkpoint as a Hugging Face folder.

    This needs neither a GPU nor the processes that wrote the checkpoint, and main memory for the weights
    once; optimizer states are not read, except to find damage.

    Args:
        checkpoint: A `.ckpt` of any rewarm module: a file, or a folder with the shards of any number of
            ranks.
        output: Folder to write; must not be there yet.
        tokenizer: Tokenizer to put beside it, a folder or id; without it, the one that it was trained with.
        average: Take the weights averaged by `CheckpointAveraging`.
        dtype: Kind of the weights that are written; without it, that of the checkpoint: float32, unless it
            was trained in a true half precision. bfloat16 halves the folder, and rounds what a later training
            would go on from.

    Raises:
        ValueError: If the checkpoint is missing, damaged, of another kind or without an average, the output
            is there, or the dtype is unknown.
    """
    path = Path(checkpoint)
    check_free(output)
    if dtype is not None:
        one_of(DTYPES, dtype=dtype)
    if path.is_dir() and not is_sharded(path):
        raise ValueError(f"{checkpoint}: the folder is not a checkpoint")
    opened = open_weights(path)
    if average and not opened.averages:
        raise ValueError(
            f"{checkpoint}: CheckpointAveraging took no snapshot, so there is no average to export"
        )
    loaded = load_tokenizer(tokenizer or opened.made_with["tokenizer"])
    model = empty_model(opened.made_with)
    _fill(model, opened, opened.averages if average else {}, None if dtype is None else DTYPES[dtype])
    with put_in_place(output) as folder:
        model.save_pretrained(folder)
        if loaded is not None:
            loaded.save_pretrained(folder)


def _fill(
    model: PreTrainedModel,
    opened: CheckpointWeights,
    averages: dict[str, list[str]],
    dtype: torch.dtype | None,
) -> None:
    """Give a model on the meta device its weights, one tensor for all names that are tied."""
    tensors, weights = model.state_dict(keep_vars=True), dict[str, Tensor]()
    unknown = set(opened.like)
    # The largest first, as reading one takes copies of it.
    for tied in sorted(tied_names(model), key=lambda names: -tensors[names[0]].numel()):
        stored = [name for name in tied if name in opened.like]
        if not stored:
            raise ValueError(f"{opened.path}: the checkpoint lacks {tied[0]}")
        unknown -= set(stored)
        name = next((name for name in stored if name in averages), stored[0])
        if keys := averages.get(name):
            # Weight by weight, so that no second model is ever in memory.
            (tensor,) = merge(([opened.read(key)] for key in keys), opened.average_weights)
        else:
            tensor = opened.read(name)
        is_parameter = isinstance(tensors[name], nn.Parameter)
        tensor = tensor.to(dtype if dtype and is_parameter else opened.like[name].dtype)
        weights |= dict.fromkeys(tied, tensor)
    if unknown:
        raise ValueError(f"{opened.path}: the checkpoint has {min(unknown)}, which its model does not know")
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
