"""Who has other data, and what is gathered from them."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.distributed.device_mesh import init_device_mesh

from rewarm.rollouts.ranks import ALONE, Place, everyone, gather, gather_in_turn, place
from tests.distributed.ranks import on_ranks


def trainer_of(module, rank=0, size=1):
    """As much of a Trainer as `place` reads."""
    return SimpleNamespace(lightning_module=module, global_rank=rank, world_size=size)


def test_without_a_mesh_every_rank_has_other_data():
    assert place(trainer_of(LightningModule(), 2, 4)) == Place(2, 4, None)


def test_a_trainer_without_a_module_has_a_place_too():
    assert place(trainer_of(None, 1, 2)) == Place(1, 2, None)


def test_a_process_without_others_is_alone_and_gathers_its_own():
    assert place(None) == everyone() == ALONE == (0, 1, None)
    assert gather({"a": 1}, ALONE) == [{"a": 1}]
    assert gather_in_turn([3, 1], ALONE) == [3, 1]


def meet():
    """On a rank of four, of which two each share a layer."""
    module = LightningModule()
    module._device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    rank = torch.distributed.get_rank()
    among = place(trainer_of(module, rank, 4))
    numbers = list(range(10, 15))
    return {
        "place": among[:2],
        "everyone": tuple(everyone()),
        "objects": gather((rank, "x" * rank), everyone()),
        "among those with other data": gather(rank, among),
        "in turn": gather_in_turn(numbers[among.rank :: among.size], among),
        "in turn by all": gather_in_turn(numbers[rank::4], everyone()),
        "fewer than ranks": gather_in_turn([7][rank::4], everyone()),
        "none": gather_in_turn([], everyone()),
    }


@pytest.mark.dist
def test_ranks_that_share_a_layer_count_once_and_lists_come_back_in_order():
    for rank, found in enumerate(on_ranks(4, meet)):
        half = rank // 2
        assert found == {
            "place": (half, 2),
            "everyone": (rank, 4, None),
            "objects": [(0, ""), (1, "x"), (2, "xx"), (3, "xxx")],
            "among those with other data": [rank % 2, rank % 2 + 2],
            "in turn": [10, 11, 12, 13, 14],
            "in turn by all": [10, 11, 12, 13, 14],
            "fewer than ranks": [7],
            "none": [],
        }
