"""Preference losses against golden values, scalar loops and what they promise about their gradients."""

import math

import pytest
import torch

from rewarm.functional.preference import dpo_loss, nca_pair_loss

# Policy log-probs -12 and -15 against reference -13 and -14.
CHOSEN, REJECTED = torch.tensor([1.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)


def draws(seed=0, pairs=16, scale=6.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, pairs, generator=generator, dtype=torch.float64)).unbind(0)


def log_of_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def test_dpo_has_its_golden_value():
    assert dpo_loss(CHOSEN, REJECTED, beta=0.1).item() == pytest.approx(0.598139, abs=1e-6)


def test_conservative_dpo_has_its_golden_value():
    loss = dpo_loss(CHOSEN, REJECTED, beta=0.1, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.618139, abs=1e-6)


def test_nca_has_its_golden_value():
    assert nca_pair_loss(CHOSEN, REJECTED, beta=0.1).item() == pytest.approx(1.338793, abs=1e-6)


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 0.49])
def test_dpo_equals_a_loop_over_pairs(beta, smoothing):
    chosen, rejected = draws()
    expected = []
    for w, l in zip(chosen.tolist(), rejected.tolist(), strict=True):
        z = beta * (w - l)
        expected.append(-(1 - smoothing) * log_of_sigmoid(z) - smoothing * log_of_sigmoid(-z))
    losses = dpo_loss(chosen, rejected, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_nca_equals_a_loop_over_pairs(beta):
    chosen, rejected = draws(seed=1)
    expected = []
    for w, l in zip(chosen.tolist(), rejected.tolist(), strict=True):
        w, l = beta * w, beta * l
        expected.append(-log_of_sigmoid(w) - 0.5 * log_of_sigmoid(-w) - 0.5 * log_of_sigmoid(-l))
    losses = nca_pair_loss(chosen, rejected, beta=beta)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    chosen, rejected = (values.requires_grad_() for values in draws(seed=2, pairs=5, scale=2.0))
    assert torch.autograd.gradcheck(
        lambda w, l: dpo_loss(w, l, beta=0.7, label_smoothing=0.1), (chosen, rejected)
    )
    assert torch.autograd.gradcheck(lambda w, l: nca_pair_loss(w, l, beta=0.7), (chosen, rejected))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_equal_margins_cost_log_two(smoothing):
    ratios = draws()[0]
    losses = dpo_loss(ratios, ratios, beta=0.3, label_smoothing=smoothing)
    torch.testing.assert_close(losses, torch.full_like(ratios, math.log(2)))


def test_only_the_difference_matters_to_dpo_but_not_to_nca():
    chosen, rejected = draws()
    torch.testing.assert_close(
        dpo_loss(chosen + 3.0, rejected + 3.0, beta=0.2), dpo_loss(chosen, rejected, beta=0.2)
    )
    moved = nca_pair_loss(chosen + 3.0, rejected + 3.0, beta=0.2) - nca_pair_loss(chosen, rejected, beta=0.2)
    assert moved.abs().min() > 1e-3


def test_dpo_never_lowers_the_chosen_nor_raises_the_rejected():
    chosen, rejected = (values.requires_grad_() for values in draws())
    dpo_loss(chosen, rejected, beta=0.5).sum().backward()
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()
    torch.testing.assert_close(chosen.grad, -rejected.grad)


def test_smoothing_turns_the_gradient_beyond_the_log_odds_of_the_labels():
    # The optimum of the smoothed loss is at z = log((1 - s) / s).
    z = math.log(0.8 / 0.2)
    chosen = torch.tensor([z - 0.1, z, z + 0.1], dtype=torch.float64, requires_grad=True)
    dpo_loss(chosen, torch.zeros(3, dtype=torch.float64), beta=1.0, label_smoothing=0.2).sum().backward()
    assert chosen.grad[0] < 0 < chosen.grad[2]
    assert abs(chosen.grad[1]) < 1e-12


def test_nca_raises_the_chosen_up_to_its_own_bound_and_lowers_the_rejected():
    # d/dr (-log s(r) - log s(-r) / 2) = -(1 - s(r)) + s(r) / 2, which is 0 at s(r) = 2/3.
    beta, turn = 0.5, math.log(2.0) / 0.5
    chosen = torch.tensor([-30.0, 0.0, turn - 0.1, turn + 0.1], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-30.0, 0.0, 5.0, 30.0], dtype=torch.float64, requires_grad=True)
    nca_pair_loss(chosen, rejected, beta=beta).sum().backward()
    assert (chosen.grad[:3] < 0).all()
    assert chosen.grad[3] > 0
    assert (rejected.grad > 0).all()
    s = torch.sigmoid(beta * chosen.detach())
    torch.testing.assert_close(chosen.grad, beta * (s / 2 - (1 - s)))


def test_huge_ratios_stay_finite():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    rejected = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses = dpo_loss(chosen, rejected, beta=1.0) + nca_pair_loss(chosen, rejected, beta=1.0)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


def test_no_pairs_give_no_losses():
    none = torch.zeros(0)
    assert dpo_loss(none, none, beta=0.1).tolist() == nca_pair_loss(none, none, beta=0.1).tolist() == []


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_above_zero(beta):
    for loss in (dpo_loss, nca_pair_loss):
        with pytest.raises(ValueError, match=r"beta is (0\.0|-0\.1|nan); it must be above 0"):
            loss(CHOSEN, REJECTED, beta=beta)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_must_be_below_one_half(smoothing):
    with pytest.raises(ValueError, match=rf"label_smoothing is {smoothing}; it must be in \[0, 0\.5\)"):
        dpo_loss(CHOSEN, REJECTED, beta=0.1, label_smoothing=smoothing)
