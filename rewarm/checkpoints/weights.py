"""The weights of a saved language model by name, none of which is read before it is asked for."""

import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rewarm.checkpoints.whole import is_sharded, read_metadata, verify

WEIGHTS = "policy.model."
"""What the names of the language model's weights begin with in checkpoints."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes in which a Hugging Face folder can be written, by their names."""

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


@dataclass(frozen=True)
class CheckpointWeights:
    """A language model on disk: a checkpoint of either kind, or a Hugging Face folder.

    Attributes:
        path: Path of the model.
        made_with: Fields that rebuild the model: `config` (the fields of a transformers config), `tokenizer`
            (a folder, an id or None) and, where it was kept, `generation_config`.
        like: Weights by Hugging Face name, on the meta device, for their shapes and dtypes. Of tied weights,
            the names that were saved.
        averages: Keys of the snapshots of each averaged weight, the oldest first, by the weight's name; empty
            unless `CheckpointAveraging` took snapshots.
        average_weights: Share of the average that each snapshot has.
        read: Function that reads one tensor by a weight's name or a snapshot's key, into memory of its own or
            a mapping that ends with the tensor.

    Example:
        >>> tensors = {"lm_head.weight": torch.ones(8, 4)}
        >>> like = {name: tensor.to("meta") for name, tensor in tensors.items()}
        >>> weights = CheckpointWeights(Path("model"), {"tokenizer": None}, like, tensors.__getitem__)
        >>> weights.read("lm_head.weight").shape == weights.like["lm_head.weight"].shape
        True
    """

    path: Path
    made_with: dict[str, Any]
    like: dict[str, Tensor]
    read: Callable[[str], Tensor]
    averages: dict[str, list[str]] = field(default_factory=dict)
    average_weights: list[float] = field(default_factory=list)


def open_weights(path: Path) -> CheckpointWeights:
    """Open what `Trainer`, `rewarm.Checkpoint`, `rewarm export` or transformers saved.

    Checkpoints are read to their end once, to find damage before anything is made from them. Nothing is kept
    in memory, and nothing stays mapped.

    Args:
        path: Path of a `.ckpt` file of any rewarm module; of a folder with the shards of any number of ranks;
            or of a Hugging Face folder with safetensors.

    Returns:
        The model's weights, of which none has been read.

    Raises:
        ValueError: If the path is missing, damaged or none of these.

    Example:
        >>> import tempfile
        >>> config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> config |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> made = AutoModelForCausalLM.from_config(read_config({"config": config}))
        >>> folder = tempfile.mkdtemp()
        >>> made.save_pretrained(folder)
        >>> weights = open_weights(Path(folder))
        >>> torch.equal(weights.read("lm_head.weight"), made.lm_head.weight)
        True
    """
    if path.is_dir() and not is_sharded(path):
        return _open_folder(path)
    verify(path)
    with _damage_named(path):
        opened = _open_shards(path) if path.is_dir() else _open_file(path)
    if not opened.made_with:
        raise ValueError(f"{path}: not a checkpoint of a rewarm module")
    return opened


def read_config(made_with: dict[str, Any]) -> PretrainedConfig:
    """Return the config of a saved model, with the fields that this version of transformers gives it.

    Args:
        made_with: Fields as in `CheckpointWeights.made_with`.

    Example:
        >>> read_config({"config": {"model_type": "llama", "hidden_size": 64}}).hidden_size
        64
    """
    fields = dict(made_with["config"])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def empty_model(made_with: dict[str, Any]) -> PreTrainedModel:
    """Build a saved model without weights: on the meta device.

    Args:
        made_with: Fields as in `CheckpointWeights.made_with`.

    Example:
        >>> config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> config |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> empty_model({"config": config}).device
        device(type='meta')
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            read_config(made_with), trust_remote_code=False
        )
    if "generation_config" in made_with:
        model.generation_config = GenerationConfig.from_dict(made_with["generation_config"])
    return model


def tied_names(model: PreTrainedModel) -> list[list[str]]:
    """Return the names in a model's `state_dict`, those of one tensor together, its own name first.

    Args:
        model: The model, with or without weights.

    Example:
        >>> config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> config |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = empty_model({"config": config | {"tie_word_embeddings": True}})
        >>> tied_names(model)[0]
        ['model.embed_tokens.weight', 'lm_head.weight']
    """
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def room(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Make a tensor in pages of its own, which go back to the system as soon as it is gone.

    In the C library's heap, holes of temporary tensors would stay between the tensors that are kept.

    Args:
        shape: Shape of the tensor.
        dtype: Type of the tensor.

    Example:
        >>> room(torch.Size([2, 3]), torch.bfloat16).shape
        torch.Size([2, 3])
    """
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap(-1, shape.numel() * dtype.itemsize), dtype=dtype).view(shape)


def load_tokenizer(source: str | None) -> PreTrainedTokenizerBase | None:
    """Load a tokenizer as it was saved.

    Args:
        source: Hugging Face folder or id; None gives None.

    Raises:
        ValueError: If the tokenizer isn't where it was when the model was trained.

    Example:
        >>> load_tokenizer(None) is None
        True
    """
    if source is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {source!r} cannot be loaded: give --tokenizer") from error


def _open_folder(path: Path) -> CheckpointWeights:
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: neither a checkpoint nor a Hugging Face folder: no config.json")
    with _damage_named(path):
        if (path / _INDEX).is_file():
            files: dict[str, str] = json.loads((path / _INDEX).read_text())["weight_map"]
        elif (path / _WHOLE).is_file():
            with safe_open(path / _WHOLE, framework="pt") as whole:
                files = dict.fromkeys(whole.keys(), _WHOLE)
        else:
            raise ValueError(f"{path}: neither {_WHOLE} nor {_INDEX}, so it has no weights that can be read")
        like: dict[str, Tensor] = {}
        for file in dict.fromkeys(files.values()):
            with safe_open(path / file, framework="pt") as shard:
                # A view of the mapped file, of which nothing is touched.
                like |= {name: shard.get_tensor(name).to("meta") for name in shard.keys()}  # noqa: SIM118
        if like.keys() != files.keys():
            differs = min(like.keys() ^ files.keys())
            raise ValueError(f"{path}: the index and the files differ in {differs}")
        try:
            made_with = {"config": AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict()}
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ValueError(f"{path}: the model comes with code of its own, and that is not run") from error

    def read(name: str) -> Tensor:
        # Opened anew, so that the pages of one tensor are mapped and not those of all so far.
        with _damage_named(path), safe_open(path / files[name], framework="pt") as shard:
            return shard.get_tensor(name)

    has_tokenizer = (path / "tokenizer_config.json").is_file()
    return CheckpointWeights(
        path, made_with | {"tokenizer": str(path) if has_tokenizer else None}, like, read
    )


def _open_file(path: Path) -> CheckpointWeights:
    # Of tensors on the meta device, torch remembers where in the file they are.
    state = torch.load(path, map_location="meta", weights_only=True)
    state = state if isinstance(state, dict) else {}
    weights = {
        name.removeprefix(WEIGHTS): tensor
        for name, tensor in state.get("state_dict", {}).items()
        if name.startswith(WEIGHTS)
    }
    averaging = _averaging(state)
    snapshots = {
        f"{number}.{name}": tensor
        for number, row in enumerate(averaging["averages"])
        for name, tensor in zip(averaging["names"], row, strict=True)
    }
    tensors = weights | snapshots

    def read(name: str) -> Tensor:
        with _damage_named(path), path.open("rb") as file:
            return _mapped(tensors[name], file)

    averages = _snapshot_keys(averaging, "", len(averaging["averages"]))
    made_with = state.get("rewarm_model", {})
    return CheckpointWeights(path, made_with, weights, read, averages, averaging["weights"])


def _open_shards(path: Path) -> CheckpointWeights:
    state = torch.load(path / "meta.pt", map_location="cpu", weights_only=True)
    reader = _Reader(path)
    stored = {
        key: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
        for key, tensor in reader.read_metadata().state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    prefix = f"state_dict.{WEIGHTS}"
    weights = {key.removeprefix(prefix): key for key in stored if key.startswith(prefix)}

    def read(name: str) -> Tensor:
        key = weights.get(name, name)
        tensors = {key: room(stored[key].shape, stored[key].dtype)}
        with _damage_named(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors[key]

    averaging = _averaging(state)
    entry, number = averaging.get("shards", ("", 0))
    like = {name: stored[key] for name, key in weights.items()}
    averages = _snapshot_keys(averaging, f"{entry}.averages.", number)
    made_with = state.get("rewarm_model", {})
    return CheckpointWeights(path, made_with, like, read, averages, averaging["weights"])


def _mapped(tensor: Tensor, file: BinaryIO, begins: int = 0) -> Tensor:
    """Map into memory what `torch.load` put on the meta device.

    Args:
        tensor: Remembers where its values are in what was loaded.
        file: Which holds that, from `begins` on.
        begins: Place in the file, in bytes.
    """
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_like(tensor, device="cpu")
    place: int = begins + storage._checkpoint_offset  # type: ignore[operator]
    start = place % ALLOCATIONGRANULARITY
    mapped = mmap(file.fileno(), start + storage.nbytes(), access=ACCESS_COPY, offset=place - start)
    content = torch.frombuffer(mapped, dtype=torch.uint8, offset=start, count=storage.nbytes())
    return content.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


class _Reader(dcp.FileSystemReader):
    """Reads the metadata once, however often tensors are asked for, and tensors from their mapped files.

    torch's own way reads each one into the C library's heap first, where such copies leave holes: up to half
    as much again as is kept.
    """

    _metadata: Metadata | None = None

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            stored = self.storage_data[item.storage_index]
            with (Path(self.path) / stored.relative_path).open("rb") as file:
                saved = self._slice_file(file, stored)
                shape = torch.load(saved, map_location="meta", weights_only=True)
                tensor = _mapped(shape, file, stored.offset)
                for dim, (first, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    tensor = tensor.narrow(dim, first, length)
                planner.resolve_tensor(item).copy_(tensor)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path))
        return self._metadata


def _averaging(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of `CheckpointAveraging`, or that of one which took no snapshot."""
    for key, callback in state.get("callbacks", {}).items():
        if str(key).startswith("CheckpointAveraging"):
            return callback
    return {"names": [], "averages": [], "weights": []}


def _snapshot_keys(averaging: dict[str, Any], prefix: str, number: int) -> dict[str, list[str]]:
    if not number:
        return {}
    return {
        name.removeprefix(WEIGHTS): [f"{prefix}{place}.{name}" for place in range(number)]
        for name in averaging["names"]
    }


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what reading damaged files raises into one line."""
    damage = (RuntimeError, EOFError, KeyError, OSError, SafetensorError)
    try:
        yield
    except pickle.UnpicklingError as error:  # its bytes are what was written, as `verify` found
        raise ValueError(
            f"{path}: holds more than weights and plain values, so it is not loaded: that could run code"
        ) from error
    except (*damage, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: the checkpoint is damaged ({error})") from error
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"{path}: the checkpoint is damaged ({cause})") from cause
