"""The policy, and the LightningModule that every method builds on."""

import copy
import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rewarm.functional.logprob import IGNORE_INDEX, Backend, sequence_sums, token_logprobs

log = logging.getLogger(__name__)

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
        return logprobs.view_as(targets)


def frozen_copy(policy: Policy) -> Policy:
    """Return a copy of a policy that never trains."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


def build_model(model: str | dict[str, Any], attention: str | None = None) -> PreTrainedModel:
    """Build a causal language model from a Hugging Face folder or id, or from a config.

    Args:
        model: Folder or Hub id; or the fields of a transformers config with `model_type`, for random weights.
        attention: `attn_implementation` of transformers; None lets it choose.

    Returns:
        The model with float32 weights, which mixed precision and its optimizer state need, in train mode.

    Raises:
        ValueError: If the folder holds no model or a damaged one, or the config lacks `model_type` or has a
            field that this kind of model does not know.
    """
    options = {} if attention is None else {"attn_implementation": attention}
    if isinstance(model, str):
        if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
            raise ValueError(
                f"model is {model!r}: the folder has no config.json, so it is no Hugging Face model"
            )
        try:
            # transformers loads in evaluation mode, in which dropout and gradient checkpointing do nothing.
            return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options).train()
        except (OSError, SafetensorError) as error:
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
    config = AutoConfig.for_model(model_type, **fields)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)


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


class LanguageModule(LightningModule):
    """What all methods share: the policy, its optimizer, exact normalisation, validation losses, export.

    A loss is a sum divided by a count over the whole optimizer step: every micro-batch of the accumulation
    window on every rank. Batches carry the counts of their window in `batch["window"]`
    (`rewarm.datamodules.loader.WindowLoader` adds them). Without `accumulate_grad_batches` any batch will do.

    Args:
        model: Hugging Face folder or id, or a config with `model_type` for random weights.
        optimizer: Called with parameter groups; biases and norms come with `weight_decay` 0.
        backend: How log-probabilities are computed: `auto`, `torch`, `liger` or `dense`.
        attention: `attn_implementation` of transformers; None lets it choose.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Run each decoder layer through `torch.compile`.
        liger_layers: Liger's layer kernels: `auto` uses them on CUDA where Liger knows the model.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-5, betas=(0.9, 0.95)),
        backend: Backend = "auto",
        attention: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        liger_layers: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.model_source = model
        self.optimizer = optimizer
        self.backend: Backend = backend
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile
        self.liger_layers = liger_layers
        self.policy: Policy = None  # type: ignore[assignment]  # built in configure_model
        self._step_counts: tuple[int, dict[str, Tensor]] | None = None
        self._step_metrics: dict[str, Tensor] = {}
        self._validation_sums: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        """Build the policy once."""
        if self.policy is not None:
            return
        model = build_model(self.model_source, self.attention)
        if self.liger_layers is True or (self.liger_layers == "auto" and torch.cuda.is_available()):
            try:
                apply_liger_layers(model)
            except RuntimeError as error:
                if self.liger_layers is True:
                    raise
                log.info("layer kernels: transformers' own (%s)", error)
        if self.gradient_checkpointing:
            # The only name up to transformers 5.17, deprecated in later versions.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        if self.compile_layers:
            for layer in decoder_layers(model):
                layer.compile()
        self.policy = Policy(model, self.backend)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Matrices decay, vectors (biases, norms) don't."""
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p.ndim >= 2]}]
        if vectors := [p for p in parameters if p.ndim < 2]:
            groups.append({"params": vectors, "weight_decay": 0.0})
        return self.optimizer(groups)

    def on_fit_start(self) -> None:
        """Forget a window that an earlier fit left unfinished; refuse tokens without an embedding."""
        self._step_counts, self._step_metrics = None, {}
        tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        vocab_size = self.policy.model.get_input_embeddings().weight.size(0)  # type: ignore[operator]
        if tokenizer is not None and len(tokenizer) > vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model embeds {vocab_size}: set vocab_size"
            )
        if str(self.trainer.precision).endswith("-true") and self.trainer.precision != "32-true":
            log.warning(
                "precision %s keeps the optimizer's moments in it too; use bf16-mixed", self.trainer.precision
            )

    def logprobs(self, batch: dict[str, Any], temperature: float = 1.0) -> Tensor:
        """Return the policy's log-probability of each target of a batch. Shape (B, T)."""
        return self.policy(batch["input_ids"], batch["position_ids"], batch["targets"], temperature)

    @property
    def _wide(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    # one optimizer step, exactly normalised

    def step_counts(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return the counts of the whole optimizer step: all its micro-batches on all ranks.

        Raises:
            ValueError: If gradients accumulate and the batch doesn't carry its window's counts.
        """
        accumulate = self.trainer.accumulate_grad_batches
        window = batch_idx // accumulate
        # The first batch of every epoch is in window 0.
        if self._step_counts is None or self._step_counts[0] != window or batch_idx % accumulate == 0:
            counts = batch.get("window") or batch.get("counts")
            if counts is None or ("window" not in batch and accumulate > 1):
                if accumulate > 1:
                    raise ValueError(
                        f"accumulate_grad_batches is {accumulate}, but the batches lack the counts of their"
                        " window: wrap your loader in rewarm.WindowLoader(loader, accumulate_grad_batches)"
                    )
                counts = {
                    "tokens": int((batch["targets"] != IGNORE_INDEX).sum()),
                    "sequences": batch["input_ids"].shape[0],
                }
            totals = torch.tensor(list(counts.values()), dtype=self._wide, device=self.device)
            totals = self.trainer.strategy.reduce(totals, reduce_op="sum")
            # A step without a single target has loss 0, not NaN.
            self._step_counts = (window, dict(zip(counts, totals.clamp(min=1.0), strict=True)))
        return self._step_counts[1]

    def step_loss(self, share: Tensor) -> Tensor:
        """Turn a share of the step's loss into what Lightning wants returned.

        Lightning divides by `accumulate_grad_batches` also in a shorter last window, and distributed
        strategies average over ranks; both are undone here, so that the step's gradient is the gradient of
        the sum of all shares.
        """
        return share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def log_step(self, shares: dict[str, Tensor], batch_idx: int) -> None:
        """Log values given as shares that add up over the micro-batches and ranks of an optimizer step."""
        for name, share in shares.items():
            self._step_metrics[name] = self._step_metrics.get(name, 0.0) + share.detach()
        accumulate = self.trainer.accumulate_grad_batches
        if (batch_idx + 1) % accumulate and batch_idx + 1 != self.trainer.num_training_batches:
            return
        metrics, self._step_metrics = self._step_metrics, {}
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0 or ((self.trainer.global_step + 1) % every and self.trainer.global_step > 0):
            return
        totals = self.trainer.strategy.reduce(
            torch.stack([v.float() for v in metrics.values()]), reduce_op="sum"
        )
        for name, total in zip(metrics, totals, strict=True):
            self.log(name, total, prog_bar=name == "train/loss", batch_size=1)

    # validation

    def on_validation_epoch_start(self) -> None:
        """Start new sums."""
        self._validation_sums = {}

    def add_validation(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Add to the mean that is logged as `val/name` when validation ends."""
        sums = torch.stack([total.detach(), torch.as_tensor(count, device=total.device)]).to(self._wide)
        self._validation_sums[name] = self._validation_sums.get(name, 0.0) + sums

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Mean negative log-likelihood per target token, overall and by domain."""
        logprobs = self.logprobs(batch)
        tokens = (batch["targets"] != IGNORE_INDEX).sum()
        self.add_validation("loss", -logprobs.sum(), tokens)
        if "domain" in batch:
            self.add_validation(f"loss/{batch['domain']}", -logprobs.sum(), tokens)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all ranks."""
        for name, sums in self._validation_sums.items():
            total, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
            split = "test" if self.trainer.testing else "val"
            self.log(f"{split}/{name}", total / count, batch_size=1, prog_bar=name == "loss")

    def on_test_epoch_start(self) -> None:
        """Start new sums."""
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Do what validation does, logged as `test/...`."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the means over all ranks."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the mean negative log-likelihood of each example, in nats, as `scores` beside the `ids`."""
        return {"ids": batch["ids"], "scores": example_losses(self.logprobs(batch), batch)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what `rewarm export` needs to rebuild the model without this run's configuration."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["rewarm_model"] = {
            "config": self.policy.model.config.to_dict(),
            "tokenizer": getattr(data, "tokenizer_source", None),
        }

    # export

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads.

        The folder appears whole or not at all.

        Args:
            folder: Where to; replaced if it is there.
            tokenizer: Saved beside the model, with its chat template.
        """
        folder = Path(folder)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        self.policy.model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder's layers.

    Raises:
        ValueError: If the model has no single list of layers.
    """
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of {depth} decoder layers")
    return lists[0]


@torch.no_grad()
def example_losses(logprobs: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return the mean negative log-likelihood of each sequence of a batch, in nats. Shape (sequences,)."""
    sequences = len(batch["ids"])
    totals = sequence_sums(-logprobs, batch["sequence_ids"], sequences)
    lengths = sequence_sums((batch["targets"] != IGNORE_INDEX).float(), batch["sequence_ids"], sequences)
    return totals / lengths.clamp(min=1.0)
