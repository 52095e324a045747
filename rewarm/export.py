"""From a checkpoint to a Hugging Face folder."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rewarm.functional.averaging import mean_weights, merge

_PREFIX = "policy.model."


def export(checkpoint: str, output: str, tokenizer: str | None = None, *, average: bool = False) -> None:
    """Write the policy of a Lightning checkpoint as a Hugging Face folder.

    Args:
        checkpoint: A `.ckpt` file of any rewarm module.
        output: Folder to write; must not be there yet.
        tokenizer: Tokenizer to put beside it; by default the one that it was trained with.
        average: Take the weights averaged by `CheckpointAveraging`.

    Raises:
        ValueError: If the checkpoint is missing, damaged, of another kind or without an average, or the
            output is there.
    """
    folder = Path(output)
    if folder.exists():
        raise ValueError(f"output {output} is there already: remove it or name another")
    state = load_checkpoint(checkpoint)
    if not isinstance(state, dict) or "rewarm_model" not in state:
        raise ValueError(f"{checkpoint}: not a checkpoint of a rewarm module")
    weights = state["state_dict"] | (_averages(state, checkpoint) if average else {})
    weights = {name.removeprefix(_PREFIX): w for name, w in weights.items() if name.startswith(_PREFIX)}
    fields = dict(state["rewarm_model"]["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    loaded = _load_tokenizer(tokenizer or state["rewarm_model"]["tokenizer"])
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    if loaded is not None:
        loaded.save_pretrained(partial)
    partial.rename(folder)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a Lightning checkpoint on the CPU.

    Raises:
        ValueError: If it is missing or damaged.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        raise ValueError(f"{path}: the checkpoint is damaged ({error})") from error


def _load_tokenizer(source: str | None) -> PreTrainedTokenizerBase | None:
    if source is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {source!r} cannot be loaded: give --tokenizer") from error


def _averages(state: dict[str, Any], path: str) -> dict[str, torch.Tensor]:
    for key, callback in state.get("callbacks", {}).items():
        if str(key).startswith("CheckpointAveraging"):
            snapshots = callback["averages"]
            if not snapshots:
                break
            means = merge(snapshots, mean_weights(len(snapshots)))
            return dict(zip(callback["names"], means, strict=True))
    raise ValueError(f"{path}: CheckpointAveraging took no snapshot, so there is no average to export")
