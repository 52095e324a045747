"""Norms and clipping against torch's on whole gradients, also of shards."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from rewarm.functional.gradients import clip_gradients_, gradient_norm
from tests.distributed.ranks import on_ranks


def network(scale=1.0):
    """With sizes that 2 ranks don't divide, and one smaller than 4 ranks."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 5), nn.Linear(5, 7, bias=False), nn.LayerNorm(7), nn.Linear(7, 6), nn.Linear(6, 2)
    )
    return net, scale * torch.randn(8, 3)


def backward(net, rows, replicas=1):
    """FSDP takes the mean over ranks; the loss is their sum."""
    (replicas * net(rows).square().sum()).backward()


def expected(max_norm, scale=1.0):
    """Norm and clipped gradients by torch, in one process, and the norm in float64 by hand."""
    net, rows = network(scale)
    backward(net, rows)
    squares = [float(g.double().square().sum()) for p in net.parameters() for g in [p.grad]]
    norm = nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    assert float(norm) == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)
    return float(norm), [p.grad for p in net.parameters()]


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_norm_and_clipped_gradients_are_torchs(max_norm):
    norm, gradients = expected(max_norm)
    net, rows = network()
    backward(net, rows)
    assert float(gradient_norm(net.parameters())) == pytest.approx(norm, rel=1e-6)
    assert float(clip_gradients_(net.parameters(), max_norm)) == pytest.approx(norm, rel=1e-6)
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_norms_of_any_order_are_those_of_all_gradients_as_one_vector():
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (), (2, 2))]
    for parameter in parameters[:-1]:  # the last one has no gradient
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    flat = torch.cat([p.grad.flatten() for p in parameters[:-1]]).double()
    assert float(gradient_norm(parameters, 1)) == pytest.approx(float(flat.abs().sum()), rel=1e-6)
    assert float(gradient_norm(parameters)) == pytest.approx(float(flat.square().sum().sqrt()), rel=1e-6)
    assert float(gradient_norm(parameters, 3)) == pytest.approx(float(flat.abs().pow(3).sum() ** (1 / 3)))


def test_a_parameter_without_a_gradient_counts_as_zero():
    net, rows = network()
    backward(net, rows)
    net[0].weight.grad = None
    assert gradient_norm([net[0].weight]) == 0.0
    assert clip_gradients_([net[0].weight], 1.0) == 0.0
    rest = [p.grad.square().sum() for p in net.parameters() if p.grad is not None]
    assert float(gradient_norm(net.parameters())) == pytest.approx(float(sum(rest)) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_the_norm_tells_of_a_single_gradient_that_is_not_finite(bad):
    net, rows = network()
    backward(net, rows)
    net[3].weight.grad[2, 1] = bad
    assert not clip_gradients_(net.parameters(), 1.0).isfinite()


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_bound_must_be_above_zero(max_norm):
    with pytest.raises(ValueError, match=f"max_norm is {max_norm}; it must be above 0"):
        clip_gradients_([], max_norm)


# --- shards ---------------------------------------------------------------------------------------------


def on_shards(kind, max_norm):
    """What a rank finds: the norms before and after clipping, and the gradients after it, whole."""
    torch.distributed.init_process_group("gloo")
    size = torch.distributed.get_world_size()
    net, rows = network()
    ways = 2 if kind == "FSDP2 and tensor parallel" else 1
    mesh = init_device_mesh("cpu", (size // ways, ways), mesh_dim_names=("data", "tensor"))
    if ways > 1:
        parallelize_module(net, mesh["tensor"], {"3": ColwiseParallel(), "4": RowwiseParallel()})
    # Nothing is done in place to what a split layer returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for part in (net[1], net[3], net):
        fully_shard(part, mesh=mesh["data"])
    replicas = size // ways
    backward(net, rows[mesh["data"].get_local_rank() :: replicas], replicas)
    before = gradient_norm(net.parameters())
    assert len({(p.grad.device_mesh, p.grad.placements) for p in net.parameters()}) == (1 if ways == 1 else 4)
    norm = clip_gradients_(net.parameters(), max_norm)
    assert torch.equal(norm, before)
    assert not isinstance(norm, DTensor)
    gradients = [p.grad.full_tensor() for p in net.parameters()]
    return float(norm), float(gradient_norm(net.parameters())), gradients


@pytest.mark.dist
@pytest.mark.parametrize(("size", "kind"), [(2, "FSDP2"), (4, "FSDP2"), (4, "FSDP2 and tensor parallel")])
def test_sharded_gradients_are_clipped_as_whole_ones_are(size, kind):
    norm, gradients = expected(0.5)
    assert norm > 1.0
    ranks = on_ranks(size, on_shards, kind, 0.5)
    # To the last bit: what ranks hold copies of must stay the same on all of them.
    assert len({found for found, _, _ in ranks}) == 1
    for found, clipped, whole in ranks:
        assert found == pytest.approx(norm, rel=1e-6)
        assert clipped == pytest.approx(0.5, rel=1e-5)
        for one, other in zip(whole, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
