"""Fits of every method on prepared batches, in one process or on every rank of a group."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import rewarm
from rewarm.functional.logprob import IGNORE_INDEX
from tests import fits, tiny
from tests.distributed.runs import STRATEGIES, Steps, files_in, ranks

ROWS = 20  # 8 per step, and 4 in the last one
SPLITS = {1: [(4, 2), (2, 4), (1, 8)], 2: [(4, 1), (2, 2), (1, 4)], 4: [(1, 2)]}
"""By number of ranks: rows per micro-batch, and micro-batches per step, whose product with it is 8."""


def pairs(count: int, seed: int = 0) -> list[Any]:
    return list(zip(fits.sequences(count, seed), fits.sequences(count, seed + 50), strict=True))


def rollouts(count: int) -> list[Any]:
    return fits.sampled(count // 4)


@dataclass(frozen=True)
class Prepared:
    """A method and the batches of some rows for it."""

    module: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    rows: Callable[[int], list[Any]] = fits.sequences
    batch: Callable[..., dict[str, Any]] = fits.text_batch


WITH_NLL = rewarm.Sum([rewarm.Sigmoid(), rewarm.ChosenNLL()], [1.0, 0.7])
METHODS = {
    "continual pretraining": Prepared(rewarm.ContinualPretraining),
    "sft": Prepared(rewarm.CurriculumSFT),
    "dpo": Prepared(
        rewarm.DPO,
        {"reference": "frozen", "loss": WITH_NLL},
        pairs,
        fits.pair_batch,
    ),
    "nca": Prepared(rewarm.DPO, {"reference": "frozen", "loss": rewarm.NCA()}, pairs, fits.pair_batch),
} | {
    f"grpo {type(options['weights']).__name__}": Prepared(rewarm.GRPO, options, rollouts, fits.rollout_batch)
    for options in (
        {"weights": rewarm.PerToken(), "kl": 0.1},
        {
            "weights": rewarm.PerSequence(),
            "loss": rewarm.GSPO(),
            "kl": 0.1,
            "advantage": rewarm.GroupAdvantage(scale_by_std=False),
        },
        {"weights": rewarm.PerConstant(30)},
    )
}


class PerBatchCounts(rewarm.StepCounts):
    """Those of the micro-batch alone."""

    def of(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"tokens": 4 * (batch["targets"] != IGNORE_INDEX).sum()}


class PerBatch(rewarm.CurriculumSFT):
    """Divides by the tokens of the micro-batch."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.counts = PerBatchCounts(self)


def fit(
    method: Prepared, size: int, accumulate: int, strategy: str = "one process", rows: int = ROWS
) -> Steps:
    """Gradients and metrics of the steps of an epoch, in batches of this size."""
    torch.manual_seed(0)
    module, steps = method.module(tiny.LLAMA, fits.sgd(), **method.options), Steps()
    trainer = fits.trainer(
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=[steps],
        devices=ranks(),
        strategy=STRATEGIES[strategy](),
    )
    batches = fits.cut(method.rows(rows), size, method.batch)
    # A rank that has nothing left takes part with a batch without rows.
    batches += [method.batch([], []) for _ in range(-len(batches) % ranks())]
    trainer.fit(module, rewarm.WindowLoader(batches[trainer.global_rank :: ranks()], accumulate))
    return steps


def replayed(folder: Path, size: int, accumulate: int, strategy: str = "one process") -> Steps:
    """The same of two steps of continual pretraining with replay on its data module."""
    torch.manual_seed(0)
    module, steps = rewarm.ContinualPretraining(tiny.LLAMA, fits.sgd()), Steps()
    trainer = fits.trainer(
        max_steps=2,
        accumulate_grad_batches=accumulate,
        callbacks=[steps],
        devices=ranks(),
        strategy=STRATEGIES[strategy](),
        use_distributed_sampler=False,
    )
    files = files_in(folder)
    data = fits.corpus(files, batch_size=size, replay={"old": files.old}, replay_fraction=0.25)
    trainer.fit(module, datamodule=data)
    return steps


def fit_splits(strategy: str, folder: Path) -> dict[str, dict[tuple[int, int], Any]]:
    """Gradients and metrics of every method in every split, on the ranks there are."""
    splits = SPLITS[ranks()]
    results = {"replay": {split: replayed(folder, *split, strategy) for split in splits}}
    for name, method in METHODS.items():
        # Rollouts always divide.
        rows = 24 if name.startswith("grpo") else ROWS
        results[name] = {split: fit(method, *split, strategy, rows) for split in splits}
    return {
        name: {split: (steps.gradients, steps.metrics) for split, steps in found.items()}
        for name, found in results.items()
    }
