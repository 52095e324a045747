"""Fits of every method in one process or in every rank of a group; as a module it writes to a folder."""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import rewarm
from tests import fits, tiny

SEQUENCES = 20  # 8 per step, and 4 in the last one
ROWS = 21  # 8 per step, and 5 in the last one, in which a second rank has a batch without rows


def options(world_size: int) -> dict[str, Any]:
    return {
        "strategy": "ddp" if world_size > 1 else "auto",
        "devices": world_size,
        "use_distributed_sampler": False,
    }


def fit_prepared(world_size: int) -> dict[str, Any]:
    """GRPO on prepared rollouts, whose sampling would depend on the rank."""
    results, size = {}, 2 if world_size > 1 else 8
    everyone = fits.sampled(SEQUENCES // 4)
    for normalise in ("token", "sequence"):
        torch.manual_seed(0)
        module, record = rewarm.GRPO(tiny.LLAMA, fits.sgd(0.1), normalise=normalise, beta=0.1), fits.Record()
        batches = fits.cut(everyone, size, fits.rollout_batch)
        accumulate = 8 // (size * world_size)
        trainer = fits.trainer(
            max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[record], **options(world_size)
        )
        mine = batches[trainer.global_rank :: world_size]
        trainer.fit(module, rewarm.WindowLoader(mine, accumulate))
        results[f"grpo by {normalise}"] = (record.weights, record.metrics)
    return results


def fit_data(files: fits.Files, world_size: int) -> dict[str, Any]:
    """The other methods on their data modules, with validation."""
    size = 2 if world_size > 1 else 8
    accumulate, results = 8 // (size * world_size), {}
    plain = {"batch_size": size, "max_length": 48}
    runs = {
        "continual pretraining": (
            rewarm.ContinualPretraining(tiny.LLAMA, fits.sgd(0.1)),
            fits.corpus(files, **plain, val={"new": files.new, "old": files.old}),
        ),
        "sft": (
            rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd(0.1)),
            fits.instructions(files, **plain, val=files.sft),
        ),
        "packed sft": (
            rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd(0.1)),
            fits.instructions(files, **plain, packing=True),
        ),
        "dpo": (
            rewarm.DPO(tiny.LLAMA, fits.sgd(0.1), nll_weight=0.7),
            fits.preferences(files, **plain, val=files.pairs),
        ),
    }
    for name, (module, data) in runs.items():
        torch.manual_seed(0)
        record = fits.Record()
        trainer = fits.trainer(
            max_epochs=1,
            # What follows the last whole pass over packed rows depends on the batch size.
            max_steps=1 if name == "packed sft" else -1,
            accumulate_grad_batches=accumulate,
            callbacks=[record],
            **options(world_size),
        )
        trainer.fit(module, datamodule=data)
        validated = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
        results[name] = (record.weights, [*record.metrics, validated])
    return results


def fit_live(files: fits.Files, world_size: int) -> dict[str, Any]:
    """GRPO with its own rollouts, and SFT, both filtered: ranks must share one curriculum and weights."""
    results = {}
    runs = {
        "live grpo": (rewarm.GRPO(tiny.LLAMA, fits.sgd(0.1)), fits.prompts(files, max_rounds=2)),
        "filtered sft": (rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd(0.1)), fits.instructions(files)),
    }
    for name, (module, data) in runs.items():
        torch.manual_seed(0)
        record, resume = fits.Record(), rewarm.ExactResume()
        callbacks = [rewarm.DifficultyFilter(0.3, 4.0), resume, record]
        trainer = fits.trainer(
            max_steps=5, accumulate_grad_batches=2, callbacks=callbacks, **options(world_size)
        )
        trainer.fit(module, datamodule=data)
        curriculum = data.curriculum.state_dict()
        results[name] = (record.weights, record.metrics, curriculum, len(resume.state_dict()["ranks"]))
    return results


def few_rows(files: fits.Files) -> fits.Files:
    for kind in ("sft", "pairs"):
        path = Path(getattr(files, kind))
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:ROWS]))
    return files


def run(folder: Path, world_size: int) -> dict[str, Any]:
    files = few_rows(fits.Files(folder))
    results = fit_prepared(world_size) | fit_data(files, world_size)
    return results | (fit_live(files, world_size) if world_size > 1 else {})


if __name__ == "__main__":
    import os

    warnings.simplefilter("ignore")
    rank, out = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.save(run(out / f"files{rank}", int(os.environ["WORLD_SIZE"])), out / f"{rank}.pt")
