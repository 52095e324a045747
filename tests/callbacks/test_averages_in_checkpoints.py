"""Averages that are written to a checkpoint are read from it again, in one process; of ranks elsewhere."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from rewarm.callbacks.averages_in_checkpoints import read_shards, write_shards, write_whole
from tests.callbacks.test_averaged_weights import filled


def test_whole_averages_are_rows_in_the_order_of_the_names():
    _, averages = filled(1.0, 2.0)
    state = {}
    write_whole(averages, state, keep=True)
    assert [[copy.shape for copy in row] for row in state["averages"]] == [[(3, 3), (3,), (3,)]] * 2
    for row, kept in zip(averages.rows, state["averages"], strict=True):
        assert all(torch.equal(copy, other) for copy, other in zip(row, kept, strict=True))
    write_whole(averages, state, keep=False)
    assert state["averages"] == [[None] * 3] * 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_shards_are_an_entry_beside_the_optimizers_and_come_back(tmp_path):
    _, averages = filled(1.0, 2.0)
    state, checkpoint = {}, {"optimizer_states": [{"of": "the optimizer"}]}
    write_shards(averages, state, checkpoint)
    entry, number = state["shards"]
    assert (entry, number) == ("optimizer_1", 2)
    assert checkpoint["optimizer_states"][0] == {"of": "the optimizer"}
    dcp.save({entry: checkpoint["optimizer_states"][1]}, checkpoint_id=tmp_path, no_dist=True)
    read = read_shards(averages, entry, number, tmp_path)
    for row, other in zip(averages.rows, read, strict=True):
        assert all(torch.equal(copy, kept) for copy, kept in zip(row, other, strict=True))
