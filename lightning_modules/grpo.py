"""Group relative policy optimisation."""

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from rewarm.checks import at_least, replaced
from rewarm.functional.logprob import IGNORE_INDEX, Backend
from rewarm.functional.policy_gradient import kl_estimate
from rewarm.lightning_modules.base import LanguageModule
from rewarm.lightning_modules.optimizers import default_optimizer
from rewarm.lightning_modules.reference import FrozenReference
from rewarm.objectives.advantages import Advantage, GroupAdvantage
from rewarm.objectives.batch import as_batch, num_sequences
from rewarm.objectives.policy_losses import Clipped, PerToken, PolicyLoss, Samples, Weights
from rewarm.objectives.sums import Sum


class GRPO(LanguageModule):
    """Reinforcement learning from verifiable rewards, with the group of samples as its own baseline.

    Idea: Sample several completions of a prompt, score them, and make those better than their group's mean
        more likely. `PromptData` samples from the current weights; this module only computes the loss.
    Objective: A loss of `rewarm.objectives.policy_losses`, by default `rewarm.Clipped`, on an advantage, by
        default `rewarm.GroupAdvantage`, plus `kl` times `rewarm.kl_estimate`; the tokens of the whole
        optimizer step are added up as `weights` says, by default `rewarm.PerToken`.
    Source: Shao et al. 2024, arXiv:2402.03300; DAPO, arXiv:2503.14476 (token mean, higher upper clip); Dr.
        GRPO, arXiv:2503.20783 (constant, no deviation).
    Defaults: clip 0.2 and 0.2 (GRPO in TRL; DAPO raises the upper to 0.28), kl 0 (TRL's, DAPO's), token
        mean (DAPO's). AdamW at 2e-5 must be lowered for real models (TRL, DAPO 1e-6).
    Watch: `rollout/reward` (before any filter, rising), `train/entropy` (nats per token, not collapsing),
        `train/sampler_gap` (nats; near 0 in the first update after a rollout, else sampler and trainer
        disagree), `train/clip_frac` (below 0.2). `train/loss` is near 0 when a rollout is used once: only its
        gradient matters.
    Cost: One forward and backward pass per update and the sampling, without groups whose rewards are all
        equal; a second copy of the weights, another forward pass and these groups too if kl > 0.
    Not for: Rewards that no sample ever gets, or that all get; filter prompts with `DifficultyFilter`.

    Args:
        model: Hugging Face folder or id, or a config with `model_type` for random weights. Also the
            reference.
        optimizer: Maker of the optimizer from parameter groups; biases and norms come with `weight_decay` 0.
        advantage: Measure of how good each completion is; None is `rewarm.GroupAdvantage()`. Dr. GRPO is
            `rewarm.GroupAdvantage(scale_by_std=False)` with `weights=rewarm.PerConstant(longest)`.
        loss: Loss of the tokens, such as `rewarm.GSPO()`, or a `rewarm.Sum` of several; None is
            `rewarm.Clipped()`.
        weights: Weights with which the tokens' losses are added up: `rewarm.PerToken()`,
            `rewarm.PerSequence()` or `rewarm.PerConstant(tokens)`; None is `rewarm.PerToken()`.
        kl: Weight of the KL divergence to the initial weights, >= 0.
        backend: How log-probabilities are computed: `auto`, `torch`, `liger` or `dense`.
        attention: `documents`, or an `attn_implementation` of transformers; None is `documents` where the
            model allows it, else transformers' choice.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Run each decoder layer through `torch.compile`.
        liger_layers: Liger's layer kernels: `auto` uses them on CUDA where Liger knows the model.

    Raises:
        ValueError: If `kl` is below 0.

    Logs:
        train/loss: The objective of the step.
        train/clip_frac: Share of tokens whose gradient clipping took. This and the other means over tokens
            are of the completions that were computed: without groups of equal rewards if `kl` is 0.
        train/sampler_gap: Mean absolute difference of policy and sampler log-probabilities, in nats.
        train/entropy: Estimate from the sampled tokens, in nats per token.
        train/completion_tokens: Mean length of all completions of the step, in tokens.
        train/kl: Estimated divergence from the reference, in nats per token; only with `kl` above 0.
        train/grad_norm: Norm of the step's gradients before clipping.
        train/skipped_steps: Steps so far that were left out because that norm was not finite.
        rollout/reward: Mean over everything sampled, also what a filter refused.
        rollout/zero_std_frac: Share of groups whose rewards are all equal.
        rollout/admitted_frac: Share of the sampled groups that the gate let in.
        rollout/filler_frac: Share of the rollout filled with refused groups after `max_rounds`.
        rollout/rounds: How often prompts were asked for.
        rollout/cut_frac: Share of completions cut at the length limit.
        val/reward: Mean over the validation completions.

    Example:
        >>> import rewarm
        >>> GRPO("models/sft", loss=rewarm.GSPO(), weights=rewarm.PerSequence(), kl=0.01).uses_reference
        True
    """

    @replaced(
        scale_by_std="advantage=rewarm.GroupAdvantage(scale_by_std=...)",
        clip_low="loss=rewarm.Clipped(low=...)",
        clip_high="loss=rewarm.Clipped(high=...)",
        beta="kl=...",
        normalise="weights=rewarm.PerToken(), rewarm.PerSequence() or rewarm.PerConstant(tokens)",
        constant_tokens="weights=rewarm.PerConstant(tokens)",
    )
    def __init__(
        self,
        model: str | dict[str, Any],
        optimizer: OptimizerCallable = default_optimizer,
        *,
        advantage: Advantage | None = None,
        loss: PolicyLoss | Sum | None = None,
        weights: Weights | None = None,
        kl: float = 0.0,
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
        at_least(0, kl=kl)
        self.advantage, self.loss = advantage or GroupAdvantage(), loss or Clipped()
        self.weights, self.kl = weights or PerToken(), kl

    @property
    def uses_reference(self) -> bool:
        """Whether the KL term needs a frozen copy of the initial weights."""
        return self.kl > 0.0

    @property
    def learns_from_equal_rewards(self) -> bool:
        """Whether completions of a group with equal rewards have a gradient."""
        return self.kl > 0.0 or not self.advantage.is_zero_for_equal_rewards

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the policy-gradient loss over the completions of the optimizer step. Shape ()."""
        batch = as_batch(batch, needs=("sampler_logprobs", "group_rewards", "group_places", "temperature"))
        counts = self.counts.of(batch, batch_idx)
        values = self.token_values(batch, self.loss.needs, batch["temperature"])
        samples = self._samples(batch, values)
        policy, mask = samples.logprobs, samples.mask
        losses, clipped = self.loss.values(samples)
        trained = counts.get("trained_tokens", counts["tokens"])
        metrics = {
            "train/clip_frac": (clipped & mask).sum() / trained,
            "train/sampler_gap": ((policy - samples.sampler_logprobs).abs() * mask).sum() / trained,
            "train/entropy": -(policy * mask).sum() / trained,
            "train/completion_tokens": batch["counts"]["tokens"] / counts["sequences"],
        }
        if self.uses_reference:
            reference = FrozenReference(self).logprobs(batch, batch["temperature"])
            kl = kl_estimate(policy, reference)
            losses = losses + self.kl * kl
            metrics["train/kl"] = (kl * mask).sum() / trained
        share = self.weights.share(losses * mask, samples, counts)
        self.counts.log({"train/loss": share, **metrics}, batch_idx)
        for name, value in batch.get("rollout_metrics", {}).items():
            self.log(f"rollout/{name}", value, batch_size=1, prog_bar=name == "reward")
        return self.counts.loss(share)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add to the mean reward of the completions sampled for the validation prompts."""
        self.means.add("reward", batch["rewards"].sum(), batch["rewards"].numel())

    def _samples(self, batch: Mapping[str, Any], values: Mapping[str, Tensor]) -> Samples:
        """What the loss sees of a batch's completions."""
        groups = self.advantage.values(batch["group_rewards"])
        advantages = groups.gather(1, batch["group_places"][:, None])[:, 0]
        ids = batch["sequence_ids"]
        return Samples(
            logprobs=values["logprobs"],
            sampler_logprobs=batch["sampler_logprobs"],
            advantages=advantages[ids.clamp(min=0)],
            mask=batch["targets"] != IGNORE_INDEX,
            sequence_ids=ids,
            num_sequences=num_sequences(batch),
            statistics=values,
        )
