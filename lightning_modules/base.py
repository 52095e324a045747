"""The LightningModule that every method builds on."""

import copy
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rewarm.functional.logprob import IGNORE_INDEX, Backend
from rewarm.functional.token_statistics import Statistic
from rewarm.lightning_modules.exact_steps import Means, StepCounts
from rewarm.lightning_modules.gradient_steps import GradientSteps
from rewarm.lightning_modules.optimizers import default_optimizer, parameter_groups
from rewarm.lightning_modules.policy import Policy, build_model, check_rows, check_tokens, equip
from rewarm.lightning_modules.saving import check_checkpoint, made_with, save_pretrained
from rewarm.lightning_modules.sharding import build_sharded, decoder_layers
from rewarm.objectives.batch import as_batch, example_losses, with_ids

log = logging.getLogger(__name__)


class LanguageModule(LightningModule):
    """What all methods share: the policy, its optimizer, exact normalisation, validation losses, export.

    It is made of parts that any LightningModule can hold: `counts` (`rewarm.StepCounts`) divides losses by
    counts of the whole optimizer step, `gradient_steps` (`rewarm.GradientSteps`) clips on any strategy and
    leaves out broken steps, `means` gathers validation values.

    Batches are those of this project's data modules, or any loader's with `input_ids` and `labels`, see
    `rewarm.objectives.batch.as_batch`.

    Args:
        model: Hugging Face folder or id, or a config with `model_type` for random weights.
        optimizer: Maker of the optimizer from parameter groups; biases and norms come with `weight_decay` 0.
        backend: How log-probabilities are computed: `auto`, `torch`, `liger` or `dense`.
        attention: `documents` keeps packed documents apart without a mask, or an `attn_implementation` of
            transformers. None is `documents` where the model allows it, else transformers' choice.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Run each decoder layer through `torch.compile`.
        liger_layers: Liger's layer kernels: `auto` uses them on CUDA where Liger knows the model.

    Attributes:
        policy: The language model that learns; it is there from `configure_model` on.
        reference: A frozen copy of that model, if the method keeps one; else None.

    Example:
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> module = LanguageModule(tiny)
        >>> module.configure_model()
        >>> batch = as_batch({"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])})
        >>> module.logprobs(batch).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        optimizer: OptimizerCallable = default_optimizer,
        *,
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
        self.reference: Policy | None = None
        self.counts = StepCounts(self)
        self.gradient_steps = GradientSteps(self)
        self.means = Means(self)

    @property
    def uses_reference(self) -> bool:
        """Whether the method keeps a frozen copy of the initial weights."""
        return False

    @property
    def skipped_steps(self) -> int:
        """Number of optimizer steps so far that were left out; reading it waits for the device."""
        return self.gradient_steps.skipped

    @property
    def attached_trainer(self) -> Trainer | None:
        """The trainer that runs this module; None without one."""
        try:
            return self.trainer
        except RuntimeError:
            return None

    def configure_model(self) -> None:
        """Build the policy once, and its frozen reference if the method uses one; in shards under FSDP2.

        Raises:
            ValueError: If the strategy is the older kind of sharding, or the model cannot be built.
        """
        if self.policy is not None:
            return
        if (trainer := self.attached_trainer) is not None and isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError("strategy is FSDPStrategy, which is not supported; use rewarm.FSDP2Strategy")
        if self.device_mesh is not None:
            self.policy, self.reference = build_sharded(self)
            return
        model = build_model(self.model_source, self.attention)
        self.policy = Policy(self.equip(model), self.backend)
        if self.uses_reference:
            self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval()

    def equip(self, model: PreTrainedModel) -> PreTrainedModel:
        """Give a model the kernels, checkpointing and compilation that this module asks for."""
        trainer = self.attached_trainer
        on_cuda = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return equip(
            model,
            decoder_layers(model),
            # What the trainer computes on decides, whatever else the machine has.
            liger_layers=on_cuda and "auto" if self.liger_layers == "auto" else self.liger_layers,
            gradient_checkpointing=self.gradient_checkpointing,
            compile=self.compile_layers,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer: matrices decay, vectors (biases, norms) don't."""
        return self.optimizer(parameter_groups(self.policy.parameters()))

    def on_fit_start(self) -> None:
        """Refuse a tokenizer whose tokens the model does not embed; warn of moments in half precision."""
        tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        if tokenizer is not None:
            check_tokens(self.policy.model, len(tokenizer))
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            log.warning("precision %s keeps the optimizer's moments in it too; use bf16-mixed", precision)

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Refuse packed rows whose examples the attention would mix."""
        check_rows(self.attention, batch)

    def token_values(
        self,
        batch: Mapping[str, Any],
        statistics: Collection[Statistic] = (),
        temperature: float = 1.0,
        policy: Policy | None = None,
    ) -> dict[str, Tensor]:
        """Return the log-probability of each target, and statistics of its distribution.

        Args:
            batch: A batch as `rewarm.objectives.batch.Batch` declares it.
            statistics: Names of statistics of `rewarm.functional.token_statistics.token_statistics`.
            temperature: Number that divides the logits, > 0.
            policy: Model to ask, such as the reference; None is the one that learns.

        Returns:
            `logprobs` in nats, shape (B, T), and each statistic by its name, shape (B, T) or (B, T, K). All
            are 0 where there is no target.
        """
        policy = self.policy if policy is None else policy
        values = policy(
            batch["input_ids"],
            batch["position_ids"],
            batch["targets"],
            temperature=temperature,
            documents=batch.get("documents"),
            num_targets=batch.get("num_targets"),
            statistics=statistics,
            candidates=batch["teacher_ids"] if "candidates" in statistics else None,
        )
        return values if statistics else {"logprobs": values}

    def logprobs(
        self, batch: Mapping[str, Any], temperature: float = 1.0, policy: Policy | None = None
    ) -> Tensor:
        """Return the log-probability of each target in nats, as `token_values` does. Shape (B, T)."""
        return self.token_values(batch, (), temperature, policy)["logprobs"]

    def forward(self, batch: Mapping[str, Any], temperature: float = 1.0) -> Tensor:
        """Return `logprobs`, also through a distributed strategy's wrapper. Shape (B, T)."""
        return self.logprobs(batch, temperature)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip on any strategy, log the norm of the gradients, leave out steps whose norm is not finite."""
        self.gradient_steps.clip(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_end(self) -> None:
        """Warn of steps that were left out after the last log."""
        self.gradient_steps.tell()

    def on_validation_epoch_start(self) -> None:
        """Begin the means of a new pass."""
        self.means.begin()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add to the mean negative log-likelihood per target token, overall and by domain."""
        batch = as_batch(batch)
        logprobs = self.logprobs(batch)
        tokens = (batch["targets"] != IGNORE_INDEX).sum()
        self.means.add("loss", -logprobs.sum(), tokens)
        if "domain" in batch:
            self.means.add(f"loss/{batch['domain']}", -logprobs.sum(), tokens)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all ranks, as `val/...` or `test/...`."""
        self.means.log("test" if self.trainer.testing else "val")

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Do what validation does; the means are logged as `test/...`."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(
        self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Return the mean negative log-likelihood of each example, in nats, as `scores` beside the `ids`."""
        batch = as_batch(batch)
        return with_ids(batch, {"scores": example_losses(self.logprobs(batch), batch)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what `rewarm export` needs to rebuild the model without this run's configuration."""
        checkpoint["rewarm_model"] = made_with(self)
        checkpoint["rewarm_skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the count of skipped steps, and refuse a checkpoint that does not belong to this module.

        Raises:
            ValueError: If the checkpoint is of another model or, where a fit goes on from it, of another
                method.
        """
        self.gradient_steps.skipped = checkpoint.get("rewarm_skipped_steps", 0)
        if (trainer := self.attached_trainer) is not None:
            check_checkpoint(checkpoint, self, trainer)

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write a Hugging Face folder, whole or not at all. All ranks must call this together.

        Args:
            folder: Path of the folder; one that is there already is replaced.
            tokenizer: Tokenizer to save beside the model, with its chat template; None saves none.
        """
        save_pretrained(self, folder, tokenizer)
