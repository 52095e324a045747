"""Sums and means of sequences against loops over their tokens."""

import math

import pytest
import torch

from rewarm.functional.sequences import per_token, sequence_means, sequence_sums


def test_sequence_sums_add_up_each_sequence_wherever_its_tokens_are():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 8, generator=generator)
    ids = torch.randint(-1, 4, (3, 8), generator=generator)
    expected = [0.0] * 5
    for value, index in zip(values.flatten().tolist(), ids.flatten().tolist(), strict=True):
        if index >= 0:
            expected[index] += value
    torch.testing.assert_close(sequence_sums(values, ids, 5), torch.tensor(expected))
    assert expected[4] == 0.0


def test_sequence_sums_hand_each_token_its_sequences_gradient_and_padding_none():
    values = torch.tensor([[1.0, 2.0, math.nan], [3.0, math.inf, 5.0]], requires_grad=True)
    sums = sequence_sums(values, torch.tensor([[1, 0, -1], [1, -1, 1]]), 2)
    assert sums.tolist() == [2.0, 9.0]
    sums.backward(torch.tensor([10.0, 20.0]))
    assert values.grad.tolist() == [[20.0, 10.0, 0.0], [20.0, 0.0, 20.0]]


def test_sequence_sums_of_bfloat16_are_added_in_float32():
    sums = sequence_sums(
        torch.ones(1, 1001, dtype=torch.bfloat16), torch.zeros(1, 1001, dtype=torch.int64), 1
    )
    assert sums.dtype == torch.float32
    assert sums.tolist() == [1001.0]


@pytest.mark.parametrize("bad", [-2, 3])
def test_sequence_sums_refuse_an_id_out_of_range(bad):
    with pytest.raises(ValueError, match=f"sequence_ids go from .*{bad}.*; allowed: -1 to 2"):
        sequence_sums(torch.ones(1, 2), torch.tensor([[bad, 0]]), 3)


def test_sequence_sums_refuse_shapes_that_differ_and_a_negative_count():
    with pytest.raises(ValueError, match=r"sequence_ids has shape \(3,\); allowed: values' \(1, 3\)"):
        sequence_sums(torch.ones(1, 3), torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="num_sequences is -1; allowed: >= 0"):
        sequence_sums(torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.int64), -1)


def test_sequence_means_are_those_of_a_loop_over_the_tokens():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 7, generator=generator) < 0.6
    ids = torch.randint(-1, 4, (3, 7), generator=generator)
    means = sequence_means(values, mask, ids, 5)
    for number in range(5):
        chosen = [
            float(values.detach()[b, t])
            for b in range(3)
            for t in range(7)
            if ids[b, t] == number and mask[b, t]
        ]
        expected = sum(chosen) / len(chosen) if chosen else 0.0
        assert float(means.detach()[number]) == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(lambda v: sequence_means(v, mask, ids, 5), values)


def test_what_each_token_gets_is_its_sequences_value_and_padding_gets_none():
    values = torch.tensor([1.5, -2.0], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, -1, 1], [1, 1, -1]])
    assert per_token(values, ids).tolist() == [[1.5, 0.0, -2.0], [-2.0, -2.0, 0.0]]
    assert torch.autograd.gradcheck(lambda v: per_token(v, ids), values)
