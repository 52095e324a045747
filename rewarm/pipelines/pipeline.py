"""The pipeline's file: its stages, with every variable filled in."""

import copy
import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

# What may be another when a stage goes on: where it runs, and how an optimizer step is cut into batches.
_MAY_CHANGE = (
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("trainer.accumulate_grad_batches", "data.init_args.batch_size", "data.init_args.num_workers"),
)


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

    Example:
        >>> Stage("sft", (), (Path("configs/curriculum_sft.yaml"),), {}, 100, "abc").configs[0].stem
        'curriculum_sft'
    """

    name: str
    command: tuple[str, ...]
    configs: tuple[Path, ...]
    settings: dict[str, Any]
    checkpoint_every: int
    fingerprint: str


def read_pipeline(pipeline: str, output: str, settings: Mapping[str, str]) -> list[Stage]:
    """Read a pipeline file and fill in its variables.

    In every text, `$name` stands for a variable of the file, and `$output`, `$stage` (the stage's folder) and
    `$here` (the folder of the file) are always there. A text that is nothing but a variable becomes its
    value, of whatever type.

    Args:
        pipeline: Pipeline file.
        output: Folder for everything that the stages write.
        settings: Values for variables of the file, as YAML.

    Returns:
        The stages in their order.

    Raises:
        ValueError: If the file is missing or wrong, or a variable is unknown or not set; names the place.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "pipeline.yaml")
        >>> _ = path.write_text("{vars: {n: 3}, stages: [{name: one, run: echo $n}]}")
        >>> read_pipeline(str(path), "runs", {"n": "4"})[0].command
        ('echo', '4')
        >>> folder.cleanup()
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
    _check_kind(parsed["stages"], list, f"{pipeline}: stages", "a list of stages")
    _check_kind(parsed.get("vars") or {}, dict, f"{pipeline}: vars", "values by name")
    variables = dict(parsed.get("vars") or {})
    for key, value in settings.items():
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
    # It is the name of a folder that is emptied: none above the output, and none that is hidden.
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
        raise ValueError(
            f"{pipeline}: a stage is named {name!r}; it must begin with a letter, a digit or '_', and go on"
            " with these, '.' and '-'"
        )
    where = f"{pipeline}, stage {name}"
    given = {k: v for k, v in entry.items() if k != "name"}
    if isinstance(given.get("run"), str):
        given["run"] = _words(given["run"], where)  # before values with spaces are filled in
    filled = _fill(given, {**variables, "stage": f"{variables['output']}/{name}"}, where)
    command: tuple[str, ...] = ()
    configs: tuple[Path, ...] = ()
    contents: list[Any] = []
    if "run" in filled:
        _check_kind(filled["run"], list, f"{where}: run", "a command, as text or as a list of words")
        command = tuple(str(part) for part in filled["run"] if _is_plain(part, f"{where}: run"))
        if not command:
            raise ValueError(f"{where}: run is {entry['run']!r}; it must be a command")
    else:
        fit = filled["fit"] if isinstance(filled["fit"], list) else [filled["fit"]]
        for config in fit:
            _check_kind(config, str, f"{where}: fit", "a config file, or a list of them")
        configs = tuple(Path(config) for config in fit)
        for config in configs:
            if not config.is_file():
                raise ValueError(f"{where}: config {config}: no such file")
            contents.append(_lasting(read_yaml(config)))
    _check_kind(filled.get("set") or {}, dict, f"{where}: set", "settings by name")
    every = filled.get("checkpoint_every", 100)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"{where}: checkpoint_every is {every!r}; it must be a whole number, at least 1")
    settings = _nested(filled.get("set") or {})
    lasting = {**filled, "fit": contents, "set": _lasting(settings)}
    text = json.dumps([before, lasting], sort_keys=True, default=str)
    return Stage(
        name,
        command,
        configs,
        settings,
        every,
        hashlib.sha256(text.encode()).hexdigest()[:16],
    )


def _words(command: str, where: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ValueError(f"{where}: run is {command!r}: {error}") from error


def _check_kind(value: Any, kind: type, what: str, allowed: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {value!r}; it must be {allowed}")


def _is_plain(part: Any, what: str) -> bool:
    """Whether a word of a command is text or a number; anything else is refused."""
    if part is None or isinstance(part, bool | list | dict):
        raise ValueError(f"{what} has the word {part!r}; it must be text or a number")
    return True


def _fill(value: Any, variables: Mapping[str, Any], where: str, within: tuple[str, ...] = ()) -> Any:
    if isinstance(value, dict):
        return {key: _fill(part, variables, where, within) for key, part in value.items()}
    if isinstance(value, list):
        return [_fill(part, variables, where, within) for part in value]
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
    if circular := [name for name in names if name in within]:
        raise ValueError(f"{where}: the variable {circular[0]} refers to itself: {' -> '.join(within)}")
    whole = len(names) == 1 and value in (f"${names[0]}", f"${{{names[0]}}}")
    filled = variables[names[0]] if whole else template.substitute(variables)
    # A variable may be written with others.
    return _fill(filled, variables, where, (*within, *names))


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


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file holds an empty one.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "config.yaml")
        >>> _ = path.write_text("trainer: {max_steps: 5}")
        >>> read_yaml(path)
        {'trainer': {'max_steps': 5}}
        >>> folder.cleanup()
    """
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
