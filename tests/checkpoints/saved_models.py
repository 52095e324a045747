"""Random models, saved in every way that `rewarm.checkpoints.weights` reads."""

import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny

KINDS = ["file", "shards", "folder", "split"]


def build(seed, dtype=torch.float32, **fields):
    """A model with weights that are large enough to tell apart."""
    config = dict(tiny.LLAMA) | fields
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    return model.to(dtype)


def save(model, path, kind, *, tokenizer=None, averages=(), extra=None):
    """A checkpoint as one file or as one rank's shards, or a Hugging Face folder, whole or split."""
    if kind in ("folder", "split"):
        model.save_pretrained(path, max_shard_size="20KB" if kind == "split" else "1GB")
        tiny.build_tokenizer(tiny.CHAT_TEMPLATE).save_pretrained(path)
        return path
    names = [f"policy.model.{name}" for name, _ in model.named_parameters()]
    weights = {f"policy.model.{name}": tensor for name, tensor in model.state_dict().items()}
    averaging = {
        "names": names,
        "averages": [[row[name] for name in names] for row in averages],
        "weights": [1 / len(averages) for _ in averages],
    }
    state = {
        "rewarm_model": {"config": model.config.to_dict(), "tokenizer": tokenizer},
        "state_dict": weights | (extra or {}),
        "callbacks": {"CheckpointAveraging": averaging},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.randn(50)}}}],
    }
    if kind == "shards":
        parts = {"state_dict": state.pop("state_dict")}
        parts["optimizer_1"] = {
            f"averages.{number}.{name}": row[name] for number, row in enumerate(averages) for name in names
        }
        averaging |= {"averages": [], "shards": ("optimizer_1", len(averages))}
        dcp.save(parts, checkpoint_id=path, no_dist=True)
    torch.save(state, path / "meta.pt" if kind == "shards" else path)
    return path
