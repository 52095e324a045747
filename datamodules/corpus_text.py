"""Reads the documents of a corpus as a stream: one at a time, whatever its size."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow
import pyarrow.parquet

from rewarm.text.encoding import Encoder, Tokens
from rewarm.text.formats import Messages, Rows, as_conversation, template_arguments

SampleBy = Literal["line", "paragraph", "document"]

_SAMPLES, _SAMPLE = 16, 4096  # blocks, and bytes of each
_CHUNK = 1 << 20  # characters


def documents(path: str | list[str], sample_by: SampleBy, encoder: Encoder) -> Iterator[str | Tokens]:
    r"""Yield the documents of a source in order.

    `.jsonl`, `.parquet` and `.txt` files, folders of such files and data sets on the Hub are read as a
    stream. What `datasets.Dataset.save_to_disk` wrote is mapped into memory; `.json` and tables are read
    whole.

    Args:
        path: A file, a list of files, a folder, or a Hub id.
        sample_by: Unit of a `.txt` file that is one document.
        encoder: Encoder that tokenises instruction data.

    Yields:
        The column `text` of each row. Where there is no such column, rows are instruction data in any form
        that `InstructionData` takes, and are yielded as tokens of which the answers are learnt.

    Raises:
        ValueError: If a row is wrong or a file cannot be read; the message names the file, and line or row.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "notes.txt")
        >>> _ = path.write_text("One.\n\nTwo,\nstill two.")
        >>> list(documents(str(path), "paragraph", None))  # plain text needs no encoder
        ['One.', 'Two,\nstill two.']
    """
    for name in path if isinstance(path, list) else [path]:
        suffix = Path(name).suffix
        if suffix in (".jsonl", ".parquet", ".txt") and not Path(name).is_file():
            raise ValueError(f"{name}: no such file")
        if suffix == ".txt":
            yield from _paragraphs(name) if sample_by == "paragraph" else _lines(name, sample_by)
            continue
        rows = _rows(name)
        first = next(rows, None)
        if first is None:
            raise ValueError(f"{name}: the file is empty")
        if "text" not in first[1]:
            yield from _conversations(name, encoder)
            continue
        for where, row in itertools.chain([first], rows):
            text = row.get("text")
            if not isinstance(text, str):
                found = "missing" if text is None else type(text).__name__
                raise ValueError(
                    f"{name}, {where}, column 'text': must be text, is {found}; the columns are"
                    f" {', '.join(row)}"
                )
            yield text


def source_identity(path: str | list[str]) -> str:
    """Return what tells a source from others, without reading all of it.

    For each file that is its kind, its size, the time of its last change, and a hash of 16 blocks of 4 KiB
    that lie evenly in it, which are all of a file below 64 KiB. A Hub id stands for itself, so that a run
    needs no network once the data are there.

    Args:
        path: A file, a list of files, a folder, or a Hub id.

    Example:
        >>> source_identity("owner/name")
        '[["hub", "owner/name"]]'
    """
    found: list[Any] = []
    for name in path if isinstance(path, list) else [path]:
        place = Path(name)
        if not place.exists():
            found.append(["hub", name])
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.is_file():
                found.append([file.suffix, *_file_identity(file)])
    return json.dumps(found)


def _file_identity(file: Path) -> tuple[int, int, str]:
    status, digest = file.stat(), hashlib.blake2b(digest_size=16)
    with file.open("rb") as content:
        for number in range(_SAMPLES):
            content.seek(max(0, status.st_size - _SAMPLE) * number // (_SAMPLES - 1))
            digest.update(content.read(_SAMPLE))
    return status.st_size, status.st_mtime_ns, digest.hexdigest()


def _lines(name: str, sample_by: SampleBy) -> Iterator[str]:
    try:
        with open(name, encoding="utf-8") as file:
            if sample_by == "document":
                yield file.read()
            else:
                for line in file:
                    yield line.removesuffix("\n")
    except UnicodeError as error:
        raise ValueError(f"{name}: cannot be read as text: {error}") from error


def _paragraphs(name: str) -> Iterator[str]:
    """Split at empty lines; two line breaks in a row are one end, from the left."""
    rest = ""
    try:
        with open(name, encoding="utf-8") as file:
            while chunk := file.read(_CHUNK):
                *whole, rest = (rest + chunk).split("\n\n")
                yield from whole
    except UnicodeError as error:
        raise ValueError(f"{name}: cannot be read as text: {error}") from error
    yield rest


def _rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where a row is, and the row."""
    suffix, folder = Path(name).suffix, Path(name)
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    if suffix == ".jsonl":
        yield from _json_lines(name)
    elif suffix == ".parquet":
        yield from _parquet_rows(name)
    elif suffix not in (".json", ".csv", ".tsv") and not saved and (folder.is_dir() or _is_hub_id(name)):
        yield from _streamed_rows(name)
    else:
        rows = Rows(name)
        for number, row in enumerate(rows):
            yield (rows.where(number).removeprefix(f"{name}, ") if "text" not in row else ""), row


def _is_hub_id(name: str) -> bool:
    return not Path(name).exists() and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None


def _json_lines(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(name, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                where = f"{name}, line {number}, column {error.colno}"
                raise ValueError(f"{where}: not JSON ({error.msg})") from None
            except UnicodeError as error:
                raise ValueError(f"{name}, line {number}: not UTF-8 ({error})") from None
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise ValueError(f"{name}, line {number}: a row must be a JSON object, not {kind}")
            yield f"line {number}", row


def _parquet_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(name, pre_buffer=False) as file:
            columns = ["text"] if "text" in file.schema_arrow.names else None
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name}: cannot be read as parquet: {' '.join(str(error).split())}") from error


def _streamed_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = iter(datasets.load_dataset(name, split="train", streaming=True))
    except Exception as error:
        reason = " ".join(str(error).split())
        if Path(name).exists():
            raise ValueError(f"{name}: the folder holds no data set that can be read ({reason})") from error
        raise ValueError(
            f"{name}: no such file or folder, and not on the Hub or no network ({reason})"
        ) from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows))


def _conversations(name: str, encoder: Encoder) -> Iterator[Tokens]:
    rows = Rows(name)
    for number, row in enumerate(rows):
        found, template = as_conversation(rows, number, row), template_arguments(rows, number, row)
        try:
            yield _encode(encoder, found, template)
        except ValueError as error:
            raise ValueError(f"{rows.where(number)}: {error}") from error


def _encode(
    encoder: Encoder, found: Messages | tuple[str | Messages, str | Messages], template: dict[str, Any]
) -> Tokens:
    if isinstance(found, list):
        return encoder.conversation(found, **template)
    return encoder.pair(*found, **template)
