"""Supervised fine-tuning along a curriculum."""

from typing import Any

from rewarm.lightning_modules.base import LanguageModule, example_losses


class CurriculumSFT(LanguageModule):
    """Supervised fine-tuning on completions, easy examples first.

    Idea: Learn from what is within reach: `InstructionData` orders and paces the examples, `DifficultyFilter`
        lets the loss of each example decide whether it comes again, `CheckpointAveraging` steadies the end.
    Objective: Negative mean of `rewarm.functional.logprob.token_logprobs` over the completion tokens of the
        step.
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
        **options: See `rewarm.lightning_modules.base.LanguageModule`.

    Logs:
        train/loss: Mean over the step's completion tokens, in nats.
        train/grad_norm: Norm of the step's gradients before clipping.
        train/skipped_steps: Steps so far that were left out because that norm was not finite.
        val/loss: Mean over all validation completion tokens, in nats.
    """

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Completion loss; returns each example's mean loss as `scores` beside the `ids` it belongs to."""
        tokens = self.step_counts(batch, batch_idx)["tokens"]
        logprobs = self.logprobs(batch)
        share = -logprobs.sum() / tokens
        self.log_step({"train/loss": share}, batch_idx)
        return {"loss": self.step_loss(share), "ids": batch["ids"], "scores": example_losses(logprobs, batch)}
