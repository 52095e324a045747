"""Losses on samples against loops over tokens, and how their weights add up."""

import math

import pytest
import torch

import rewarm
from rewarm.objectives.policy_losses import Samples

LOSSES = {
    "clipped": rewarm.Clipped(low=0.2, high=0.28),
    "gspo": rewarm.GSPO(low=0.1, high=0.15),
    "sum": rewarm.Sum([rewarm.Clipped(0.2, 0.2), rewarm.GSPO(0.1, 0.1)], [0.25, 2.0]),
}
WEIGHTS = {"token": rewarm.PerToken(), "sequence": rewarm.PerSequence(), "constant": rewarm.PerConstant(9)}
LENGTHS = [5, 1, 3, 7, 2]


def samples(lengths=LENGTHS, width=8, dtype=torch.float64, seed=0, order=None):
    """Completions of these lengths behind prompts that fill up the rows, each with an advantage."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(4, 8, generator=generator, dtype=dtype) for _ in lengths]
    advantages = torch.randn(len(lengths), generator=generator, dtype=dtype)
    chosen = list(range(len(lengths))) if order is None else order
    mask = torch.zeros(len(chosen), width, dtype=torch.bool)
    policy, sampler = (torch.zeros(len(chosen), width, dtype=dtype) for _ in range(2))
    for place, number in enumerate(chosen):
        size = lengths[number]
        mask[place, width - size :] = True
        policy[place, width - size :] = -2 + 0.4 * rows[number][0, :size]
        sampler[place, width - size :] = -2 + 0.4 * rows[number][1, :size]
    ids = torch.arange(len(chosen))[:, None].expand(-1, width)
    return Samples(policy, sampler, advantages[chosen][:, None].expand(-1, width), mask, ids, len(chosen))


def replace(given, logprobs):
    g = given
    return Samples(logprobs, g.sampler_logprobs, g.advantages, g.mask, g.sequence_ids, g.num_sequences)


def written_out(loss, given):
    """(loss, clipped) of each token of each completion, in Python's floats."""
    found = []
    for row in range(given.num_sequences):
        places = given.mask[row].nonzero().flatten().tolist()
        differences = [float(given.logprobs[row, t] - given.sampler_logprobs[row, t]) for t in places]
        if isinstance(loss, rewarm.GSPO):
            differences = [math.fsum(differences) / len(differences)] * len(differences)
        advantage = float(given.advantages[row, 0])
        for difference in differences:
            ratio = math.exp(difference)
            bounded = min(max(ratio, 1 - loss.low), 1 + loss.high)
            found.append(
                (-min(ratio * advantage, bounded * advantage), bounded * advantage < ratio * advantage)
            )
    return found


@pytest.mark.parametrize("name", ["clipped", "gspo"])
def test_values_are_those_of_a_loop_over_tokens(name):
    given = samples()
    losses, clipped = LOSSES[name].values(given)
    expected = written_out(LOSSES[name], given)
    assert losses[given.mask].tolist() == pytest.approx([value for value, _ in expected], rel=1e-12)
    assert clipped[given.mask].tolist() == [is_clipped for _, is_clipped in expected]
    assert 0 < sum(is_clipped for _, is_clipped in expected) < len(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    given = samples()
    policy = given.logprobs.clone().requires_grad_(True)

    def share(logprobs):
        losses, _ = LOSSES[name].values(replace(given, logprobs))
        return (losses * given.mask).sum()

    assert torch.autograd.gradcheck(share, policy)
    share(policy).backward()
    assert (policy.grad[~given.mask] == 0).all()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_of_any_padding_add_up_to_one_batch(name, weights):
    counts = {"tokens": torch.tensor(18.0), "sequences": torch.tensor(5.0)}

    def share(given):
        losses, _ = LOSSES[name].values(given)
        return WEIGHTS[weights].share(losses * given.mask, given, counts).item()

    whole = share(samples())
    parts = share(samples(order=[3, 0], width=11)) + share(samples(order=[4, 1, 2], width=7))
    assert parts == pytest.approx(whole, rel=1e-6)


def test_on_policy_the_gradient_of_a_completion_is_its_advantage_over_its_weight():
    given = samples()
    policy = given.sampler_logprobs.clone().requires_grad_(True)
    losses, clipped = rewarm.GSPO().values(replace(given, policy))
    assert not clipped.any()
    counts = {"sequences": torch.tensor(5.0, dtype=torch.float64)}
    rewarm.PerSequence().share(losses * given.mask, given, counts).backward()
    for row, length in enumerate(LENGTHS):
        expected = -float(given.advantages[row, 0]) / length / 5
        assert policy.grad[row][given.mask[row]].tolist() == pytest.approx([expected] * length, rel=1e-5)


def test_gspo_of_equal_tokens_is_the_clipped_loss():
    given = samples()
    shifted = given.sampler_logprobs + torch.linspace(-0.3, 0.3, 5, dtype=torch.float64)[:, None] * given.mask
    bounds = {"low": 0.1, "high": 0.2}
    one, other = (
        loss.values(replace(given, shifted))[0][given.mask]
        for loss in (rewarm.GSPO(**bounds), rewarm.Clipped(**bounds))
    )
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rewarm.Clipped(low=0.0), r"clip_low is 0.0; it must be in \(0, 1\]"),
        (lambda: rewarm.GSPO(high=-1.0), "clip_high is -1.0; it must be above 0"),
        (lambda: rewarm.PerConstant(0), "tokens is 0; it must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused_where_the_part_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
