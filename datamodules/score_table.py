"""Score tables: the scores of a data set's examples in a Parquet file, with how they were made.

`rewarm score` writes them, the data modules read them as `score_table=...`, and `join_scores` gives them to
any `Rows`.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from rewarm.checkpoints.placing import put_in_place
from rewarm.text.formats import Row, Rows

_KEY = b"rewarm"  # of the metadata


def example_id(row: Row) -> str:
    """Return the id of an example: a hash of all its columns.

    The id depends on the content alone, neither on the row's place nor on the kind of file. Rows that are
    equal have the same id, and the same scores.

    Args:
        row: Columns of the example by name, as `Rows` yields them: those without a value are left out.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> example_id({"prompt": "1+1=", "level": 2}) == example_id({"level": 2, "prompt": "1+1="})
        True
    """
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def data_fingerprint(ids: Iterable[str]) -> str:
    """Return the fingerprint of a data set, in which the order and the repetition of rows play no part.

    Args:
        ids: Ids of the rows, see `example_id`.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> data_fingerprint(["b", "a", "b"]) == data_fingerprint(["a", "b"])
        True
    """
    return hashlib.blake2b("\n".join(sorted(set(ids))).encode(), digest_size=16).hexdigest()


@dataclass
class ScoreTable:
    """The scores of a data set's examples.

    Attributes:
        data: Path or Hub id of the data set.
        ids: Ids of the data set's examples, each once.
        scores: Scores by name, one for each id; None where an example has no score.
        made: Record of how the scores were made. Each call of `rewarm score` has an entry, named after its
            column, with its arguments, the versions and the date.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "scores.parquet")
        >>> ScoreTable("rows.jsonl", ["a", "b"], {"loss": [0.5, None]}).write(path)
        >>> ScoreTable.read(path).scores
        {'loss': [0.5, None]}
    """

    data: str
    ids: list[str]
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    made: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the data set."""
        return data_fingerprint(self.ids)

    @classmethod
    def read(cls, path: str | Path) -> "ScoreTable":
        """Read a table.

        Raises:
            ValueError: If there is no such file, or the file is no score table or a damaged one.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such score table")
        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: cannot be read as Parquet: {error}") from error
        if _KEY not in (table.schema.metadata or {}):
            raise ValueError(f"{path}: is no score table; `rewarm score` writes one")
        about, columns = json.loads(table.schema.metadata[_KEY]), table.to_pydict()
        read = cls(about["data"], columns.pop("id"), columns, about["made"])
        if read.fingerprint != about["fingerprint"]:
            raise ValueError(f"{path}: the ids are not those that the scores were made for")
        return read

    def write(self, path: str | Path) -> None:
        """Write the table; it appears whole or not at all."""
        about = {"data": self.data, "fingerprint": self.fingerprint, "made": self.made}
        types = {"id": pyarrow.string()} | dict.fromkeys(self.scores, pyarrow.float64())
        table = pyarrow.table({"id": self.ids, **self.scores}, schema=pyarrow.schema(types.items()))
        with put_in_place(path, replace=True) as place:
            pyarrow.parquet.write_table(table.replace_schema_metadata({_KEY: json.dumps(about)}), place)

    def check(self, path: str | Path, rows: Rows, ids: list[str]) -> None:
        """Make sure that the scores of the table are those of a data set.

        Args:
            path: Path of the table.
            rows: The data set.
            ids: Ids of the data set's rows, in their order.

        Raises:
            ValueError: If the scores are of other data; the message names both data sets, and the first row
                without scores.
        """
        if (now := data_fingerprint(ids)) == self.fingerprint:
            return
        known = set(self.ids)
        unknown = [number for number, one in enumerate(ids) if one not in known]
        which = f", such as {rows.where(unknown[0])}" if unknown else ""
        raise ValueError(
            f"{path}: the scores are of {self.data} ({len(self.ids)} examples, fingerprint"
            f" {self.fingerprint[:8]}), not of {rows.path} ({len(set(ids))}, {now[:8]}):"
            f" {len(unknown)} rows have no score{which}; score these data anew"
        )


def join_scores(rows: Rows, path: str | Path, names: Iterable[str] = ()) -> None:
    r"""Give rows the scores of a table as further columns, except those that they have already.

    Args:
        rows: Data set whose rows may be in any order; it gets the columns.
        path: Path of a table that `rewarm score` wrote for the same data set.
        names: Names of columns that must not be in both, the rows and the table.

    Raises:
        ValueError: If the table is of other data, or one of the names is in both.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        >>> rows = Rows(folder / "rows.jsonl")
        >>> ids = [example_id(row) for row in rows]
        >>> ScoreTable("rows.jsonl", ids, {"loss": [0.5, 1.5]}).write(folder / "scores.parquet")
        >>> join_scores(rows, folder / "scores.parquet")
        >>> rows.values("loss")
        [0.5, 1.5]
    """
    table = ScoreTable.read(path)
    for name in sorted({*names} & {*table.scores} & {*rows.columns}):
        raise ValueError(f"{name!r} is a column of {rows.path} and of {path}: rename one of them")
    ids = [example_id(row) for row in rows]
    table.check(path, rows, ids)
    place = {one: number for number, one in enumerate(table.ids)}
    places = [place[one] for one in ids]
    for name, scores in table.scores.items():
        if name not in rows.columns:
            rows.data = rows.data.add_column(
                name, pyarrow.array([scores[p] for p in places], pyarrow.float64())
            )
