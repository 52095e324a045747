"""The policy: a transformers model whose forward gives log-probabilities, built from a folder or a config."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rewarm.functional.logprob import Backend, token_logprobs

# Fields that models read though their configs don't declare them, and older names that transformers
# translates.
_UNDECLARED = {"head_dim", "rope_theta", "rope_scaling", "partial_rotary_factor"}


class Policy(nn.Module):
    """A causal language model whose forward returns the log-probability of each target.

    The head is applied inside `forward`, and to target tokens alone: distributed wrappers see an ordinary
    forward, and the (tokens, vocabulary) logits never exist.

    Args:
        model: Any transformers causal language model with a plain linear head.
        backend: How log-probabilities are computed, see `rewarm.functional.logprob.token_logprobs`.
    """

    def __init__(self, model: PreTrainedModel, backend: Backend = "auto") -> None:
        super().__init__()
        self.model = model
        self.backend: Backend = backend
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Granite divides its logits, Cohere multiplies them: both are a temperature.
        self.logit_temperature = getattr(config, "logits_scaling", 1.0) / getattr(config, "logit_scale", 1.0)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, targets: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Return log-probabilities of the targets.

        Args:
            input_ids: Shape (B, T).
            position_ids: Restarts at 0 where a packed document begins, which keeps documents apart. Shape (B,
                T).
            targets: The token that follows each position, -100 where there is none to learn. Shape (B, T).
            temperature: Divides the logits, > 0.

        Returns:
            Log-probabilities in nats, 0 where there is no target, float32. Shape (B, T).
        """
        # A cache would make transformers forget the block-diagonal mask of packed rows.
        hidden = self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
        head = self.model.get_output_embeddings()
        logprobs = token_logprobs(
            hidden.flatten(0, 1),
            head.weight,
            targets.flatten(),
            bias=head.bias,
            temperature=temperature * self.logit_temperature,
            softcap=self.softcap,
            backend=self.backend,
        )
        # A copy: FSDP2 hangs its hooks on what is returned, and they may be lost with a view.
        return logprobs.view_as(targets).clone()


def build_model(
    model: str | dict[str, Any], attention: str | None = None, dtype: torch.dtype | str = torch.float32
) -> PreTrainedModel:
    """Build a causal language model from a Hugging Face folder or id, or from a config.

    Args:
        model: Folder or Hub id; or the fields of a transformers config with `model_type`, for random weights.
        attention: `attn_implementation` of transformers; None lets it choose.
        dtype: Of the weights; `auto` is the files' own. float32 is what mixed precision and its optimizer
            state need.

    Returns:
        The model in train mode.

    Raises:
        ValueError: If the folder holds no model or a damaged one, or the config lacks `model_type` or has a
            field that this kind of model does not know.
    """
    options = {} if attention is None else {"attn_implementation": attention}
    if not isinstance(model, str):
        dtype = torch.float32 if dtype == "auto" else dtype
        return AutoModelForCausalLM.from_config(_config(model), dtype=dtype, **options)
    _config(model)
    try:
        # transformers loads in evaluation mode, in which dropout and gradient checkpointing do nothing.
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **options).train()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model is {model!r}: the folder cannot be loaded: {error}") from error


def build_empty(model: str | dict[str, Any], attention: str | None = None) -> PreTrainedModel:
    """Build the same model as `build_model`, float32, without weights: on the meta device."""
    options = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(model), dtype=torch.float32, **options)


def _config(model: str | dict[str, Any]) -> PretrainedConfig:
    if isinstance(model, str):
        if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
            raise ValueError(
                f"model is {model!r}: the folder has no config.json, so it is no Hugging Face model"
            )
        try:
            return AutoConfig.from_pretrained(model)
        except OSError as error:
            if Path(model).is_dir():
                raise ValueError(f"model is {model!r}: the folder cannot be loaded: {error}") from error
            raise ValueError(
                f"model is {model!r}: no such folder, and not on the Hub or no network"
            ) from error
    fields = dict(model)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError("model is a config without model_type (for example `model_type: llama`)")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {model_type!r}, which transformers does not know")
    known = AutoConfig.for_model(model_type)
    for name in fields:
        # transformers keeps any name it is given, and builds the model without it.
        if name not in _UNDECLARED and not hasattr(known, name):
            raise ValueError(f"model has the field {name!r}, which model_type {model_type!r} does not know")
    return AutoConfig.for_model(model_type, **fields)


def apply_liger_layers(model: PreTrainedModel) -> None:
    """Swap the model's norm, rotary and MLP layers for Liger's Triton kernels, in place.

    Raises:
        RuntimeError: If Liger is not installed, there is no CUDA device, or Liger has no kernels for this
            kind of model.
    """
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        raise RuntimeError("liger_layers needs a CUDA device and the liger-kernel package (Linux)")
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise RuntimeError(f"Liger has no layer kernels for model_type {model.config.model_type!r}")
    # The loss stays ours: one formula for all methods.
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
