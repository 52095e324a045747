"""Reward functions that check a completion against a reference answer, and the one way they are called.

A reward function is any callable `reward(prompts, completions, **columns) -> list[float]`: strings in, one
number per completion out. `columns` holds the other columns of the data, one value per completion.
"""

import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from importlib import import_module
from numbers import Real
from typing import Any

Reward = Callable[..., Sequence[float]]
TIMEOUT_SECONDS = 5  # for one expression of math_verify, its own default

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
    $ and % do not count: 50% equals 50. The comparison is exact, without rounding.

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

    Extraction and comparison are those of the `math-verify` package. A completion that takes longer than 5
    seconds to parse or to compare gets 0. The limit needs a signal, which only the main thread may set: in
    other threads there is none.

    Args:
        prompts: Not read. Length N.
        completions: Texts to judge: LaTeX in $...$ or \boxed{...}, or plain numbers. Length N.
        answer: References in LaTeX, bare or in $...$ or \boxed{...}. Length N.
        columns: Not read.

    Returns:
        1.0 or 0.0 per completion. Length N.

    Raises:
        ImportError: If `math-verify` is not installed.
        ValueError: If a reference is missing or cannot be parsed.

    Example:
        >>> math_verify(["?"] * 2, ["so $x = \\frac{2}{4}$", "so $0.4$"], answer=["\\frac{1}{2}", "0.5"])
        [1.0, 0.0]

    Source: none; the package's own rules, https://github.com/huggingface/Math-Verify.   Differs: nothing.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("the reward math_verify needs `pip install rewarm[math]`") from error
    limit = TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None

    def equal(text: str, reference: str) -> bool:
        marked = "$" in reference or "\\boxed" in reference
        # Bare LaTeX is not recognised as mathematics.
        gold = parse(reference if marked else f"\\boxed{{{reference}}}", parsing_timeout=limit)
        if not gold:
            raise ValueError(
                f"column 'answer' holds {reference!r}, must be an expression that math-verify can parse"
            )
        return verify(gold, parse(text, parsing_timeout=limit), timeout_seconds=limit)

    references = [str(value) for value in _required("answer", answer)]
    return [float(equal(text, value)) for text, value in zip(completions, references, strict=True)]


def reasoning_gym(
    prompts: Sequence[str],
    completions: Sequence[str],
    dataset: Sequence[str] | None = None,
    entry: Sequence[Mapping[str, Any] | str] | None = None,
    **columns: Sequence[Any],
) -> list[float]:
    """Score of the completion's answer by the reasoning-gym data set that made the puzzle.

    The answer is the text of the last `<answer>...</answer>`, or the whole completion where there is none.

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
        ValueError: If a column is missing or a data set is unknown.

    Example:
        >>> puzzle = {"question": "1 + 2 =", "answer": "3", "metadata": {}}
        >>> reasoning_gym(["1 + 2 ="] * 2, ["So <answer>3</answer>", "4"], ["chain_sum"] * 2, [puzzle] * 2)
        [1.0, 0.0]

    Source: Stojanovski et al. 2025, arXiv:2505.24760.   Differs: nothing.
    """
    names, entries = _required("dataset", dataset), _required("entry", entry)
    scores = []
    for text, name, puzzle in zip(completions, names, entries, strict=True):
        tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        puzzle = json.loads(puzzle) if isinstance(puzzle, str) else puzzle
        scores.append(float(_scorer(name)((tagged[-1] if tagged else text).strip(), puzzle)))
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
    except ImportError:
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
    sign = -1 if (match["sign"] in ("-", "\u2212")) != (match["inner"] == "-") else 1
    bottom = int(Decimal(match["bottom"] or "1"))
    return sign * Fraction(Decimal(match["top"].replace(",", ""))) / bottom if bottom else None


def _last_number(text: str) -> Fraction | None:
    matches = list(_NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


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


@lru_cache
def _scorer(name: str) -> Callable[[str, Mapping[str, Any]], float]:
    try:
        from reasoning_gym.factory import DATASETS, get_score_answer_fn
    except ImportError as error:
        raise ImportError("the reward reasoning_gym needs `pip install rewarm[puzzles]`") from error
    if name not in DATASETS:
        raise ValueError(f"column 'dataset' holds {name!r}, must be one of {', '.join(sorted(DATASETS))}")
    return get_score_answer_fn(name)


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
