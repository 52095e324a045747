"""Advantages against the statistics module."""

import statistics

import pytest
import torch

import rewarm
from rewarm.objectives.advantages import Advantage


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_those_of_a_loop_over_groups(scale):
    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = rewarm.GroupAdvantage(scale_by_std=scale).values(rewards)
    for group, advantages in zip(rewards.tolist(), found.tolist(), strict=True):
        deviation = statistics.stdev(group) + 1e-4 if scale else 1.0
        expected = [(reward - statistics.fmean(group)) / deviation for reward in group]
        assert advantages == pytest.approx(expected, rel=1e-9)


def test_groups_of_equal_rewards_have_none_and_the_part_says_so():
    for scale in (True, False):
        advantage = rewarm.GroupAdvantage(scale)
        assert advantage.is_zero_for_equal_rewards
        assert advantage.values(torch.tensor([[0.3] * 5])).tolist() == [[0.0] * 5]


class Raw(Advantage):
    def values(self, rewards):
        return rewards


def test_groups_are_skipped_only_where_their_advantage_is_surely_zero():
    assert not rewarm.GRPO({"model_type": "llama"}).learns_from_equal_rewards
    assert rewarm.GRPO({"model_type": "llama"}, advantage=Raw()).learns_from_equal_rewards
    assert rewarm.GRPO({"model_type": "llama"}, kl=0.1).learns_from_equal_rewards
