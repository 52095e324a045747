"""Group relative policy optimisation."""

from typing import Any, Literal

import torch
from torch import Tensor

from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.functional.policy_gradient import clipped_policy_loss, group_advantages, kl_estimate
from rewarm.functional.sequences import sequence_sums
from rewarm.lightning_modules.base import LanguageModule


class GRPO(LanguageModule):
    """Reinforcement learning from verifiable rewards, with the group of samples as its own baseline.

    Idea: Sample several completions of a prompt, score them, and make those better than their group's mean
        more likely. `PromptData` samples from the current weights; this module only computes the loss.
    Objective: `rewarm.functional.policy_gradient.clipped_policy_loss` on `group_advantages`, plus `beta`
        times `kl_estimate`, summed over tokens and divided as `normalise` says, over the whole optimizer
        step.
    Source: Shao et al. 2024, arXiv:2402.03300; DAPO, arXiv:2503.14476 (token mean, higher upper clip); Dr.
        GRPO, arXiv:2503.20783 (constant, no deviation).
    Defaults: clip 0.2 and 0.2 (GRPO in TRL; DAPO raises the upper to 0.28), beta 0 (TRL's, DAPO's), token
        mean (DAPO's). AdamW at 2e-5 must be lowered for real models (TRL, DAPO 1e-6).
    Watch: `rollout/reward` (before any filter, rising), `train/entropy` (nats per token, not collapsing),
        `train/sampler_gap` (nats; near 0 in the first update after a rollout, else sampler and trainer
        disagree), `train/clip_frac` (below 0.2). `train/loss` is near 0 when a rollout is used once: only its
        gradient matters.
    Cost: One forward and backward pass per update and the sampling, without groups whose rewards are all
        equal; a second copy of the weights, another forward pass and these groups too if beta > 0.
    Not for: Rewards that no sample ever gets, or that all get; filter prompts with `DifficultyFilter`.

    Args:
        model: Hugging Face folder or id, or a config with `model_type` for random weights. Also the
            reference.
        optimizer: Called with parameter groups; biases and norms come with `weight_decay` 0.
        scale_by_std: Divide advantages by the group's standard deviation.
        clip_low: How far the ratio to the sampler may fall below 1, in (0, 1].
        clip_high: How far it may rise above 1, > 0.
        beta: Weight of the KL divergence to the initial weights, >= 0.
        normalise: `token` divides by the step's tokens, `sequence` takes the mean over sequences of their
            token means, `constant` divides by sequences times `constant_tokens`.
        constant_tokens: For `constant`: usually the longest completion allowed, >= 1.
        **options: See `rewarm.lightning_modules.base.LanguageModule`.

    Logs:
        train/loss: The objective of the step.
        train/clip_frac: Share of tokens whose gradient clipping took. This and what follows per token: of
            the completions that were computed, without groups of equal rewards if `beta` is 0.
        train/sampler_gap: Mean absolute difference of policy and sampler log-probabilities, in nats.
        train/entropy: Estimate from the sampled tokens, in nats per token.
        train/completion_tokens: Mean length of a completion, of all of them.
        train/kl: Estimated divergence from the reference, in nats per token; only with beta above 0.
        train/grad_norm: Norm of the step's gradients before clipping.
        train/skipped_steps: Steps so far that were left out because that norm was not finite.
        rollout/reward: Mean over everything sampled, also what a filter refused.
        rollout/zero_std_frac: Share of groups whose rewards are all equal.
        rollout/admitted_frac: Share of the sampled groups that the gate let in.
        rollout/filler_frac: Share of the rollout filled with refused groups after `max_rounds`.
        rollout/rounds: How often prompts were asked for.
        rollout/cut_frac: Share of completions cut at the length limit.
        val/reward: Mean over the validation completions.
    """

    def __init__(
        self,
        *args: Any,
        scale_by_std: bool = True,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        beta: float = 0.0,
        normalise: Literal["token", "sequence", "constant"] = "token",
        constant_tokens: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        clipped_policy_loss(
            torch.zeros(0), torch.zeros(0), torch.zeros(0), clip_low=clip_low, clip_high=clip_high
        )
        if beta < 0.0:
            raise ValueError(f"beta is {beta}; it must not be below 0")
        if normalise not in ("token", "sequence", "constant"):
            raise ValueError(f"normalise is {normalise!r}; known are 'token', 'sequence', 'constant'")
        if (normalise == "constant") != (constant_tokens is not None):
            raise ValueError(
                f"normalise is {normalise!r} and constant_tokens {constant_tokens}: they go together"
            )
        if constant_tokens is not None and constant_tokens < 1:
            raise ValueError(f"constant_tokens is {constant_tokens}; it must be at least 1")
        self.scale_by_std, self.clip_low, self.clip_high, self.beta = scale_by_std, clip_low, clip_high, beta
        self.normalise, self.constant_tokens = normalise, constant_tokens

    @property
    def uses_reference(self) -> bool:
        """Whether the KL term needs the initial weights."""
        return self.beta > 0.0

    @property
    def learns_from_equal_rewards(self) -> bool:
        """Whether completions with an advantage of 0 have a gradient."""
        return self.beta > 0.0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Clipped policy gradient over the completions of the optimizer step."""
        counts = self.step_counts(batch, batch_idx)
        policy, sampler = self.logprobs(batch, batch["temperature"]), batch["sampler_logprobs"]
        mask = batch["targets"] != IGNORE_INDEX
        groups = group_advantages(batch["group_rewards"], scale_by_std=self.scale_by_std)
        advantages = groups.gather(1, batch["group_places"][:, None])[:, 0]
        losses, clipped = clipped_policy_loss(
            policy,
            sampler,
            advantages[batch["sequence_ids"].clamp(min=0)],
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        trained = counts.get("trained_tokens", counts["tokens"])
        metrics = {
            "train/clip_frac": (clipped & mask).sum() / trained,
            "train/sampler_gap": ((policy - sampler).abs() * mask).sum() / trained,
            "train/entropy": -(policy * mask).sum() / trained,
            "train/completion_tokens": batch["counts"]["tokens"] / counts["sequences"],
        }
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(
                    batch["input_ids"],
                    batch["position_ids"],
                    batch["targets"],
                    batch["temperature"],
                    documents=batch.get("documents"),
                    num_targets=batch.get("num_targets"),
                )
            kl = kl_estimate(policy, reference)
            losses = losses + self.beta * kl
            metrics["train/kl"] = (kl * mask).sum() / trained
        share = self._normalised(losses * mask, mask, batch, counts)
        self.log_step({"train/loss": share, **metrics}, batch_idx)
        for name, value in batch.get("rollout_metrics", {}).items():
            self.log(f"rollout/{name}", value, batch_size=1, prog_bar=name == "reward")
        return self.step_loss(share)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Mean reward of completions sampled for the validation prompts."""
        self.add_validation("reward", batch["rewards"].sum(), batch["rewards"].numel())

    def _normalised(
        self, losses: Tensor, mask: Tensor, batch: dict[str, Any], counts: dict[str, Tensor]
    ) -> Tensor:
        """This micro-batch's share of the step's loss."""
        if self.normalise == "token":
            return losses.sum() / counts["tokens"]
        if self.normalise == "constant":
            assert self.constant_tokens is not None
            return losses.sum() / (counts["sequences"] * self.constant_tokens)
        sequences = len(batch["ids"])
        lengths = sequence_sums(mask.float(), batch["sequence_ids"], sequences).clamp(min=1.0)
        return (sequence_sums(losses, batch["sequence_ids"], sequences) / lengths).sum() / counts["sequences"]
