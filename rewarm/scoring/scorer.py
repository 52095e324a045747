"""Scores that a user's own command or function gives to something on disk."""

import math
import shlex
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

PLACE = "{}"
"""What stands for the path in a command."""


def read_scorer(text: str) -> Callable[[Path], float]:
    """Turn what was written on the command line into a function that scores a path; higher is better.

    Args:
        text: A shell command with `{}` where the path belongs, whose last line of output is the score. Or the
            dotted name of a Python function that takes a `Path`.

    Returns:
        The function. It raises ValueError if the command fails, or the score is no finite number.

    Raises:
        ValueError: If the text is neither.

    Example:
        >>> read_scorer("echo loading; echo -0.5 # {}")(Path("some/folder"))
        -0.5
    """
    if PLACE not in text:
        return _named(text)

    def score(path: Path) -> float:
        command = text.replace(PLACE, shlex.quote(str(path)))
        done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise ValueError(f"command {command!r} failed with exit code {done.returncode}")
        *_, last = ["", *filter(None, map(str.strip, done.stdout.splitlines()))]
        return _checked(f"the last line that command {command!r} wrote", last)

    return score


def _named(text: str) -> Callable[[Path], float]:
    module, _, name = text.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"score is {text!r}: neither a command with {PLACE} in it nor a function's dotted name ({error})"
        ) from error
    return lambda path: _checked(f"what {text} returned for {path}", function(path))


def _checked(what: str, value: object) -> float:
    try:
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{what} is {value!r}, but a score is a finite number")
    return score
