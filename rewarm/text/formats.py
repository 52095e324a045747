"""Reads the files that users already have, and says which row is wrong."""

import csv
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
import torch

Row = dict[str, Any]
Messages = list[dict[str, Any]]

_KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
PROMPT_COLUMNS = ("prompt", "question", "messages")


class Rows:
    r"""Rows of a data set that know where they come from.

    Args:
        path: A `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.txt` file, a list of such files, a folder
            written by `datasets.Dataset.save_to_disk`, or a Hub id. All cells of `.csv` and `.tsv` are text,
            empty ones are absent.
        split: Name of the split of a saved or Hub data set.
        sample_by: What one row of a `.txt` file is.

    Raises:
        ValueError: If the path is missing, of an unknown kind, empty, or cannot be parsed; the error
            names the file, and the line of JSON lines.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.csv")
        ...     _ = file.write_text("prompt,answer\n1+1=,2\n2+1=,3\n")
        ...     rows = Rows(file)
        >>> rows.columns, len(rows), next(iter(rows))
        (['prompt', 'answer'], 2, {'prompt': '1+1=', 'answer': '2'})
    """

    def __init__(
        self,
        path: str | Path | list[str],
        split: str = "train",
        sample_by: Literal["line", "paragraph", "document"] = "line",
    ) -> None:
        self.path, self._split, self._sample_by = path, split, sample_by
        self.data = _load(path, split, sample_by)
        if len(self.data) == 0:
            raise ValueError(f"{path}: the data set is empty")

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.data.column_names)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.data)

    def __iter__(self) -> Iterator[Row]:
        """Go through the rows in order; absent values are left out."""
        for row in self.data:
            yield _without_absent(row)

    def values(self, column: str) -> list[Any]:
        """Return the values of a column in the order of the rows; None where there is none."""
        return list(self.data.select_columns([column])[:][column])

    def where(self, number: int) -> str:
        """Name a row for an error message: its file, and the line where there are lines."""
        path = self.path
        if isinstance(self.path, list):
            for path in self.path:
                count = len(_load(path, self._split, self._sample_by))
                if number < count:
                    break
                number -= count
        line = _line_of(str(path), number)
        return f"{path}, row {number}" if line is None else f"{path}, line {line}"

    def bad(self, number: int, column: str, problem: str) -> ValueError:
        """Return the error for a wrong value."""
        return ValueError(f"{self.where(number)}, column {column!r}: {problem}")


def _load(path: str | Path | list[str], split: str, sample_by: str) -> datasets.Dataset:
    files = [str(p) for p in path] if isinstance(path, list) else [str(path)]
    suffixes = {Path(f).suffix for f in files}
    if suffixes <= _KINDS.keys():
        for name in files:
            if not Path(name).is_file():
                raise ValueError(f"{name}: no such file")
        kinds = {_KINDS[suffix] for suffix in suffixes}
        if len(kinds) > 1:
            raise ValueError(f"{files}: files of one data set must be of one kind")
        kind = kinds.pop()
        if kind == "csv":
            return _read_tables(files)
        options: dict[str, Any] = {"sample_by": sample_by} if kind == "text" else {}
        try:
            return datasets.load_dataset(kind, data_files=files, split="train", **options)
        except Exception as error:
            if kind == "json":
                _check_json(files)
            if all(not Path(name).read_bytes().strip() for name in files):
                raise ValueError(f"{path}: the file is empty") from error
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{path}: cannot be read as {kind}: {reason}") from error
    if len(files) > 1:
        raise ValueError(f"{files}: known kinds of files are {', '.join(_KINDS)}")
    folder = Path(files[0])
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"{folder}: no split {split!r}; it has {', '.join(saved)}")
            return saved[split]
        return saved
    if folder.is_file():
        raise ValueError(f"{folder}: known kinds of files are {', '.join(_KINDS)}")
    if not folder.exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", files[0]):
        raise ValueError(f"{folder}: no such file or data set folder")
    try:
        return datasets.load_dataset(files[0], split=split)
    except Exception as error:
        reason = " ".join(str(error).split())
        if folder.exists():
            raise ValueError(f"{folder}: the folder holds no data set that can be read ({reason})") from error
        raise ValueError(
            f"{folder}: no such file or folder, and not on the Hub or no network ({reason})"
        ) from error


def _read_tables(files: list[str]) -> datasets.Dataset:
    """Read CSV files as text: guessing types would turn an answer 007 into 7 and the word NA into nothing."""
    columns: dict[str, list[str | None]] = {}
    for name in files:
        header: list[str] = []
        for line, cells in _table_rows(name):
            if not header:
                header = cells
                if len(set(header)) < len(header) or (columns and set(columns) != set(header)):
                    raise ValueError(
                        f"{name}: the columns {', '.join(header)} repeat, or differ from the files before"
                    )
                columns = columns or {column: [] for column in header}
            elif len(cells) != len(header):
                raise ValueError(
                    f"{name}, line {line}: {len(cells)} cells, but the header names {len(header)} columns"
                )
            else:
                for column, cell in zip(header, cells, strict=True):
                    columns[column].append(cell or None)
        if not header:
            raise ValueError(f"{name}: the file is empty")
    return datasets.Dataset.from_dict(columns)


def _table_rows(name: str) -> Iterator[tuple[int, list[str]]]:
    """Go through the rows of a CSV file, the header too, each with the line that it begins in."""
    limit, line = csv.field_size_limit(2**31 - 1), 1
    try:
        with open(name, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if name.endswith(".tsv") else ",", strict=True)
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
    except (csv.Error, UnicodeError) as error:
        raise ValueError(f"{name}, line {line}: cannot be read as csv: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _line_of(name: str, number: int) -> int | None:
    """Return the line in which a row of a file begins, None where rows are not lines."""
    suffix = Path(name).suffix
    if suffix == ".jsonl":
        with open(name, encoding="utf-8") as file:
            lines = (line for line, text in enumerate(file, 1) if text.strip())
            return next(itertools.islice(lines, number, None))
    if suffix in (".csv", ".tsv"):
        return next(itertools.islice(_table_rows(name), number + 1, None))[0]
    return None


def _without_absent(value: Any) -> Any:
    """Leave out what is None in objects at any depth: `datasets` gives every row the fields of all rows."""
    if isinstance(value, Mapping):
        return {name: _without_absent(part) for name, part in value.items() if part is not None}
    return [_without_absent(part) for part in value] if isinstance(value, list) else value


def _check_json(files: list[str]) -> None:
    for name in files:
        if Path(name).suffix == ".json":
            try:
                json.loads(Path(name).read_text(encoding="utf-8"))
                continue
            except json.JSONDecodeError as error:
                if error.msg != "Extra data":  # JSON lines, which a .json file may hold too
                    where = f"{name}, line {error.lineno}, column {error.colno}"
                    raise ValueError(f"{where}: not JSON ({error.msg})") from None
        with open(name, encoding="utf-8") as lines:
            kinds: dict[str, tuple[str, int]] = {}
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{name}, line {number}, column {error.colno}: not JSON ({error.msg})"
                    ) from None
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{name}, line {number}: a row must be a JSON object, not {type(row).__name__}"
                    )
                for column, value in row.items():
                    if value is None:
                        continue
                    kind, first = kinds.setdefault(column, (type(value).__name__, number))
                    if kind != type(value).__name__ and {kind, type(value).__name__} != {"int", "float"}:
                        raise ValueError(
                            f"{name}, line {number}, column {column!r}: {type(value).__name__},"
                            f" but line {first} has {kind}"
                        )


def text_of(rows: Rows, number: int, row: Row, column: str) -> str:
    r"""Return the text in a column of a row.

    Args:
        rows: The rows, which know their file and their lines.
        number: Number of the row.
        row: The row itself.
        column: Name of the column.

    Raises:
        ValueError: If the value is of another kind; the error names file, line and column.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.csv")
        ...     _ = file.write_text("prompt,level\n1+1=,2\n")
        ...     rows = Rows(file)
        >>> text_of(rows, 0, rows.data[0], "prompt")
        '1+1='
    """
    value = row.get(column)
    if not isinstance(value, str):
        found = "missing" if value is None else type(value).__name__
        raise rows.bad(number, column, f"must be text, is {found}; the columns are {', '.join(rows.columns)}")
    return value


def number_of(rows: Rows, number: int, row: Row, column: str) -> float:
    r"""Return the number in a column of a row, which may be written as text, as in the cells of a table.

    Args:
        rows: The rows, which know their file and their lines.
        number: Number of the row.
        row: The row itself.
        column: Name of the column.

    Raises:
        ValueError: If the value is of another kind; the error names file, line and column.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.csv")
        ...     _ = file.write_text("prompt,level\n1+1=,2\n")
        ...     rows = Rows(file)
        >>> number_of(rows, 0, rows.data[0], "level")
        2.0
    """
    value = row.get(column)
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return float(value)
    except ValueError:
        found = "missing" if value is None else repr(value)
        problem = f"must be a number, is {found}; the columns are {', '.join(rows.columns)}"
        raise rows.bad(number, column, problem) from None


def label_of(rows: Rows, number: int, row: Row, column: str) -> str | int | float | bool:
    r"""Return the label in a column of a row: text, a number, or true or false.

    Args:
        rows: The rows, which know their file and their lines.
        number: Number of the row.
        row: The row itself.
        column: Name of the column.

    Raises:
        ValueError: If the value is of another kind; the error names file, line and column.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.csv")
        ...     _ = file.write_text("prompt,subject\n1+1=,sums\n")
        ...     rows = Rows(file)
        >>> label_of(rows, 0, rows.data[0], "subject")
        'sums'
    """
    value = row.get(column)
    if not isinstance(value, str | int | float | bool):
        found = "missing" if value is None else type(value).__name__
        problem = f"must be a label, is {found}; the columns are {', '.join(rows.columns)}"
        raise rows.bad(number, column, problem)
    return value


def messages_of(rows: Rows, number: int, row: Row, column: str) -> Messages:
    """Return the messages in a column of a row, in the style of OpenAI.

    Args:
        rows: The rows, which know their file and their lines.
        number: Number of the row.
        row: The row itself.
        column: Name of the column.

    Raises:
        ValueError: If the value is of another kind; the error names file, line and column.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.jsonl")
        ...     _ = file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
        ...     rows = Rows(file)
        >>> messages_of(rows, 0, rows.data[0], "messages")
        [{'role': 'user', 'content': 'Hi'}]
    """
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise rows.bad(number, column, "must be a list of messages with `role` and `content`")
    for message in value:
        has_role = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not has_role or not (isinstance(message.get("content"), str | list) or "tool_calls" in message):
            raise rows.bad(
                number, column, f"a message must have `role` and `content`, this is {message!r:.80}"
            )
    return value


def segments_of(rows: Rows, number: int, row: Row, column: str = "segments") -> list[tuple[str, float]]:
    """Return the pieces of text in a column of a row, each with whether it is learnt, or with its weight.

    A piece is `{"text": ..., "learn": true, false or a weight}`, or a list of the two.

    Args:
        rows: The rows, which know their file and their lines.
        number: Number of the row.
        row: The row itself.
        column: Name of the column.

    Raises:
        ValueError: If the value is of another kind; the error names file, line and column.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.jsonl")
        ...     _ = file.write_text('{"segments": [{"text": "1+1=", "learn": false}, ["2", true]]}')
        ...     rows = Rows(file)
        >>> segments_of(rows, 0, rows.data[0])
        [('1+1=', 0.0), ('2', 1.0)]
    """
    pieces: Any = row.get(column)
    segments: list[tuple[str, float]] = []
    if not isinstance(pieces, list) or not pieces:
        raise rows.bad(number, column, "must be a list of pieces with `text` and `learn`")
    for piece in pieces:
        pair: Any = (piece.get("text"), piece.get("learn")) if isinstance(piece, Mapping) else piece
        known = isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
        if not known or not isinstance(pair[1], bool | int | float):
            raise rows.bad(number, column, f"a piece must have `text` and `learn`, this is {piece!r:.80}")
        segments.append((pair[0], float(pair[1])))
    return segments


def numbers_of(rows: Rows, number: int, row: Row, column: str, length: int) -> torch.Tensor:
    """Return the list in a column of a row: a number, or as many numbers each, for every learnt token.

    Args:
        rows: The rows, which know their file and their lines.
        number: Number of the row.
        row: The row itself.
        column: Name of the column.
        length: Number of learnt tokens, N.

    Returns:
        The numbers, float64. Shape (N,), or (N, K) for K numbers each.

    Raises:
        ValueError: If the value is of another kind; the error names file, line and column.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.jsonl")
        ...     _ = file.write_text('{"weights": [0.5, 1.0]}')
        ...     rows = Rows(file)
        >>> numbers_of(rows, 0, rows.data[0], "weights", length=2).tolist()
        [0.5, 1.0]
    """
    value = row.get(column)
    try:
        numbers = torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0)
    if len(numbers) != length or not isinstance(value, list):
        found = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
        raise rows.bad(
            number, column, f"must have numbers for each of the {length} learnt tokens, is {found}"
        )
    return numbers


def template_arguments(rows: Rows, number: int, row: Row) -> dict[str, Any]:
    """Return what a row gives the chat template: `tools`, and all in `chat_template_kwargs`.

    Raises:
        ValueError: If the value is of another kind; the error names file, line and column.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.jsonl")
        ...     _ = file.write_text('{"prompt": "Hi", "chat_template_kwargs": {"style": "short"}}')
        ...     rows = Rows(file)
        >>> template_arguments(rows, 0, rows.data[0])
        {'style': 'short'}
    """
    arguments = row.get("chat_template_kwargs", {})
    if not isinstance(arguments, Mapping):
        raise rows.bad(number, "chat_template_kwargs", f"must be an object, is {type(arguments).__name__}")
    return {name: row[name] for name in ("tools",) if name in row} | dict(arguments)


def _sharegpt(rows: Rows, number: int, row: Row) -> Messages:
    turns, messages = row.get("conversations"), []
    if not isinstance(turns, list) or not turns:
        raise rows.bad(number, "conversations", "must be a list of turns with `from` and `value`")
    for turn in turns:
        role = _SHAREGPT_ROLES.get(str(turn.get("from"))) if isinstance(turn, Mapping) else None
        if role is None or not isinstance(turn.get("value"), str):
            known = ", ".join(_SHAREGPT_ROLES)
            raise rows.bad(
                number,
                "conversations",
                f"a turn needs `value` and `from` out of {known}, this is {turn!r:.80}",
            )
        messages.append({"role": role, "content": turn["value"]})
    return messages


def as_conversation(rows: Rows, number: int, row: Row) -> Messages | tuple[str | Messages, str | Messages]:
    r"""Bring a row of training data into one of two forms.

    Known columns: `messages`; ShareGPT `conversations`; `prompt` and `completion`, each text or messages;
    Alpaca `instruction`, `input`, `output`; `question` and `answer`; `text`.

    Returns:
        The messages of a whole conversation, or a pair of prompt and completion.

    Raises:
        ValueError: If the value is of another kind; the error names file, line and column.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.csv")
        ...     _ = file.write_text("question,answer\n1+1?,2\n")
        ...     rows = Rows(file)
        >>> as_conversation(rows, 0, rows.data[0])
        ('1+1?\n', '2')
    """
    if "messages" in rows.columns:
        return messages_of(rows, number, row, "messages")
    if "conversations" in rows.columns:
        return _sharegpt(rows, number, row)
    if "prompt" in rows.columns and "completion" in rows.columns:
        if isinstance(row.get("prompt"), list):
            return messages_of(rows, number, row, "prompt"), messages_of(rows, number, row, "completion")
        return text_of(rows, number, row, "prompt"), text_of(rows, number, row, "completion")
    if "instruction" in rows.columns:
        extra = row.get("input") or ""
        prompt = text_of(rows, number, row, "instruction") + (f"\n{extra}" if extra else "")
        return f"{prompt}\n", text_of(rows, number, row, "output")
    if "question" in rows.columns and "answer" in rows.columns:
        return text_of(rows, number, row, "question") + "\n", text_of(rows, number, row, "answer")
    if "text" in rows.columns:
        return "", text_of(rows, number, row, "text")
    raise ValueError(
        f"{rows.path}: cannot train on the columns {', '.join(rows.columns)}; known are messages;"
        " conversations; prompt and completion; instruction, input and output; question and answer; text"
    )


def as_prompt(rows: Rows, number: int, row: Row) -> str | Messages:
    r"""Return the prompt of a row: text or messages from `prompt`, `messages` or `question`.

    Raises:
        ValueError: If the data has none of them, or the assistant has the last word.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.csv")
        ...     _ = file.write_text("prompt,answer\n1+1=,2\n")
        ...     rows = Rows(file)
        >>> as_prompt(rows, 0, rows.data[0])
        '1+1='
    """
    column = "prompt" if "prompt" in rows.columns else "messages"
    if isinstance(row.get("prompt"), list) or (column == "messages" and column in rows.columns):
        messages = messages_of(rows, number, row, column)
        if messages[-1]["role"] == "assistant":
            raise rows.bad(
                number, column, "the last message is the assistant's, so there is nothing to answer"
            )
        return messages
    if "prompt" in rows.columns:
        return text_of(rows, number, row, "prompt")
    if "question" in rows.columns:
        return text_of(rows, number, row, "question") + "\n"
    raise ValueError(
        f"{rows.path}: no prompt among the columns {', '.join(rows.columns)}; known are"
        " prompt, messages, question"
    )


Pair = tuple[str | Messages, str | Messages, str | Messages]


def as_pair(rows: Rows, number: int, row: Row) -> Pair | None:
    r"""Return prompt, chosen and rejected of a row.

    An implicit prompt is what the two share: their first messages, or the first words of their text. Of
    `responses` with `rewards` the best and the worst make the pair. A `prefix`, the steps that both have in
    common, belongs to the prompt.

    Returns:
        The pair; None if all responses have the same reward, so that none is preferred.

    Raises:
        ValueError: If the value is of another kind; the error names file, line and column.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.csv")
        ...     _ = file.write_text("prompt,chosen,rejected\n1+1=,2,3\n")
        ...     rows = Rows(file)
        >>> as_pair(rows, 0, rows.data[0])
        ('1+1=', '2', '3')
    """
    if "responses" in rows.columns:
        return _best_and_worst(rows, number, row)
    for column in ("chosen", "rejected"):
        if column not in rows.columns:
            raise ValueError(f"{rows.path}: no column {column!r} among {', '.join(rows.columns)}")
        if column not in row:
            raise rows.bad(number, column, "is missing")
    if isinstance(row.get("chosen"), list):
        chosen, rejected = (messages_of(rows, number, row, column) for column in ("chosen", "rejected"))
        if "prompt" in rows.columns:
            prompt = row.get("prompt")
            as_messages = messages_of(rows, number, row, "prompt") if isinstance(prompt, list) else None
            return (
                as_messages or [{"role": "user", "content": text_of(rows, number, row, "prompt")}],
                chosen,
                rejected,
            )
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if shared == 0 or shared == len(chosen) or shared == len(rejected):
            raise rows.bad(
                number,
                "chosen",
                "without a prompt, chosen and rejected must share their first messages and then differ",
            )
        return chosen[:shared], chosen[shared:], rejected[shared:]
    better, worse = (text_of(rows, number, row, column) for column in ("chosen", "rejected"))
    if "prompt" in rows.columns:
        prefix = text_of(rows, number, row, "prefix") if "prefix" in rows.columns else ""
        return text_of(rows, number, row, "prompt") + prefix, better, worse
    pairs = enumerate(itertools.zip_longest(better, worse))
    shared = next((place for place, (ours, theirs) in pairs if ours != theirs), 0)
    while shared and not better[shared - 1].isspace():
        shared -= 1
    if shared in (0, len(better), len(worse)):
        raise rows.bad(
            number,
            "chosen",
            "without a prompt, chosen and rejected must share their first words and then differ",
        )
    return better[:shared], better[shared:], worse[shared:]


def responses_of(rows: Rows, number: int, row: Row) -> tuple[list[str], list[float]]:
    """Return the columns `responses` and `rewards`: texts, and a number for each.

    Raises:
        ValueError: If the value is of another kind; the error names file, line and column.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "data.jsonl")
        ...     _ = file.write_text('{"responses": ["2", "3"], "rewards": [1, 0]}')
        ...     rows = Rows(file)
        >>> responses_of(rows, 0, rows.data[0])
        (['2', '3'], [1.0, 0.0])
    """
    responses, rewards = row.get("responses"), row.get("rewards")
    if not isinstance(responses, list) or not isinstance(rewards, list) or len(responses) != len(rewards):
        raise rows.bad(number, "responses", "needs `responses` and `rewards`, lists of equal length")
    if not all(isinstance(response, str) for response in responses):
        raise rows.bad(number, "responses", "must be texts")
    if not all(isinstance(reward, int | float) and math.isfinite(reward) for reward in rewards):
        raise rows.bad(number, "rewards", "must be finite numbers")
    return responses, [float(reward) for reward in rewards]


def _best_and_worst(rows: Rows, number: int, row: Row) -> Pair | None:
    responses, rewards = responses_of(rows, number, row)
    if not rewards or max(rewards) == min(rewards):
        return None
    best, worst = (responses[rewards.index(pick(rewards))] for pick in (max, min))
    return text_of(rows, number, row, "prompt"), best, worst
