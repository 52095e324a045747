"""Replay of what was really seen: what a checkpoint remembers of it, and how often each phase comes back."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from rewarm.checks import at_least, one_of
from rewarm.datamodules.loader import Example
from rewarm.datamodules.samplers import pass_order
from rewarm.datamodules.token_store import TokenRows

Rehearsal = Literal["rows", "uniform", "power-law"]

Seen = dict[str, dict[str, Any]]
"""By the fingerprint of a source's rows: which of them were drawn, as their order and how many of it."""


def rehearsal_shares(
    sizes: Mapping[str, int], rehearsal: Rehearsal = "rows", power: float = 1.0
) -> dict[str, float]:
    """Return the share of each earlier phase among the replayed rows, summing to 1.

    `rows` gives shares in proportion to the rows of the phases, `uniform` gives equal shares, and
    `power-law` gives phase k of n (from 0) the share (n - k)^-power / sum_j (n - j)^-power, so that the
    latest phase, k = n - 1, comes most often.

    Args:
        sizes: Number of rows of each phase, the oldest first.
        rehearsal: Rule by which the phases are weighted.
        power: Exponent of the power law, >= 0; 0 is uniform.

    Raises:
        ValueError: If `rehearsal` is unknown or `power` is below 0.

    Example:
        >>> shares = rehearsal_shares({"first": 10, "second": 30}, "power-law")
        >>> {phase: round(share, 3) for phase, share in shares.items()}
        {'first': 0.333, 'second': 0.667}

    Source: the power law is after power-law rehearsal, arXiv:2401.10393; this form of it and the default
    exponent are ours.
    """
    one_of(get_args(Rehearsal), rehearsal=rehearsal)
    at_least(0, rehearsal_power=power)
    weights = {
        name: {"rows": float(size), "uniform": 1.0, "power-law": (len(sizes) - place) ** -power}[rehearsal]
        for place, (name, size) in enumerate(sizes.items())
    }
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


class SeenRows:
    """The rows of a source that an earlier run has drawn, in the order in which it drew them first.

    Args:
        rows: All rows of the source, cut as that run had cut them.
        seen: Entry of the run's checkpoint for these rows.

    Raises:
        ValueError: If the run has seen none of the rows.

    Example:
        >>> rows = ["first", "second", "third"]  # in place of `TokenRows`
        >>> seen = SeenRows(rows, {"name": "old", "drawn": 2, "seed": 0, "shuffle": False})
        >>> [seen[number] for number in range(len(seen))]
        ['first', 'second']
    """

    def __init__(self, rows: TokenRows, seen: dict[str, Any]) -> None:
        if seen["drawn"] < 1:
            raise ValueError(f"the checkpoint has seen none of the rows of {seen['name']}")
        self._rows, self._count = rows, min(seen["drawn"], len(rows))
        order = pass_order(len(rows), seen["seed"], seen["name"], 0) if seen["shuffle"] else None
        self._order = order or range(len(rows)).__getitem__

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._count

    def __getitem__(self, number: int) -> Example:
        """Return a row."""
        if not 0 <= number < self._count:
            raise IndexError(f"row {number} of {self._count}")
        return self._rows[self._order(number)]


def more_seen(one: Seen, other: Seen) -> Seen:
    """Join what two runs have seen; for the same rows in two orders, keep the order with more rows drawn.

    Args:
        one: What one run has seen.
        other: What the other run has seen, which wins a tie.

    Example:
        >>> before = {"rows": {"name": "old", "drawn": 4, "seed": 0, "shuffle": True}}
        >>> after = {"rows": {"name": "old", "drawn": 9, "seed": 1, "shuffle": True}}
        >>> more_seen(after, before)["rows"]["drawn"]
        9
    """
    return one | {
        rows: entry
        for rows, entry in other.items()
        if rows not in one or entry["drawn"] >= one[rows]["drawn"]
    }


def read_seen(path: str) -> Seen:
    """Return what a checkpoint's run, and those before it, have seen of each source.

    Args:
        path: Checkpoint of a run with `CorpusData`: a file, or a folder of shards.

    Returns:
        The entry of each source, by the fingerprint of its rows.

    Raises:
        ValueError: If the checkpoint can't be read, or does not say what was seen.

    Example:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/last.ckpt"
        >>> torch.save({"CorpusData": {"seen": {"rows": {"name": "old", "drawn": 4}}}}, path)
        >>> read_seen(path)
        {'rows': {'name': 'old', 'drawn': 4}}
    """
    file = Path(path) / "meta.pt" if Path(path).is_dir() else Path(path)
    try:
        checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint: {' '.join(str(error).split())}") from error
    found = [value for value in checkpoint.values() if isinstance(value, dict) and "seen" in value]
    if not found:
        raise ValueError(f"{path}: the checkpoint does not say which rows of a corpus were seen")
    return found[0]["seen"]
