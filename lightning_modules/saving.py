"""What a module leaves behind: Hugging Face folders, and what checkpoints tell of the model in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedTokenizerBase

from rewarm.checkpoints.placing import put_in_place
from rewarm.functional.shards import any_sharded

if TYPE_CHECKING:
    from rewarm.lightning_modules.base import LanguageModule


def made_with(module: "LanguageModule") -> dict[str, Any]:
    """Return what `rewarm export` needs to rebuild a module's model without its run's configuration.

    Args:
        module: Whose checkpoint this goes into.
    """
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    return {
        "method": type(module).__name__,
        "config": module.policy.model.config.to_dict(),
        "generation_config": module.policy.model.generation_config.to_dict(),
        "tokenizer": getattr(data, "tokenizer_source", None),
    }


def check_checkpoint(checkpoint: Mapping[str, Any], module: "LanguageModule", trainer: Trainer) -> None:
    """Refuse a checkpoint of another model or, to train on from, of another method.

    Args:
        checkpoint: As Lightning has read it.
        module: What is to be loaded.
        trainer: Its trainer.

    Raises:
        ValueError: If it is; names both.
    """
    path, made = str(trainer.ckpt_path), checkpoint.get("rewarm_model", {})
    method = made.get("method", type(module).__name__)
    if trainer.state.fn == "fit" and method != type(module).__name__:
        raise ValueError(
            f"{path}: the checkpoint is of {method}, this run trains {type(module).__name__}: export it,"
            " and give the folder as model"
        )
    kinds = (made.get("config", {}).get("model_type"), module.policy.model.config.model_type)
    if None not in kinds and kinds[0] != kinds[1]:
        raise ValueError(f"{path}: the checkpoint is of {kinds[0]}, this run's model is {kinds[1]}")
    # Strategies that shard have loaded and checked the weights by now.
    if "state_dict" in checkpoint:
        shapes = {name: weight.shape for name, weight in checkpoint["state_dict"].items()}
        check_weights(path, shapes, module, module.strict_loading)


def check_weights(
    path: str | Path, shapes: Mapping[str, torch.Size], module: nn.Module, strict: bool = True
) -> None:
    """Compare the weights of a checkpoint with those of a module, before they are read.

    Args:
        path: Of the checkpoint.
        shapes: Of its weights, by name.
        module: What is to be loaded.
        strict: Whether both must have the same names.

    Raises:
        ValueError: If they differ; names both sides.
    """
    ours = {name: weight.shape for name, weight in module.state_dict().items()}
    for name in ours.keys() & shapes.keys() if not strict else [*ours, *shapes]:
        if name not in shapes:
            raise ValueError(f"{path}: the checkpoint lacks {name}, which this run's model has")
        if name not in ours:
            raise ValueError(f"{path}: the checkpoint has {name}, which this run's model lacks")
        if shapes[name] != ours[name]:
            raise ValueError(
                f"{path}: {name} has shape {tuple(shapes[name])} in the checkpoint, {tuple(ours[name])} in"
                " this run's model"
            )


def save_pretrained(
    module: "LanguageModule", folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads.

    The folder appears whole or not at all. Shards are gathered on rank 0, in its main memory: all ranks must
    call this together.

    Args:
        module: Whose language model is written.
        folder: Where to; replaced if it is there.
        tokenizer: Saved beside the model, with its chat template.
    """
    weights = _gathered_weights(module)
    trainer = module.attached_trainer
    if trainer is not None and not trainer.is_global_zero:
        return
    with put_in_place(folder, replace=True) as place:
        module.policy.model.save_pretrained(place, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)


def _gathered_weights(module: "LanguageModule") -> dict[str, Any] | None:
    """The language model's weights, assembled on rank 0; None if they are not in shards."""
    model = module.policy.model
    if not any_sharded(model.parameters()):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(module.policy, options=options)
    # Tied weights once, as transformers writes them.
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    inner = {
        name.removeprefix("model."): weight for name, weight in weights.items() if name.startswith("model.")
    }
    return {name: weight for name, weight in inner.items() if name not in tied}
