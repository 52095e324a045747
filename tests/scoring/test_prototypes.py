"""Mini-batch k-means against known clusters, brute force over all clusterings, and Lloyd's algorithm."""

import itertools
import math
from collections import Counter

import pytest
import torch

from rewarm.scoring.prototypes import Prototypes, first_centroids, fit_prototypes


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(centres, each, spread, seed=0):
    """Points around centres in random order, and which centre each is of."""
    centres = torch.as_tensor(centres, dtype=torch.float64)
    labels = torch.arange(len(centres)).repeat(each)[torch.randperm(each * len(centres), generator=rng(seed))]
    noise = torch.randn(len(labels), centres.shape[1], generator=rng(seed + 1), dtype=torch.float64)
    return centres[labels] + spread * noise, labels


def same_clusters(one, other):
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


def inertia(points, centroids):
    return torch.cdist(points, centroids).square().min(1).values.sum().item()


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_clusters_that_are_apart_are_found_whatever_the_batches(spherical, seed):
    centres = 6 * torch.eye(8)
    points, labels = blobs(centres, each=50, spread=0.4, seed=seed)
    fitted = fit_prototypes(points.split(64), 8, seed=seed, spherical=spherical)
    assert same_clusters(fitted.nearest(points), labels)
    assert fitted.counts.tolist() == [50] * 8
    assert fitted.counts.sum() == len(points)


def test_one_pass_in_one_batch_from_right_starts_gives_the_means_of_the_clusters():
    points, labels = blobs([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], each=40, spread=0.5)
    prototypes = Prototypes(torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]]).double(), spherical=False)
    for batch in points.split(17):
        prototypes.update(batch)
    means = torch.stack([points[labels == label].mean(0) for label in range(3)])
    torch.testing.assert_close(prototypes.centroids, means)


def test_an_update_is_the_published_loop_over_the_batch():
    points = torch.randn(60, 3, generator=rng(), dtype=torch.float64)
    centroids = points[:4].clone()
    prototypes, counts = Prototypes(centroids, spherical=False), [0] * 4
    expected = centroids.clone()
    for batch in points.split(13):
        nearest = [int((point - expected).square().sum(1).argmin()) for point in batch]
        for point, label in zip(batch, nearest, strict=True):
            counts[label] += 1
            rate = 1 / counts[label]
            expected[label] = (1 - rate) * expected[label] + rate * point
        prototypes.update(batch)
        torch.testing.assert_close(prototypes.centroids, expected)
    assert prototypes.counts.tolist() == counts


def test_the_best_of_a_few_starts_equals_brute_force_over_all_clusterings():
    points = torch.rand(9, 2, generator=rng(4), dtype=torch.float64)
    best = math.inf
    for labels in itertools.product(range(3), repeat=9):
        groups = [points[[i for i in range(9) if labels[i] == k]] for k in range(3)]
        best = min(best, sum((g - g.mean(0)).square().sum().item() for g in groups if len(g)))
    found = math.inf
    for seed in range(5):
        # Many passes, so that the running means forget where they started.
        fitted = fit_prototypes([points] * 300, 3, seed=seed, spherical=False)
        found = min(found, inertia(points, fitted.centroids))
    assert found == pytest.approx(best, rel=1e-3)


def test_batches_cluster_nearly_as_well_as_lloyds_algorithm_on_all_at_once():
    points = torch.randn(1500, 4, generator=rng(), dtype=torch.float64)
    centroids = points[:12].clone()
    for _ in range(100):
        labels = torch.cdist(points, centroids).argmin(1)
        centroids = torch.stack([points[labels == k].mean(0) for k in range(12)])
    fitted = fit_prototypes([*points.split(100)] * 3, 12, spherical=False)
    assert inertia(points, fitted.centroids) < 1.1 * inertia(points, centroids)


def test_the_distance_is_one_minus_the_cosine_to_the_nearest_prototype():
    points = torch.randn(40, 5, generator=rng(), dtype=torch.float64)
    fitted = fit_prototypes([points], 6)
    for point, distance in zip(points, fitted.distance(points), strict=True):
        cosines = torch.cosine_similarity(point[None], fitted.centroids)
        assert distance.item() == pytest.approx(1 - cosines.max().item(), abs=1e-12)
    by_position = fit_prototypes([points], 6, spherical=False)
    own = by_position.centroids[torch.cdist(points, by_position.centroids).argmin(1)]
    torch.testing.assert_close(by_position.distance(points), 1 - torch.cosine_similarity(points, own))


def test_examples_far_from_the_middle_of_their_cluster_are_hardest():
    points, labels = blobs(8 * torch.eye(4), each=60, spread=0.5, seed=3)
    centres = torch.eye(4).double()[labels]
    hardness = fit_prototypes([points] * 2, 4).distance(points)
    truth = 1 - torch.cosine_similarity(points, centres)
    ranks = torch.stack([x.argsort().argsort().double() for x in (hardness, truth)])
    assert torch.corrcoef(ranks)[0, 1] > 0.95


def test_only_directions_matter_on_the_sphere():
    points = torch.randn(80, 4, generator=rng(), dtype=torch.float64)
    scaled = points * (0.1 + torch.rand(80, 1, generator=rng(1), dtype=torch.float64))
    one, other = fit_prototypes([points], 5), fit_prototypes([scaled], 5)
    torch.testing.assert_close(one.centroids, other.centroids)
    torch.testing.assert_close(one.distance(points), other.distance(scaled))
    torch.testing.assert_close(one.centroids.norm(dim=1), torch.ones(5).double())


def test_a_first_draw_is_uniform_and_a_second_in_proportion_to_the_squared_distance():
    points, generator, trials = torch.tensor([[0.0], [1.0], [3.0]]), rng(), 4000
    # k = 2 has two candidates, of which the better is kept; one is what the probabilities are about.
    seen = Counter(
        tuple(first_centroids(points, 2, generator=generator).flatten().tolist()) for _ in range(trials)
    )
    firsts = Counter()
    for (first, _), count in seen.items():
        firsts[first] += count
    for first in (0.0, 1.0, 3.0):
        assert abs(firsts[first] - trials / 3) < 4 * math.sqrt(trials * 2 / 9)
    # From 0: 1 weighs 1 and 3 weighs 9; 3 leaves the least, so 1 is kept only if drawn twice.
    p = (1 / 10) ** 2
    assert abs(seen[0.0, 1.0] / firsts[0.0] - p) < 4 * math.sqrt(p / firsts[0.0])
    # From 3: 0 weighs 9, 1 weighs 4; both leave the same distance (1), so the first of the two draws is kept.
    p = 4 / 13
    assert abs(seen[3.0, 1.0] / firsts[3.0] - p) < 4 * math.sqrt(p * (1 - p) / firsts[3.0])


def test_embeddings_that_are_all_alike_still_give_prototypes():
    fitted = fit_prototypes([torch.ones(5, 3)], 3)
    assert fitted.distance(torch.ones(2, 3)).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: Prototypes(torch.zeros(0, 3)), r"centroids has shape \(0, 3\)"),
        (lambda: Prototypes(torch.zeros(3)), r"centroids has shape \(3,\)"),
        (lambda: first_centroids(torch.zeros(2, 3), 3, generator=rng()), "k is 3; it must be in 1 to 2"),
        (lambda: first_centroids(torch.zeros(2, 3), 0, generator=rng()), "k is 0"),
        (lambda: first_centroids(torch.full((2, 3), math.nan), 1, generator=rng()), "not finite"),
        (lambda: fit_prototypes([], 3), "batches is empty"),
        (lambda: fit_prototypes([torch.zeros(2, 3)], 3), "k is 3; it must be in 1 to 2"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(act, named):
    with pytest.raises(ValueError, match=named):
        act()
