"""Search for the mixture of sources that trains best: try some, predict the rest, try the promising ones.

One iteration of the loop is `next_mixtures`; its first call, with nothing tried yet, draws from the prior.
What trains and scores a mixture is the caller's.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Dirichlet


class Predictor(Protocol):
    """A regressor, as scikit-learn and LightGBM have them.

    Example:
        >>> predictor: Predictor = KernelRidge()
        >>> _ = predictor.fit([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0])
        >>> predictor.predict([[0.5, 0.5]]).tolist()
        [1.0]

    Source: the interface of scikit-learn.   Differs: nothing.
    """

    def fit(self, x: Any, y: Any) -> Any:
        """Learn from mixtures (N, D) and their scores (N,), numpy arrays; what was learned before is gone."""

    def predict(self, x: Any) -> Any:
        """Return a score for each of some mixtures (N, D)."""


class KernelRidge:
    """Predicts scores as a smooth function of the shares, as smooth as leaving one out says is best.

    score(w) = m + sum_i a_i k(w, w_i),  a = (K + r I)^-1 (y - m),  k(u, v) = 1 + exp(-|u - v|^2 / (2 l^2))

    m is the mean score. Of a grid, r and the length l are those that predict each mixture best from all
    others. Far from all mixtures that were tried it predicts about their mean. That keeps the search honest:
    a quadratic polynomial, with more terms than mixtures, sends it to where it knows nothing.

    Example:
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8], [0.7, 0.3]])
        >>> scores = 1.0 + w[:, 0] * w[:, 1]
        >>> [round(float(s), 2) for s in KernelRidge().fit(w, scores).predict([[0.4, 0.6], [0.9, 0.1]])]
        [1.24, 1.09]

    Source: Saunders et al. 1998 (the regression); Rasmussen and Williams 2006, eq. 5.12 (leaving one out in
    closed form). Differs: the grid is ours. CLIMB, arXiv:2504.13161, uses boosted trees (LightGBM).
    """

    _strengths = torch.logspace(-8, 1, 10, dtype=torch.float64)
    _lengths = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of the median distance between mixtures

    def fit(self, x: Any, y: Any) -> "KernelRidge":
        """Learn from at least two different mixtures and their scores."""
        self._tried, target = (torch.as_tensor(values, dtype=torch.float64) for values in (x, y))
        self._mean = target.mean()
        distances = torch.pdist(self._tried)
        if not (distances > 0).any():
            raise ValueError(f"x holds {len(target)} mixtures; at least two must be different")
        lengths = torch.tensor(self._lengths) * distances[distances > 0].median()
        identity = torch.eye(len(target), dtype=torch.float64)
        least = float("inf")
        for length in lengths:
            kernel = _kernel(self._tried, self._tried, length)
            for strength in self._strengths:
                inverse = torch.linalg.inv(kernel + strength * identity)
                slopes = inverse @ (target - self._mean)
                error = float((slopes / inverse.diagonal()).square().mean())
                if error < least:
                    least, self._length, self._slopes = error, length, slopes
        return self

    def predict(self, x: Any) -> Any:
        """Return the scores of some mixtures. Shape (N,)."""
        kernel = _kernel(torch.as_tensor(x, dtype=torch.float64), self._tried, self._length)
        return (self._mean + kernel @ self._slopes).numpy()


def _kernel(u: Tensor, v: Tensor, length: Tensor) -> Tensor:
    return 1.0 + torch.exp(-torch.cdist(u, v).square() / (2.0 * length**2))


def draw_mixtures(concentration: Sequence[float], count: int, seed: int) -> Tensor:
    """Draw mixtures from a Dirichlet distribution; the same seed draws the same.

    Args:
        concentration: One number > 0 per source. All 1: every mixture is as likely; their proportions are
            those of the mean mixture; the larger, the closer to it.
        count: Number of mixtures to draw, >= 1.
        seed: Seed of the draw.

    Returns:
        Shares that sum to 1. Shape (count, D), float64.

    Raises:
        ValueError: If there are fewer than two sources, or a number is out of range.

    Example:
        >>> draw_mixtures([1.0, 1.0, 1.0], count=2, seed=0).shape
        torch.Size([2, 3])

    Source: ours, a Dirichlet distribution.
    """
    if len(concentration) < 2 or not min(concentration) > 0.0 or not sum(concentration) < float("inf"):
        raise ValueError(f"concentration is {list(concentration)}; there must be two or more numbers above 0")
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Dirichlet(torch.tensor(list(concentration), dtype=torch.float64)).sample((count,))


def next_mixtures(
    tried: Tensor,
    scores: Sequence[float],
    count: int,
    *,
    predictor: Predictor,
    concentration: Sequence[float],
    candidates: int = 20_000,
    top: int = 200,
    seed: int,
) -> Tensor:
    """Choose the mixtures to try next.

    Fits the predictor to all that was tried, draws candidates from the prior, and takes some at random among
    those that it predicts to be best: near enough to what is good, apart enough to learn from.

    Args:
        tried: Mixtures tried so far. Shape (N, D); with N = 0 the next ones are drawn from the prior.
        scores: Scores of the mixtures tried; higher is better.
        count: Number of mixtures to choose, >= 1.
        predictor: What predicts scores; it is fitted anew.
        concentration: Concentration of the prior, see `draw_mixtures`.
        candidates: Number of mixtures to choose from.
        top: Number of the best predicted ones that stay, from `count` to `candidates`.
        seed: Seed of the draw.

    Returns:
        Mixtures. Shape (count, D).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> tried = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
        >>> prior = dict(predictor=KernelRidge(), concentration=[1.0, 1.0])
        >>> chosen = next_mixtures(tried, [0.0, 0.5, 1.0], 2, **prior, candidates=100, top=5, seed=0)
        >>> chosen.shape, (chosen[:, 1] > 0.5).all()
        (torch.Size([2, 2]), tensor(True))

    Source: Diao et al. 2025, arXiv:2504.13161 (CLIMB), the iterative search; its 64, 32 and 16 mixtures in
    three iterations. Differs: how many candidates there are and stay is ours; not checked against the text
    of the paper, but against notes on it.
    """
    if not len(tried):
        return draw_mixtures(concentration, count, seed)
    if not count <= top <= candidates:
        raise ValueError(f"top is {top}; it must be from count={count} to candidates={candidates}")
    drawn = draw_mixtures(concentration, candidates, seed)
    best = _predicted(predictor, tried, scores, drawn).argsort(descending=True, stable=True)[:top]
    order = torch.randperm(top, generator=torch.Generator().manual_seed(seed))
    return drawn[best[order[:count]]]


def best_mixture(
    tried: Tensor,
    scores: Sequence[float],
    *,
    predictor: Predictor,
    concentration: Sequence[float],
    candidates: int = 20_000,
    seed: int,
) -> tuple[Tensor, float]:
    """Return the mixture that is predicted to be best, and its prediction.

    Args:
        tried: Mixtures tried, at least two; they are candidates, too. Shape (N, D).
        scores: Scores of the mixtures tried; higher is better.
        predictor: What predicts scores; it is fitted anew.
        concentration: Concentration of the prior, see `draw_mixtures`.
        candidates: Number of further mixtures to choose from.
        seed: Seed of the draw.

    Returns:
        The mixture, shape (D,), and the score that it is predicted to have.

    Raises:
        ValueError: If the predictor's scores are not as many as the mixtures, or not finite, or an argument
            is out of range.

    Example:
        >>> tried = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
        >>> prior = dict(predictor=KernelRidge(), concentration=[1.0, 1.0])
        >>> mixture, score = best_mixture(tried, [0.0, 0.5, 1.0], **prior, candidates=100, seed=0)
        >>> bool(mixture[1] > 0.8)
        True

    Source: arXiv:2504.13161.
    """
    drawn = torch.cat([tried, draw_mixtures(concentration, candidates, seed)])
    predicted = _predicted(predictor, tried, scores, drawn)
    best = int(predicted.argmax())
    return drawn[best], float(predicted[best])


def _predicted(predictor: Predictor, tried: Tensor, scores: Sequence[float], drawn: Tensor) -> Tensor:
    predictor.fit(tried.numpy(), torch.tensor(list(scores), dtype=torch.float64).numpy())
    predicted = torch.as_tensor(predictor.predict(drawn.numpy()), dtype=torch.float64).flatten()
    if len(predicted) != len(drawn) or not predicted.isfinite().all():
        raise ValueError(
            f"predictor {type(predictor).__name__} gave {len(predicted)} scores for {len(drawn)} mixtures,"
            " or some that are not finite"
        )
    return predicted
