"""Averages of the weights along a run: validated, exported, saved and resumed, next to the live weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from rewarm.functional.averaging import (
    debiased_decay,
    ema_,
    mean_weights,
    merge,
    merge_decay,
)
from rewarm.schedules.decay_weights import shape_weights


class CheckpointAveraging(Callback):
    """Averages the trainable weights of any LightningModule while it trains.

    Averaging late checkpoints of a run at a constant learning rate replaces most of a learning-rate decay,
    and keeps what the best, latest data taught. `last_k` is the mean of the last k snapshots, recomputed from
    them whenever it is needed; `window` the mean of the last whole one of consecutive windows of k snapshots,
    and before there is one, of those so far; `ema` an exponential moving average with bias correction. All
    see the weights after every `every_n_steps`-th optimizer step.

    The means are plain, or have `weights`: such that the mean stands for the end of a decayed run, or any.

    The average stands in for the weights during validation and testing (`validate`), and stays in place when
    the fit ends (`apply_at_end`), so that what exports afterwards exports the average. A monitored validation
    metric is the average's. Put this callback before others that export in `on_train_end`. A later fit with
    the same Trainer goes on from the live weights.

    Checkpoints hold the live weights in `state_dict`, whenever they are saved, and the buffers in the
    callback's state: a resumed run or a branch starts from the live weights, and the average goes on where it
    was. Only a weights-only checkpoint is out of our hands (Lightning doesn't call callbacks for it): it
    holds what is in place, the average once the fit has ended.

    Works with one device, DDP and `ModelParallelStrategy`. Under FSDP2 every rank averages its own shards,
    and a sharded checkpoint holds them as DTensors, so another number of ranks can resume. Checkpoints that
    are one file hold whole averages, and any of these strategies can resume from them.

    Logs:
        averaging/snapshots: Number of snapshots in the average (`ema`: updates so far), every
            `log_every_n_steps` steps.

    Cost: float32 buffers of the trainable weights, k times (`last_k`), twice (`window`) or once (`ema`), and
    one copy in their own dtype while the average is in place. The module is never copied. For models too
    large for that, average saved checkpoints instead: `rewarm average`.

    Args:
        mode: `last_k`, `window` or `ema`.
        k: Snapshots in the mean, >= 1 (not `ema`). 6 as in the curriculum paper.
        every_n_steps: Optimizer steps between snapshots or updates, >= 1. None is 1 for `ema` and 100 for the
            others (ours).
        start_step: Optimizer step of the first snapshot, >= 0. 0 starts at `every_n_steps`.
        decay: Decay of the moving average per update, in [0, 1) (`ema` only). 0 is the current weights.
        validate: Validate and test the average. Before the first snapshot, and in the sanity check, it is the
            live weights.
        apply_at_end: Leave the average in place when the fit ends.
        device: Where buffers live, for example `cpu`. None is the parameters' device.
        weights: Of the k snapshots, oldest first, 0 or more, of which only the proportions matter, that of
            the newest above 0; with fewer snapshots those of the newest (`last_k`) or the oldest (`window`).
            Or the shape of a learning-rate decay to 0 for which the mean stands: `linear`, `sqrt`, `cosine`
            and others, see `rewarm.schedules.decay_weights.shape_weights`. None is the plain mean. Not for
            `ema`.

    Raises:
        ValueError: If an argument is out of range or has no effect in this mode.

    Example:
        >>> averaging = CheckpointAveraging(k=6, every_n_steps=500, start_step=10_000)
        >>> trainer = Trainer(callbacks=[averaging])  # doctest: +SKIP
        >>> averaging.num_snapshots
        0

    Source: arXiv:2511.18903 (last six checkpoints under an ordered curriculum), arXiv:2306.03241 (mean of the
    last k), arXiv:2405.18392 (windows), arXiv:2507.17634 (weights that stand for a decay).
    Differs: the papers average saved files; the moving average is bias-corrected, which theirs is not.
    """

    def __init__(
        self,
        mode: Literal["last_k", "window", "ema"] = "last_k",
        k: int = 6,
        every_n_steps: int | None = None,
        start_step: int = 0,
        decay: float = 0.999,
        validate: bool = True,
        apply_at_end: bool = True,
        device: str | None = None,
        weights: Sequence[float] | str | None = None,
    ) -> None:
        if mode not in ("last_k", "window", "ema"):
            raise ValueError(f"mode is {mode!r}; it must be 'last_k', 'window' or 'ema'")
        if k < 1 or (mode == "ema" and k != 6):
            raise ValueError(f"k is {k}; it must be at least 1, and mode 'ema' does not have it")
        if not 0.0 <= decay < 1.0 or (mode != "ema" and decay != 0.999):
            raise ValueError(f"decay is {decay}; it must be in [0, 1), and only mode 'ema' has it")
        if weights is not None and mode == "ema":
            raise ValueError(f"weights is {weights!r}; mode 'ema' has none but its decay")
        if isinstance(weights, str):
            shape_weights(weights, k)
        elif weights is not None and (
            len(weights) != k or min(weights) < 0.0 or not 0.0 < weights[-1] <= sum(weights) < math.inf
        ):
            raise ValueError(
                f"weights is {list(weights)}; it must be {k} numbers (k), 0 or more, the last above 0"
            )
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; it must be at least 1")
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}; it must be 0 or more")
        self.mode = mode
        self.k = k
        self.every_n_steps = every_n_steps or (1 if mode == "ema" else 100)
        self.start_step = start_step
        self.decay = decay
        self.validate = validate
        self.apply_at_end = apply_at_end
        self.device = device
        self.weights = weights

        # Oldest first. Mode `ema` has one row, the average itself; `window` the last whole window, if there
        # is one, and that which grows.
        self._buffers: list[list[Tensor]] = []
        self._max_rows = {"last_k": k, "window": 2, "ema": 1}[mode]
        self._num_updates = 0
        self._last_step: int | None = None
        self._names: list[str] = []
        self._parameters: list[nn.Parameter] = []
        # While the average is in place: what it displaced.
        self._live: list[tuple[nn.Parameter, Tensor]] = []
        self._evaluating = False
        # Buffers still to be read from a sharded checkpoint: entry and number.
        self._shards: tuple[str, int] | None = None
        self._checkpoint_path: Any = None

    # --- access for exporters -------------------------------------------------------------------------------

    @property
    def num_snapshots(self) -> int:
        """Number of snapshots in the average; for `ema`, of updates."""
        if self.mode == "ema":
            return self._num_updates
        return min(self._num_updates, self.k) if self.mode == "window" else self._num_rows

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[None]:
        """Put the average in place of the weights within a `with` block.

        Args:
            pl_module: The module that was trained. Its weights are the live ones again afterwards, unless the
                average was in place before.

        Raises:
            RuntimeError: If there is no snapshot yet.
        """
        if not self.num_snapshots:
            raise RuntimeError("there is no snapshot yet, so there is no average")
        applied = self._apply(pl_module)
        try:
            yield
        finally:
            if applied:
                self._restore(pl_module)

    def averaged_state_dict(self, pl_module: LightningModule) -> dict[str, Any]:
        """Return the module's `state_dict` with averages for the trainable weights.

        They have the weights' dtype, and share no memory with them.

        Args:
            pl_module: The module that was trained; not changed.

        Raises:
            RuntimeError: If there is no snapshot yet.
        """
        with self.averaged(pl_module):
            return self._detached(pl_module.state_dict())

    # --- taking snapshots -----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go back to the live weights if an earlier fit left the average in place."""
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"strategy is {type(trainer.strategy).__name__}, whose flat shards can't be saved with a"
                " callback; use ModelParallelStrategy (FSDP2) or DDP"
            )
        if stage == "fit":
            self._restore(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the trainable weights, and take what a checkpoint restored."""
        if trainer.global_step == 0:
            self._buffers, self._num_updates, self._last_step = [], 0, None
            self._names, self._shards = [], None
        self._place(pl_module)
        if self._last_step is None:
            self._last_step = trainer.global_step
        # A checkpoint saved after the step but before our hook lacks the snapshot of that step.
        self._update(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take a snapshot if an optimizer step was taken and it is time."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._update(step)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0:
            pl_module.log("averaging/snapshots", float(self.num_snapshots))

    @torch.no_grad()
    def _update(self, step: int) -> None:
        last, self._last_step = self._last_step or 0, step
        # Floor division rather than a remainder: several optimizers move `global_step` by more than one.
        intervals = (step - self.start_step) // self.every_n_steps - (
            last - self.start_step
        ) // self.every_n_steps
        if step < self.start_step or intervals <= 0:
            return
        self._num_updates += 1
        weights = [_local(parameter) for parameter in self._parameters]
        decay = 0.0
        if self.mode == "ema":
            decay = debiased_decay(self.decay, self._num_updates)
        elif self.mode == "window":
            decay = merge_decay(self._snapshot_weights(self.k), self._num_updates)
        opens_window = self.mode == "window" and (self._num_updates - 1) % self.k == 0
        if self.mode == "last_k" or opens_window or not self._buffers:
            row = (
                self._buffers.pop(0)
                if len(self._buffers) == self._max_rows
                else [
                    torch.empty_like(w, dtype=torch.float32, device=self.device or w.device) for w in weights
                ]
            )
            self._buffers.append(row)
        ema_(self._buffers[-1], weights, decay)

    def _snapshot_weights(self, number: int) -> list[float]:
        if self.weights is None:
            return mean_weights(number)
        if isinstance(self.weights, str):
            return shape_weights(self.weights, number)
        newest = self.weights[-number:]
        return [weight / sum(newest) for weight in newest]

    @property
    def _num_rows(self) -> int:
        return min(self._shards[1], self._max_rows) if self._shards else len(self._buffers)

    def _row_weights(self) -> list[float]:
        """Return how much of the average each row of buffers is."""
        rows = self._num_rows
        if not rows:
            return []
        if self.mode == "last_k":
            return self._snapshot_weights(rows)
        whole = rows - 1 if self.mode == "ema" or self._num_updates % self.k == 0 else 0
        return [float(row == whole) for row in range(rows)]

    # --- putting the average in place -----------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._evaluating = self.validate and not trainer.sanity_checking and self._apply(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the live weights."""
        if self._evaluating:
            self._restore(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the average."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the live weights."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Go back to the live weights, whatever happened while the average was in place."""
        self._restore(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in place."""
        if self.apply_at_end and not self._apply(pl_module):
            rank_zero_warn(
                f"CheckpointAveraging took no snapshot in {trainer.global_step} steps"
                f" (start_step={self.start_step}, every_n_steps={self.every_n_steps}): the weights are the"
                " last ones, not an average"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in place also when a finished run was resumed and had nothing left to train."""
        if self.apply_at_end:
            self._apply(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the accelerator, as Lightning does with the module."""
        self._buffers = [[buffer.cpu() for buffer in buffers] for buffers in self._buffers]
        self._live = [(parameter, weight.cpu()) for parameter, weight in self._live]

    # Validation runs in inference mode; tensors made there could not be updated in training.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _apply(self, pl_module: LightningModule) -> bool:
        if self._live or not self.num_snapshots:
            return False
        self._place(pl_module)
        self._live = [(p, _local(p).to(self.device or p.device, copy=True)) for p in self._parameters]
        used = [pair for pair in zip(self._buffers, self._row_weights(), strict=True) if pair[1]]
        rows, weights = zip(*used, strict=True)
        for parameter, column in zip(self._parameters, zip(*rows, strict=True), strict=True):
            _local(parameter).copy_(merge(([tensor] for tensor in column), weights)[0])
        return True

    @torch.inference_mode(False)
    @torch.no_grad()
    def _restore(self, pl_module: LightningModule) -> None:
        if not self._live:
            return
        _reshard(pl_module)
        for parameter, weight in self._live:
            _local(parameter).copy_(weight)
        self._live, self._evaluating = [], False

    @torch.inference_mode(False)
    @torch.no_grad()
    def _exchange(self, pl_module: LightningModule) -> None:
        _reshard(pl_module)
        for parameter, weight in self._live:
            displaced = _local(parameter).clone()
            _local(parameter).copy_(weight)
            weight.copy_(displaced)

    # --- saving and resuming --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the buffers, oldest first, each a list in the order of `names`; without shards.

        `weights` has each one's share of the average.
        """
        sharded = any(isinstance(p, DTensor) for p in self._parameters)
        return {
            "mode": self.mode,
            "num_updates": self._num_updates,
            "last_step": self._last_step,
            "names": self._names,
            "averages": [] if sharded else [list(buffers) for buffers in self._buffers],
            "weights": self._row_weights(),
            "window": self._window(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; shards are read when training or validation starts."""
        if state_dict["mode"] != self.mode:
            raise ValueError(
                f"mode is {self.mode!r}, but the checkpoint was averaged with {state_dict['mode']!r}"
            )
        if state_dict.get("window") != self._window():
            raise ValueError(
                f"the weights in a window are {self._window()}, but the checkpoint was averaged with"
                f" {state_dict.get('window')}"
            )
        self._num_updates = state_dict["num_updates"]
        self._last_step = state_dict["last_step"]
        self._names = state_dict["names"]
        self._buffers = state_dict["averages"][-self._max_rows :]
        self._shards = state_dict.get("shards")

    def _window(self) -> list[float] | None:
        return self._snapshot_weights(self.k) if self.mode == "window" else None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Forget what was in place: Lightning has just written the live weights into the module."""
        self._live, self._evaluating = [], False
        self._checkpoint_path = trainer.ckpt_path

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the live weights into the checkpoint, and shards where every rank saves its own."""
        if self._shards is not None:
            self._place(pl_module)
        if self._live:
            self._exchange(pl_module)
            try:
                live = self._detached(trainer.strategy.lightning_module_state_dict())
            finally:
                self._exchange(pl_module)
            checkpoint["state_dict"] = {
                name: live.get(name, v) for name, v in checkpoint["state_dict"].items()
            }
        if not self._buffers or not any(isinstance(p, DTensor) for p in self._parameters):
            return
        state, shards = checkpoint["callbacks"][self.state_key], self._sharded(self._buffers)
        if not getattr(trainer.strategy, "_save_distributed_checkpoint", True):
            # One file, which rank 0 writes.
            wholes = [_whole(shard, trainer.is_global_zero) for shard in shards.values()]
            row = len(self._names)
            state["averages"] = [wholes[start : start + row] for start in range(0, len(wholes), row)]
            return
        # Of a sharded checkpoint, callback states are written by rank 0 alone; every rank writes its part of
        # the weights and optimizer states. Among the weights our entries would be unexpected keys to whoever
        # loads the model.
        checkpoint["optimizer_states"].append(shards)
        state["shards"] = (f"optimizer_{len(checkpoint['optimizer_states']) - 1}", len(self._buffers))

    def _detached(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy what shares memory with the trainable weights; tied entries share their copy."""
        own = {_local(parameter).data_ptr() for parameter in self._parameters}
        copies: dict[int, Any] = {}
        for name, value in state_dict.items():
            pointer = _local(value).data_ptr() if isinstance(value, Tensor) else 0
            if pointer and pointer in own:
                if pointer not in copies:
                    copies[pointer] = value.clone()
                state_dict[name] = copies[pointer]
        return state_dict

    def _place(self, pl_module: LightningModule) -> None:
        """Find the trainable parameters (tied ones once) and bring the buffers to where they are."""
        _reshard(pl_module)
        # `torch.compile` of a layer adds a name, and may differ between the runs.
        found = {n.replace("_orig_mod.", ""): p for n, p in pl_module.named_parameters() if p.requires_grad}
        if not found:
            raise ValueError(f"{type(pl_module).__name__} has no trainable parameters to average")
        if self._names and self._names != list(found):
            difference = sorted(set(self._names) ^ set(found)) or "their order"
            raise ValueError(f"the averaged and the trainable parameters differ in {difference}")
        self._names, self._parameters = list(found), list(found.values())
        if self._shards is not None:
            self._buffers = self._read_shards(*self._shards)[-self._max_rows :]
            self._shards = None
        self._buffers = [
            [self._place_one(buffer, p) for buffer, p in zip(buffers, self._parameters, strict=True)]
            for buffers in self._buffers
        ]

    def _place_one(self, buffer: Tensor, parameter: nn.Parameter) -> Tensor:
        shape = _local(parameter).shape
        if buffer.shape != shape and buffer.shape == parameter.shape and isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            buffer = distribute_tensor(buffer, mesh, placements, src_data_rank=None).to_local().clone()
        if buffer.shape != shape:
            raise ValueError(
                f"an average has shape {tuple(buffer.shape)}, its parameter {tuple(parameter.shape)}"
            )
        return buffer.to(self.device or parameter.device)

    def _read_shards(self, entry: str, number: int) -> list[list[Tensor]]:
        empty = [
            [torch.empty_like(_local(p), dtype=torch.float32, device=self.device or p.device) for p in row]
            for row in [self._parameters] * number
        ]
        saved = self._sharded(empty)
        dcp.load({entry: saved}, checkpoint_id=self._checkpoint_path)
        tensors = iter(saved.values())
        return [[_local(next(tensors)) for _ in row] for row in empty]

    def _sharded(self, buffers: list[list[Tensor]]) -> dict[str, Tensor]:
        return {
            f"averages.{index}.{name}": _like(tensor, parameter)
            for index, row in enumerate(buffers)
            for name, tensor, parameter in zip(self._names, row, self._parameters, strict=True)
        }


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor, keep: bool) -> Tensor | None:
    """Gather a tensor; all ranks must call this, and those that don't keep it get None."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.cpu() if keep else None


def _like(local: Tensor, parameter: nn.Parameter) -> Tensor:
    """Wrap a local tensor as a shard, if its parameter is one."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).to(local.device)


def _reshard(pl_module: LightningModule) -> None:
    """Drop gathered weights: after a forward pass without backward, FSDP2 would go on using them."""
    for module in pl_module.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
