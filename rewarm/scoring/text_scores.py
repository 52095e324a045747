"""Scores that need no model: from text, tokens, a column, or what several models answered."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from rewarm.curriculum.item_response import fit_rasch
from rewarm.datamodules.score_table import ScoreTable
from rewarm.scoring.difficulty import compression_ratio, token_counts, word_rarity
from rewarm.scoring.scored_data import Part, ScoredData, check_part, part_of
from rewarm.text.encoding import Encoder
from rewarm.text.formats import number_of

Scores = list[float | None]


class Result(NamedTuple):
    """What a score gives.

    Attributes:
        columns: Columns of the table: the score itself under "", all that comes with it under what is
            appended to its name. One value per example, None where it has none.
        notes: What else is worth keeping.

    Example:
        >>> Result({"": [1.0, None]}).columns[""]
        [1.0, None]
    """

    columns: dict[str, Scores]
    notes: Mapping[str, Any] = MappingProxyType({})


def length(data: ScoredData, encoder: Encoder, *, part: Part = "all") -> Result:
    """Tokens of a part.

    Args:
        data: Examples to score.
        encoder: Encoder of the texts.
        part: Part of an example.
    """
    check_part(part)
    return Result({"": [float(len(part_of(s, part))) if s else None for s in data.sequences(encoder)]})


def rarity(data: ScoredData, encoder: Encoder, *, part: Part = "all") -> Result:
    """Summed negative log frequency of a part's tokens, counted over that part of all rows.

    Args:
        data: Examples to score.
        encoder: Encoder of the texts.
        part: Part of an example.
    """
    check_part(part)
    parts = [part_of(sequence, part) for sequence in data.sequences(encoder)]
    repeated = (p for p, n in zip(parts, data.repeats, strict=True) for _ in range(n))
    counts = token_counts(repeated, len(encoder.tokenizer))
    return Result({"": [word_rarity(tokens, counts) if len(tokens) else None for tokens in parts]})


def compression(data: ScoredData, *, part: Part = "all") -> Result:
    """Compressed size of a part's text, relative to its size.

    Args:
        data: Examples to score.
        part: Part of an example.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "data.jsonl")
        >>> _ = path.write_text('{"prompt": "a", "completion": "' + 'ab' * 100 + '"}')
        >>> [round(score, 2) for score in compression(ScoredData(str(path))).columns[""]]
        [0.06]
        >>> folder.cleanup()
    """
    return Result({"": [compression_ratio(text) if text else None for text in data.texts(part)]})


def column(data: ScoredData, *, column: str) -> Result:
    """A column of the data that holds numbers.

    Args:
        data: Examples to score.
        column: Column of the data that holds numbers.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "data.jsonl")
        >>> _ = path.write_text('{"prompt": "1+1=", "completion": "2", "level": 3}')
        >>> column(ScoredData(str(path)), column="level").columns[""]
        [3.0]
        >>> folder.cleanup()
    """
    return Result({"": [number_of(data.rows, number, row, column) for number, row in data]})


def irt_difficulty(data: ScoredData, *, answers: list[str]) -> Result:
    """Difficulty under the one-parameter model of item response theory, fitted to several models' answers.

    Args:
        data: Examples to score.
        answers: Score tables with pass rates of several models, or columns that are 1 where a model was right
            and 0 where not.

    Raises:
        ValueError: If there are fewer than two models, or an answer is neither right nor wrong.
    """
    models = _answers(data, answers)
    if len(models) < 2:
        raise ValueError(f"answers has {len(models)} model; difficulties need those of several")
    right, trials = (torch.tensor(rows, dtype=torch.float64) for rows in zip(*models.values(), strict=True))
    known = trials.sum(0) > 0
    fit = fit_rasch(right[:, known], trials[:, known])
    fitted = iter(fit.difficulties.tolist())
    return Result(
        {"": [next(fitted) if is_known else None for is_known in known.tolist()]},
        {"abilities": dict(zip(models, fit.abilities.tolist(), strict=True))},
    )


def _answers(data: ScoredData, answers: list[str]) -> dict[str, tuple[list[float], list[float]]]:
    """How many right answers each model gave to each example, and how many answers."""
    models: dict[str, tuple[list[float], list[float]]] = {}
    for source in answers:
        if source in data.rows.columns:
            given = [number_of(data.rows, number, row, source) for number, row in data]
            if not {*given} <= {0.0, 1.0}:
                raise ValueError(f"{data.rows.path}: column {source!r} holds something else than 0 and 1")
            models[source] = given, [1.0] * len(given)
            continue
        if not Path(source).is_file():
            columns = ", ".join(data.rows.columns)
            raise ValueError(f"answers has {source!r}: neither a score table nor among the columns {columns}")
        table = ScoreTable.read(source)
        table.check(source, data.rows, data.every_id)
        rates = [name for name, made in table.made.items() if made["by"] == "pass_rate"]
        if not rates:
            raise ValueError(f"{source}: has no pass rates; score some with --by pass_rate")
        place = {one: number for number, one in enumerate(table.ids)}
        for name in rates:
            right, trials = table.scores[f"{name}_passed"], table.scores[f"{name}_samples"]
            models[f"{source}:{name}"] = (
                [right[place[one]] or 0.0 for one in data.ids],
                [trials[place[one]] or 0.0 for one in data.ids],
            )
    return models
