"""Which parameters decay."""

import torch

from rewarm.lightning_modules.optimizers import default_optimizer, parameter_groups


def test_matrices_decay_and_vectors_do_not_and_what_does_not_learn_is_left_out():
    net = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    net[0].requires_grad_(False)
    matrices, vectors = parameter_groups(net.parameters())
    assert [tuple(p.shape) for p in matrices["params"]] == [(3, 4)]
    assert [tuple(p.shape) for p in vectors["params"]] == [(4,), (4,), (3,)]
    assert "weight_decay" not in matrices
    assert vectors["weight_decay"] == 0.0
    optimizer = default_optimizer([matrices, vectors])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert all(group["fused"] for group in optimizer.param_groups)


def test_without_vectors_there_is_one_group():
    (group,) = parameter_groups([torch.nn.Parameter(torch.zeros(2, 2))])
    assert len(group["params"]) == 1
