"""Reward functions that check a completion against a reference answer, and the one way they are called.

A reward function is any callable `reward(prompts, completions, **columns) -> list[float]`: strings in, one
number per completion out. `columns` holds the other columns of the data, one value per completion.
"""

import atexit
import json
import logging
import math
import pickle
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from numbers import Real
from typing import Any

from rewarm.rollouts.sandbox import Sandbox, SandboxError

log = logging.getLogger(__name__)

Reward = Callable[..., Sequence[float]]
TIMEOUT_SECONDS = 5.0
"""Processor time that a completion may take in a sandbox."""

LONGEST_NUMBER = 10_000
"""Characters of the longest number that is compared; what is longer equals nothing."""

_MATH = "rewarm.rollouts.math_scores.make_math_score"
_PUZZLES = "rewarm.rollouts.puzzle_scores.make_puzzle_score"

_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w.)\]}]) [-+\u2212] )?      # not after a word, a number or a bracket: "7-3" holds 7 and 3
    (?: \\?\$ (?P<inner>-)? )?
    (?P<top>
        (?: (?: \d{1,3}(?:,\d{3})+(?!\d) | \d+ ) (?:\.\d+)? | \.\d+ )
        (?: [eE][-+]?\d{1,3}(?!\d) )?           # bounded: 1e999999999 would fill the memory
    )
    (?: / (?P<bottom>\d+) )?
    """,
    re.VERBOSE,
)


class RewardError(ValueError):
    """A reward function failed or returned something that is not a finite number for each completion."""


def exact_number(
    prompts: Sequence[str],
    completions: Sequence[str],
    answer: Sequence[Any] | None = None,
    **columns: Sequence[Any],
) -> list[float]:
    """1 where the last number of the completion equals the reference as a number, else 0.

    Numbers may have thousands commas, a sign, $, %, decimals, an exponent of ten, or be fractions like 3/4.
    $ and % do not count: 50% equals 50. The comparison is exact, without rounding. A number of more than 10
    000 characters equals nothing.

    Args:
        prompts: Not read. Length N.
        completions: Texts to judge. Length N.
        answer: Reference numbers, as numbers or as text that holds one number and nothing else. Length N.
        columns: Not read.

    Returns:
        1.0 or 0.0 per completion. Length N.

    Raises:
        ValueError: If a reference is missing or not a number.

    Example:
        >>> exact_number(["6 * 7?"] * 3, ["It is 42.", "It is 42, not 41", "none"], answer=["42", 42, "42.0"])
        [1.0, 0.0, 0.0]

    Source: none (ours).   Differs: nothing.
    """
    references = [_reference_number(value) for value in _required("answer", answer)]
    return [float(_last_number(text) == value) for text, value in zip(completions, references, strict=True)]


def gsm8k(
    prompts: Sequence[str],
    completions: Sequence[str],
    answer: Sequence[Any] | None = None,
    **columns: Sequence[Any],
) -> list[float]:
    r"""1 where the number right after the last `####` of the completion equals the reference, else 0.

    Args:
        prompts: Not read. Length N.
        completions: Texts to judge; one without `####` followed by a number gets 0. Length N.
        answer: Numbers, or whole GSM8K solutions that end in `#### number`. Length N.
        columns: Not read.

    Returns:
        1.0 or 0.0 per completion. Length N.

    Raises:
        ValueError: If a reference is missing or holds no number.

    Example:
        >>> gsm8k(["?"] * 2, ["48 + 24 = 72\n#### 72", "It is 72"], answer=["The sum is 72\n#### 72", "72"])
        [1.0, 0.0]

    Source: Cobbe et al. 2021, arXiv:2110.14168 (the data and its `####`).
    Differs: Numbers are compared as in `exact_number`, not as text.
    """
    references = [
        _reference_number(str(value).rpartition("####")[2]) for value in _required("answer", answer)
    ]
    return [float(_marked_number(text) == value) for text, value in zip(completions, references, strict=True)]


def math_verify(
    prompts: Sequence[str],
    completions: Sequence[str],
    answer: Sequence[Any] | None = None,
    **columns: Sequence[Any],
) -> list[float]:
    r"""1 where the completion's final expression is mathematically equal to the reference, else 0.

    Extraction and comparison are those of the `math-verify` package, which looks at the last 100 000
    characters. They run in a `Sandbox`: a completion that takes more than 5 seconds or 1 GiB gets 0.

    Args:
        prompts: Not read. Length N.
        completions: Texts to judge: LaTeX in $...$ or \boxed{...}, or plain numbers. Length N.
        answer: References in LaTeX, bare or in $...$ or \boxed{...}. Length N.
        columns: Not read.

    Returns:
        1.0 or 0.0 per completion. Length N.

    Raises:
        ImportError: If `math-verify` is not installed.
        SandboxError: If this system cannot confine a process.
        ValueError: If a reference is missing or cannot be parsed.

    Example:
        >>> math_verify(["?"] * 2, ["so $x = \\frac{2}{4}$", "so $0.4$"], answer=["\\frac{1}{2}", "0.5"])
        [1.0, 0.0]

    Source: none; the package's own rules, https://github.com/huggingface/Math-Verify.   Differs: nothing.
    """
    _need("math_verify", "math")
    references = [str(value) for value in _required("answer", answer)]
    scores, unusable = _sandboxed(_MATH, list(zip(completions, references, strict=True)))
    for row in unusable:
        raise ValueError(
            f"column 'answer' holds {references[row]!r}, must be an expression that math-verify can parse"
        )
    return scores


def reasoning_gym(
    prompts: Sequence[str],
    completions: Sequence[str],
    dataset: Sequence[str] | None = None,
    entry: Sequence[Mapping[str, Any] | str] | None = None,
    **columns: Sequence[Any],
) -> list[float]:
    """Score of the completion's answer by the reasoning-gym data set that made the puzzle.

    The answer is the text of the last `<answer>...</answer>`, or the whole completion where there is none. It
    is scored in a `Sandbox`: one that takes more than 5 seconds or 1 GiB, or that the data set fails on, gets
    0.

    Args:
        prompts: Not read. Length N.
        completions: Texts to judge. Length N.
        dataset: Names of reasoning-gym data sets, such as "chain_sum". Length N.
        entry: Puzzles as the data set made them (question, answer, metadata), or their JSON. Length N.
        columns: Not read.

    Returns:
        Score per completion, in [0, 1]; most data sets give partial credit. Length N.

    Raises:
        ImportError: If `reasoning-gym` is not installed.
        SandboxError: If this system cannot confine a process.
        ValueError: If a column is missing, a data set is unknown, or it cannot score a puzzle's own answer.

    Example:
        >>> puzzle = {"question": "1 + 2 =", "answer": "3", "metadata": {}}
        >>> reasoning_gym(["1 + 2 ="] * 2, ["So <answer>3</answer>", "4"], ["chain_sum"] * 2, [puzzle] * 2)
        [1.0, 0.0]

    Source: Stojanovski et al. 2025, arXiv:2505.24760.
    Differs: Nine data sets evaluate answers as Python; here these may hold literals, arithmetic and
        mathematical functions alone.
    """
    names, entries = _required("dataset", dataset), _required("entry", entry)
    _need("reasoning_gym", "puzzles")
    puzzles = [json.loads(puzzle) if isinstance(puzzle, str) else puzzle for puzzle in entries]
    answers = [_tagged(text).strip() for text in completions]
    scores, unusable = _sandboxed(_PUZZLES, list(zip(answers, names, puzzles, strict=True)))
    for row, problem in unusable.items():
        name, puzzle = names[row], _short(entries[row])
        kind, _, known = problem.partition(": ")
        if kind == "LookupError":
            raise ValueError(f"column 'dataset' holds {name!r}, must be one of {known}")
        raise ValueError(f"column 'entry' holds {puzzle}, must be a puzzle that {name} can score: {problem}")
    return scores


def score(
    rewards: Reward | Sequence[Reward],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    weights: Sequence[float] | None = None,
) -> list[float]:
    """Call reward functions on a batch and check what they return.

    score_i = sum over functions f of weight_f * f_i

    Args:
        rewards: One reward function, or several.
        prompts: Prompts as text. Length N.
        completions: Completions as text. Length N.
        columns: Further columns of the data, by name, passed on as keyword arguments. Each of length N.
        weights: Finite weight of each function; None weighs each by 1.

    Returns:
        Score per completion, finite. Length N.

    Raises:
        RewardError: If a function raises or does not return one finite number per completion. The message
            shows the function and the first row that it fails on; the function's own exception is its cause.
        ImportError: If a function needs a package that is not installed.
        SandboxError: If a function needs to confine a process, and this system cannot.
        ValueError: If lengths do not match or a weight is not finite.

    Example:
        >>> def short(prompts, completions, **columns):
        ...     return [float(len(text) < 9) for text in completions]
        >>> score([exact_number, short], ["2 + 2?"] * 2, ["4", "2 + 2 = 4"], {"answer": [4, 4]}, [1.0, 0.5])
        [1.5, 1.0]

    Source: none (ours).   Differs: nothing.
    """
    functions = [rewards] if callable(rewards) else list(rewards)
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if not functions:
        raise ValueError("rewards=[], must be at least one reward function")
    if len(weights) != len(functions) or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"weights={weights}, must be {len(functions)} finite numbers, one per reward function"
        )
    for name, values in {"completions": completions, **columns}.items():
        if len(values) != len(prompts):
            raise ValueError(f"{name} has {len(values)} rows, must have {len(prompts)}, one per prompt")
    parts = [_checked(function, prompts, completions, columns) for function in functions]
    return [sum(w * value for w, value in zip(weights, row, strict=True)) for row in zip(*parts, strict=True)]


def _checked(
    function: Reward, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> list[float]:
    name = getattr(function, "__name__", type(function).__name__)

    def failure(row: int, problem: str) -> RewardError:
        answer = columns["answer"][row] if "answer" in columns else None
        shown = (
            f"prompt {_short(prompts[row])}, completion {_short(completions[row])}, answer {_short(answer)}"
        )
        return RewardError(f"reward {name} failed on row {row} ({shown}): {problem}")

    try:
        values = list(function(prompts=prompts, completions=completions, **columns))
    except (ImportError, SandboxError):
        raise
    except Exception as error:
        row = _failing_row(function, error, prompts, completions, columns)
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if row is None:
            raise RewardError(f"reward {name} failed on the {len(prompts)} rows: {problem}") from error
        raise failure(row, problem) from error
    if len(values) != len(prompts):
        raise RewardError(f"reward {name} returned {len(values)} values for {len(prompts)} completions")
    values = [value.item() if hasattr(value, "item") else value for value in values]
    for row, value in enumerate(values):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise failure(row, f"it returned {value!r}, must be a finite number")
    return [float(value) for value in values]


def _failing_row(
    function: Reward,
    error: Exception,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> int | None:
    """First row that raises the same error on its own: the exception does not say where it happened."""
    for row in range(len(prompts)):
        alone = {name: [values[row]] for name, values in columns.items()}
        try:
            function(prompts=[prompts[row]], completions=[completions[row]], **alone)
        except Exception as again:
            if type(again) is type(error):
                return row
    return None


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def _required(column: str, values: Sequence[Any] | None) -> Sequence[Any]:
    if values is None:
        raise ValueError(f"column {column!r} is missing, this reward needs it in the data")
    if any(value is None for value in values):
        row = next(row for row, value in enumerate(values) if value is None)
        raise ValueError(f"column {column!r} is None in row {row}, must hold the reference")
    return values


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > LONGEST_NUMBER:
        return None
    sign = -1 if (match["sign"] in ("-", "\u2212")) != (match["inner"] == "-") else 1
    bottom = int(Decimal(match["bottom"] or "1"))
    return sign * Fraction(Decimal(match["top"].replace(",", ""))) / bottom if bottom else None


def _last_number(text: str) -> Fraction | None:
    last = deque(_NUMBER.finditer(text), maxlen=1)
    return _value(last[0]) if last else None


def _marked_number(text: str) -> Fraction | None:
    _, marker, tail = text.rpartition("####")
    match = _NUMBER.match(tail.lstrip())
    return _value(match) if marker and match else None


def _reference_number(reference: Any) -> Fraction:
    text = str(reference).strip().removesuffix(".").removesuffix("$").removesuffix("%").removesuffix("\\")
    match = _NUMBER.fullmatch(text)
    value = _value(match) if match else None
    if value is None:
        raise ValueError(f"column 'answer' holds {_short(reference)}, must be a number")
    return value


def _tagged(text: str) -> str:
    """Return what is in the last pair of answer tags, or all of it if there is none; in linear time."""
    begins, place = "<answer>", 0
    found = text
    while (opened := text.find(begins, place)) >= 0:
        closed = text.find("</answer>", opened + len(begins))
        if closed < 0:
            break
        found, place = text[opened + len(begins) : closed], closed + len("</answer>")
    return found


def _need(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f"the reward {package} needs `pip install rewarm[{extra}]`")


@lru_cache
def _sandbox(make: str) -> Sandbox:
    sandbox = Sandbox(make)
    atexit.register(sandbox.close)
    return sandbox


def _sandboxed(make: str, items: Sequence[tuple[Any, ...]]) -> tuple[list[float], dict[int, str]]:
    """Score items in the sandbox, each a completion followed by its reference.

    Returns:
        The scores, 0 where there is none; and the first row of each reference that is itself unusable, with
        why.
    """
    sandbox = _sandbox(make)
    outcomes = sandbox.map(items, TIMEOUT_SECONDS)
    # Either the completion or its reference is at fault: the reference alone tells.
    suspects = {
        pickle.dumps(items[row][1:]): row for row in reversed(range(len(items))) if outcomes[row].problem
    }
    checks = sandbox.map([(None, *items[row][1:]) for row in suspects.values()], TIMEOUT_SECONDS)
    unusable = {
        row: check.problem for row, check in zip(suspects.values(), checks, strict=True) if check.problem
    }
    if given_up := [outcome.problem for outcome in outcomes if outcome.problem in ("time", "memory", "died")]:
        counts = ", ".join(f"{given_up.count(kind)} for {kind}" for kind in dict.fromkeys(given_up))
        log.warning("%d of %d completions were given up and score 0 (%s)", len(given_up), len(items), counts)
    values = [outcome.value for outcome in outcomes]
    return [float(v) if isinstance(v, Real) and math.isfinite(v) else 0.0 for v in values], unusable


def load_reward(name: str) -> Any:
    """Import a reward function by its dotted name.

    Raises:
        ValueError: If there is none of this name.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward is {name!r}, which cannot be imported: {error}") from error
