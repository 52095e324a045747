"""Continual pretraining."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rewarm.lightning_modules.base import LanguageModule
from rewarm.objectives.batch import as_batch


class ContinualPretraining(LanguageModule):
    """Next-token training that goes on from an existing model, or starts one.

    Idea: A finished model learns a new domain if its learning rate is warmed up again, and keeps the old one
        if a share of each batch is replayed from it.
    Objective: Negative mean of `rewarm.functional.logprob.token_logprobs` over all tokens of the step.
    Source: Ibrahim et al. 2024, arXiv:2403.08763; Gupta et al. 2023, arXiv:2308.04014.
    Defaults: AdamW at 2e-5 with betas 0.9, 0.95 (ours; the papers go back to the peak of pretraining, 3e-4 at
        405M). Replay lives in `CorpusData(replay_fraction=...)`: the paper takes 0.05 for a weak shift, 0.25
        for a strong one. The schedule lives in `LRSchedule`.
    Watch: `train/loss` (nats per token) should fall after the re-warm's first rise; `val/loss/<domain>` of
        the old domain is the forgetting.
    Cost: One forward and backward pass, one copy of the weights.
    Not for: Teaching a format or following instructions.

    Args:
        model: Hugging Face folder or id, or a config with `model_type` for random weights.
        optimizer: Maker of the optimizer from parameter groups; biases and norms come with `weight_decay` 0.
        backend: How log-probabilities are computed: `auto`, `torch`, `liger` or `dense`.
        attention: `documents`, or an `attn_implementation` of transformers; None is `documents` where the
            model allows it, else transformers' choice.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Run each decoder layer through `torch.compile`.
        liger_layers: Liger's layer kernels: `auto` uses them on CUDA where Liger knows the model.

    Logs:
        train/loss: Mean over the step's tokens, in nats.
        train/grad_norm: Norm of the step's gradients before clipping.
        train/skipped_steps: Steps so far that were left out because that norm was not finite.
        val/loss: Mean over all validation tokens, in nats.
        val/loss/<domain>: Mean over the validation tokens of one source, in nats.

    Example:
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> module = ContinualPretraining(tiny, attention="sdpa", gradient_checkpointing=True)
        >>> module.configure_model()
        >>> module.policy.model.config.vocab_size
        8
    """

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the next-token loss, a mean over every token of the optimizer step. Shape ()."""
        batch = as_batch(batch)
        tokens = self.counts.of(batch, batch_idx)["tokens"]
        share = -self.logprobs(batch).sum() / tokens
        self.counts.log({"train/loss": share}, batch_idx)
        return self.counts.loss(share)
