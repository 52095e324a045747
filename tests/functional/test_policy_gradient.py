"""Group advantages, the clipped surrogate and the KL estimate against scalar loops and their null cases."""

import math
import statistics

import pytest
import torch

from rewarm.functional.policy_gradient import clipped_policy_loss, group_advantages, kl_estimate


def draws(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_advantages_equal_a_loop_over_groups(scale_by_std):
    rewards = draws(5, 4)
    expected = []
    for group in rewards.tolist():
        mean, deviation = statistics.fmean(group), statistics.stdev(group)
        expected.append([(r - mean) / (deviation + 1e-4 if scale_by_std else 1.0) for r in group])
    advantages = group_advantages(rewards, scale_by_std=scale_by_std)
    torch.testing.assert_close(
        advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, 1000.1, -123.456])
@pytest.mark.parametrize("completions", [2, 3, 7, 16])
def test_equal_rewards_have_advantage_zero(reward, completions):
    rewards = torch.full((3, completions), reward)
    for scale_by_std in (True, False):
        assert (group_advantages(rewards, scale_by_std=scale_by_std) == 0).all()


def test_advantages_of_a_group_sum_to_zero_and_keep_its_order():
    rewards = draws(6, 8)
    for scale_by_std in (True, False):
        advantages = group_advantages(rewards, scale_by_std=scale_by_std)
        assert advantages.sum(-1).abs().max() < 1e-12
        assert torch.equal(advantages.argsort(-1), rewards.argsort(-1))


def test_scaling_makes_groups_of_any_spread_alike():
    rewards = draws(1, 8)
    groups = torch.cat([rewards, 100.0 * rewards + 5.0])
    scaled = group_advantages(groups, scale_by_std=True, epsilon=0.0)
    torch.testing.assert_close(scaled[0], scaled[1])
    centred = group_advantages(groups, scale_by_std=False)
    torch.testing.assert_close(100.0 * centred[0], centred[1])


def test_one_completion_is_no_group():
    with pytest.raises(ValueError, match="completions_per_group is 1; it must be at least 2"):
        group_advantages(torch.ones(3, 1), scale_by_std=True)


def reference_loss(policy, sampler, advantage, low, high):
    ratio = math.exp(policy - sampler)
    clipped = min(max(ratio, 1.0 - low), 1.0 + high)
    return -min(ratio * advantage, clipped * advantage), ratio * advantage > clipped * advantage


def test_loss_equals_a_loop_over_tokens():
    policy, sampler, advantages = draws(8, 16), draws(8, 16, seed=1), draws(8, 16, seed=2)
    losses, clipped = clipped_policy_loss(policy, sampler, advantages, clip_low=0.2, clip_high=0.28)
    for place in range(policy.numel()):
        loss, was_clipped = reference_loss(
            policy.flatten()[place].item(),
            sampler.flatten()[place].item(),
            advantages.flatten()[place].item(),
            0.2,
            0.28,
        )
        assert losses.flatten()[place].item() == pytest.approx(loss, rel=1e-12)
        assert bool(clipped.flatten()[place]) == was_clipped
    assert 0.2 < clipped.double().mean() < 0.8  # both kinds are among the draws


def test_gradient_is_that_of_finite_differences():
    policy = draws(4, 5, scale=0.5).requires_grad_()
    sampler, advantages = draws(4, 5, seed=1, scale=0.5), draws(4, 1, seed=2)
    assert torch.autograd.gradcheck(
        lambda p: clipped_policy_loss(p, sampler, advantages, clip_low=0.2, clip_high=0.3)[0], (policy,)
    )


def test_on_policy_the_gradient_is_minus_the_advantage_and_the_loss_too():
    policy, advantages = draws(6, 5).requires_grad_(), draws(6, 1, seed=1)
    losses, clipped = clipped_policy_loss(policy, policy.detach(), advantages, clip_low=0.2, clip_high=0.2)
    losses.sum().backward()
    torch.testing.assert_close(policy.grad, -advantages.expand(6, 5))
    torch.testing.assert_close(losses.detach(), -advantages.expand(6, 5))
    assert not clipped.any()


@pytest.mark.parametrize(
    ("advantage", "ratio", "is_clipped"),
    [
        (1.0, 0.5, False),  # a good token that became too rare is still pulled up
        (1.0, 1.1, False),
        (1.0, 1.5, True),
        (-1.0, 0.5, True),
        (-1.0, 0.9, False),
        (-1.0, 1.5, False),  # a bad token that became too frequent is still pushed down
        (0.0, 1.5, False),
    ],
)
def test_clipping_stops_only_what_goes_further_the_way_of_the_advantage(advantage, ratio, is_clipped):
    policy = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    losses, clipped = clipped_policy_loss(
        policy, torch.zeros(1), torch.tensor([advantage], dtype=torch.float64), clip_low=0.2, clip_high=0.2
    )
    losses.sum().backward()
    assert clipped.tolist() == [is_clipped]
    assert policy.grad.item() == pytest.approx(0.0 if is_clipped else -ratio * advantage)


def test_bounds_are_separate():
    policy = torch.tensor([math.log(1.25), math.log(0.75)])
    advantages = torch.tensor([1.0, -1.0])
    _, clipped = clipped_policy_loss(policy, torch.zeros(2), advantages, clip_low=0.2, clip_high=0.28)
    assert clipped.tolist() == [False, True]
    _, clipped = clipped_policy_loss(policy, torch.zeros(2), advantages, clip_low=0.3, clip_high=0.2)
    assert clipped.tolist() == [True, False]


def test_no_gradient_reaches_the_sampler_or_the_reference():
    policy, other = draws(4).requires_grad_(), draws(4, seed=1).requires_grad_()
    losses, _ = clipped_policy_loss(policy, other, torch.ones(4), clip_low=0.2, clip_high=0.2)
    (losses + kl_estimate(policy, other)).sum().backward()
    assert policy.grad is not None
    assert other.grad is None


@pytest.mark.parametrize(
    ("name", "value"), [("clip_low", 0.0), ("clip_low", 1.1), ("clip_high", 0.0), ("clip_high", -1.0)]
)
def test_clip_ranges_are_checked(name, value):
    bounds = {"clip_low": 0.2, "clip_high": 0.2} | {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        clipped_policy_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), **bounds)


def test_kl_estimate_equals_a_loop_over_tokens():
    policy, reference = draws(20), draws(20, seed=1)
    expected = [
        math.exp(r - p) - (r - p) - 1.0 for p, r in zip(policy.tolist(), reference.tolist(), strict=True)
    ]
    torch.testing.assert_close(kl_estimate(policy, reference), torch.tensor(expected, dtype=torch.float64))


def test_kl_estimate_is_never_negative_and_zero_only_where_both_agree():
    differences = torch.cat([torch.logspace(-12, 1, 400), -torch.logspace(-12, 1, 400)])
    assert (kl_estimate(torch.zeros(800), differences) >= 0).all()
    assert (kl_estimate(torch.zeros(800), differences)[differences.abs() > 1e-3] > 0).all()
    assert kl_estimate(differences, differences).abs().max() == 0


def test_kl_estimate_has_the_divergence_as_its_mean():
    logits = draws(2, 6)
    policy, reference = logits.log_softmax(-1).unbind(0)
    divergence = (policy.exp() * (policy - reference)).sum()
    mean = (policy.exp() * kl_estimate(policy, reference)).sum()
    torch.testing.assert_close(mean, divergence)


def test_kl_estimate_has_the_gradient_of_finite_differences():
    reference = draws(6, seed=1)
    assert torch.autograd.gradcheck(lambda p: kl_estimate(p, reference), (draws(6).requires_grad_(),))
