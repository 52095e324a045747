"""Supervised fine-tuning along a curriculum."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable

from rewarm.functional.logprob import Backend
from rewarm.lightning_modules.base import LanguageModule
from rewarm.lightning_modules.optimizers import default_optimizer
from rewarm.objectives.batch import as_batch, example_losses, num_sequences, with_ids
from rewarm.objectives.sums import Sum
from rewarm.objectives.token_losses import NLL, TokenLoss


class CurriculumSFT(LanguageModule):
    """Supervised fine-tuning on completions, easy examples first.

    Idea: Learn from what is within reach: `InstructionData` orders and paces the examples, `DifficultyFilter`
        lets the loss of each example decide whether it comes again, `CheckpointAveraging` steadies the end.
    Objective: Negative mean of `rewarm.functional.logprob.token_logprobs` over the completion tokens of the
        step; or another of the losses in `rewarm.objectives.token_losses`.
    Source: Platanios et al. 2019, arXiv:1903.09848 (competence); arXiv:2511.18903 (averaging in place of a
        full decay).
    Defaults: AdamW at 2e-5 (TRL's), betas 0.9, 0.95 (ours). Pair an ascending order with a mild decay:
        arXiv:2511.18903 finds that a decay to about 0 wastes the hard examples at the end.
    Watch: `train/loss` (nats per completion token); it rises whenever harder examples come in. `val/loss`.
    Cost: One forward and backward pass, one copy of the weights.
    Not for: Examples whose prompts should be learnt too; use `ContinualPretraining`.

    Args:
        model: Hugging Face folder or id, or a config with `model_type` for random weights.
        optimizer: Maker of the optimizer from parameter groups; biases and norms come with `weight_decay` 0.
        loss: Loss of the tokens, such as `rewarm.DFT()`, or a `rewarm.Sum` of several; None is
            `rewarm.NLL()`, the negative log-likelihood.
        backend: How log-probabilities are computed: `auto`, `torch`, `liger` or `dense`.
        attention: `documents`, or an `attn_implementation` of transformers; None is `documents` where the
            model allows it, else transformers' choice.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Run each decoder layer through `torch.compile`.
        liger_layers: Liger's layer kernels: `auto` uses them on CUDA where Liger knows the model.

    Logs:
        train/loss: The step's loss, by default the mean over its completion tokens, in nats.
        train/grad_norm: Norm of the step's gradients before clipping.
        train/skipped_steps: Steps so far that were left out because that norm was not finite.
        val/loss: Mean negative log-likelihood over all validation completion tokens, in nats.

    Example:
        >>> import rewarm
        >>> CurriculumSFT("models/base", loss=rewarm.DFT(power=0.5)).loss
        DFT(power=0.5)
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        optimizer: OptimizerCallable = default_optimizer,
        *,
        loss: TokenLoss | Sum | None = None,
        backend: Backend = "auto",
        attention: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        liger_layers: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(
            model,
            optimizer,
            backend=backend,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            liger_layers=liger_layers,
        )
        self.loss = loss or NLL()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return the loss of the completions, and each example's mean loss as `scores` beside its `ids`.

        Raises:
            ValueError: If the loss distils a teacher and the data have none.
        """
        batch = as_batch(batch)
        counts = self.counts.of(batch, batch_idx)
        values = self.token_values(self._with_teacher(batch), self.loss.needs, self.loss.temperature)
        share = self.loss.share(values["logprobs"], batch, values, counts)
        self.counts.log({"train/loss": share}, batch_idx)
        outputs = {"loss": self.counts.loss(share), "scores": example_losses(values["logprobs"], batch)}
        return with_ids(batch, outputs)

    def _with_teacher(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        if "candidates" not in self.loss.needs or "teacher_ids" in batch:
            return batch
        if num_sequences(batch):
            raise ValueError("the loss distils a teacher, but the data have no column 'teacher_ids'")
        # A rank without rows has no teacher either.
        return {**batch, "teacher_ids": torch.zeros_like(batch["targets"])[..., None]}
