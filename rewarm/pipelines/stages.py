"""Running one stage of a pipeline: what its folder notes, where it goes on, what it is started with."""

import json
import re
import secrets
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from rewarm.checkpoints.placing import put_in_place, remove
from rewarm.pipelines.pipeline import Stage, read_yaml
from rewarm.pipelines.processes import (
    REWARM,
    TERMINATED,
    environment_of,
    free_port,
    polls,
    roll_call,
    say,
    signals,
    wait,
)

_MARKER = "stage.json"
_OVERLAY = "overlay.yaml"
_OWN = re.compile(rf"\.rank-\d+-[0-9a-f]+|\.{re.escape(_MARKER)}\.(partial|old)")
"""What the ranks of a stage may have written before the first of them has noted that the folder is theirs."""


def run_stage(folder: Path, stage: Stage, rank: int, ranks: int, marker: dict[str, Any]) -> None:
    """Run a stage, or let it go on, and note that it is finished.

    Args:
        folder: Folder of the stage.
        stage: The stage.
        rank: Rank of this process among those of the launcher.
        ranks: How many there are.
        marker: What the folder noted before.

    Raises:
        ValueError: If the stage fails, or its folder holds files that no pipeline made.
        SystemExit: With code 143, after SIGTERM.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if rank != 0:
        if stage.command:
            for _ in polls():
                if read_marker(folder, stage).get("finished"):
                    return
        known = _ask(folder, stage, rank)
    else:
        known = _prepare(folder, stage, ranks, marker)
    command = _command(folder, stage, known["resume"])
    written = time.monotonic()
    began = written - known["seconds"]

    def note_time() -> None:
        nonlocal written
        if rank == 0 and time.monotonic() - written > 5.0:
            written = time.monotonic()
            _write_marker(folder, stage, **known | {"seconds": written - began})

    numbers: list[int] = [signal.SIGTERM] if stage.command else signals()
    code, stopped = wait(command, environment_of(known["port"]), numbers, note_time)
    if code in (TERMINATED, -signal.SIGTERM):
        say(rank, f"stage {stage.name} was stopped by SIGTERM; the same command goes on")
        raise SystemExit(TERMINATED)
    if code:
        raise ValueError(f"stage {stage.name} failed with exit code {code}: {shlex.join(command)}")
    if rank == 0:
        _write_marker(folder, stage, **known | {"seconds": time.monotonic() - began, "finished": True})
        for name in known["ranks"]:
            (folder / name).unlink(missing_ok=True)
    if stopped:
        raise SystemExit(TERMINATED)


def read_marker(folder: Path, stage: Stage) -> dict[str, Any]:
    """Return what a stage's folder notes; nothing if the stage was never begun.

    Raises:
        ValueError: If another stage, or this one with other settings, has made the folder.

    Example:
        >>> read_marker(Path("nowhere"), Stage("sft", (), (), {}, 100, "abc"))
        {}
    """
    marker = folder / _MARKER
    if not marker.is_file():
        return {}
    try:
        known: dict[str, Any] = json.loads(marker.read_text())
        fingerprint = known["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{marker} is damaged ({error}): remove {folder} to run the stage anew") from error
    if fingerprint != stage.fingerprint:
        raise ValueError(
            f"{folder} was made with other settings: give another --output, or remove it to run it anew"
        )
    return known


def _write_marker(folder: Path, stage: Stage, seconds: float, *, finished: bool, **more: Any) -> None:
    known = {"fingerprint": stage.fingerprint, "seconds": round(seconds, 1), "finished": finished, **more}
    with put_in_place(folder / _MARKER, replace=True) as place:
        place.write_text(json.dumps(known))


def _prepare(folder: Path, stage: Stage, ranks: int, marker: dict[str, Any]) -> dict[str, Any]:
    """Make a stage's folder ready and tell the other ranks where it goes on."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link, and what it leads to is not the pipeline's: remove it")
    if not marker and (foreign := sorted(p.name for p in folder.iterdir() if not _OWN.fullmatch(p.name))):
        raise ValueError(
            f"{folder} has files that no pipeline made ({', '.join(foreign[:3])}): give another --output, or"
            " remove them"
        )
    known = {"seconds": marker.get("seconds", 0.0), "finished": False}
    known |= {"resume": None, "ranks": [], "port": None}
    _write_marker(folder, stage, **known)  # from here on the folder is ours
    if stage.command:
        _clear(folder)
        return known
    write_overlay(folder, stage)
    resume = checkpoint_to_resume(folder / "checkpoints", lambda line: say(0, line))
    known |= {"resume": None if resume is None else str(resume)}
    if ranks > 1:
        known |= {"ranks": roll_call(folder, ranks), "port": free_port()}
    _write_marker(folder, stage, **known)
    return known


def checkpoint_to_resume(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint of a folder, and rename those before it, which are damaged.

    Args:
        folder: Folder of the checkpoints; may be missing.
        say: Function that is told about each damaged one.

    Example:
        >>> checkpoint_to_resume(Path("nowhere"), print) is None
        True
    """
    if not folder.is_dir():
        return None
    from rewarm.checkpoints.whole import newest_first, verify

    found = newest_first(folder)
    for path in found:
        try:
            verify(path)
        except ValueError as error:
            damaged = path.with_name(f"{path.name}.damaged")
            remove(damaged)
            path.rename(damaged)
            say(f"{error}; renamed to {damaged.name}")
        else:
            return path
    if found:
        say(f"{folder} has no whole checkpoint left: the stage starts anew")
    return None


def _ask(folder: Path, stage: Stage, rank: int) -> dict[str, Any]:
    """Wait until rank 0 has read this rank's name, and return what it wrote down with it."""
    name = f".rank-{rank}-{secrets.token_hex(4)}"
    known: dict[str, Any] = {}
    for _ in polls():
        known = read_marker(folder, stage)
        if name in known.get("ranks", []):
            break
        (folder / name).touch()
    return known


def _clear(folder: Path) -> None:
    """Remove what an interrupted command left: it starts anew, and may refuse to overwrite its own output."""
    for path in folder.iterdir():
        if path.name == _MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _command(folder: Path, stage: Stage, resume: str | None) -> list[str]:
    if stage.command:
        first, *rest = stage.command
        starts = {"python": [sys.executable], "rewarm": [*REWARM]}
        return [*starts.get(first, [first]), *rest]
    command = [*REWARM, "fit"]
    for config in (*stage.configs, folder / _OVERLAY):
        command += ["--config", str(config)]
    return command if resume is None else [*command, "--ckpt_path", resume]


def write_overlay(folder: Path, stage: Stage) -> None:
    """Write what every stage gets: a place for logs, checkpoints, an answer to SIGTERM, a final export."""
    settings = json.loads(json.dumps(stage.settings))
    trainer = settings.setdefault("trainer", {})
    trainer["default_root_dir"] = str(folder)
    trainer["logger"] = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(folder), "name": "", "version": "logs"},
    }
    own = _own_callbacks(stage.configs, trainer)
    names = {_name(callback) for callback in own}
    added = [callback for callback in _added_callbacks(folder, stage) if _name(callback) not in names]
    trainer["callbacks"] = own + added
    with put_in_place(folder / _OVERLAY, replace=True) as place:
        place.write_text(yaml.safe_dump(settings))


def _own_callbacks(configs: Sequence[Path], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the callbacks of a stage's configs and settings, less those that the pipeline brings."""
    callbacks: list[dict[str, Any]] = []
    sections = [read_yaml(config).get("trainer") or {} for config in configs]
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
    return _name(callback) in ("HuggingFaceExport", "Checkpoint", "Preemption") or (
        _name(callback) == "ModelCheckpoint" and monitor is None
    )


def _added_callbacks(folder: Path, stage: Stage) -> list[dict[str, Any]]:
    checkpoints = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": stage.checkpoint_every}
    return [
        {"class_path": "rewarm.Throughput"},
        {"class_path": "rewarm.ExactResume"},
        {"class_path": "rewarm.HuggingFaceExport", "init_args": {"folder": str(folder / "hf")}},
        {"class_path": "rewarm.Checkpoint", "init_args": checkpoints},
        {"class_path": "rewarm.Preemption"},
    ]
