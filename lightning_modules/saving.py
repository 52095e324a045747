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
        module: The module that is saved, in a trainer and with its policy.

    Returns:
        The name of the `method`, the model's `config` and `generation_config`, and the source of the
        `tokenizer`, None if the data tell none.

    Example:
        >>> import rewarm
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> module = rewarm.DPO(tiny)
        >>> module.configure_model()
        >>> module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> made_with(module)["method"]
        'DPO'
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
        checkpoint: The checkpoint as Lightning has read it.
        module: The module that the checkpoint is to be loaded into.
        trainer: The trainer of the module.

    Raises:
        ValueError: If the two do not belong together; the message names both.

    Example:
        >>> from rewarm import GRPO
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> trainer.ckpt_path, trainer.state.fn = "last.ckpt", "fit"
        >>> checkpoint = {"rewarm_model": {"method": "DPO"}}
        >>> check_checkpoint(checkpoint, GRPO("models/sft"), trainer)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: last.ckpt: the checkpoint is of DPO, this run trains GRPO: export it, ...
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
        path: Path of the checkpoint, for the message.
        shapes: Shapes of the checkpoint's weights, by name.
        module: The module that the weights are to be loaded into.
        strict: Whether both must have weights of the same names.

    Raises:
        ValueError: If the weights differ; the message names both sides.

    Example:
        >>> check_weights("last.ckpt", {"weight": torch.Size([1, 3])}, nn.Linear(2, 1, bias=False))
        Traceback (most recent call last):
            ...
        ValueError: last.ckpt: weight has shape (1, 3) in the checkpoint, (1, 2) in this run's model
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
        module: The module whose language model is written.
        folder: Path of the folder; one that is there already is replaced.
        tokenizer: Tokenizer to save beside the model, with its chat template; None saves none.

    Example:
        >>> import rewarm, tempfile
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> module = rewarm.DPO(tiny)
        >>> module.configure_model()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(module, f"{folder}/model")
        ...     sorted(path.name for path in Path(folder, "model").glob("*.safetensors"))
        ['model.safetensors']
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
