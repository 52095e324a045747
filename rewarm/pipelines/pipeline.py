"""Runs the stages of a pipeline, each as a process of its own, and goes on where it was interrupted."""

import copy
import ctypes
import hashlib
import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import FrameType
from typing import Any

import yaml

from rewarm.checkpoints.placing import put_in_place, remove

_POLL_SECONDS = 0.2
_ROLL_CALL_SECONDS = 300.0  # network file systems show new files up to a minute late
_MARKER = "stage.json"
_OVERLAY = "overlay.yaml"
# What may be another when a stage goes on: where it runs, and how an optimizer step is cut into batches.
_MAY_CHANGE = (
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("trainer.accumulate_grad_batches", "data.init_args.batch_size", "data.init_args.num_workers"),
)
_TERMINATED = 128 + signal.SIGTERM  # the exit code of rewarm.Preemption


@dataclass(frozen=True)
class Stage:
    """One stage, with every variable filled in.

    Attributes:
        name: Unique in the pipeline; also the name of its folder.
        command: Of a stage that is any command; empty for one that trains.
        configs: Config files of a stage that trains.
        settings: What it sets on top of them.
        checkpoint_every: Optimizer steps between checkpoints of a stage that trains.
        fingerprint: Changes when the stage, its configs or a stage before it change, except in where the
            stage runs and how an optimizer step is cut into batches.
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

    A stage that was interrupted goes on from its newest whole checkpoint; damaged ones are renamed to
    `NAME.damaged`. SIGTERM goes on to the stage, which saves a checkpoint; then this ends with exit code 143.

    Args:
        pipeline: Pipeline file.
        output: Folder for everything; the same folder again goes on.
        settings: `key=value` for the pipeline's variables.

    Raises:
        ValueError: If the file is wrong, a variable is unknown or missing, a stage was finished with other
            settings, its folder is somebody else's, or a stage fails.
        SystemExit: With code 143, after SIGTERM.
    """
    stages = read_pipeline(pipeline, output, settings)
    rank, ranks = _place()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _when_parent_ends(signal.SIGTERM)  # the agent on this node; then there is time for a checkpoint
    with _answering({**dict.fromkeys(_signals(), _ignore), signal.SIGTERM: _exit}):
        for number, stage in enumerate(stages, 1):
            marker = _read_marker(Path(output) / stage.name, stage)
            if marker.get("finished"):
                seconds = marker["seconds"]
                _say(rank, f"[{number}/{len(stages)}] {stage.name}: finished before, {seconds:.0f} s")
                continue
            _say(rank, f"[{number}/{len(stages)}] {stage.name}")
            _run_stage(Path(output) / stage.name, stage, rank, ranks, marker)
    if rank == 0:
        from rewarm.pipelines.report import write_report

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
    contents: list[Any] = []
    if "run" in filled:
        parts = filled["run"] if isinstance(filled["run"], list) else shlex.split(filled["run"])
        command = tuple(str(part) for part in parts)
    else:
        fit = filled["fit"] if isinstance(filled["fit"], list) else [filled["fit"]]
        configs = tuple(Path(config) for config in fit)
        for config in configs:
            if not config.is_file():
                raise ValueError(f"{where}: config {config}: no such file")
            contents.append(_lasting(_read_yaml(config)))
    settings = _nested(filled.get("set") or {})
    lasting = {**filled, "fit": contents, "set": _lasting(settings)}
    text = json.dumps([before, lasting], sort_keys=True, default=str)
    return Stage(
        name,
        command,
        configs,
        settings,
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


def _read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a config what may change while a stage is under way."""
    kept = copy.deepcopy(config)
    for name in _MAY_CHANGE:
        *path, last = name.split(".")
        place = kept
        for part in path:
            place = place.get(part) or {}
        place.pop(last, None)
    return kept


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


def _write_marker(folder: Path, stage: Stage, seconds: float, *, finished: bool, **more: Any) -> None:
    known = {"fingerprint": stage.fingerprint, "seconds": round(seconds, 1), "finished": finished, **more}
    with put_in_place(folder / _MARKER, replace=True) as place:
        place.write_text(json.dumps(known))


def _place() -> tuple[int, int]:
    """Return this process's rank and their number, by what torchrun or srun has set."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_NTASKS", "1"))
    return 0, 1


def _run_stage(folder: Path, stage: Stage, rank: int, ranks: int, marker: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if rank != 0:
        if stage.command:
            for _ in _polls():
                if _read_marker(folder, stage).get("finished"):
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

    numbers: list[int] = [signal.SIGTERM] if stage.command else _signals()
    code, stopped = _wait(command, _environment(known["port"]), numbers, note_time)
    if code in (_TERMINATED, -signal.SIGTERM):
        _say(rank, f"stage {stage.name} was stopped by SIGTERM; the same command goes on")
        raise SystemExit(_TERMINATED)
    if code:
        raise ValueError(f"stage {stage.name} failed with exit code {code}: {shlex.join(command)}")
    if rank == 0:
        _write_marker(folder, stage, **known | {"seconds": time.monotonic() - began, "finished": True})
        for name in known["ranks"]:
            (folder / name).unlink(missing_ok=True)
    if stopped:
        raise SystemExit(_TERMINATED)


def _prepare(folder: Path, stage: Stage, ranks: int, marker: dict[str, Any]) -> dict[str, Any]:
    """Make a stage's folder ready and tell the other ranks where it goes on."""
    if not marker and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder} has files that no pipeline made: give another --output, or remove them")
    known = {"seconds": marker.get("seconds", 0.0), "finished": False}
    known |= {"resume": None, "ranks": [], "port": None}
    _write_marker(folder, stage, **known)  # from here on the folder is ours
    if stage.command:
        _clear(folder)
        return known
    write_overlay(folder, stage)
    resume = checkpoint_to_resume(folder / "checkpoints", lambda line: _say(0, line))
    known |= {"resume": None if resume is None else str(resume)}
    if ranks > 1:
        known |= {"ranks": _roll_call(folder, ranks), "port": _free_port()}
    _write_marker(folder, stage, **known)
    return known


def checkpoint_to_resume(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint of a folder, and rename those before it, which are damaged.

    Args:
        folder: Of the checkpoints; may be missing.
        say: Is told about each damaged one.
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


def _roll_call(folder: Path, ranks: int) -> list[str]:
    """Wait until the other ranks of this launch have put their names down; those of earlier ones are void."""
    for name in folder.glob(".rank-*"):
        name.unlink(missing_ok=True)
    began, told = time.monotonic(), False
    while len(names := [path.name for path in folder.glob(".rank-*")]) < ranks - 1:
        time.sleep(_POLL_SECONDS)
        here, seconds = f"{len(names)} of {ranks - 1} are here", time.monotonic() - began
        if seconds > _ROLL_CALL_SECONDS:
            raise ValueError(
                f"{folder}: after {seconds:.0f} s {here}: it must be on a file system that all nodes share"
            )
        if seconds > 10.0 and not told:
            _say(0, f"waiting for the other ranks in {folder}: {here}")
            told = True
    return names


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _ask(folder: Path, stage: Stage, rank: int) -> dict[str, Any]:
    """Wait until rank 0 has read this rank's name, and return what it wrote down with it."""
    name = f".rank-{rank}-{secrets.token_hex(4)}"
    known: dict[str, Any] = {}
    for _ in _polls():
        known = _read_marker(folder, stage)
        if name in known.get("ranks", []):
            break
        (folder / name).touch()
    return known


def _polls() -> Iterator[None]:
    """Go round as long as there is a rank 0 to wait for.

    Under torchrun its agent has a port open as long as it lives. SLURM ends all ranks when one has failed.
    """
    for count in itertools.count(1):
        yield
        time.sleep(_POLL_SECONDS)
        if count % 25 == 0 and "TORCHELASTIC_RUN_ID" in os.environ:
            host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
            try:
                socket.create_connection((host, int(port)), timeout=10.0).close()
            except OSError as error:
                raise ValueError(
                    f"rank 0 ({host}, port {port}) has ended or cannot be reached: {error}"
                ) from error


def _environment(port: int | None) -> dict[str, str]:
    """Return the environment of a stage whose ranks are to meet at a port of rank 0's.

    A port for each stage: in the store that torchrun keeps for them all, ranks would find the addresses that
    those of the stage before have left.
    """
    meeting = {} if port is None else {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return {**os.environ, **meeting}


def _when_parent_ends(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # 1 is PR_SET_PDEATHSIG


def _signals() -> list[int]:
    """What a training answers to; SLURM sends SIGUSR1 to all processes of a job that it is about to end."""
    return [signal.SIGTERM, signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [signal.SIGTERM]


def _wait(
    command: list[str], environment: dict[str, str], numbers: list[int], meanwhile: Callable[[], None]
) -> tuple[int, bool]:
    """Run a command, passing some signals on; return its exit code, and whether SIGTERM was among them."""
    process: subprocess.Popen[bytes] | None = None
    got: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        got.append(number)
        if process is not None:
            process.send_signal(number)

    with _answering(dict.fromkeys(numbers, pass_on)):
        process = subprocess.Popen(
            command, env=environment, preexec_fn=lambda: _when_parent_ends(signal.SIGKILL)
        )
        try:
            for number in got:  # while it was being started
                process.send_signal(number)
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                meanwhile()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return process.returncode, signal.SIGTERM in got


@contextmanager
def _answering(handlers: Mapping[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # which signals don't reach
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(_TERMINATED)


def _ignore(number: int, frame: FrameType | None) -> None: ...


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
        starts = {"python": [sys.executable], "rewarm": [sys.executable, "-m", "rewarm"]}
        return [*starts.get(first, [first]), *rest]
    command = [sys.executable, "-m", "rewarm", "fit"]
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
    sections = [_read_yaml(config).get("trainer") or {} for config in configs]
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


def _say(rank: int, line: str) -> None:
    if rank == 0:
        print(line, flush=True)  # noqa: T201
