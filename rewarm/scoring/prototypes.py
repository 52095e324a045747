"""Prototypes of a data set, by k-means on embeddings that stream by, and how far examples are from them."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Prototypes:
    """Centroids that move with every batch, as far as an average over all that they got would.

    Args:
        centroids: Where they start. Floating, shape (K, D).
        spherical: Compare directions only: embeddings count as unit vectors. Else by Euclidean distance.

    Attributes:
        counts: How many embeddings each centroid has got. int64, shape (K,).

    Example:
        >>> prototypes = Prototypes(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> prototypes.update(torch.tensor([[2.0, 0.1], [0.1, 3.0]]))
        >>> prototypes.distance(torch.tensor([[5.0, 0.25], [1.0, 1.0]]))
        tensor([0.0000, 0.2585])

    Raises:
        ValueError: If there is no centroid.

    Source: mini-batch k-means of Sculley 2010 ("Web-scale k-means clustering"); the distance of Sorscher et
    al. 2022, arXiv:2206.14486. Differs: nothing.
    """

    def __init__(self, centroids: Tensor, *, spherical: bool = True) -> None:
        if centroids.ndim != 2 or not len(centroids):
            raise ValueError(f"centroids has shape {tuple(centroids.shape)}; it must be (K, D) with K >= 1")
        self.spherical = spherical
        self._means = self._seen_as(centroids)
        self.counts = torch.zeros(len(centroids), dtype=torch.int64, device=centroids.device)

    @property
    def centroids(self) -> Tensor:
        """The centroids; of unit length if spherical. Shape (K, D)."""
        return self._seen_as(self._means)

    @torch.no_grad()
    def nearest(self, embeddings: Tensor) -> Tensor:
        """Return the number of the nearest centroid of each embedding. int64, shape (N,)."""
        # On the unit sphere the nearest in angle is the nearest in Euclidean distance.
        return torch.cdist(self._seen_as(embeddings), self.centroids).argmin(1)

    @torch.no_grad()
    def update(self, embeddings: Tensor) -> None:
        """Give each embedding of a batch to its nearest centroid and move those. Shape (N, D)."""
        points, labels = self._seen_as(embeddings), self.nearest(embeddings)
        got = torch.bincount(labels, minlength=len(self.counts))
        self.counts += got
        sums = torch.zeros_like(self._means).index_add(0, labels, points)
        self._means += (sums - got[:, None] * self._means) / self.counts.clamp(min=1)[:, None]

    @torch.no_grad()
    def distance(self, embeddings: Tensor) -> Tensor:
        """Return 1 - cos(angle) of each embedding and its nearest centroid, in [0, 2]. Shape (N,)."""
        own = normalize(self.centroids, dim=1)[self.nearest(embeddings)]
        return (1.0 - (normalize(self._wide(embeddings), dim=1) * own).sum(1)).clamp(min=0.0)

    def _wide(self, embeddings: Tensor) -> Tensor:
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

    def _seen_as(self, embeddings: Tensor) -> Tensor:
        wide = self._wide(embeddings)
        return normalize(wide, dim=1) if self.spherical else wide


@torch.no_grad()
def first_centroids(embeddings: Tensor, k: int, *, generator: torch.Generator) -> Tensor:
    """Draw k embeddings to start from, far from each other (greedy k-means++).

    Each is drawn with a probability in proportion to its squared distance from those before; of 2 + log k
    such draws the one is kept that leaves the least squared distance in total.

    Args:
        embeddings: Floating, shape (N, D).
        k: In 1 to N.
        generator: Source of the randomness, on the embeddings' device.

    Returns:
        k of the embeddings. Shape (K, D).

    Raises:
        ValueError: If k is out of range or an embedding is not finite.

    Example:
        >>> points = torch.tensor([[0.0], [0.1], [9.0]])
        >>> first_centroids(points, 2, generator=torch.Generator().manual_seed(0)).max()
        tensor(9.)

    Source: Arthur and Vassilvitskii 2007 ("k-means++"). Differs: nothing.
    """
    if not 1 <= k <= len(embeddings):
        raise ValueError(f"k is {k}; it must be in 1 to {len(embeddings)}, the number of embeddings")
    if not embeddings.isfinite().all():
        raise ValueError("embeddings holds a number that is not finite")
    points = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    device = points.device
    chosen = [int(torch.randint(len(points), (1,), generator=generator, device=device))]
    squared = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < k:
        # Embeddings may all lie on those chosen; then any will do.
        weights = squared if squared.sum() > 0 else torch.ones_like(squared)
        # torch.multinomial takes 2^24 weights at most.
        draws = torch.rand(2 + int(math.log(k)), generator=generator, device=device, dtype=torch.float64)
        steps = weights.double().cumsum(0)
        candidates = torch.searchsorted(steps, draws * steps[-1], right=True).clamp(max=len(points) - 1)
        left = torch.minimum(squared, torch.cdist(points[candidates], points).square())
        best = left.sum(1).argmin()
        chosen.append(int(candidates[best]))
        squared = left[best]
    return points[chosen]


def fit_prototypes(batches: Iterable[Tensor], k: int, *, seed: int = 0, spherical: bool = True) -> Prototypes:
    """Cluster embeddings that come in batches, of which only one is held at a time.

    Args:
        batches: Embeddings, each batch of shape (N, D); the first needs at least k of them, and several
            passes are several times the same batches, one after the other.
        k: Number of prototypes, >= 1. Any number within an order of magnitude of the data's classes will do.
        seed: Of the start.
        spherical: As in `Prototypes`.

    Returns:
        The prototypes, on the embeddings' device.

    Raises:
        ValueError: If there is no batch or the first is too small.

    Example:
        >>> points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> fit_prototypes([points, points], 2).counts
        tensor([4, 4])

    Source: Sculley 2010, from a start by Arthur and Vassilvitskii 2007 on the first batch; use for data
    selection: Sorscher et al. 2022, arXiv:2206.14486. Differs: nothing.
    """
    prototypes = None
    for batch in batches:
        if prototypes is None:
            points = normalize(batch, dim=1) if spherical else batch
            generator = torch.Generator(batch.device).manual_seed(seed)
            prototypes = Prototypes(first_centroids(points, k, generator=generator), spherical=spherical)
        prototypes.update(batch)
    if prototypes is None:
        raise ValueError("batches is empty; there must be at least one")
    return prototypes
