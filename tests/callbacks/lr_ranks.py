"""Fits with `LRSchedule` on every rank of a group of processes."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from rewarm.callbacks.lr_schedule import LRSchedule
from rewarm.schedules.published import branch, constant, cosine, linear

LENGTHS = [[5, 1, 4, 2, 8, 3], [2, 2, 9, 1, 1, 7]]  # tokens per batch on two ranks


class Sharded(LightningModule):
    """A regression in two layers, in shards where there is a device mesh."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
        self.lr = lr
        self.used: list[float] = []

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.layers[0].weight, DTensor):
            for layer in (self.layers[0], self.layers[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        optimizer.register_step_post_hook(lambda o, *_: self.used.append(o.param_groups[0]["lr"]))
        return optimizer

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x = batch["input_ids"].float()[:1, :1] * torch.tensor([[0.1, -0.2, 0.3, 0.05]])
        return (self.layers(x) - 1.0).square().mean()

    def weights(self) -> torch.Tensor:
        return torch.cat([whole(p.detach()).flatten() for p in self.parameters()])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Watch(Callback):
    """Keeps the optimizer's state before the first step, and the logged and true norms of every gradient."""

    def __init__(self) -> None:
        self.state: list[torch.Tensor] | None = None
        self.norms: list[list[float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.used.clear()  # torch takes a step of LR 0 to make room for the optimizer's shards

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.state is None:
            states = trainer.optimizers[0].state.values()
            self.state = [whole(one[name].clone()) for one in states for name in ("step", "exp_avg")]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        flat = torch.cat([whole(p.grad).flatten() for p in pl_module.parameters()]).double()
        self.norms.append([float(flat.abs().sum()), float(flat.square().sum().sqrt())])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.norms[-1] += [float(trainer.callback_metrics[f"train/grad_norm_{n}"]) for n in ("l1", "l2")]


def fit(
    schedule: LRSchedule, lr: float, strategy: Any, max_steps: int, ckpt_path: Path | None = None
) -> tuple[Sharded, Watch]:
    module, watch = Sharded(lr), Watch()
    processes = 1 if strategy == "auto" else 2
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        max_steps=max_steps,
        callbacks=[schedule, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    lengths = (
        LENGTHS[trainer.global_rank] if processes == 2 else [sum(both) for both in zip(*LENGTHS, strict=True)]
    )
    # The same example everywhere, so that any number of ranks has the same gradient.
    # Every fit takes the first six of many batches, as none stops at the end of an epoch.
    batches = [{"input_ids": torch.full((1, n), 3.0 + i)} for i, n in enumerate(4 * lengths)]
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return module, watch


def strategy_of(name: str) -> Any:
    if name == "fsdp2":
        return ModelParallelStrategy(2, 1, process_group_backend="gloo")
    return DDPStrategy(process_group_backend="gloo") if name == "ddp" else "auto"


def continued(folder: Path, name: str) -> dict[str, Any]:
    """A stable run by tokens, then every way to go on from its checkpoint."""
    stable = LRSchedule(constant(20), unit="tokens", gradient_norms=True)
    module, _ = fit(stable, 0.05, strategy_of(name), 6)
    module.trainer.save_checkpoint(folder / "stable.ckpt")
    results: dict[str, Any] = {"stable": (module.used, module.weights(), [], [])}
    ways: dict[str, dict[str, Any]] = {
        "resume": {"schedule": constant(20), "unit": "tokens"},
        "branch": {"schedule": branch(0.1, "linear"), "mode": "branch", "phase": "b"},
        "branch by tokens": {
            "schedule": branch(),
            "mode": "branch",
            "phase": "b",
            "unit": "tokens",
            "total_tokens": 60,
        },
        "rewarm": {"schedule": cosine(2), "mode": "rewarm", "phase": "r"},
        "rewarm, kept": {"schedule": linear(2), "mode": "rewarm", "phase": "r", "reset_optimizer": False},
    }
    for way, arguments in ways.items():
        schedule = LRSchedule(gradient_norms=True, **arguments)
        module, watch = fit(schedule, 0.02, strategy_of(name), 12, folder / "stable.ckpt")
        results[way] = (module.used, module.weights(), watch.state, watch.norms)
    return results
