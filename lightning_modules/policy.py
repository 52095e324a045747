"""The policy: a transformers model whose forward gives log-probabilities, built from a folder or a config."""

import functools
import importlib.util
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rewarm.functional.document_attention import Documents, document_attention, has_kernel, moved
from rewarm.functional.logprob import Backend, token_logprobs
from rewarm.functional.token_statistics import Statistic, token_statistics

log = logging.getLogger(__name__)

DOCUMENTS = "documents"
"""The attention that keeps documents apart without a mask, as `attn_implementation`."""

# Fields that models read though their configs don't declare them, and older names that transformers
# translates.
_UNDECLARED = {"head_dim", "rope_theta", "rope_scaling", "partial_rotary_factor"}
# Models whose layers do not hand on what attention within documents needs.
_DEAF = {"nemotron"}


class Policy(nn.Module):
    """A causal language model whose forward returns the log-probability of each target.

    The head is applied inside `forward`, and to target tokens alone: distributed wrappers see an ordinary
    forward, and the (tokens, vocabulary) logits never exist.

    Args:
        model: Any causal language model of transformers with a plain linear head.
        backend: Way in which log-probabilities are computed, see
            `rewarm.functional.logprob.token_logprobs`.

    Example:
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> policy = Policy(build_model(tiny))
        >>> ids, positions, targets = torch.tensor([[[5, 6, 7]], [[0, 1, 2]], [[6, 7, -100]]])
        >>> policy(ids, positions, targets)[0, 2].item()  # no target there
        0.0
    """

    def __init__(self, model: PreTrainedModel, backend: Backend = "auto") -> None:
        super().__init__()
        self.model = model
        self.backend: Backend = backend
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Granite divides its logits, Cohere multiplies them: both are a temperature.
        self.logit_temperature = getattr(config, "logits_scaling", 1.0) / getattr(config, "logit_scale", 1.0)

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """Return the last hidden states, 0 where none are computed. Shape (B, T, D).

        The arguments are those of `forward`.
        """
        # A cache would make transformers forget the block-diagonal mask of packed rows.
        decoder = functools.partial(self.model.base_model, use_cache=False)
        if self.model.config._attn_implementation != DOCUMENTS:
            return decoder(input_ids=input_ids, position_ids=position_ids)[0]
        if documents is None or (documents.places is not None and not self._attends_quickly(input_ids)):
            documents = Documents(position_ids)
        # A mask with four dimensions is taken for a ready one, so that none is made.
        mask = input_ids.new_empty((1, 1, 0, 0), dtype=torch.bool)
        if documents.places is None:
            return decoder(
                input_ids=input_ids, position_ids=position_ids, attention_mask=mask, documents=documents
            )[0]
        places = moved(documents.places, input_ids.device)
        row, positions = (ids.flatten().index_select(0, places)[None] for ids in (input_ids, position_ids))
        (hidden,) = decoder(input_ids=row, position_ids=positions, attention_mask=mask, documents=documents)[
            0
        ]
        whole = hidden.new_zeros(input_ids.numel(), hidden.shape[-1])
        return whole.index_copy(0, places, hidden).unflatten(0, input_ids.shape)

    def _attends_quickly(self, input_ids: Tensor) -> bool:
        """Whether a row of many documents costs no more than a row for each."""
        device, dtype = input_ids.device, self.model.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return device.type == "cpu" or has_kernel(device, dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        documents: Documents | None = None,
        num_targets: int | None = None,
        statistics: Collection[Statistic] = (),
        candidates: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return log-probabilities of the targets, and on request more of each target's distribution.

        Args:
            input_ids: Tokens that the model reads. Shape (B, T).
            position_ids: Place of each token in its document. It restarts at 0 where a packed document
                begins, which keeps documents apart, and at more where a branch goes on from one.
                Shape (B, T).
            targets: Token that follows each position, -100 where there is none to learn. Shape (B, T).
            temperature: Number that divides the logits, > 0.
            documents: What `position_ids` say, known on the host, so that a device need not be asked; perhaps
                with the positions to compute. Positions that are left out have no targets.
            num_targets: Number of targets, known on the host; None asks the device.
            statistics: Names of statistics of `rewarm.functional.token_statistics.token_statistics`.
            candidates: Ids of tokens whose log-probabilities are wanted. Shape (B, T, K).

        Returns:
            Log-probabilities in nats, 0 where there is no target, float32. Shape (B, T). With statistics, a
            mapping with the log-probabilities as `logprobs` and each statistic by its name.
        """
        hidden = self.hidden_states(input_ids, position_ids, documents).flatten(0, 1)
        head = self.model.get_output_embeddings()
        options: dict[str, Any] = {
            "bias": head.bias,
            "temperature": temperature * self.logit_temperature,
            "softcap": self.softcap,
            "backend": self.backend,
            "num_targets": num_targets,
        }
        # Copies: FSDP2 hangs its hooks on what is returned, and they may be lost with a view.
        if not statistics:
            return token_logprobs(hidden, head.weight, targets.flatten(), **options).view_as(targets).clone()
        if candidates is not None:
            candidates = candidates.flatten(0, 1)
        values = token_statistics(
            hidden, head.weight, targets.flatten(), statistics, candidates=candidates, **options
        )
        return {name: value.unflatten(0, targets.shape).clone() for name, value in values.items()}


def check_tokens(model: PreTrainedModel, count: int) -> None:
    """Refuse a tokenizer that has tokens without an embedding.

    Args:
        model: The model that embeds.
        count: Number of tokens that the tokenizer has.

    Raises:
        ValueError: If the model embeds fewer tokens.

    Example:
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> check_tokens(build_empty(tiny), 9)
        Traceback (most recent call last):
            ...
        ValueError: the tokenizer has 9 tokens, the model embeds 8: set vocab_size
    """
    vocab_size = model.config.get_text_config().vocab_size
    if count > vocab_size:
        raise ValueError(f"the tokenizer has {count} tokens, the model embeds {vocab_size}: set vocab_size")


def check_rows(attention: str | None, batch: Mapping[str, Any]) -> None:
    """Refuse packed rows whose examples the attention would mix.

    Args:
        attention: The `attn_implementation` that was asked for; None if none was.
        batch: A batch with `input_ids`, shape (B, T), and `counts`.

    Raises:
        ValueError: If several rows are packed, and the attention knows the documents of a single row only.

    Example:
        >>> check_rows("sdpa", {"input_ids": torch.zeros(2, 4), "counts": {"sequences": 5}})
        >>> batch = {"input_ids": torch.zeros(2, 4), "counts": {"sequences": 5}}
        >>> check_rows("flash_attention_2", batch)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: attention is 'flash_attention_2', which keeps packed examples apart in a single row ...
    """
    rows, sequences = len(batch["input_ids"]), batch.get("counts", {}).get("sequences", 0)
    if rows > 1 and sequences > rows and "flash" in str(attention):
        raise ValueError(
            f"attention is {attention!r}, which keeps packed examples apart in a single row only;"
            f" this batch has {rows}: set the data's packing to 'padding_free', or batch_size to 1"
        )


def equip(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    *,
    liger_layers: bool | Literal["auto"],
    gradient_checkpointing: bool,
    compile: bool,
) -> PreTrainedModel:
    """Give a model the kernels, checkpointing and compilation that were asked for, in place.

    Args:
        model: The model, which is changed.
        layers: Decoder layers of the model.
        liger_layers: Whether to use Liger's layer kernels; `auto` if Liger knows the model.
        gradient_checkpointing: Whether to recompute activations in the backward pass.
        compile: Whether to run each layer through `torch.compile`.

    Returns:
        The same model.

    Raises:
        RuntimeError: If `liger_layers` is True and there are no kernels for the model.

    Example:
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = build_model(tiny)
        >>> options = {"liger_layers": False, "gradient_checkpointing": True, "compile": False}
        >>> equip(model, model.model.layers, **options) is model
        True
    """
    if liger_layers:
        try:
            apply_liger_layers(model)
        except RuntimeError as error:
            if liger_layers is True:
                raise
            log.info("layer kernels: transformers' own (%s)", error)
    if gradient_checkpointing:
        # The only name up to transformers 5.17, deprecated in later versions.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if compile:
        compile_layers(layers)
    return model


def _interface(attention: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Return what transformers calls in each layer: `attention` where documents are given, else SDPA."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        documents: Documents | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if documents is None and attention_mask is not None and not attention_mask.numel():
            raise ValueError(
                f"attention is {DOCUMENTS!r}, but the layers around {type(module).__name__} do not hand on"
                " what it needs: set attention to 'sdpa' or 'eager'"
            )
        if documents is None or documents.plain:
            mask = attention_mask if documents is None else None
            return sdpa_attention_forward(
                module, query, key, value, mask, dropout=dropout, scaling=scaling, **options
            )
        asked = {"dropout": dropout or None} | {name: options.get(name) for name in _NOT_FOR_DOCUMENTS}
        for name, value_asked in asked.items():
            if value_asked is not None:
                raise ValueError(
                    f"attention is {DOCUMENTS!r}, but the model asks for {name} {value_asked}: set attention"
                    " to 'sdpa' or 'eager'"
                )
        return attention(query, key, value, documents, scaling).transpose(1, 2), None

    return attend


_NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # else transformers asks on the terminal
_FIXED = "{} does not let its attention be chosen"
# What a model's layers may ask of their attention, and this one does not do.
_NOT_FOR_DOCUMENTS = ("sliding_window", "softcap", "s_aux", "position_bias")

AttentionInterface.register(DOCUMENTS, _interface(document_attention))
# For generation, which brings a cache and no documents.
AttentionMaskInterface.register(DOCUMENTS, sdpa_mask)


def compile_layers(layers: nn.ModuleList) -> None:
    """Run each decoder layer through `torch.compile`, except for the attention within documents.

    The lengths of documents differ from batch to batch, and code would be compiled for each of them.

    Args:
        layers: Decoder layers of a model, which are changed.
    """
    AttentionInterface.register(DOCUMENTS, _interface(torch.compiler.disable(document_attention)))
    for layer in layers:
        layer.compile()


def _set_attention(model: PreTrainedModel, attention: str | None) -> PreTrainedModel:
    """Let a model attend within documents, if that is asked for or, by default, if it can."""
    if attention not in (None, DOCUMENTS):
        return model
    problem = _documents_problem(model)
    if problem is None:
        model.set_attn_implementation(DOCUMENTS)
        if model.config._attn_implementation == DOCUMENTS:
            return model
        problem = _FIXED.format(type(model).__name__)
    if attention == DOCUMENTS:
        raise ValueError(f"attention is {DOCUMENTS!r}, but {problem}: set it to 'sdpa' or 'eager'")
    log.info("attention: %s, with a mask (%s)", model.config._attn_implementation, problem)
    return model


def _documents_problem(model: PreTrainedModel) -> str | None:
    """Say why a model can't attend within documents alone; None if it can."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if kinds is None else None
    choosable = getattr(model, "_supports_attention_backend", False) and config.model_type not in _DEAF
    if not choosable or model.config.is_encoder_decoder:
        return _FIXED.format(type(model).__name__)
    if others := set(kinds or []) - {"full_attention"}:
        return f"the model has layers of {', '.join(sorted(others))}"
    if window is not None:
        return f"the model has a sliding_window of {window}"
    if not getattr(config, "is_causal", True):
        return "the model is not causal"
    for name in ("attn_logit_softcapping", "attention_dropout", "attn_pdrop", "alibi"):
        if getattr(config, name, None):
            return f"the model has {name} {getattr(config, name)}"
    return None


def build_model(
    model: str | dict[str, Any], attention: str | None = None, dtype: torch.dtype | str = torch.float32
) -> PreTrainedModel:
    """Build a causal language model from a Hugging Face folder or id, or from a config.

    Args:
        model: Folder or Hub id; or the fields of a transformers config with `model_type`, for random weights.
        attention: `documents` keeps documents apart without a mask, or an `attn_implementation` of
            transformers. None is `documents` where the model allows it, else transformers' choice.
        dtype: Type of the weights; `auto` is the type in the files. Mixed precision and the optimizer's state
            need float32.

    Returns:
        The model in train mode.

    Raises:
        ValueError: If the folder holds no model or a damaged one, the config lacks `model_type` or has a
            field that this kind of model does not know, or the model can't attend as asked.

    Example:
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = build_model(tiny)
        >>> model.training, model.config.vocab_size
        (True, 8)
        >>> build_model({"vocab_size": 8})
        Traceback (most recent call last):
            ...
        ValueError: model is a config without model_type (for example `model_type: llama`)
    """
    options = _attention_options(attention)
    if not isinstance(model, str):
        dtype = torch.float32 if dtype == "auto" else dtype
        built = AutoModelForCausalLM.from_config(_config(model), dtype=dtype, **_NO_CODE, **options)
        return _set_attention(built, attention)
    _config(model)
    try:
        # transformers loads in evaluation mode, in which dropout and gradient checkpointing do nothing.
        built = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **_NO_CODE, **options).train()
    except UnpicklingError as error:
        raise ValueError(
            f"model is {model!r}: its weights are a pickle of more than weights, so they are not loaded"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model is {model!r}: the folder cannot be loaded: {error}") from error
    return _set_attention(built, attention)


def build_empty(model: str | dict[str, Any], attention: str | None = None) -> PreTrainedModel:
    """Build the same model as `build_model` does, float32, without weights: on the meta device.

    Args:
        model: Folder or Hub id, or the fields of a transformers config with `model_type`.
        attention: The attention, as in `build_model`.

    Returns:
        The model in train mode.

    Raises:
        ValueError: If `build_model` would refuse the config or the attention.

    Example:
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> build_empty(tiny).device
        device(type='meta')
    """
    options = _attention_options(attention)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(_config(model), dtype=torch.float32, **_NO_CODE, **options)
    return _set_attention(built, attention)


def _attention_options(attention: str | None) -> dict[str, str]:
    return {} if attention in (None, DOCUMENTS) else {"attn_implementation": str(attention)}


def _config(model: str | dict[str, Any]) -> PretrainedConfig:
    if isinstance(model, str):
        if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
            raise ValueError(
                f"model is {model!r}: the folder has no config.json, so it is no Hugging Face model"
            )
        try:
            return AutoConfig.from_pretrained(model, **_NO_CODE)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ValueError(
                f"model is {model!r}, which comes with code of its own, and that is not run; it must be of a"
                " kind that transformers knows"
            ) from error
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

    Args:
        model: The model, which is changed.

    Raises:
        RuntimeError: If Liger is not installed, there is no CUDA device, or Liger has no kernels for this
            kind of model.

    Example:
        >>> apply_liger_layers(build_empty({"model_type": "gpt2"}))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        RuntimeError: ...
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
