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

    It depends on the content alone, neither on the row's place nor on the kind of file. Rows that are equal
    have the same id, and the same scores.

    Args:
        row: Its columns by name, those without a value left out, as `Rows` yields it.

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

    Example:
        >>> data_fingerprint(["b", "a", "b"]) == data_fingerprint(["a", "b"])
        True
    """
    return hashlib.blake2b("\n".join(sorted(set(ids))).encode(), digest_size=16).hexdigest()


@dataclass
class ScoreTable:
    """The scores of a data set's examples.

    Attributes:
        data: Where the data set was.
        ids: Ids of its examples, each once.
        scores: By name, one per id; None where an example has none.
        made: How the scores were made: for each call of `rewarm score` the column that it is named after, and
            its arguments, the versions and the date.
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
            ValueError: If there is none, or it is something else or damaged.
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
        """Make sure that the table is of a data set.

        Args:
            path: Path of the table.
            rows: The data set.
            ids: Ids of its rows, in their order.

        Raises:
            ValueError: If not; names both, and the first row without scores.
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
    """Give rows the scores of a table as further columns, except those that they have already.

    Args:
        rows: Any data set, in any order.
        path: A table that `rewarm score` wrote for the same data set.
        names: Columns that must come from one of the two.

    Raises:
        ValueError: If the table is of other data, or one of the names is in both.
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
