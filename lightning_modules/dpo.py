"""Direct preference optimisation."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from rewarm.checks import one_of, replaced
from rewarm.functional.logprob import IGNORE_INDEX, Backend
from rewarm.functional.sequences import sequence_sums
from rewarm.lightning_modules.base import LanguageModule
from rewarm.lightning_modules.optimizers import default_optimizer
from rewarm.lightning_modules.reference import CachedReference, FrozenReference
from rewarm.objectives.batch import as_pair_batch, num_sequences
from rewarm.objectives.pair_losses import PairLoss, Pairs, Sigmoid
from rewarm.objectives.sums import Sum


class DPO(LanguageModule):
    """Learns from pairs of a chosen and a rejected completion, without a reward model.

    Idea: Raise the chosen completion over the rejected one, measured against the model as it was when
        training began.
    Objective: One of the losses in `rewarm.objectives.pair_losses`, mean over the step's pairs, by default
        `rewarm.Sigmoid`; or a weighted `rewarm.Sum` of several.
    Source: Rafailov et al. 2023, arXiv:2305.18290; NCA: Chen et al. 2024, arXiv:2402.05369.
    Defaults: beta 0.1 (TRL's; the DPO repository says 0.1 to 0.5), AdamW at 2e-5 must be lowered for real
        models (TRL 1e-6, Tulu 3 5e-7), no label smoothing, no NLL term.
    Watch: `train/accuracy` (share of pairs ranked right, above 0.5), `train/margin` (nats, rising),
        `train/chosen_logratio` (nats; falling far below 0 means that the chosen answers are unlearnt too:
        lower the learning rate or add `rewarm.ChosenNLL`).
    Cost: One forward and backward pass over both completions and their prompt, once; the reference costs one
        forward pass over the data up front (`reference: cached`), or a second copy of the weights
        (`reference: frozen`).
    Not for: Teaching answers that the model never gives; do SFT first.

    Args:
        model: Hugging Face folder or id, or a config with `model_type` for random weights. Also the
            reference.
        optimizer: Maker of the optimizer from parameter groups; biases and norms come with `weight_decay` 0.
        loss: Loss of the pairs, such as `rewarm.NCA(beta=0.1)`, or a `rewarm.Sum` of several; None is
            `rewarm.Sigmoid()`.
        reference: `cached` computes the reference's log-probabilities once, before the first step, and keeps
            them by example id; `frozen` keeps a copy of the weights.
        backend: How log-probabilities are computed: `auto`, `torch`, `liger` or `dense`.
        attention: `documents`, or an `attn_implementation` of transformers; None is `documents` where the
            model allows it, else transformers' choice.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Run each decoder layer through `torch.compile`.
        liger_layers: Liger's layer kernels: `auto` uses them on CUDA where Liger knows the model.

    Raises:
        ValueError: If `loss` is given by name, or `reference` is unknown.

    Logs:
        train/loss: The objective of the step.
        train/nll: Mean negative log-likelihood of the step's chosen tokens, in nats, also where no loss
            reads it.
        train/accuracy: Share of the step's pairs with a margin above 0.
        train/margin: Mean log-ratio of chosen less that of rejected completions, in nats.
        train/chosen_logratio: Mean log-ratio of chosen completions to the reference, in nats.
        train/grad_norm: Norm of the step's gradients before clipping.
        train/skipped_steps: Steps so far that were left out because that norm was not finite.
        val/loss: Mean loss of the validation pairs, without terms that are counted in tokens.
        val/accuracy: Share of the validation pairs with a margin above 0.
        val/margin: Mean log-ratio of chosen less that of rejected completions, in nats.
        val/chosen_logratio: Mean log-ratio of chosen completions to the reference, in nats.

    Example:
        >>> import rewarm
        >>> DPO("models/sft", loss=rewarm.NCA(beta=0.1), reference="frozen").uses_reference
        True
        >>> DPO("models/sft", loss=rewarm.NCA(beta=0.1), reference="cached").uses_reference
        False
    """

    @replaced(
        beta="loss=rewarm.Sigmoid(beta=...)",
        label_smoothing="loss=rewarm.Sigmoid(label_smoothing=...)",
        nll_weight="loss=rewarm.Sum([rewarm.Sigmoid(), rewarm.ChosenNLL()], [1.0, nll_weight])",
    )
    def __init__(
        self,
        model: str | dict[str, Any],
        optimizer: OptimizerCallable = default_optimizer,
        *,
        loss: PairLoss | Sum | None = None,
        reference: Literal["cached", "frozen"] = "cached",
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
        if isinstance(loss, str):
            raise ValueError(f"loss is {loss!r}; it must be a part, such as rewarm.Sigmoid() or rewarm.NCA()")
        one_of(("cached", "frozen"), reference=reference)
        self.loss = loss or Sigmoid()
        self.reference_kind = reference
        self.cached = CachedReference(self) if self.loss.needs_reference and reference == "cached" else None

    @property
    def uses_reference(self) -> bool:
        """Whether the method keeps a frozen copy of the initial weights."""
        return self.loss.needs_reference and self.cached is None

    def on_fit_start(self) -> None:
        """Forget the reference of an earlier fit."""
        super().on_fit_start()
        if self.cached is not None:
            self.cached.begin_fit()

    def on_train_start(self) -> None:
        """Compute the reference's log-probabilities, unless a checkpoint brought them."""
        self._prepare()

    def on_validation_start(self) -> None:
        """Compute the reference's log-probabilities, unless they are there."""
        self._prepare()

    def on_test_start(self) -> None:
        """Compute the reference's log-probabilities, unless they are there."""
        self._prepare()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the reference's log-probabilities: a resumed run has other weights than the reference."""
        super().on_save_checkpoint(checkpoint)
        if self.cached is not None:
            checkpoint["dpo_reference"] = self.cached.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the reference's log-probabilities.

        Raises:
            ValueError: If the checkpoint has none where this module reads them, or is not of this module.
        """
        super().on_load_checkpoint(checkpoint)
        if self.cached is None:
            return
        if "dpo_reference" not in checkpoint:
            raise ValueError(
                "the checkpoint has no cached reference of DPO: export it, and give the folder as model"
            )
        self.cached.load_state_dict(checkpoint["dpo_reference"])

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return the loss of the pairs, and each pair's margin as `scores` beside its `ids`."""
        batch = as_pair_batch(batch)
        counts = self.counts.of(batch, batch_idx)
        pairs = self._pairs(batch, "train")
        share = self.loss.share(pairs, counts)
        shares = {"train/loss": share, "train/nll": -pairs.chosen.sum() / counts["chosen_tokens"]}
        metrics = self._metrics(pairs)
        shares |= {f"train/{name}": value.sum() / counts["pairs"] for name, value in metrics.items()}
        self.counts.log(shares, batch_idx)
        outputs = {"loss": self.counts.loss(share), "scores": metrics["margin"]}
        return outputs | {"ids": batch["ids"][::2]} if "ids" in batch else outputs

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add to the means of loss, accuracy, margin and log-ratio over the validation pairs."""
        pairs = self._pairs(as_pair_batch(batch), "val")
        number = len(pairs.chosen)
        terms = [(weight, loss) for weight, loss in self.loss.terms if loss.counted_in == "pairs"]
        if terms:
            values = torch.stack([weight * loss.values(pairs) for weight, loss in terms])
            self.means.add("loss", values.sum(0).sum(), number)
        for name, value in self._metrics(pairs).items():
            self.means.add(name, value.sum(), number)

    def _prepare(self) -> None:
        if self.cached is not None:
            self.cached.prepare()

    def _pairs(self, batch: Mapping[str, Any], split: str) -> Pairs:
        """What the loss sees of a batch's pairs."""
        ids, sequences = batch["sequence_ids"], num_sequences(batch)
        chosen, rejected = sequence_sums(self.logprobs(batch), ids, sequences).view(-1, 2).unbind(-1)
        lengths = sequence_sums((batch["targets"] != IGNORE_INDEX).float(), ids, sequences).view(-1, 2)
        reference_chosen = reference_rejected = None
        if self.loss.needs_reference:
            reference = self.cached or FrozenReference(self)
            reference_chosen, reference_rejected = reference.sums(batch, split).view(-1, 2).unbind(-1)
        names = batch.get("column_names", ())
        return Pairs(
            chosen=chosen,
            rejected=rejected,
            chosen_tokens=lengths[:, 0],
            rejected_tokens=lengths[:, 1],
            reference_chosen=reference_chosen,
            reference_rejected=reference_rejected,
            columns={name: batch["columns"][:, place] for place, name in enumerate(names)},
        )

    def _metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        """What to watch of each pair, (P,): log-ratios to the reference, without one log-probabilities."""
        sides = (pairs.chosen, pairs.rejected)
        if self.loss.needs_reference:
            sides = (pairs.chosen_logratios, pairs.rejected_logratios)
        # Side by side, as their sums have always been rounded.
        chosen, rejected = torch.stack(sides, -1).detach().unbind(-1)
        margin = chosen - rejected
        return {"accuracy": (margin > 0).float(), "margin": margin, "chosen_logratio": chosen}
