"""The search on landscapes whose best mixture is known."""

import math

import pytest
import torch

from rewarm.functional.mixture_search import KernelRidge, best_mixture, draw_mixtures, next_mixtures

SIZES = (16, 8, 4)  # 4:2:1, at a quarter of the paper's budget


def search(score, sources, seed, predictor=None, sizes=SIZES):
    """The best mixture that the loop finds."""
    tried, scores = torch.empty(0, sources, dtype=torch.float64), []
    options = {"predictor": predictor or KernelRidge(), "concentration": [1.0] * sources}
    for iteration, count in enumerate(sizes):
        chosen = next_mixtures(tried, scores, count, seed=100 * seed + iteration, **options)
        tried = torch.cat([tried, chosen])
        scores += [score(mixture) for mixture in chosen]
    return best_mixture(tried, scores, seed=100 * seed + 99, **options)[0]


def random_search(score, sources, seed):
    """The best of as many random mixtures."""
    drawn = draw_mixtures([1.0] * sources, sum(SIZES), seed)
    return drawn[torch.tensor([score(mixture) for mixture in drawn]).argmax()]


def bowl(seed, sources, noise=0.0):
    """A quadratic loss with its least value at a random mixture, and that mixture."""
    generator = torch.Generator().manual_seed(seed)
    best = draw_mixtures([2.0] * sources, 1, seed + 1000)[0]
    root = torch.randn(sources, sources, generator=generator, dtype=torch.float64)
    curvature = root @ root.T + torch.eye(sources)

    def score(mixture):
        error = noise * torch.randn((), generator=generator, dtype=torch.float64)
        return -float((mixture - best) @ curvature @ (mixture - best) + error)

    return score, best, curvature


def regret(mixture, best, curvature):
    return float((mixture - best) @ curvature @ (mixture - best))


def regrets(sources, noise=0.0, seeds=20, make=KernelRidge):
    """How far above the bottom of a bowl each of the two searches ends, by seed."""
    pairs = []
    for seed in range(seeds):
        score, best, curvature = bowl(seed, sources, noise)
        pairs.append(
            [
                regret(find(), best, curvature)
                for find in (
                    lambda score=score, seed=seed: search(score, sources, seed, make()),
                    lambda score=score, seed=seed: random_search(score, sources, seed),
                )
            ]
        )
    return list(zip(*pairs, strict=True))


@pytest.mark.parametrize(("sources", "noise"), [(3, 0.0), (5, 0.0), (5, 0.05), (8, 0.0)])
def test_on_a_bowl_it_comes_nearer_to_the_bottom_than_random_search_on_the_same_budget(sources, noise):
    ours, random = regrets(sources, noise)
    assert sum(one < other for one, other in zip(ours, random, strict=True)) >= 16
    assert sum(ours) < 0.5 * sum(random)


def test_without_noise_it_all_but_finds_the_bottom():
    # The rest is the grid of candidates.
    assert max(regrets(5, seeds=10)[0]) < 0.02


def test_with_more_sources_than_can_be_told_apart_it_is_no_worse_than_random_search():
    ours, random = regrets(16)
    assert sum(ours) < 1.1 * sum(random)


def exponential_law(seed, sources=4, domains=3):
    """Losses of some domains that fall exponentially with the shares, as data-mixing laws have it."""
    generator = torch.Generator().manual_seed(seed)
    slopes = 3 * torch.rand(domains, sources, generator=generator, dtype=torch.float64)
    return lambda mixture: -float((1.0 + torch.exp(-slopes @ mixture)).mean() + 0.3 * mixture.square().sum())


def test_on_a_law_that_is_not_quadratic_it_is_better_than_random_search_too():
    gains = []
    for seed in range(20):
        score = exponential_law(seed)
        gains.append(score(search(score, 4, seed)) - score(random_search(score, 4, seed)))
    assert sum(gain > 0 for gain in gains) >= 16
    assert sum(gains) > 0


class Nearest:
    """A regressor of another kind: the mean score of the three nearest mixtures."""

    def fit(self, x, y):
        self.x, self.y = torch.tensor(x), torch.tensor(y)

    def predict(self, x):
        nearest = torch.cdist(torch.tensor(x), self.x).topk(min(3, len(self.x)), largest=False).indices
        return self.y[nearest].mean(1).tolist()


def test_anything_that_fits_and_predicts_will_do():
    ours, random = regrets(3, make=Nearest)
    assert sum(ours) < 0.5 * sum(random)


def test_the_next_mixtures_are_among_the_best_predicted_and_differ():
    class First:
        def fit(self, x, y):
            self.seen = len(x), len(y)

        def predict(self, x):
            return x[:, 0]

    tried = draw_mixtures([1.0] * 3, 5, 0)
    predictor = First()
    options = {"predictor": predictor, "concentration": [1.0] * 3, "candidates": 1000, "top": 50}
    chosen = next_mixtures(tried, [0.0] * 5, 20, seed=7, **options)
    assert predictor.seen == (5, 5)
    assert len(chosen.unique(dim=0)) == 20
    assert chosen[:, 0].min() >= draw_mixtures([1.0] * 3, 1000, 7)[:, 0].sort(descending=True).values[49]
    assert torch.equal(chosen, next_mixtures(tried, [0.0] * 5, 20, seed=7, **options))
    assert not torch.equal(chosen, next_mixtures(tried, [0.0] * 5, 20, seed=8, **options))


def test_the_best_mixture_may_be_one_that_was_tried():
    tried = torch.tensor([[0.9999, 0.0001], [0.5, 0.5], [0.0001, 0.9999]], dtype=torch.float64)

    class Peak:
        def fit(self, x, y):
            pass

        def predict(self, x):
            return -abs(x[:, 0] - 0.9999)

    mixture, predicted = best_mixture(
        tried, [1.0, 0.0, 0.0], predictor=Peak(), concentration=[50.0, 50.0], candidates=10, seed=0
    )
    assert torch.equal(mixture, tried[0])
    assert predicted == 0.0


def test_mixtures_are_drawn_from_the_prior():
    drawn = draw_mixtures([1.0, 2.0, 5.0], 20_000, 0)
    alpha = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(drawn.mean(0), alpha / 8, rtol=0.02, atol=0)
    torch.testing.assert_close(drawn.var(0), alpha / 8 * (1 - alpha / 8) / 9, rtol=0.05, atol=0)
    assert drawn.min() >= 0
    torch.testing.assert_close(drawn.sum(1), torch.ones(20_000, dtype=torch.float64))


def test_drawing_leaves_the_random_state_of_the_program_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    draw_mixtures([1.0, 1.0], 4, 0)
    assert torch.equal(torch.rand(2), expected)


# --- the regressor --------------------------------------------------------------------------------------


def kernel(u, v, length):
    return 1 + math.exp(-sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) / (2 * length**2))


def regression(w, y, length, strength, at):
    """Kernel ridge regression of values around a known mean, written out."""
    gram = torch.tensor([[kernel(u, v, length) for v in w] for u in w], dtype=torch.float64)
    slopes = torch.linalg.solve(
        gram + strength * torch.eye(len(w), dtype=torch.float64), torch.tensor(y).double()
    )
    return [sum(float(a) * kernel(u, v, length) for a, v in zip(slopes, w, strict=True)) for u in at]


def test_the_regressor_is_the_one_of_its_grid_that_predicts_left_out_mixtures_best():
    w = draw_mixtures([1.0] * 4, 12, 0)
    y = w.square().sum(1) + 0.05 * torch.randn(
        12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    rows, values = w.tolist(), (y - y.mean()).tolist()
    distances = sorted(math.dist(a, b) for i, a in enumerate(rows) for b in rows[:i])
    median = distances[(len(distances) - 1) // 2]
    errors = {}
    for length in (0.5, 1, 2, 4, 8, 16):
        for power in range(-8, 2):
            error = 0.0
            for i in range(12):
                others = [*rows[:i], *rows[i + 1 :]], [*values[:i], *values[i + 1 :]]
                (left_out,) = regression(*others, length * median, 10.0**power, [rows[i]])
                error += (values[i] - left_out) ** 2
            errors[length * median, 10.0**power] = error
    best = min(errors, key=errors.get)
    new = draw_mixtures([1.0] * 4, 6, 1).tolist()
    expected = [float(y.mean()) + value for value in regression(rows, values, *best, new)]
    found = KernelRidge().fit(w.numpy(), y.numpy()).predict(new)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_regressor_is_near_on_smooth_landscapes_and_takes_constants():
    w, new = draw_mixtures([1.0] * 4, 40, 0), draw_mixtures([1.0] * 4, 200, 1)
    for value in (lambda w: w[:, 0] * w[:, 1] - w[:, 2] ** 2, lambda w: torch.exp(-3 * w).sum(1)):
        found = torch.as_tensor(KernelRidge().fit(w, value(w)).predict(new))
        assert (found - value(new)).square().mean() < 1e-3 * value(new).var()
    assert KernelRidge().fit(w, torch.full((40,), 2.0)).predict(new).tolist() == pytest.approx([2.0] * 200)


# --- errors ---------------------------------------------------------------------------------------------


class Broken:
    def fit(self, x, y):
        pass

    def predict(self, x):
        return [math.nan] * len(x)


def choose(**changed):
    options = {"predictor": KernelRidge(), "concentration": [1.0, 1.0], "seed": 0} | changed
    count = options.pop("count", 2)
    return next_mixtures(draw_mixtures([1.0, 1.0], 3, 0), [0.0, 1.0, 2.0], count, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_mixtures([1.0], 2, 0), "two or more"),
        (lambda: draw_mixtures([1.0, 0.0], 2, 0), "above 0"),
        (lambda: draw_mixtures([1.0, math.nan], 2, 0), "above 0"),
        (lambda: draw_mixtures([1.0, 1.0], 0, 0), "count is 0"),
        (lambda: choose(top=1), "top is 1; it must be from count=2"),
        (lambda: choose(top=30, candidates=20), "to candidates=20"),
        (lambda: choose(count=300), "count=300"),
        (lambda: KernelRidge().fit([[0.5, 0.5]] * 3, [1.0, 2.0, 3.0]), "3 mixtures; at least two"),
        (lambda: choose(predictor=Broken()), "predictor Broken gave .* not finite"),
    ],
)
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
