"""A fit whose weights are sharded over ranks: it leaves checkpoints, and what their exports must be."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

import rewarm
from tests import fits, tiny

STEPS = 4


class Snapshots(Callback):
    """Keeps the whole weights of the policy after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(
            {
                name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
                for name, p in pl_module.policy.model.named_parameters()
            }
        )


def run(out: Path, rank: int, name: str, model: dict[str, Any], whole: bool) -> None:
    files, snapshots = fits.Files(out / f"files{rank}"), Snapshots()
    torch.manual_seed(0)
    trainer = fits.trainer(
        max_steps=STEPS,
        strategy=rewarm.FSDP2Strategy(save_distributed_checkpoint=not whole, process_group_backend="gloo"),
        devices=2,
        callbacks=[snapshots, *([] if whole else [rewarm.CheckpointAveraging(k=3, every_n_steps=1)])],
        use_distributed_sampler=False,
    )
    trainer.fit(rewarm.CurriculumSFT(model, fits.adamw()), datamodule=fits.instructions(files))
    trainer.save_checkpoint(out / f"{name}.ckpt")
    if rank == 0:
        torch.save(snapshots.weights, out / f"{name}.pt")


def save_all(out: Path) -> None:
    """On a rank: fits of two models in shards, saved in shards and in one file."""
    rank = int(os.environ["RANK"])
    tied = {**tiny.LLAMA, "tie_word_embeddings": True}
    run(out, rank, "untied", tiny.LLAMA, whole=False)
    run(out, rank, "tied", tied, whole=False)
    run(out, rank, "whole", tied, whole=True)
