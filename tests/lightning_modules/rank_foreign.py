"""A LightningModule that is none of ours, with two parts of ours, in one process or on every rank."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.distributed.fsdp import fully_shard

import rewarm
from tests import fits
from tests.distributed.runs import STRATEGIES, Steps, ranks

ROWS, STEP = 22, 8
"""Rows in all, and per optimizer step: the last one has six."""


class Regression(LightningModule):
    """Squared errors of rows, divided by the rows of the whole step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        self.counts = rewarm.StepCounts(self)
        self.gradient_steps = rewarm.GradientSteps(self)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        errors = (self.net(batch["x"])[:, 0] - batch["y"]).square()
        share = errors.sum() / self.counts.of(batch, batch_idx)["rows"]
        self.counts.log({"train/loss": share}, batch_idx)
        return self.counts.loss(share)

    def configure_gradient_clipping(self, optimizer: Any, *clipping: Any, **named: Any) -> None:
        self.gradient_steps.clip(optimizer, *clipping, **named)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(sizes: list[int]) -> list[dict[str, Any]]:
    """The rows in order, in batches of these sizes."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(ROWS, 3, generator=generator), torch.randn(ROWS, generator=generator)
    parts = zip(x.split(sizes), y.split(sizes), torch.arange(ROWS).split(sizes), strict=True)
    return [{"x": a, "y": b, "ids": ids, "counts": {"rows": len(b)}} for a, b, ids in parts]


def fit(sizes: list[int], accumulate: int, strategy: str = "one process") -> Steps:
    """Gradients and metrics of an epoch's steps; the batches go to the ranks in turns."""
    torch.manual_seed(0)
    module, steps = Regression(), Steps()
    trainer = fits.trainer(
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        callbacks=[steps],
        devices=ranks(),
        strategy=STRATEGIES[strategy](),
    )
    mine = batches(sizes)[trainer.global_rank :: ranks()]
    trainer.fit(module, rewarm.WindowLoader(mine, accumulate))
    return steps


def fit_each(cases: list[tuple[list[int], int, str]]) -> list[tuple[Any, Any]]:
    """Gradients and metrics of several fits."""
    return [(steps.gradients, steps.metrics) for steps in (fit(*case) for case in cases)]
