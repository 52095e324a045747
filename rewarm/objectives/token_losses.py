"""Losses of supervised fine-tuning as parts: the formulas are in `rewarm.functional.sft_losses`.

A loss says what it needs of each token's distribution, gives a value per token, and a weight per token with
which the values add up to the loss of the whole optimizer step, however that is cut into batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.functional.sft_losses import (
    dft_loss,
    distillation_loss,
    ditto_loss,
    label_smoothing_loss,
    nll_loss,
    num_selected_tokens,
    select_tokens,
    task_token_weights,
    z_loss,
)
from rewarm.functional.token_statistics import Statistic


class TokenLoss:
    """Base of the losses of tokens, and the negative log-likelihood itself.

    Attributes:
        needs: Statistics of each token's distribution, see `rewarm.functional.token_statistics`.
        temperature: What divides the logits.

    Example:
        >>> logprobs, counts = torch.tensor([[-0.5, -2.0]]), {"tokens": torch.tensor(4.0)}
        >>> TokenLoss().share(logprobs, {"targets": torch.tensor([[3, 4]])}, {}, counts)
        tensor(0.6250)

    Source: maximum likelihood.   Differs: nothing.
    """

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Statistics that the loss needs."""
        return ()

    @property
    def temperature(self) -> float:
        """What divides the logits."""
        return 1.0

    def values(self, logprobs: Tensor, batch: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each token, 0 where there is no target.

        Args:
            logprobs: Log-probabilities of the targets, in nats. Shape (B, T).
            batch: The batch, with `targets` of shape (B, T) and what else the loss reads.
            statistics: The statistics that the loss needs, each of shape (B, T), or (B, T, K).
        """
        return nll_loss(logprobs)

    def token_weights(self, batch: Mapping[str, Any], counts: Mapping[str, Tensor]) -> Tensor:
        """Return what each token's loss is multiplied with before all are added up: 1 / the step's targets.

        Args:
            batch: The batch, which may have `weights` of shape (B, T), factors of the loss.
            counts: Counts of the whole optimizer step, over all micro-batches and ranks; `tokens` at least.
        """
        return batch.get("weights", 1.0) / counts["tokens"]

    def share(
        self,
        logprobs: Tensor,
        batch: Mapping[str, Any],
        statistics: Mapping[str, Tensor],
        counts: Mapping[str, Tensor],
    ) -> Tensor:
        """Return this batch's part of the step's loss; see the other methods for the arguments."""
        return (self.values(logprobs, batch, statistics) * self.token_weights(batch, counts)).sum()


@dataclass(frozen=True)
class NLL(TokenLoss):
    """Negative log-likelihood.

    Example:
        >>> NLL().values(torch.tensor([[-0.5, -2.0]]), {}, {})
        tensor([[0.5000, 2.0000]])

    Source: maximum likelihood.   Differs: nothing.
    """


@dataclass(frozen=True)
class LabelSmoothing(TokenLoss):
    """Cross entropy with a target distribution of which a share is spread: `label_smoothing_loss`.

    Args:
        smoothing: Share that is spread over the vocabulary, in [0, 1). 0 is NLL.

    Raises:
        ValueError: If smoothing is out of range.

    Example:
        >>> loss = LabelSmoothing(smoothing=0.5)
        >>> loss.values(torch.tensor([[-1.0]]), {}, {"mean_logprobs": torch.tensor([[-3.0]])})
        tensor([[2.]])

    Source: Szegedy et al. 2016, arXiv:1512.00567.   Differs: nothing.
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        label_smoothing_loss(_NONE, _NONE, smoothing=self.smoothing)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The mean log-probability over the vocabulary."""
        return ("mean_logprobs",)

    def values(self, logprobs: Tensor, batch: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each token."""
        return label_smoothing_loss(logprobs, statistics["mean_logprobs"], smoothing=self.smoothing)


@dataclass(frozen=True)
class ZLoss(TokenLoss):
    """Another loss with a pull of the softmax normaliser towards 1 added to it: `z_loss`.

    Args:
        coefficient: Strength of the pull, >= 0. 0 adds nothing.
        loss: The other loss.

    Raises:
        ValueError: If the coefficient is below 0 or not finite.

    Example:
        >>> loss = ZLoss(coefficient=0.5)
        >>> loss.values(torch.tensor([[-1.0]]), {}, {"logsumexp": torch.tensor([[2.0]])})
        tensor([[3.]])

    Source: PaLM, Chowdhery et al. 2022, arXiv:2204.02311.   Differs: nothing.
    """

    coefficient: float = 1e-4
    loss: TokenLoss = field(default_factory=NLL)

    def __post_init__(self) -> None:
        z_loss(_NONE, coefficient=self.coefficient)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The normaliser, and what the other loss needs."""
        return tuple(dict.fromkeys((*self.loss.needs, "logsumexp")))

    @property
    def temperature(self) -> float:
        """What divides the logits, for the other loss."""
        return self.loss.temperature

    def values(self, logprobs: Tensor, batch: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each token."""
        pull = z_loss(statistics["logsumexp"], coefficient=self.coefficient)
        return self.loss.values(logprobs, batch, statistics) + pull

    def token_weights(self, batch: Mapping[str, Any], counts: Mapping[str, Tensor]) -> Tensor:
        """Return the weights of the other loss."""
        return self.loss.token_weights(batch, counts)


@dataclass(frozen=True)
class DFT(TokenLoss):
    """NLL weighted by the token's own probability, over the number of tokens: `dft_loss`.

    Args:
        power: Exponent of the probability, in [0, 1]. 1 is DFT, 0 is NLL.

    Raises:
        ValueError: If the power is out of range.

    Example:
        >>> DFT().values(torch.tensor([[-0.6931]]), {}, {})
        tensor([[0.3466]])

    Source: dynamic fine-tuning, arXiv:2508.05629.   Differs: the power.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        dft_loss(_NONE, power=self.power)

    def values(self, logprobs: Tensor, batch: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each token."""
        return dft_loss(logprobs, power=self.power)


@dataclass(frozen=True)
class EntropySFT(TokenLoss):
    """NLL of the tokens whose errors the model's own doubt does not explain: `select_tokens`.

    The choice is made within each micro-batch of each rank. The sum is divided by floor(token_ratio * targets
    of the whole optimizer step), as in the repository.

    Args:
        token_ratio: Share of the targets that is learnt, in (0, 1]. 1 is NLL.
        entropy_weight: How much doubt excuses an error, >= 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> batch = {"targets": torch.tensor([[3, 4]])}
        >>> loss = EntropySFT(token_ratio=0.5)
        >>> loss.values(torch.tensor([[-3.0, -1.0]]), batch, {"entropy": torch.tensor([[0.5, 0.5]])})
        tensor([[3., 0.]])

    Source: Light-IF, arXiv:2508.03178, in its repository.   Differs: nothing.
    """

    token_ratio: float = 0.8
    entropy_weight: float = 0.8

    def __post_init__(self) -> None:
        num_selected_tokens(1, self.token_ratio)
        select_tokens(
            _NONE, _NONE, _NONE > 0, token_ratio=self.token_ratio, entropy_weight=self.entropy_weight
        )

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The entropy."""
        return ("entropy",)

    def values(self, logprobs: Tensor, batch: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each token, 0 for those that are not learnt."""
        selected = select_tokens(
            logprobs,
            statistics["entropy"],
            batch["targets"] != IGNORE_INDEX,
            token_ratio=self.token_ratio,
            entropy_weight=self.entropy_weight,
            num_tokens=batch.get("num_targets"),
        )
        return nll_loss(logprobs) * selected

    def token_weights(self, batch: Mapping[str, Any], counts: Mapping[str, Tensor]) -> Tensor:
        """Return one over the number of tokens to learn in the step."""
        return batch.get("weights", 1.0) / (self.token_ratio * counts["tokens"]).floor().clamp(min=1.0)


@dataclass(frozen=True)
class DITTO(TokenLoss):
    """A penalty on repeated tokens of rows that repeat themselves, NLL for all others: `ditto_loss`.

    Rows with `repeat: true` have the sentence of their completion again and again.

    Args:
        decay: Factor that each repetition should have over the one before, in [0, 1].
        one_sided: Whether a repeated token may be less likely than that at no cost.

    Raises:
        ValueError: If the decay is out of range.

    Example:
        >>> logprobs = torch.tensor([[0.5, 0.25]]).log()
        >>> DITTO(decay=0.5).values(logprobs, {"repeats": torch.tensor([[0, 1]])}, {})[0, 1] < 1e-6
        tensor(True)

    Source: Xu et al. 2022, arXiv:2206.02369, and its repository.   Differs: see
    `rewarm.functional.sft_losses.ditto_loss`.
    """

    decay: float = 0.5
    one_sided: bool = False

    def __post_init__(self) -> None:
        none = torch.zeros(1, 1)
        ditto_loss(none, none.long() - 1, decay=self.decay)

    def values(self, logprobs: Tensor, batch: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each token."""
        if "repeats" not in batch:
            return nll_loss(logprobs)
        distance = batch["repeats"]
        places = torch.arange(distance.shape[1], device=distance.device)
        earlier = torch.where(distance > 0, places - distance, -1)
        return ditto_loss(logprobs, earlier, decay=self.decay, one_sided=self.one_sided)


@dataclass(frozen=True)
class MultiTask(TokenLoss):
    """Weighted sum of each task's mean loss: `task_token_weights`.

    Args:
        weights: Weight of each task, >= 0, by its name in the column that the data's `task` names.
        loss: Loss of the tokens.

    Raises:
        ValueError: If a weight is out of range.

    Example:
        >>> loss = MultiTask({"answer": 1.0, "steps": 0.5})
        >>> counts = {"tokens of task answer": torch.tensor(1.0), "tokens of task steps": torch.tensor(4.0)}
        >>> loss.token_weights({"tasks": torch.tensor([[0, 1, -1]])}, counts)
        tensor([[1.0000, 0.1250, 0.0000]])

    Source: distilling step-by-step, Hsieh et al. 2023, arXiv:2305.02301.   Differs: any number of tasks in
    one batch.
    """

    weights: dict[str, float]
    loss: TokenLoss = field(default_factory=NLL)

    def __post_init__(self) -> None:
        task_token_weights(torch.tensor([-1]), list(self.weights.values()), [1] * len(self.weights))

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """What the loss of the tokens needs."""
        return self.loss.needs

    @property
    def temperature(self) -> float:
        """What divides the logits, for the loss of the tokens."""
        return self.loss.temperature

    def values(self, logprobs: Tensor, batch: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each token."""
        return self.loss.values(logprobs, batch, statistics)

    def token_weights(self, batch: Mapping[str, Any], counts: Mapping[str, Tensor]) -> Tensor:
        """Return the weight of each token's task over the targets that it has in the step.

        Raises:
            ValueError: If the tasks of the data are not those of the weights.
        """
        names = sorted(name.removeprefix(TASK_COUNT) for name in counts if name.startswith(TASK_COUNT))
        if names != sorted(self.weights):
            raise ValueError(f"weights names the tasks {sorted(self.weights)}, the data have {names}")
        totals = torch.stack([counts[TASK_COUNT + name] for name in names])
        # A rank without rows has no tasks either.
        tasks = batch["tasks"] if "tasks" in batch else torch.full_like(batch["targets"], -1)
        shares = task_token_weights(tasks, [self.weights[name] for name in names], totals)
        return shares * batch.get("weights", 1.0)


@dataclass(frozen=True)
class Distillation(TokenLoss):
    """Divergence from a teacher whose likeliest tokens are stored with the data: `distillation_loss`.

    Rows have `teacher_ids` and `teacher_logprobs`, for each learnt token a list of K. The scores of the
    examples are taken at the temperature too.

    Args:
        at_temperature: Temperature that divides both models' logits, > 0; the teacher's were stored at it.

    Raises:
        ValueError: If the temperature is not above 0.

    Example:
        >>> teacher = torch.tensor([[[0.75, 0.25]]]).log()
        >>> batch = {"targets": torch.tensor([[3]]), "teacher_logprobs": teacher}
        >>> Distillation().values(torch.zeros(1, 1), batch, {"candidates": teacher}).abs() < 1e-6
        tensor([[True]])

    Source: Hinton et al. 2015, arXiv:1503.02531.   Differs: only the teacher's likeliest tokens are stored;
    all others count as one.
    """

    at_temperature: float = 2.0

    def __post_init__(self) -> None:
        distillation_loss(_NONE[None], _NONE[None], temperature=self.at_temperature)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The log-probabilities of the stored tokens."""
        return ("candidates",)

    @property
    def temperature(self) -> float:
        """What divides the logits."""
        return self.at_temperature

    def values(self, logprobs: Tensor, batch: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each token."""
        student = statistics["candidates"]
        if "teacher_logprobs" not in batch:  # a rank without rows
            return student.sum(-1) * 0.0
        losses = distillation_loss(student, batch["teacher_logprobs"], temperature=self.at_temperature)
        return torch.where(batch["targets"] != IGNORE_INDEX, losses, 0.0)


TASK_COUNT = "tokens of task "
"""What the counts of each task's targets are called, before its name."""

_NONE = torch.zeros(1)
