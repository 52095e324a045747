"""`rewarm mixture`: a search over a proxy training of the user's, which goes on where it was interrupted."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rewarm.functional.mixture_search import KernelRidge, Predictor, best_mixture, next_mixtures
from rewarm.scoring.scorer import read_scorer


def search_mixtures(
    tokens: Mapping[str, float],
    score: Callable[[Path], float],
    output: str,
    sizes: Sequence[int] = (64, 32, 16),
    *,
    predictor: Predictor | str | None = None,
    candidates: int = 20_000,
    top: int = 200,
    seed: int = 0,
) -> dict[str, float]:
    """Find the mixture of sources with which training scores best.

    The first iteration draws mixtures around the proportions of the sources. Each later one fits the
    predictor to all scores so far and draws among those that it predicts to be best. `score` trains a small
    model on a mixture and measures it; the same call again goes on where it was interrupted.

    Writes to `output`: `mixtures/NNN.json`, the shares by source that `score` is given (such as
    `CorpusData(weights=...)` takes); `tried.jsonl`, a line for each iteration's mixtures and one for each
    score; in the end `best.json`, the mixture that is predicted to score best, and a table of it and of the
    best that were tried.

    Args:
        tokens: Size of each source, in any unit; at least two, each above 0.
        score: Scores the mixture in a file; higher is better. Write side products beside it, if you like.
        output: Folder; must be new or of the same search. It may be prolonged by further `sizes`.
        sizes: How many mixtures each iteration tries, >= 1; the first at least 2. The paper's, 4:2:1.
        predictor: Anything with scikit-learn's `fit` and `predict`, or the dotted name of its class, such as
            `lightgbm.LGBMRegressor`; None is `KernelRidge`.
        candidates: How many mixtures the predictor chooses from.
        top: How many of the best predicted ones the next ones are drawn from.
        seed: Seed of the mixtures.

    Returns:
        Share of each source in the mixture that is predicted to score best.

    Raises:
        ValueError: If an argument is out of range, the output is of another search, or a score is not finite
            or cannot be had.

    Source: Diao et al. 2025, arXiv:2504.13161 (CLIMB). Differs: the mean of the prior is the sources'
    proportions as in the paper, its width is ours (concentrations that sum to the number of sources).
    """
    if len(tokens) < 2 or not all(0.0 < size < float("inf") for size in tokens.values()):
        raise ValueError(f"tokens is {dict(tokens)}; there must be two or more sources, each above 0")
    if not sizes or min(sizes) < 1 or sizes[0] < 2:
        raise ValueError(f"sizes is {list(sizes)}; each must be at least 1, the first at least 2")
    largest = max(sizes[1:], default=1)
    if not largest <= top <= candidates:
        raise ValueError(f"top is {top}; it must be from {largest} (of sizes) to candidates={candidates}")
    total = sum(tokens.values())
    options: dict[str, Any] = {
        "predictor": _made(predictor) if isinstance(predictor, str) else predictor or KernelRidge(),
        "concentration": [len(tokens) * size / total for size in tokens.values()],
        "candidates": candidates,
    }
    tried = _Tried(Path(output), list(tokens))
    for iteration, size in enumerate(sizes):
        if iteration == len(tried.iterations):
            seeded: dict[str, Any] = {"seed": 1000 * seed + iteration, "top": top}
            drawn = next_mixtures(tried.mixtures(), tried.scores, size, **seeded, **options)
            tried.propose(drawn.tolist())
        if len(tried.iterations[iteration]) != size:
            raise ValueError(
                f"sizes is {list(sizes)}, but {output} has {len(tried.iterations[iteration])} mixtures in"
                f" iteration {iteration + 1}"
            )
        while len(tried.scores) < sum(sizes[: iteration + 1]):
            tried.try_next(score, sum(sizes))
    best, predicted = best_mixture(tried.mixtures(), tried.scores, seed=1000 * seed + len(sizes), **options)
    shares = dict(zip(tokens, best.tolist(), strict=True))
    (tried.folder / "best.json").write_text(json.dumps(shares, indent=2) + "\n")
    _show(tried, {name: size / total for name, size in tokens.items()}, shares, predicted)
    return shares


def mixture(
    sources: Mapping[str, float],
    *,
    score: str,
    output: str,
    sizes: Sequence[int] = (64, 32, 16),
    predictor: str | None = None,
    candidates: int = 20_000,
    top: int = 200,
    seed: int = 0,
) -> None:
    """Search for the mixture of data sources with which training scores best.

    Each mixture is tried by training a small model of yours. The same call again goes on where it was
    interrupted; the folder's `best.json` holds the result (CLIMB, arXiv:2504.13161).

    Args:
        sources: The sources, two or more, and how large each is, in tokens or any other unit.
        score: What trains a small model and scores it: a shell command with {} for a JSON file with each
            source's share, whose last line of output is the score (higher is better), or the dotted name of a
            Python function.
        output: Folder of the search; must be new or of the same search.
        sizes: How many mixtures each iteration tries, >= 1; the first at least 2.
        predictor: Dotted name of a class with scikit-learn's fit and predict, such as
            lightgbm.LGBMRegressor; without it, kernel ridge regression.
        candidates: How many mixtures the predictor chooses from.
        top: How many of the best predicted mixtures the next ones are drawn from.
        seed: Seed of the mixtures.

    Raises:
        ValueError: As in `search_mixtures`.
    """
    search_mixtures(
        sources,
        read_scorer(score),
        output,
        sizes,
        predictor=predictor,
        candidates=candidates,
        top=top,
        seed=seed,
    )


def _made(name: str) -> Predictor:
    module, _, kind = name.rpartition(".")
    try:
        made: Predictor = getattr(import_module(module), kind)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"predictor is {name!r}, which cannot be imported: {error}") from error
    return made


class _Tried:
    """What was tried so far, in memory and in a file that has a line more for all that becomes known."""

    def __init__(self, folder: Path, sources: list[str]) -> None:
        self.folder, self.sources = folder, sources
        self.iterations: list[list[list[float]]] = []
        self.scores: list[float] = []
        (folder / "mixtures").mkdir(parents=True, exist_ok=True)
        self._path = folder / "tried.jsonl"
        text = self._path.read_text() if self._path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a kill tore the last line
            self._path.write_text(whole)
        for row in map(json.loads, whole.splitlines()):
            mixtures = row.get("mixtures") or [row["mixture"]]
            if list(mixtures[0]) != sources:
                raise ValueError(f"{self._path} is a search over {list(mixtures[0])}, not over {sources}")
            if "mixtures" in row:
                self.iterations.append([list(mixture.values()) for mixture in mixtures])
            else:
                self.scores.append(row["score"])

    def mixtures(self) -> Tensor:
        """Return all mixtures so far. Shape (N, D)."""
        rows = [mixture for iteration in self.iterations for mixture in iteration]
        return torch.tensor(rows, dtype=torch.float64).view(-1, len(self.sources))

    def propose(self, mixtures: list[list[float]]) -> None:
        """Take down what the next iteration will try."""
        self._write({"mixtures": [self._named(mixture) for mixture in mixtures]})
        self.iterations.append(mixtures)

    def try_next(self, score: Callable[[Path], float], total: int) -> None:
        """Score the first mixture that has no score."""
        number = len(self.scores)
        mixture = self._named(self.mixtures()[number].tolist())
        path = self.folder / "mixtures" / f"{number + 1:03}.json"
        path.write_text(json.dumps(mixture, indent=2) + "\n")
        result = float(score(path))
        if not math.isfinite(result):
            raise ValueError(f"the score of {path} is {result}; scores are finite")
        self._write({"mixture": mixture, "score": result})
        self.scores.append(result)
        shares = ", ".join(f"{name} {share:.3f}" for name, share in mixture.items())
        print(f"[{number + 1}/{total}] {result:g}  {shares}", flush=True)  # noqa: T201

    def _named(self, mixture: list[float]) -> dict[str, float]:
        return dict(zip(self.sources, mixture, strict=True))

    def _write(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _show(tried: _Tried, sizes: dict[str, float], shares: dict[str, float], predicted: float) -> None:
    best = max(range(len(tried.scores)), key=tried.scores.__getitem__)
    measured = tried.mixtures()[best].tolist()
    table = Table(title=f"{tried.folder / 'best.json'}: the best of {len(tried.scores)} tried, and predicted")
    for heading in ("source", "of all", f"tried ({best + 1:03})", "predicted"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, share in zip(tried.sources, measured, strict=True):
        table.add_row(Text(name), f"{sizes[name]:.3f}", f"{share:.3f}", f"{shares[name]:.3f}")
    table.add_section()
    table.add_row("score", "", f"{tried.scores[best]:.4g}", f"{predicted:.4g}")
    Console().print(table)
