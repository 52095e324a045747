"""Runs the stages of a pipeline, each as a process of its own, and goes on where it was interrupted."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

_POLL_SECONDS = 0.2
_MARKER = "stage.json"
_OVERLAY = "overlay.yaml"


@dataclass(frozen=True)
class Stage:
    """One stage, with every variable filled in.

    Attributes:
        name: Unique in the pipeline; also the name of its folder.
        command: Of a stage that is any command; empty for one that trains.
        configs: Config files of a stage that trains.
        settings: What it sets on top of them.
        checkpoint_every: Optimizer steps between checkpoints of a stage that trains.
        fingerprint: Changes when the stage, its configs or a stage before it change.
    """

    name: str
    command: tuple[str, ...]
    configs: tuple[Path, ...]
    settings: dict[str, Any]
    checkpoint_every: int
    fingerprint: str


def run_pipeline(pipeline: str, output: str, settings: Sequence[str] = ()) -> None:
    """Run every stage that is not finished yet, then write the report.

    Under torchrun or SLURM every rank runs this: stages that train run on all ranks with the launcher's
    environment, commands run on rank 0 while the others wait for them in the shared folder.

    Args:
        pipeline: Pipeline file.
        output: Folder for everything; the same folder again goes on.
        settings: `key=value` for the pipeline's variables.

    Raises:
        ValueError: If the file is wrong, a variable is unknown or missing, a stage was finished with other
            settings, or a stage fails.
    """
    stages = read_pipeline(pipeline, output, settings)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    for number, stage in enumerate(stages, 1):
        marker = _read_marker(Path(output) / stage.name, stage)
        if marker.get("finished"):
            _say(rank, f"[{number}/{len(stages)}] {stage.name}: finished before, {marker['seconds']:.0f} s")
            continue
        _say(rank, f"[{number}/{len(stages)}] {stage.name}")
        _run_stage(Path(output) / stage.name, stage, rank, marker.get("seconds", 0.0))
    if rank == 0:
        from rewarm.report import write_report

        write_report(Path(output), [stage.name for stage in stages if not stage.command])


def read_pipeline(pipeline: str, output: str, settings: Sequence[str]) -> list[Stage]:
    """Read a pipeline file and fill in its variables.

    In every text, `$name` stands for a variable of the file, and `$output`, `$stage` (the stage's folder) and
    `$here` (the folder of the file) are always there. A text that is nothing but a variable becomes its
    value, of whatever type.

    Raises:
        ValueError: Names the file, the stage and the key.
    """
    path = Path(pipeline)
    if not path.is_file():
        raise ValueError(f"{pipeline}: no such file")
    try:
        parsed = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{pipeline}: not YAML: {error}") from error
    if not isinstance(parsed, dict) or set(parsed) - {"vars", "stages"} or not parsed.get("stages"):
        raise ValueError(f"{pipeline}: must have `stages` and may have `vars`, nothing else")
    variables = dict(parsed.get("vars") or {})
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: must be key=value")
        if key not in variables:
            raise ValueError(
                f"--set {key}: {pipeline} has no such variable; it has {', '.join(variables) or 'none'}"
            )
        variables[key] = yaml.safe_load(value)
    variables |= {"output": str(Path(output)), "here": str(path.parent)}
    stages: list[Stage] = []
    before = ""
    for entry in parsed["stages"]:
        stage = _stage(pipeline, entry, variables, before)
        if stage.name in {other.name for other in stages}:
            raise ValueError(f"{pipeline}: two stages are named {stage.name!r}")
        before = stage.fingerprint
        stages.append(stage)
    return stages


def _stage(pipeline: str, entry: Any, variables: dict[str, Any], before: str) -> Stage:
    known = {"name", "run", "fit", "set", "checkpoint_every"}
    if not isinstance(entry, dict) or set(entry) - known or ("run" in entry) == ("fit" in entry):
        raise ValueError(
            f"{pipeline}: a stage has `name`, either `run` or `fit`, and may have `set`; this is {entry}"
        )
    name = str(entry.get("name", ""))
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{pipeline}: a stage is named {name!r}; use letters, digits, '.', '_' and '-'")
    where = f"{pipeline}, stage {name}"
    filled = _fill(
        {k: v for k, v in entry.items() if k != "name"},
        {**variables, "stage": f"{variables['output']}/{name}"},
        where,
    )
    command: tuple[str, ...] = ()
    configs: tuple[Path, ...] = ()
    contents: list[str] = []
    if "run" in filled:
        parts = filled["run"] if isinstance(filled["run"], list) else shlex.split(filled["run"])
        command = tuple(str(part) for part in parts)
    else:
        fit = filled["fit"] if isinstance(filled["fit"], list) else [filled["fit"]]
        configs = tuple(Path(config) for config in fit)
        for config in configs:
            if not config.is_file():
                raise ValueError(f"{where}: config {config}: no such file")
            contents.append(config.read_text())
    text = json.dumps([before, filled, contents], sort_keys=True, default=str)
    return Stage(
        name,
        command,
        configs,
        _nested(filled.get("set") or {}),
        int(filled.get("checkpoint_every", 100)),
        hashlib.sha256(text.encode()).hexdigest()[:16],
    )


def _fill(value: Any, variables: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill(part, variables, where) for key, part in value.items()}
    if isinstance(value, list):
        return [_fill(part, variables, where) for part in value]
    if not isinstance(value, str):
        return value
    template = Template(value)
    names = template.get_identifiers()
    if unknown := set(names) - set(variables):
        raise ValueError(f"{where}: no variable {', '.join(unknown)}; known are {', '.join(variables)}")
    if unset := [name for name in names if variables[name] is None]:
        raise ValueError(f"{where}: {unset[0]} is not set: give --set {unset[0]}=VALUE")
    if not template.is_valid():
        raise ValueError(f"{where}: {value!r}: a lone $ is written $$")
    if not names:
        return template.substitute()
    whole = len(names) == 1 and value in (f"${names[0]}", f"${{{names[0]}}}")
    filled = variables[names[0]] if whole else template.substitute(variables)
    # A variable may be written with others.
    return _fill(filled, variables, where)


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Turn {"a.b": 1} into {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def _read_marker(folder: Path, stage: Stage) -> dict[str, Any]:
    marker = folder / _MARKER
    if not marker.is_file():
        return {}
    known: dict[str, Any] = json.loads(marker.read_text())
    if known["fingerprint"] != stage.fingerprint:
        raise ValueError(
            f"{folder} was made with other settings: give another --output, or remove it to run it anew"
        )
    return known


def _write_marker(folder: Path, stage: Stage, seconds: float, *, finished: bool) -> None:
    text = json.dumps({"fingerprint": stage.fingerprint, "seconds": round(seconds, 1), "finished": finished})
    partial = folder / f".{_MARKER}"
    partial.write_text(text)
    partial.replace(folder / _MARKER)


def _run_stage(folder: Path, stage: Stage, rank: int, seconds: float) -> None:
    if stage.command and rank != 0:
        while not _read_marker(folder, stage).get("finished"):
            time.sleep(_POLL_SECONDS)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        if stage.command:
            _clear(folder)
        else:
            write_overlay(folder, stage)
        _write_marker(folder, stage, seconds, finished=False)
    while not _read_marker(folder, stage):
        time.sleep(_POLL_SECONDS)
    command = _command(folder, stage)
    began = time.monotonic() - seconds
    with subprocess.Popen(command) as process:
        written = time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                if rank == 0 and time.monotonic() - written > 5.0:
                    written = time.monotonic()
                    _write_marker(folder, stage, written - began, finished=False)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise ValueError(
            f"stage {stage.name} failed with exit code {process.returncode}: {shlex.join(command)}"
        )
    if rank == 0:
        _write_marker(folder, stage, time.monotonic() - began, finished=True)


def _clear(folder: Path) -> None:
    """Remove what an interrupted command left: it starts anew, and may refuse to overwrite its own output."""
    for path in folder.iterdir():
        if path.name == _MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _command(folder: Path, stage: Stage) -> list[str]:
    if stage.command:
        first, *rest = stage.command
        starts = {"python": [sys.executable], "rewarm": [sys.executable, "-m", "rewarm"]}
        return [*starts.get(first, [first]), *rest]
    command = [sys.executable, "-m", "rewarm", "fit"]
    for config in (*stage.configs, folder / _OVERLAY):
        command += ["--config", str(config)]
    if checkpoint := newest_checkpoint(folder / "checkpoints"):
        command += ["--ckpt_path", str(checkpoint)]
    return command


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the latest step in a folder, None if there is none."""
    steps = {
        int(match[1]): path
        for path in folder.glob("*.ckpt")
        if (match := re.search(r"step=(\d+)", path.name))
    }
    return steps[max(steps)] if steps else None


def write_overlay(folder: Path, stage: Stage) -> None:
    """Write what every stage gets: a place for logs and checkpoints, exact resume, an export at the end."""
    settings = json.loads(json.dumps(stage.settings))
    trainer = settings.setdefault("trainer", {})
    trainer["default_root_dir"] = str(folder)
    trainer["logger"] = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(folder), "name": "", "version": "logs"},
    }
    own = _own_callbacks(stage.configs, trainer)
    names = {_name(callback) for callback in own} - {"ModelCheckpoint"}
    added = [callback for callback in _added_callbacks(folder, stage) if _name(callback) not in names]
    trainer["callbacks"] = own + added
    partial = folder / f".{_OVERLAY}"
    partial.write_text(yaml.safe_dump(settings))
    partial.replace(folder / _OVERLAY)


def _own_callbacks(configs: Sequence[Path], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the callbacks of a stage's configs and settings, less those that the pipeline brings."""
    callbacks: list[dict[str, Any]] = []
    sections = [(yaml.safe_load(config.read_text()) or {}).get("trainer") or {} for config in configs]
    for section in (*sections, settings):
        callbacks = list(section.pop("callbacks", None) or callbacks) + list(
            section.pop("callbacks+", None) or []
        )
    return [callback for callback in callbacks if not _is_replaced(callback)]


def _name(callback: dict[str, Any]) -> str:
    return str(callback["class_path"]).rsplit(".", 1)[-1]


def _is_replaced(callback: dict[str, Any]) -> bool:
    # The next stage reads the export, and resuming is the pipeline's; a checkpoint by score is the user's.
    monitor = (callback.get("init_args") or {}).get("monitor")
    return _name(callback) == "HuggingFaceExport" or (
        _name(callback) == "ModelCheckpoint" and monitor is None
    )


def _added_callbacks(folder: Path, stage: Stage) -> list[dict[str, Any]]:
    checkpoints = {
        "dirpath": str(folder / "checkpoints"),
        "every_n_train_steps": stage.checkpoint_every,
        "filename": "{step}",
    }
    return [
        {"class_path": "rewarm.Throughput"},
        {"class_path": "rewarm.ExactResume"},
        {"class_path": "rewarm.HuggingFaceExport", "init_args": {"folder": str(folder / "hf")}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
    ]


def _say(rank: int, line: str) -> None:
    if rank == 0:
        print(line, flush=True)  # noqa: T201
