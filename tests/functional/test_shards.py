"""Shards of two ranks against the whole tensors that they are parts of."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from rewarm.functional.shards import (
    any_sharded,
    joined_like,
    local,
    part_like,
    reshard,
    total_norm,
    whole,
    whole_on_cpu,
)
from tests.distributed.ranks import on_ranks


def test_whole_tensors_stay_as_they_are():
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    assert not any_sharded([weight])
    assert local(weight).data_ptr() == weight.data_ptr()
    assert not local(weight).requires_grad
    for same in (whole(weight), part_like(weight, weight), joined_like(weight, weight)):
        assert same is weight
    assert torch.equal(whole_on_cpu(weight, keep=True), weight)
    assert whole_on_cpu(weight, keep=False) is None
    reshard(nn.Linear(2, 2))


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
def test_the_norm_is_that_of_all_as_one_vector(order):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), ())]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).double()
    expected = float(flat.abs().pow(order).sum() ** (1 / order))
    assert float(total_norm(tensors, order)) == pytest.approx(expected, rel=1e-6)


def on_shards():
    """On each rank: what it holds of uneven tensors, and what all hold together."""
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("data",))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, generator=generator)  # 3 rows on the first rank, 2 on the second
    like = DTensor.from_local(
        torch.zeros(3 if rank == 0 else 2, 3), mesh, [Shard(0)], shape=(5, 3), stride=(3, 1)
    )
    mine = values[:3] if rank == 0 else values[3:]
    part = part_like(values, like)
    assert any_sharded([values, part])
    assert part.placements == like.placements
    assert torch.equal(local(part), mine)
    assert local(part).untyped_storage().nbytes() == mine.numel() * 4  # it does not keep the whole alive
    assert torch.equal(whole(part), values)
    joined = joined_like(mine, like)
    assert joined.shape == like.shape
    assert torch.equal(whole(joined), values)
    kept = whole_on_cpu(joined, keep=rank == 0)
    assert kept is None if rank else torch.equal(kept, values)
    copies = DTensor.from_local(values * 2, mesh, [Replicate()])
    norm = total_norm([part, copies, values], 2.0)
    assert not isinstance(norm, DTensor)
    net = nn.Linear(3, 3)
    fully_shard(net, mesh=mesh)
    with torch.no_grad():
        net(torch.ones(1, 3))
    gathered = not any_sharded(net.parameters())
    reshard(net)
    assert any_sharded(net.parameters())
    return float(norm), float(values.norm()), gathered


@pytest.mark.dist
def test_ranks_hold_parts_that_are_the_whole_together():
    for norm, whole_norm, gathered in on_ranks(2, on_shards):
        assert norm == pytest.approx(whole_norm * (1 + 4 + 1) ** 0.5, rel=1e-6)
        assert gathered
