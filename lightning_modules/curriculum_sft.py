"""Supervised fine-tuning along a curriculum."""

from typing import Any

import torch
from torch import Tensor

from rewarm.lightning_modules.base import LanguageModule, example_losses
from rewarm.lightning_modules.policy import Policy
from rewarm.lightning_modules.statistics_policy import StatisticsPolicy
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
        optimizer: Called with parameter groups; biases and norms come with `weight_decay` 0.
        loss: Of the tokens, such as `rewarm.DFT`; None is the negative log-likelihood.
        **options: See `rewarm.lightning_modules.base.LanguageModule`.

    Logs:
        train/loss: The step's loss, by default the mean over its completion tokens, in nats.
        train/grad_norm: Norm of the step's gradients before clipping.
        train/skipped_steps: Steps so far that were left out because that norm was not finite.
        val/loss: Mean negative log-likelihood over all validation completion tokens, in nats.
    """

    policy: Policy

    def __init__(self, *args: Any, loss: TokenLoss | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loss = loss or NLL()

    @property
    def policy_class(self) -> type[Policy]:
        """One that returns what the loss needs."""
        return StatisticsPolicy if self.loss.needs else Policy

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Completion loss; returns each example's mean loss as `scores` beside the `ids` it belongs to."""
        counts = self.step_counts(batch, batch_idx)
        statistics: dict[str, Tensor] = {}
        if self.loss.needs:
            statistics = self.policy(
                batch["input_ids"],
                batch["position_ids"],
                batch["targets"],
                self.loss.temperature,
                self.loss.needs,
                self._stored(batch) if "candidates" in self.loss.needs else None,
                batch.get("documents"),
                batch.get("num_targets"),
            )
            logprobs = statistics["logprobs"]
        else:
            logprobs = self.logprobs(batch, self.loss.temperature)
        share = self.loss.share(logprobs, batch, statistics, counts)
        self.log_step({"train/loss": share}, batch_idx)
        return {"loss": self.step_loss(share), "ids": batch["ids"], "scores": example_losses(logprobs, batch)}

    def _stored(self, batch: dict[str, Any]) -> Tensor:
        if "teacher_ids" in batch:
            stored: Tensor = batch["teacher_ids"]
            return stored
        if batch["ids"]:
            raise ValueError("the loss distils a teacher, but the data have no column 'teacher_ids'")
        return torch.zeros_like(batch["targets"])[..., None]
