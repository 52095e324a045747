"""Copies of weights are kept and put in the weights' place, and the weights come back to the bit."""

import pytest
import torch
from torch import nn

from rewarm.callbacks.averaged_weights import AveragedWeights
from rewarm.callbacks.averaging_policy import AveragingPolicy


def net():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    made[1].weight = made[0].weight
    made[2].requires_grad_(False)
    return made


def filled(*values):
    """A net with a row for each value."""
    module, averages = net(), AveragedWeights()
    averages.find(module)
    for value in values:
        fill(module, value)
        averages.take(0.0, opens_row=True, max_rows=2)
    return module, averages


def fill(module, value):
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(value)


def values_of(module):
    return {float(value) for p in module.parameters() if p.requires_grad for value in p.detach().flatten()}


def test_tied_weights_are_one_and_frozen_ones_none():
    _, averages = filled()
    assert averages.names == ["0.weight", "0.bias", "1.bias"]
    assert [len(row) for row in averages.rows] == []


def test_the_oldest_row_goes_and_its_memory_is_used_again():
    module, averages = filled(1.0, 2.0)
    first = averages.rows[0]
    fill(module, 3.0)
    averages.take(0.0, opens_row=True, max_rows=2)
    assert averages.rows[1] is first
    assert [{float(v) for copy in row for v in copy.flatten()} for row in averages.rows] == [{2.0}, {3.0}]


def test_an_average_is_put_in_place_and_taken_out_again():
    module, averages = filled(1.0, 2.0)
    fill(module, 7.0)
    averages.apply([0.25, 0.75])
    assert averages.is_applied
    assert values_of(module) == {1.75}
    averages.exchange(module)
    assert values_of(module) == {7.0}
    averages.exchange(module)
    assert values_of(module) == {1.75}
    averages.restore(module)
    assert values_of(module) == {7.0}
    assert not averages.is_applied
    fill(module, 8.0)
    averages.restore(module)  # nothing is in place
    assert values_of(module) == {8.0}


def test_weights_that_inference_mode_has_seen_can_be_trained_on():
    module, averages = filled(1.0, 2.0)
    with torch.inference_mode():
        averages.apply([0.5, 0.5])
        averages.restore(module)
        averages.apply([0.5, 0.5])
    module[0](torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert not any(parameter.is_inference() for parameter in module.parameters())


def test_a_state_dict_is_detached_from_the_weights_alone():
    module, averages = filled(1.0)
    state = averages.detached(module.state_dict())
    fill(module, 2.0)
    assert {float(v) for v in state["0.weight"].flatten()} == {1.0}
    assert state["0.weight"] is state["1.weight"]
    assert state["2.weight"].data_ptr() == module[2].weight.data_ptr()


def test_rows_of_other_weights_are_refused():
    module, averages = filled(1.0)
    averages.rows[0][0] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"an average has shape \(2, 2\), its parameter \(3, 3\)"):
        averages.settle()
    module[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"the averaged and the trainable parameters differ in \['0.bias'\]"):
        averages.find(module)
    averages.clear()
    averages.find(module)
    assert averages.names == ["0.weight", "1.bias"]
    with pytest.raises(ValueError, match="Linear has no trainable parameters to average"):
        averages.find(nn.Linear(2, 2).requires_grad_(False))


def test_the_name_that_compilation_adds_does_not_count():
    module, averages = filled(1.0)
    compiled = nn.Module()
    compiled._orig_mod = module[0]
    averages.find(nn.Sequential(compiled, module[1]))
    assert averages.names == ["0.weight", "0.bias", "1.bias"]


def test_a_moving_average_of_bfloat16_weights_does_not_stall():
    module, averages, policy = nn.Linear(1, 1, bias=False), AveragedWeights(), AveragingPolicy("ema")
    module.weight = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    averages.find(module)
    for number in range(1, 2001):  # a first 1.0, then 1.5
        averages.take(policy.decay_of(number), policy.opens_row(number), policy.max_rows)
        module.weight.data.fill_(1.5)
    share = (1 - 0.999) * 0.999**1999 / (1 - 0.999**2000)  # weight of the first
    assert averages.rows[0][0].dtype == torch.float32
    assert averages.rows[0][0].item() == pytest.approx(1.5 - 0.5 * share, abs=1e-3)
