"""Direct preference optimisation."""

from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor

from rewarm.functional.preference import dpo_loss, nca_pair_loss
from rewarm.functional.sequences import sequence_sums
from rewarm.lightning_modules.base import LanguageModule


class DPO(LanguageModule):
    """Learns from pairs of a chosen and a rejected completion, without a reward model.

    Idea: Raise the chosen completion over the rejected one, measured against the model as it was when
        training began.
    Objective: `rewarm.functional.preference.dpo_loss` or `nca_pair_loss`, mean over the step's pairs, plus
        `nll_weight` times the mean negative log-likelihood of the step's chosen tokens.
    Source: Rafailov et al. 2023, arXiv:2305.18290; NCA: Chen et al. 2024, arXiv:2402.05369.
    Defaults: beta 0.1 (TRL's; the DPO repository says 0.1 to 0.5), AdamW at 2e-5 must be lowered for real
        models (TRL 1e-6, Tulu 3 5e-7), no label smoothing, no NLL term.
    Watch: `train/accuracy` (share of pairs ranked right, above 0.5), `train/margin` (nats, rising),
        `train/chosen_logratio` (nats; falling far below 0 means that the chosen answers are unlearnt too:
        lower the learning rate or add `nll_weight`).
    Cost: One forward and backward pass over both completions and their prompt, once; the reference costs one
        forward pass over the data up front (`reference: cached`), or a second copy of the weights
        (`reference: frozen`).
    Not for: Teaching answers that the model never gives; do SFT first.

    Args:
        model: Hugging Face folder or id, or a config with `model_type` for random weights. Also the
            reference.
        optimizer: Called with parameter groups; biases and norms come with `weight_decay` 0.
        loss: `sigmoid` or `nca_pair`.
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: Probability that a label is flipped, in [0, 0.5); `sigmoid` only.
        nll_weight: Weight of the chosen completions' negative log-likelihood, >= 0.
        reference: `cached` computes the reference's log-probabilities once, before the first step, and keeps
            them by example id; `frozen` keeps a copy of the weights.
        **options: See `rewarm.lightning_modules.base.LanguageModule`.

    Logs:
        train/loss: The objective of the step.
        train/nll: Mean over the step's chosen tokens, in nats, whatever its weight.
        train/accuracy: Share of the step's pairs with a margin above 0.
        train/margin: Mean log-ratio of chosen less that of rejected completions, in nats.
        train/chosen_logratio: Mean log-ratio of chosen completions to the reference, in nats.
        train/grad_norm: Norm of the step's gradients before clipping.
        train/skipped_steps: Steps so far that were left out because that norm was not finite.
        val/loss: Preference loss over the validation pairs, without the likelihood term.
        val/accuracy: As in training.
        val/margin: As in training.
        val/chosen_logratio: As in training.
    """

    def __init__(
        self,
        *args: Any,
        loss: Literal["sigmoid", "nca_pair"] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        nll_weight: float = 0.0,
        reference: Literal["cached", "frozen"] = "cached",
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if loss not in ("sigmoid", "nca_pair"):
            raise ValueError(f"loss is {loss!r}; known are 'sigmoid', 'nca_pair'")
        if loss == "nca_pair" and label_smoothing:
            raise ValueError(
                f"label_smoothing is {label_smoothing}, which nca_pair does not have: set it to 0"
            )
        if reference not in ("cached", "frozen"):
            raise ValueError(f"reference is {reference!r}; known are 'cached', 'frozen'")
        if nll_weight < 0.0:
            raise ValueError(f"nll_weight is {nll_weight}; it must not be below 0")
        dpo_loss(
            torch.zeros(0), torch.zeros(0), beta=beta, label_smoothing=label_smoothing
        )  # checks the ranges
        self.loss, self.beta, self.label_smoothing, self.nll_weight = loss, beta, label_smoothing, nll_weight
        self.reference_kind = reference
        self.reference_table: dict[str, Tensor] = {}

    @property
    def uses_reference(self) -> bool:
        """Whether the reference is a copy of the weights."""
        return self.reference_kind == "frozen"

    def on_train_start(self) -> None:
        """Compute the reference's log-probabilities, unless a checkpoint brought them."""
        self._fill_reference_table()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the reference's log-probabilities: a resumed run has other weights than the reference."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["dpo_reference_table"] = self.reference_table

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the reference's log-probabilities."""
        super().on_load_checkpoint(checkpoint)
        if "dpo_reference_table" not in checkpoint:
            raise ValueError("the checkpoint is not one of DPO: export it, and give the folder as model")
        self.reference_table = checkpoint["dpo_reference_table"]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Preference loss over the pairs; returns each pair's margin as `scores` beside its `ids`."""
        counts = self.step_counts(batch, batch_idx)
        logprobs = self.logprobs(batch)
        losses, nll, metrics = self._pair_losses(batch, logprobs, "train")
        share = losses.sum() / counts["pairs"]
        if self.nll_weight:
            share = share + self.nll_weight * nll / counts["chosen_tokens"]
        shares = {"train/loss": share, "train/nll": nll / counts["chosen_tokens"]}
        shares |= {f"train/{name}": value.sum() / counts["pairs"] for name, value in metrics.items()}
        self.log_step(shares, batch_idx)
        return {"loss": self.step_loss(share), "ids": batch["ids"][::2], "scores": metrics["margin"]}

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Preference loss, accuracy and margin over the validation pairs."""
        self._fill_reference_table()
        losses, _, metrics = self._pair_losses(batch, self.logprobs(batch), "val")
        for name, value in {"loss": losses, **metrics}.items():
            self.add_validation(name, value.sum(), batch["counts"]["pairs"])

    def _fill_reference_table(self) -> None:
        if self.reference_kind == "cached" and not self.reference_table:
            self.reference_table = {split: self._score(split) for split in ("train", "val")}

    def _pair_losses(
        self, batch: dict[str, Any], logprobs: Tensor, split: str
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss per pair (P,), the chosen tokens' summed NLL, and what to watch, each (P,)."""
        sequences = len(batch["ids"])
        policy_sums = sequence_sums(logprobs, batch["sequence_ids"], sequences).view(-1, 2)
        reference_sums = self._reference_sums(batch, split)
        chosen, rejected = (policy_sums - reference_sums).unbind(-1)
        if self.loss == "sigmoid":
            losses = dpo_loss(chosen, rejected, beta=self.beta, label_smoothing=self.label_smoothing)
        else:
            losses = nca_pair_loss(chosen, rejected, beta=self.beta)
        margin = (chosen - rejected).detach()
        metrics = {
            "accuracy": (margin > 0).float(),
            "margin": margin,
            "chosen_logratio": chosen.detach(),
        }
        return losses, -policy_sums[:, 0].sum(), metrics

    @torch.no_grad()
    def _reference_sums(self, batch: dict[str, Any], split: str) -> Tensor:
        if self.reference is None:
            # A rank without rows has no ids, which would make floats.
            pairs = torch.tensor(batch["ids"][::2], dtype=torch.long)
            # The table stays on the CPU: only the batch's rows travel.
            return self.reference_table[split][pairs].to(self.device)
        logprobs = self.reference(
            batch["input_ids"],
            batch["position_ids"],
            batch["targets"],
            documents=batch.get("documents"),
            num_targets=batch.get("num_targets"),
        )
        return sequence_sums(logprobs, batch["sequence_ids"], len(batch["ids"])).view(-1, 2)

    @torch.no_grad()
    def _score(self, split: str) -> Tensor:
        """Summed log-probabilities of every pair of a split under the policy as it is now. Shape (N, 2)."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "scoring_dataloader"):
            raise ValueError(
                "reference 'cached' reads the data once through datamodule.scoring_dataloader(split), which"
                f" {type(data).__name__} does not have: use PreferenceData or reference 'frozen'"
            )
        loader = data.scoring_dataloader(split)
        if loader is None:
            return torch.empty(0, 2)
        training = self.policy.training
        table: dict[int, list[float]] = {}
        self.policy.eval()
        hide = not self.trainer.is_global_zero or self.trainer.progress_bar_callback is None
        for batch in track(loader, f"reference log-probabilities ({split})", disable=hide):
            batch = self.trainer.strategy.batch_to_device(batch, self.device)
            with self.trainer.precision_plugin.forward_context():
                logprobs = self.logprobs(batch)
            sums = sequence_sums(logprobs, batch["sequence_ids"], len(batch["ids"])).view(-1, 2)
            table.update(zip(batch["ids"][::2], sums.tolist(), strict=True))
        self.policy.train(training)
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, table)
            table = {example: sums for part in parts for example, sums in part.items()}
        return torch.tensor([table[example] for example in range(len(table))])
