"""The data that `rewarm score` scores, and the file that keeps what is finished."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy
import torch
from torch import Tensor

from rewarm.checkpoints.placing import put_in_place
from rewarm.checks import one_of
from rewarm.datamodules.score_table import data_fingerprint, example_id
from rewarm.text.encoding import Encoder, Tokens
from rewarm.text.formats import (
    Messages,
    Row,
    Rows,
    as_conversation,
    as_pair,
    as_prompt,
    segments_of,
    template_arguments,
)

Part = Literal["completion", "prompt", "all"]
Conversation: TypeAlias = Messages | tuple[str | Messages, str | Messages]


class ScoredData:
    """A data set whose examples are scored; rows that repeat each other are one example.

    Rows with a prompt and its completion and conversations are read as `InstructionData` reads them; of a
    preference pair the chosen completion counts; prompts alone have an empty completion.

    Args:
        path: File or saved data set.

    Attributes:
        path: The path as given.
        rows: All rows.
        every_id: Ids of all rows.
        ids: Ids of the examples, in the order of their first rows.
        numbers: Numbers of these first rows.
        repeats: How many rows each example has.
        fingerprint: Fingerprint of the data set.
        digest: Hash of the ids in their order.

    Raises:
        ValueError: As `Rows` does.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "data.jsonl")
        >>> with path.open('w') as file:
        ...     _ = [print('{"prompt": "1+1=", "completion": "2"}', file=file) for _ in range(2)]
        >>> data = ScoredData(str(path))
        >>> len(data), data.repeats, list(data.texts("completion"))
        (1, [2], ['2'])
        >>> folder.cleanup()
    """

    def __init__(self, path: str) -> None:
        self.path, self.rows = path, Rows(path)
        self.every_id = [example_id(row) for row in self.rows]
        first: dict[str, int] = {}
        for number, one in enumerate(self.every_id):
            first.setdefault(one, number)
        self.ids, self.numbers = list(first), list(first.values())
        self.repeats = list(Counter(self.every_id).values())
        self.fingerprint = data_fingerprint(first)
        self.digest = hashlib.blake2b("\n".join(self.ids).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Yield the first row of each example, with its number."""
        wanted = iter(self.numbers)
        following = next(wanted)
        for number, row in enumerate(self.rows):
            if number == following:
                yield number, row
                following = next(wanted, -1)

    def conversation(self, number: int, row: Row) -> Conversation | None:
        """Return prompt and completion, or the messages of a conversation; None if no completion is chosen.

        Raises:
            ValueError: Names file, line and column of a row that cannot be read.
        """
        columns = self.rows.columns
        if "chosen" in columns or "responses" in columns:
            pair = as_pair(self.rows, number, row)
            return None if pair is None else pair[:2]
        if "prompt" in columns and "completion" not in columns and "messages" not in columns:
            prompt = as_prompt(self.rows, number, row)
            return (prompt, "") if isinstance(prompt, str) else (prompt, [])
        return as_conversation(self.rows, number, row)

    def sequences(self, encoder: Encoder) -> list[Tokens | None]:
        """Tokenise the examples as training does, whatever their length; None where there is nothing."""
        made: list[Tokens | None] = []
        for number, row in self:
            if "segments" in self.rows.columns:
                made.append(encoder.segments(segments_of(self.rows, number, row)))
                continue
            conversation = self.conversation(number, row)
            template = template_arguments(self.rows, number, row)
            try:
                made.append(_encode(encoder, conversation, template, ends="prefix" not in self.rows.columns))
            except ValueError as error:
                raise ValueError(f"{self.rows.where(number)}: {error}") from error
        return made

    def texts(self, part: Part) -> Iterator[str]:
        """Yield the text of a part of each example, without any template; empty where there is none."""
        check_part(part)
        for number, row in self:
            conversation = self.conversation(number, row)
            if isinstance(conversation, list):
                ours = {"completion": (True,), "prompt": (False,), "all": (True, False)}[part]
                yield _text([m for m in conversation if (m["role"] == "assistant") in ours])
            elif conversation is not None:
                prompt, completion = map(_text, conversation)
                yield {"completion": completion, "prompt": prompt, "all": prompt + completion}[part]
            else:
                yield ""


def check_part(part: Part) -> Part:
    """Return what it is given, if that is known.

    Raises:
        ValueError: If it is not.

    Example:
        >>> check_part("prompt")
        'prompt'
    """
    one_of(get_args(Part), part=part)
    return part


def part_of(sequence: Tokens | None, part: Part) -> Tensor:
    """Return the tokens of a part of an example: those that are learnt, the others, or all. Shape (N,).

    Example:
        >>> tokens = Tokens(torch.tensor([5, 6, 7]), torch.tensor([False, True, True]))
        >>> part_of(tokens, "completion"), part_of(None, "all")
        (tensor([6, 7]), tensor([], dtype=torch.int64))
    """
    if sequence is None:
        return torch.zeros(0, dtype=torch.long)
    if part == "all":
        return sequence.tokens
    return sequence.tokens[sequence.learn == (part == "completion")]


def _encode(
    encoder: Encoder, conversation: Conversation | None, template: dict[str, Any], *, ends: bool
) -> Tokens | None:
    if conversation is None:
        return None
    if isinstance(conversation, list):
        return encoder.conversation(conversation, **template)
    prompt, completion = conversation
    if not completion:
        tokens = torch.tensor(encoder.prompt(prompt, **template), dtype=torch.long)
        return Tokens(tokens, torch.zeros(len(tokens), dtype=torch.bool))
    if prompt == "":
        return encoder.document(str(completion))
    return encoder.pair(prompt, completion, ends=ends, **template)


def _text(said: str | Messages) -> str:
    return said if isinstance(said, str) else "\n".join(str(m.get("content") or "") for m in said)


class Finished:
    """Values of examples on disk, a record for each: a job that was killed goes on after its last batch.

    Args:
        folder: Where the records of all ranks are; made if it is not there.
        job: What the values depend on. A folder of another job is refused.
        width: Values per example.
        rank: Whose file is written to.

    Raises:
        ValueError: If the folder is of another job.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> finished = Finished(Path(folder.name), {"by": "loss"}, 1)
        >>> finished.add([2, 0], torch.tensor([[0.5], [1.5]]))
        >>> finished.places(), finished.values(3)[:, 0].tolist()
        ({0, 2}, [1.5, nan, 0.5])
        >>> folder.cleanup()
    """

    def __init__(self, folder: Path, job: dict[str, Any], width: int, rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        about, text = folder / "job.json", json.dumps(job, indent=1, sort_keys=True)
        if about.exists():
            then = json.loads(about.read_text())
            changed = sorted(name for name in {*then, *job} if then.get(name) != job.get(name))
            if changed:
                name = changed[0]
                raise ValueError(
                    f"{folder} was begun with {name} {then.get(name)!r}, now it is {job.get(name)!r}: remove"
                    " the folder, or go on as it was begun"
                )
        elif rank == 0:
            with put_in_place(about) as place:
                place.write_text(text)
        self._folder, self._rank, self._own = folder, rank, folder / f"rank{rank}.records"
        self._record = numpy.dtype([("place", "<i8"), ("values", "<f4", (width,))])
        if self._own.exists():
            # A kill may have torn the last record.
            with self._own.open("r+b") as file:
                file.truncate(self._own.stat().st_size // self._record.itemsize * self._record.itemsize)

    def add(self, places: list[int], values: Tensor) -> None:
        """Take down the values (N, width) of some examples."""
        records = numpy.empty(len(places), self._record)
        records["place"], records["values"] = places, values.float().cpu().numpy()
        with self._own.open("ab") as file:
            file.write(records.tobytes())

    def places(self) -> set[int]:
        """Return which examples have values."""
        return {int(place) for part in self._parts() for place in part["place"]}

    def values(self, count: int) -> numpy.ndarray[Any, Any]:
        """Return the values of all examples, nan for those without; on disk, shape (count, width)."""
        width = self._record["values"].shape[0]
        path = self._folder / f"rank{self._rank}.values"
        found = numpy.memmap(path, "<f4", "w+", shape=(count, width))
        found[:] = numpy.nan
        for part in self._parts():
            found[part["place"]] = part["values"]
        return found

    def _parts(self) -> Iterator[numpy.ndarray[Any, Any]]:
        for path in sorted(self._folder.glob("rank*.records")):
            whole = path.stat().st_size // self._record.itemsize
            if whole:
                yield numpy.memmap(path, self._record, "r", shape=(whole,))
