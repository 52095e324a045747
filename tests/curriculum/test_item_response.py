"""Item response theory: known parameters recovered, optima checked by grids and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Binomial, Normal

from rewarm.curriculum.item_response import estimate_ability, fit_rasch, margin_of_pass_rate


def simulated(models, examples, answers=1, seed=0, spread=1.5):
    """Abilities, difficulties, and the counts of correct answers they lead to."""
    generator = torch.Generator().manual_seed(seed)
    abilities = torch.randn(models, generator=generator, dtype=torch.float64)
    difficulties = spread * torch.randn(examples, generator=generator, dtype=torch.float64)
    p = torch.sigmoid(abilities[:, None] - difficulties)
    drawn = torch.rand(answers, models, examples, generator=generator, dtype=torch.float64) < p
    return abilities, difficulties, drawn.sum(0)


def correlation(x, y):
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def rank_correlation(x, y):
    return correlation(x.argsort().argsort().double(), y.argsort().argsort().double())


def log_density(abilities, difficulties, correct, trials, ability_std, difficulty_std):
    likelihood = Binomial(trials.double(), logits=abilities[:, None] - difficulties).log_prob(
        correct.double()
    )
    zero, stds = torch.zeros(1).double(), torch.tensor([ability_std, difficulty_std], dtype=torch.float64)
    prior = (
        Normal(zero, stds[0]).log_prob(abilities).sum() + Normal(zero, stds[1]).log_prob(difficulties).sum()
    )
    return likelihood.sum() + prior


# --- several models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "answers", "ranks"), [(8, 1, 0.8), (20, 1, 0.9), (60, 1, 0.96), (8, 8, 0.96)]
)
def test_known_difficulties_and_abilities_are_recovered(models, answers, ranks):
    abilities, difficulties, correct = simulated(models, 400, answers)
    fit = fit_rasch(correct, torch.full_like(correct, answers))
    assert rank_correlation(fit.difficulties, difficulties) > ranks
    assert correlation(fit.abilities, abilities) > 0.98


def test_with_many_answers_the_values_themselves_are_recovered():
    abilities, difficulties, correct = simulated(30, 60, answers=400, spread=1.0)
    fit = fit_rasch(correct, torch.full_like(correct, 400))
    # The prior puts the mean ability at 0.
    shift = abilities.mean() - fit.abilities.mean()
    torch.testing.assert_close(fit.abilities + shift, abilities, rtol=0, atol=0.1)
    torch.testing.assert_close(fit.difficulties + shift, difficulties, rtol=0, atol=0.12)


@pytest.mark.parametrize(("ability_std", "difficulty_std"), [(1.0, 1000.0), (1.0, 2.0), (0.3, 1.0)])
def test_the_fit_is_where_the_gradient_of_the_density_vanishes(ability_std, difficulty_std):
    _, _, correct = simulated(6, 25, answers=3, seed=1)
    trials = torch.full_like(correct, 3)
    correct[2, 5:9], trials[2, 5:9] = 0, 0
    fit = fit_rasch(correct, trials, ability_std=ability_std, difficulty_std=difficulty_std)
    leaves = [parameter.requires_grad_() for parameter in fit]
    density = log_density(*leaves, correct, trials, ability_std, difficulty_std)
    for gradient in torch.autograd.grad(density, leaves):
        assert gradient.abs().max() < 1e-8


def test_examples_that_all_or_none_got_right_are_extreme_but_finite():
    correct = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1], [1, 0, 1, 1]])
    fit = fit_rasch(correct, torch.ones_like(correct))
    assert fit.difficulties.isfinite().all()
    assert fit.difficulties.argmin() == 0
    assert fit.difficulties.argmax() == 1
    alike = fit_rasch(torch.ones(3, 4), torch.ones(3, 4))
    assert alike.abilities.isfinite().all()
    assert alike.difficulties.isfinite().all()


def test_answers_that_are_missing_change_nothing():
    _, _, correct = simulated(5, 30, seed=2)
    trials = torch.ones_like(correct)
    silent = torch.zeros(1, 30)
    alone = fit_rasch(correct, trials)
    joined = fit_rasch(torch.cat([correct, silent]), torch.cat([trials, silent]))
    torch.testing.assert_close(joined.difficulties, alone.difficulties)
    torch.testing.assert_close(joined.abilities, torch.cat([alone.abilities, torch.zeros(1).double()]))


def test_counts_are_as_good_as_single_answers():
    # Two answers of one model are two rows only if its ability is the same: with abilities held by the prior.
    _, _, correct = simulated(4, 20, answers=6, seed=3)
    doubled = fit_rasch(2 * correct, torch.full_like(correct, 12), ability_std=1.0, difficulty_std=5.0)
    scaled = fit_rasch(
        correct, torch.full_like(correct, 6), ability_std=math.sqrt(2), difficulty_std=5.0 * math.sqrt(2)
    )
    torch.testing.assert_close(doubled.difficulties, scaled.difficulties)


# --- one model ------------------------------------------------------------------------------------

answers_of = st.lists(st.tuples(st.floats(-30, 30), st.booleans()), max_size=40)


@given(answers_of, st.floats(0.2, 5.0))
@settings(deadline=None)
def test_newtons_ability_equals_a_grid_search(answers, prior_std):
    difficulties = torch.tensor([b for b, _ in answers], dtype=torch.float64)
    correct = torch.tensor([right for _, right in answers])
    found = estimate_ability(correct, difficulties, prior_std=prior_std)

    def density(theta):
        signs = correct.double() * 2 - 1
        likelihood = torch.nn.functional.logsigmoid(signs * (theta[:, None] - difficulties)).sum(1)
        return likelihood - theta.square() / (2 * prior_std**2)

    low, high = -40.0, 40.0
    for _ in range(4):
        grid = torch.linspace(low, high, 401, dtype=torch.float64)
        best, step = grid[density(grid).argmax()].item(), (high - low) / 400
        low, high = best - step, best + step
    # Where the density is flat to rounding, a grid can't tell its points apart.
    assert found == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("side", [1, -1])
def test_an_ability_far_from_the_start_is_found_where_plain_newton_runs_in_circles(side):
    difficulties = torch.full((1000,), 20.0 * side)
    found = estimate_ability(torch.full((1000,), side == 1), difficulties)
    # 1000 sigmoid(-(x - 20)) = x at the optimum.
    assert 1000 / (1 + math.exp(abs(found) - 20)) == pytest.approx(abs(found), rel=1e-9)
    assert found * side > 0


@pytest.mark.parametrize("prior_std", [1e3, 1e8, 1e50])
@pytest.mark.parametrize("right", [True, False])
def test_a_prior_that_says_next_to_nothing_is_enough(prior_std, right):
    found = abs(estimate_ability(torch.full((3,), right), torch.zeros(3), prior_std=prior_std))
    # 3 sigmoid(-x) = x / prior_std^2, in logarithms.
    left = math.log(3) - found - math.log1p(math.exp(-found))
    assert left == pytest.approx(math.log(found) - 2 * math.log(prior_std), abs=1e-9)


def test_the_ability_of_one_model_is_the_fits_with_its_difficulties_held():
    _, _, correct = simulated(6, 300, seed=4)
    fit = fit_rasch(correct, torch.ones_like(correct))
    for model in range(6):
        ability = estimate_ability(correct[model], fit.difficulties)
        assert ability == pytest.approx(fit.abilities[model].item(), abs=1e-8)


def test_without_answers_the_prior_speaks():
    assert estimate_ability(torch.zeros(0), torch.zeros(0)) == 0.0


@pytest.mark.parametrize("pass_rate", [0.1, 0.5, 0.8])
def test_the_margin_is_where_the_model_passes_at_the_rate(pass_rate):
    ability = 0.7
    difficulty = ability + margin_of_pass_rate(pass_rate)
    assert 1 / (1 + math.exp(difficulty - ability)) == pytest.approx(pass_rate, rel=1e-12)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: fit_rasch(ONES, ONES[:1]), r"num_correct has shape \(2, 3\) and num_trials \(1, 3\)"),
        (lambda: fit_rasch(2 * ONES, ONES), r"num_correct must be in \[0, num_trials\]"),
        (lambda: fit_rasch(-ONES, ONES), r"num_correct must be in \[0, num_trials\]"),
        (lambda: fit_rasch(ONES * math.nan, ONES), r"num_correct must be in \[0, num_trials\]"),
        (lambda: fit_rasch(0 * ONES, 0 * ONES), "example 0 has no answer"),
        (lambda: fit_rasch(ONES, ONES, ability_std=0.0), "ability_std is 0.0"),
        (lambda: fit_rasch(ONES, ONES, difficulty_std=math.inf), "difficulty_std is inf"),
        (lambda: fit_rasch(ONES, ONES, tolerance=-1.0), "tolerance is -1.0"),
        (lambda: estimate_ability(ONES[0], ONES[0, :2]), r"correct has shape \(3,\)"),
        (lambda: estimate_ability(-ONES[0], ONES[0]), "something else than 0 and 1"),
        (lambda: estimate_ability(ONES[0], ONES[0] * math.nan), "not finite"),
        (lambda: estimate_ability(ONES[0], ONES[0], prior_std=0.0), "prior_std is 0.0"),
        (lambda: margin_of_pass_rate(0.0), "pass_rate is 0.0"),
        (lambda: margin_of_pass_rate(1.0), "pass_rate is 1.0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(act, named):
    with pytest.raises(ValueError, match=named):
        act()
