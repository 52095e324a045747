"""`rewarm score`: scores of a data set's examples, into a table that goes on where it was interrupted."""

import inspect
import os
import platform
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewarm import __version__
from rewarm.checks import one_of
from rewarm.datamodules.score_table import ScoreTable
from rewarm.scoring.model_scores import (
    angle,
    loss,
    pass_rate,
    perplexity_ratio,
    perplexity_score,
    prototype_distance,
)
from rewarm.scoring.score_job import Job
from rewarm.scoring.scored_data import ScoredData
from rewarm.scoring.text_scores import Result, Scores, column, compression, irt_difficulty, length, rarity
from rewarm.text.encoding import Encoder, load_tokenizer

_OF_TEXT: dict[str, Callable[..., Result]] = {
    "compression": compression,
    "column": column,
    "irt_difficulty": irt_difficulty,
}
_OF_TOKENS: dict[str, Callable[..., Result]] = {"length": length, "rarity": rarity}
_OF_MODELS: dict[str, Callable[..., Result]] = {
    "loss": loss,
    "perplexity": perplexity_score,
    "perplexity_ratio": perplexity_ratio,
    "pass_rate": pass_rate,
    "angle": angle,
    "prototype_distance": prototype_distance,
}
_SCORES = {**_OF_TOKENS, **_OF_TEXT, **_OF_MODELS}
_BARS, _WIDTH = 10, 40


def _encoder(*, tokenizer: str) -> Encoder:
    """Return what encodes the texts of scores that need tokens alone.

    Args:
        tokenizer: Hugging Face folder or id of a tokenizer; without it, the model's.
    """
    return Encoder(load_tokenizer(tokenizer))


OPTIONS: dict[str, list[Callable[..., Any]]] = {
    **{name: [made_by] for name, made_by in _OF_TEXT.items()},
    **{name: [made_by, _encoder] for name, made_by in _OF_TOKENS.items()},
    **{name: [made_by, Job] for name, made_by in _OF_MODELS.items()},
}
"""Functions that take the options of a score."""
# Another device computes the same.
_NO_PART = {"device"}


def score(
    data: str, *, by: str, output: str, name: str | None = None, plot: str | None = None, **options: Any
) -> ScoreTable:
    """Score the examples of a data set, for curricula; go on where it was interrupted.

    The scores become a column of a table, in which an example is known by the hash of its columns: the table
    survives another order of the rows. Under torchrun the ranks share the work of scores under a model.
    Killed, the same call goes on after the last batch that was finished, with the same result.

    Args:
        data: File or saved data set: prompts with completions, conversations, pairs, or prompts.
        by: Score. Without a model: length (in tokens), rarity (of the tokens), compression (ratio), column
            (any that holds numbers), irt_difficulty (from several models' answers). With --model: loss,
            perplexity, perplexity_ratio (with and without the prompt, or of two models), pass_rate (of
            verified samples, with its interval), angle (concentration of the question's hidden states),
            prototype_distance.
        output: Parquet file of the table; if there is one of these data, it gains a column.
        name: Name of the column; without it, that of the score.
        plot: PNG file for a histogram.
        **options: Options of the score, see `rewarm score --help`; None is the score's default.

    Returns:
        The table.

    Raises:
        ValueError: If an option is not for this score, is missing or out of range; if the output is of other
            data, or has this column made in another way.
    """
    one_of(_SCORES, by=by)
    arguments = _arguments(by, {key: value for key, value in options.items() if value is not None})
    name, path = by if name is None else name, Path(output)
    if name in ("", "id") or Path(name).name != name:
        raise ValueError(f"name is {name!r}; it must be the name of a column other than id, without any /")
    scored = ScoredData(data)
    table = ScoreTable.read(path) if path.exists() else ScoreTable(data, scored.ids)
    table.check(path, scored.rows, scored.every_id)
    folder = path.with_name(f"{path.name}.{name}.partial")
    rank = int(os.environ.get("RANK", 0))
    if name in table.made:
        then = table.made[name]
        if (then["by"], _kept(then["arguments"])) != (by, _kept(arguments)):
            raise ValueError(
                f"{output} has a column {name!r} already, by {_call(then['by'], then['arguments'])}, not by"
                f" {_call(by, arguments)}: give another --name"
            )
    else:
        result = _scores(scored, by, arguments, folder)
        columns = {name + suffix: values for suffix, values in result.columns.items()}
        for taken in sorted({*columns} & {*table.scores}):
            raise ValueError(f"{output} has a column {taken!r} already: give another --name")
        made = {"by": by, "arguments": arguments, "columns": list(columns), **result.notes, **_origin()}
        place = {one: number for number, one in enumerate(scored.ids)}
        order = [place[one] for one in table.ids]
        table.scores |= {key: [values[p] for p in order] for key, values in columns.items()}
        table.made[name] = made
        if rank == 0:
            table.write(path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        _show(output, table, name)
        if plot is not None:
            _plot(plot, table, name)
    return table


def _allowed(by: str) -> dict[str, inspect.Parameter]:
    """The options of a score, and of the tokenizer or model that it needs."""
    return {
        name: parameter
        for source in OPTIONS[by]
        for name, parameter in inspect.signature(source).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _arguments(by: str, given: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a score, the defaults too."""
    allowed = _allowed(by)
    for name in sorted({*given} - {*allowed}):
        for_these = ", ".join(one for one in _SCORES if name in _allowed(one))
        raise ValueError(f"{_flag(name)} is not for {by}" + (f", but for {for_these}" if for_these else ""))
    needed = [name for name, one in allowed.items() if one.default is one.empty and name not in given]
    if needed:
        raise ValueError(f"{by} needs {', '.join(map(_flag, needed))}")
    return {name: given.get(name, parameter.default) for name, parameter in allowed.items()}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _kept(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in _NO_PART}


def _call(by: str, arguments: dict[str, Any]) -> str:
    return f"{by}({', '.join(f'{name}={value}' for name, value in arguments.items() if value is not None)})"


def _scores(data: ScoredData, by: str, arguments: dict[str, Any], folder: Path) -> Result:
    if by in _OF_TEXT:
        return _OF_TEXT[by](data, **arguments)
    own = dict(arguments)
    if by in _OF_TOKENS:
        return _OF_TOKENS[by](data, _encoder(tokenizer=own.pop("tokenizer")), **own)
    models = [own["model"], *([own["other"]] if own.get("other") else [])]
    about = {
        "by": by,
        **_kept(arguments),
        "data": data.digest,
        "weights": [_weights(model) for model in models],
    }
    loading = {name: own.pop(name) for name in inspect.signature(Job).parameters if name in own}
    return _OF_MODELS[by](Job(data, folder, about, **loading), **own)


def _weights(model: str) -> list[list[Any]]:
    """What tells whether a model's files are still the same."""
    files = sorted(Path(model).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _origin() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "rewarm": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers")},
        },
    }


def _known(values: Scores) -> list[float]:
    return sorted(value for value in values if value is not None)


def _show(output: str, table: ScoreTable, name: str) -> None:
    """Print what the scores are like, and who answered how well."""
    values, made = _known(table.scores[name]), table.made[name]
    console = Console()
    console.print(Text(f"{output}: {name} of {len(values)} of {len(table.ids)} examples"), soft_wrap=True)
    if values:
        shown = Table("lowest", "quarter", "median", "three quarters", "highest", "mean")
        marks = [values[round(share * (len(values) - 1))] for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
        shown.add_row(*(f"{value:.4g}" for value in (*marks, sum(values) / len(values))))
        console.print(shown)
        counts, edges = _histogram(values)
        for count, low, high in zip(counts, edges, edges[1:], strict=False):
            bar = "#" * round(_WIDTH * count / max(counts))
            console.print(Text(f"{low:>10.4g} to {high:<10.4g} {count:>8} {bar}"), soft_wrap=True)
    for model, ability in made.get("abilities", {}).items():
        console.print(Text(f"ability {ability:+.3f}  {model}"), soft_wrap=True)


def _histogram(values: list[float]) -> tuple[list[int], list[float]]:
    low, high = values[0], values[-1]
    bars = _BARS if high > low else 1
    edges = [low + (high - low) * bar / bars for bar in range(bars)] + [high]
    counts = [0] * bars
    for value in values:
        counts[min(int((value - low) / (high - low) * bars), bars - 1) if high > low else 0] += 1
    return counts, edges


def _plot(path: str, table: ScoreTable, name: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(_known(table.scores[name]), bins=50)
    axes.set(xlabel=name, ylabel="examples", title=Path(table.data).name)
    figure.savefig(path, dpi=120)
