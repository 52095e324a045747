"""Small fits that save and are interrupted, each in a process of its own, or in one per rank.

The weights after every step and all that was logged go to a file, so that a run in pieces can be compared
with one that was never interrupted.
"""

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from rewarm.callbacks.checkpoint import Checkpoint
from rewarm.callbacks.exact_resume import ExactResume
from rewarm.callbacks.preemption import Preemption

# A process is forked from one that has imported all of this and done nothing else.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])


class Batches:
    """Numbered batches that go on where they were; every epoch has others."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch, self.position = count, 0, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.position == self.count:
            self.epoch, self.position = self.epoch + 1, 0
        while self.position < self.count:
            self.position += 1
            seed = 1000 * self.epoch + self.position
            yield torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Net(LightningModule):
    """Draws random numbers in every step and in validation; shards itself where there is a mesh."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width, self.net = width, None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, self.width), nn.Dropout(0.3), nn.Linear(self.width, 1))
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val", self.net(batch).mean() + torch.rand(()), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Lines(Logger):
    """Keeps what is logged."""

    name = version = ""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, float]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append({"step": step, **metrics})


class Record(Callback):
    """Writes to a file what the steps left and what was logged; at once, so that it outlives the process."""

    def __init__(self, path: Path, logger: Lines) -> None:
        self.path, self.logger, self.weights = path, logger, {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        weights = {name: _whole(p.detach()) for name, p in pl_module.named_parameters()}
        self.weights[trainer.global_step] = {name: weight.clone() for name, weight in weights.items()}

    def write(self) -> None:
        torch.save((self.weights, self.logger.lines), self.path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write()

    def on_exception(self, *_: Any) -> None:
        self.write()


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class At(Callback):
    """Does something at the beginning of a batch.

    Args:
        batch: Number of the batch since the process started, from 1.
        rank: Which rank does it.
        hook: Of which hook the calls are counted.
    """

    def __init__(self, batch: int, rank: int = 0, hook: str = "on_train_batch_start") -> None:
        self.batch, self.rank, self.hook, self.count = batch, rank, hook, 0

    def _count(self, hook: str, trainer: Trainer) -> None:
        self.count += hook == self.hook
        if hook == self.hook and self.count == self.batch and trainer.global_rank == self.rank:
            self.act()

    def act(self) -> None: ...

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self._count("on_train_start", trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._count("on_train_batch_start", trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._count("on_validation_batch_start", trainer)


class Signal(At):
    """Sends a signal to its own process, or several with some seconds between them.

    Args:
        number: Of the signal.
        batch: When, see `At`.
        times: How often.
        seconds: Between two.
        children: Send it to the processes that this one started, too.
        **place: See `At`.
    """

    def __init__(
        self,
        number: int,
        batch: int,
        times: int = 1,
        seconds: float = 0.0,
        children: bool = False,
        **place: Any,
    ) -> None:
        super().__init__(batch, **place)
        self.number, self.times, self.seconds, self.children = number, times, seconds, children

    def act(self) -> None:
        for sent in range(self.times):
            time.sleep(self.seconds if sent else 0.0)
            others = multiprocessing.active_children() if self.children else []
            for pid in (*(process.pid for process in others), os.getpid()):
                os.kill(pid, self.number)


class Kill(At):
    """Ends the process at its n-th change to the names on the disk from a batch on, as SIGKILL would."""

    def __init__(self, batch: int, change: int, **place: Any) -> None:
        super().__init__(batch, **place)
        self.changes = change

    def act(self) -> None:
        for name in ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir"):
            setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.changes -= 1
            if self.changes < 0:
                os._exit(9)
            return original(*args, **kwargs)

        return call


class FullDisk(At):
    """Lets no file grow beyond some bytes from a batch on, until that has ended the run."""

    def __init__(self, batch: int, size: int, **place: Any) -> None:
        super().__init__(batch, **place)
        self.size, self.limits = size, resource.getrlimit(resource.RLIMIT_FSIZE)

    def act(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.limits[1]))

    def on_exception(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


def fit(
    folder: Path,
    *,
    name: str = "whole",
    ckpt_path: Path | str | None = None,
    callbacks: list[Callback] | None = None,
    batches: int = 10,
    validates: bool = False,
    width: int = 8,
    workers: bool = False,
    seed: int = 0,
    **options: Any,
) -> Trainer:
    """Fit `Net`, perhaps with batches from workers; the record goes to `folder/NAME-RANK.pt`."""
    torch.manual_seed(seed)
    logger = Lines()
    record = Record(folder / f"{name}-{os.environ.get('RANK', '0')}.pt", logger)
    callbacks = [*(callbacks or []), ExactResume(), record]
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 8,
        "accumulate_grad_batches": 2,
        "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    trainer = Trainer(logger=logger, callbacks=callbacks, **defaults | options)
    if workers:
        loader = DataLoader(torch.ones(40, 4), num_workers=2, worker_init_fn=_outlive_sigterm)
        trainer.fit(Net(width), loader)
        return trainer
    loaders = [Batches(batches), DataLoader(torch.ones(3, 4))] if validates else [Batches(batches)]
    trainer.fit(Net(width), *loaders, ckpt_path=ckpt_path)
    return trainer


def _outlive_sigterm(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def read(folder: Path, *names: str, rank: int = 0) -> tuple[dict[int, Any], list[Any]]:
    """The weights after every step and everything logged of a run in one or more pieces."""
    weights: dict[int, Any] = {}
    lines: list[Any] = []
    for name in names:
        more, logged = torch.load(folder / f"{name}-{rank}.pt")
        weights |= more
        lines += logged
    return weights, lines


def equal(one: tuple[dict[int, Any], list[Any]], other: tuple[dict[int, Any], list[Any]]) -> bool:
    """Whether two runs had the same weights after every step, to the last bit, and logged the same."""
    if one[0].keys() != other[0].keys() or not one[0]:
        return False
    pairs = [(one[0][step][name], other[0][step][name]) for step in one[0] for name in one[0][step]]
    return all(torch.equal(*pair) for pair in pairs) and one[1] == other[1]


def options(strategy: str) -> dict[str, Any]:
    """What a strategy needs of the Trainer: `one`, `ddp` and `fsdp2`, the latter two on two ranks."""
    if strategy == "fsdp2":
        return {"strategy": ModelParallelStrategy(2, 1), "devices": 2}
    return {"strategy": "ddp", "devices": 2} if strategy == "ddp" else {}


class Run:
    """A fit with `Preemption` and perhaps `Checkpoint`, in as many processes as its strategy has ranks.

    Args:
        folder: Of the run; checkpoints go to `folder/checkpoints`.
        strategy: `one`, `ddp` or `fsdp2`.
        every: Steps between checkpoints; None leaves `Checkpoint` out.
        others: More callbacks.
        environment: Set in the processes.
        settings: Of `fit`.
    """

    def __init__(
        self,
        folder: Path,
        strategy: str = "one",
        every: int | None = None,
        others: tuple[Callback, ...] = (),
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        ranks = options(strategy).get("devices", 1)
        port = str(_free_port())
        self._outputs, self.processes = [], []
        for rank in range(ranks):
            variables = dict(environment or {})
            if ranks > 1:
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                variables |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
            self._outputs.append(folder / f"{settings.get('name', 'whole')}-{rank}.txt")
            arguments = (self._outputs[-1], variables, folder, strategy, every, others, settings)
            self.processes.append(_FORKS.Process(target=_work, args=arguments))
            self.processes[-1].start()

    def end(self, seconds: float = 120.0) -> list[int | None]:
        """Wait for the end of all processes and return their exit codes; None had to be killed."""
        until = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.join(max(0.0, until - time.monotonic()))
            return [process.exitcode for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.join()

    @property
    def outputs(self) -> list[str]:
        """What each process wrote."""
        return [path.read_text() for path in self._outputs]

    @property
    def output(self) -> str:
        """What all processes wrote."""
        return "".join(self.outputs)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _work(
    output: Path,
    environment: dict[str, str],
    folder: Path,
    strategy: str,
    every: int | None,
    others: tuple[Callback, ...],
    settings: dict[str, Any],
) -> None:
    os.environ.update(environment)
    with output.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    warnings.simplefilter("ignore")
    callbacks: list[Callback] = [Preemption(), *others]
    if every is not None:
        callbacks.append(Checkpoint(str(folder / "checkpoints"), every_n_train_steps=every))
    fit(folder, callbacks=callbacks, **options(strategy), **settings)
