"""Fits on fewer rows than there are ranks, alone or as one of a group."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import rewarm
from tests import fits, tiny


def few(files: fits.Files) -> fits.Files:
    """One row of everything."""
    for name in (files.sft, files.pairs, files.prompts, files.new):
        path = Path(name)
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    return files


def run(folder: Path, world_size: int, strategy: Any) -> dict[str, Any]:
    files, results = few(fits.Files(folder)), {}
    one = {"batch_size": 2 // world_size}
    runs = {
        "sft": (rewarm.CurriculumSFT, {}, fits.instructions(files, val=files.sft, **one)),
        "packed sft": (rewarm.CurriculumSFT, {}, fits.instructions(files, packing=True, **one)),
        "dpo": (rewarm.DPO, {}, fits.preferences(files, val=files.pairs, **one)),
        "cpt": (rewarm.ContinualPretraining, {}, fits.corpus(files, val={"new": files.new}, **one)),
        "grpo": (
            rewarm.GRPO,
            {},
            fits.prompts(
                files,
                val=files.prompts,
                prompts_per_rollout=1,
                completions_per_prompt=8,
                minibatches=1,
            ),
        ),
    }
    for name, (kind, options, data) in runs.items():
        torch.manual_seed(0)
        module = kind(tiny.LLAMA, fits.sgd(0.1), **options)
        trainer = fits.trainer(
            max_steps=3, strategy=strategy(), devices=world_size, use_distributed_sampler=False
        )
        trainer.fit(module, datamodule=data)
        weights = {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in module.named_parameters()
        }
        results[name] = (
            weights,
            {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
        )
    return results


def run_sharded_and_not(folder: Path) -> dict[str, Any]:
    """On one of two ranks: what DDP leaves, and what shards do."""
    strategies = {
        "ddp": lambda: "ddp",
        "fsdp2": lambda: rewarm.FSDP2Strategy(process_group_backend="gloo"),
    }
    files = folder / f"files{os.environ['RANK']}"
    return {name: run(files, 2, strategy) for name, strategy in strategies.items()}
