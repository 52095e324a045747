"""Exact normalisation for any LightningModule: one batch, micro-batches and ranks have the same gradient."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from rewarm.rollouts.ranks import place


class StepCounts:
    """Turns sums over a micro-batch into the loss of a whole optimizer step.

    A loss is a sum divided by a count over the whole step: every micro-batch of the accumulation window on
    every rank. Batches carry the counts of their window in `batch["window"]`, which `rewarm.WindowLoader`
    adds. Without `accumulate_grad_batches` a batch's own counts, `batch["counts"]`, do as well.

    Args:
        module: The module whose trainer accumulates and averages.

    Example:
        >>> class Regression(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net, self.counts = torch.nn.Linear(3, 1), StepCounts(self)
        ...     def training_step(self, batch, batch_idx):
        ...         errors = (self.net(batch["x"])[:, 0] - batch["y"]).square()
        ...         return self.counts.loss(errors.sum() / self.counts.of(batch, batch_idx)["rows"])

    Source: ours.   Differs: nothing.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._known: tuple[int, dict[str, Tensor]] | None = None
        self._logged: dict[str, Tensor] = {}

    def of(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return the counts of the whole optimizer step: all its micro-batches on all ranks.

        All ranks must call this together.

        Args:
            batch: A batch with `window`, or with `counts` if gradients do not accumulate: numbers by name.
            batch_idx: Number of the batch in the epoch, as Lightning tells it.

        Returns:
            Each count by its name, float64 of shape (). None is below 1, so that a step without a single
            target has loss 0.

        Raises:
            ValueError: If the batch does not carry these counts.
        """
        accumulate = self._module.trainer.accumulate_grad_batches
        window = batch_idx // accumulate
        # The first batch of every epoch is in window 0.
        if self._known is None or self._known[0] != window or batch_idx % accumulate == 0:
            counts = batch.get("window", batch.get("counts") if accumulate == 1 else None)
            if counts is None:
                raise ValueError(
                    f"accumulate_grad_batches is {accumulate}, but the batches lack the counts of their"
                    " window: wrap your loader in rewarm.WindowLoader(loader, accumulate_grad_batches)"
                    if accumulate > 1
                    else "the batch has neither 'window' nor 'counts', which its loss is divided by"
                )
            totals = torch.tensor(list(counts.values()), dtype=self.wide, device=self._module.device)
            totals = sum_over_ranks(totals, self._module.trainer)
            self._known = (window, dict(zip(counts, totals.clamp(min=1.0), strict=True)))
        return self._known[1]

    def loss(self, share: Tensor) -> Tensor:
        """Turn a share of the step's loss into what Lightning wants returned.

        Lightning divides by `accumulate_grad_batches` also in a shorter last window, and distributed
        strategies average over ranks; both are undone here, so that the step's gradient is the gradient of
        the sum of all shares.

        Args:
            share: This micro-batch's part of the sum, divided by a count of the whole step. Shape ().

        Returns:
            What `training_step` returns as its loss. Shape ().
        """
        trainer = self._module.trainer
        return share * (trainer.accumulate_grad_batches * place(trainer).size)

    def log(self, shares: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log values given as shares that add up over the micro-batches and ranks of an optimizer step.

        Args:
            shares: This micro-batch's part of each value, by the name to log. Shapes ().
            batch_idx: Number of the batch in the epoch, as Lightning tells it.
        """
        trainer = self._module.trainer
        if not step_is_logged(trainer):
            return
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._logged = {}  # what an earlier fit left unfinished
        for name, share in shares.items():
            self._logged[name] = self._logged.get(name, 0.0) + share.detach()
        is_last = batch_idx + 1 == trainer.num_training_batches
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not is_last:
            return
        metrics, self._logged = self._logged, {}
        totals = sum_over_ranks(torch.stack([value.float() for value in metrics.values()]), trainer)
        for name, total in zip(metrics, totals, strict=True):
            self._module.log(name, total, prog_bar=name == "train/loss", batch_size=1)

    @property
    def wide(self) -> torch.dtype:
        """The widest float that the module's device has."""
        return torch.float32 if self._module.device.type == "mps" else torch.float64


class Means:
    """Means over all batches of all ranks, logged when a pass over some data ends.

    Args:
        module: The module that logs the means.

    Example:
        >>> class Printer(LightningModule):
        ...     trainer = None  # a process without others
        ...     def log(self, name, value, **options):
        ...         print(name, value.item())
        >>> means = Means(Printer())
        >>> means.add("loss", torch.tensor(8.0), 3)
        >>> means.add("loss", torch.tensor(1.0), 1)
        >>> means.log("val")
        val/loss 2.25
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._sums: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Begin new means."""
        self._sums = {}

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Add values to a mean.

        Args:
            name: Name of the mean.
            total: Sum of the values. Shape ().
            count: Number of the values. Shape ().
        """
        dtype = torch.float32 if total.device.type == "mps" else torch.float64
        sums = torch.stack([total.detach(), torch.as_tensor(count, device=total.device)]).to(dtype)
        self._sums[name] = self._sums.get(name, 0.0) + sums

    def log(self, split: str) -> None:
        """Log each mean over all ranks as `split/name`. All ranks must call this together."""
        for name, sums in self._sums.items():
            total, count = sum_over_ranks(sums, self._module.trainer)
            self._module.log(f"{split}/{name}", total / count, batch_size=1, prog_bar=name == "loss")


def step_is_logged(trainer: Trainer) -> bool:
    """Return whether the optimizer step that is being made will be logged.

    Args:
        trainer: The trainer that makes the step.

    Example:
        >>> from types import SimpleNamespace
        >>> trainers = [SimpleNamespace(log_every_n_steps=4, global_step=step) for step in range(9)]
        >>> [trainer.global_step for trainer in trainers if step_is_logged(trainer)]
        [0, 3, 7]
    """
    every, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]
    return bool(every) and (step == 0 or (step + 1) % every == 0)


def sum_over_ranks(values: Tensor, trainer: Trainer) -> Tensor:
    """Sum over the ranks that have different data; ranks that share a layer have the same data.

    All ranks must call this together.

    Args:
        values: Values of this rank, which the sums replace. Any shape.
        trainer: The trainer whose ranks are added up.

    Returns:
        The sums, the same on all ranks.

    Example:
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)  # a single rank
        >>> sum_over_ranks(torch.tensor([2.0, 3.0]), trainer)
        tensor([2., 3.])
    """
    here = place(trainer)
    if here.size > 1:
        dist.all_reduce(values, group=here.group)  # Lightning's `reduce` would also wait at a barrier
    return values
