"""Lightning's FSDP2 strategy with sizes that follow the number of processes."""

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from rewarm.checkpoints.whole import read_metadata
from rewarm.functional.shards import any_sharded, part_like, whole_on_cpu
from rewarm.lightning_modules.saving import check_weights


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2), optionally with tensor parallelism, on any number of processes.

    It is Lightning's `ModelParallelStrategy`, for modules that shard themselves in `configure_model` (all of
    rewarm's do), with three differences. The data parallel size is by default whatever number of processes
    there is, so that one config fits any; Lightning's own default splits each layer over the GPUs of a node.
    It also resumes from the single-file checkpoints of one process or DDP, whose optimizer states Lightning
    would hand to the wrong parameters if their groups are not in the model's order. And a checkpoint with
    other weights than the model's is refused before any is read.

    Args:
        tensor_parallel_size: Number of processes that share each layer, >= 1.
        data_parallel_size: Number of processes (or of groups that share layers) that share the batch, >= 1;
            `auto` takes all.
        save_distributed_checkpoint: Whether to save a folder to which every rank writes its shards; False
            assembles one file on rank 0.
        process_group_backend: Backend of the process group, as in `ModelParallelStrategy`.
        timeout: Time for which ranks wait in a collective call for one that is gone.

    Raises:
        ValueError: If a size is below 1, or the sizes do not fit the number of processes.

    Example:
        >>> FSDP2Strategy(tensor_parallel_size=0)
        Traceback (most recent call last):
            ...
        ValueError: tensor_parallel_size is 0; it must be at least 1
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        data_parallel_size: int | Literal["auto"] = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        sizes = {"tensor_parallel_size": tensor_parallel_size, "data_parallel_size": data_parallel_size}
        for name, size in sizes.items():
            if size != "auto" and size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        super().__init__(
            data_parallel_size,
            tensor_parallel_size,
            save_distributed_checkpoint,
            process_group_backend,
            timeout,
        )
        self.saves_shards = save_distributed_checkpoint

    def setup_environment(self) -> None:
        """Settle the sizes, then join the other processes.

        Raises:
            ValueError: If the sizes do not fit the number of processes.
        """
        assert self.cluster_environment is not None
        # Lightning leaves this to its own launchers; the error that comes later names other arguments.
        self.cluster_environment.validate_settings(self.num_processes, self.num_nodes)
        processes = self.num_nodes * self.num_processes
        given, ways = parallel_sizes(self)
        assert ways != "auto"
        replicas = max(1, processes // ways) if given == "auto" else given
        if replicas * ways != processes:
            raise ValueError(
                f"data_parallel_size is {given} and tensor_parallel_size {ways}, but there are {processes}"
                f" processes ({self.num_nodes} nodes with {self.num_processes} each)"
            )
        parallel_sizes(self, replicas)
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state: this rank's shards, or whole and numbered as without sharding."""
        if self.saves_shards:
            return super().optimizer_state(optimizer)
        state = optimizer.state_dict()
        # All ranks gather, and rank 0 alone keeps what was gathered.
        entries = {
            number: {
                name: whole_on_cpu(value, keep=self.is_global_zero) if any_sharded([value]) else value
                for name, value in entry.items()
            }
            for number, entry in state["state"].items()
        }
        return {**state, "state": entries} if self.is_global_zero else {}

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load shards, or each rank's part of a checkpoint that is a single file.

        Raises:
            ValueError: If the checkpoint's weights are not those of the model.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        assert self.lightning_module is not None
        strict = self.lightning_module.strict_loading
        if not path.is_file():
            check_weights(path, _shapes_of_shards(path), self.model, strict)
            try:
                return super().load_checkpoint(path, weights_only)
            except CheckpointException as error:
                cause, _ = next(iter(error.failures.values()))
                raise ValueError(f"{path}: {cause}") from cause
        # Mapped: of each tensor a rank reads its part.
        checkpoint: dict[str, Any] = torch.load(
            path, mmap=True, map_location="cpu", weights_only=weights_only
        )
        weights = checkpoint.pop("state_dict")
        check_weights(path, {name: weight.shape for name, weight in weights.items()}, self.model, strict)
        for name, weight in self.model.state_dict().items():
            if name in weights:
                weight.copy_(part_like(weights[name], weight))
        if self.optimizers:
            if "optimizer_states" not in checkpoint:
                raise ValueError(
                    f"{path}: the checkpoint has weights alone, so training cannot go on from it"
                )
            for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states"), strict=True):
                _load_by_place(optimizer, state)
        return checkpoint


def parallel_sizes(
    strategy: ModelParallelStrategy, data_parallel_size: int | None = None
) -> tuple[int | Literal["auto"], int | Literal["auto"]]:
    """Return the data and the tensor parallel size of a strategy, before it has set up its processes.

    Lightning takes both in the constructor and publishes neither; what it calls `auto` is split over the GPUs
    of a node when the processes are set up, and can be settled otherwise only before that.

    Args:
        strategy: Lightning's strategy, or one that is made from it.
        data_parallel_size: Data parallel size to settle on, >= 1; None leaves the strategy's own.

    Returns:
        The data parallel size, and the tensor parallel size.

    Example:
        >>> parallel_sizes(FSDP2Strategy(tensor_parallel_size=2), data_parallel_size=4)
        (4, 2)
    """
    if data_parallel_size is not None:
        strategy._data_parallel_size = data_parallel_size
    return strategy._data_parallel_size, strategy._tensor_parallel_size


def _load_by_place(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an unsharded optimizer, which numbers the parameters group by group.

    Lightning takes the numbers for places in the model, which they are not if its vectors are a group.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    entries = {
        number: {
            name: part_like(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
            for name, value in state["state"][number].items()
        }
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in state["state"]
    }
    optimizer.load_state_dict({**state, "state": entries})


def _shapes_of_shards(path: Path) -> dict[str, torch.Size]:
    if not (path / ".metadata").is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        stored = read_metadata(path).state_dict_metadata  # also before torch and Lightning unpickle it
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return {
        key.removeprefix("state_dict."): entry.size
        for key, entry in stored.items()
        if key.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
    }
