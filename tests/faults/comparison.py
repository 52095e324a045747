"""In what a run that was interrupted differs from one that never was."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from rewarm.checkpoints.whole import newest_first

# Counters of Lightning's and torchdata's own that go on in another way when a run is resumed at the end of an
# epoch, and steer nothing.
_IDLE = {"ready", "started", "_num_yielded", "_sampler_iter_yielded", "epoch_loop.val_loop.batch_progress"}


def differences(whole: Path, resumed: Path) -> list[str]:
    """Compare the finished models, the last checkpoints with all that is in them, and every logged value."""
    found = []
    for what, read in {"model": _model, "checkpoint": _last_checkpoint}.items():
        found += _unequal(read(whole), read(resumed), what)
    expected, logged = _logged(whole), _logged(resumed)
    found += [f"never logged: {expected[key]}" for key in expected.keys() - logged.keys()]
    found += [f"logged beside: {logged[key]}" for key in logged.keys() - expected.keys()]
    found += [
        f"logged: {sorted(logged[key])} instead of {sorted(expected[key])}"
        for key in expected.keys() & logged.keys()
        if logged[key] != expected[key]
    ]
    return found


def steps_done_twice(folder: Path) -> int:
    """How many optimizer steps a run has taken more than once."""
    steps = (folder / "steps").read_text().split()
    return len(steps) - len(set(steps))


def _lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def _logged(folder: Path) -> dict[tuple[Any, ...], set[str]]:
    """What was logged, by step and names: one line, or several if a step was not done twice the same way."""
    logged = defaultdict(set)
    for line in _lines(folder):
        logged[(line["step"], *line)].add(json.dumps(line))
    return logged


def _model(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


def _last_checkpoint(folder: Path) -> dict[str, Any]:
    path = newest_first(folder / "checkpoints")[0]
    if path.is_file():
        return torch.load(path, weights_only=True)
    with NamedTemporaryFile(dir=folder) as file:
        dcp_to_torch_save(path, file.name)
        return {
            "shards": torch.load(file.name, weights_only=True),
            "rest": torch.load(path / "meta.pt", weights_only=True),
        }


def _unequal(one: Any, other: Any, where: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            yield f"{where}: {sorted(map(str, one.keys() ^ other.keys()))} in one of the two"
        for key in (one.keys() & other.keys()) - _IDLE:
            yield from _unequal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield f"{where}: {len(one)} and {len(other)} entries"
        for number, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from _unequal(a, b, f"{where}.{number}")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield f"{where}: other numbers"
    elif one != other:
        yield f"{where}: {one} and {other}"
