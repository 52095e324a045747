"""Tokens against counting them one by one."""

import pytest
import torch
from lightning.pytorch import Trainer

from rewarm.callbacks.token_count import TokenCount, tokens_of

IDS = torch.ones(2, 5, dtype=torch.long)
HALF = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": IDS}, 10),
        ({"input_ids": IDS, "attention_mask": HALF}, 4),
        ({"input_ids": IDS, "sequence_ids": HALF - 1}, 4),
        ({"input_ids": IDS, "sequence_ids": HALF - 1, "attention_mask": IDS}, 4),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 5, 5)}, 10),  # a mask of pairs tells no padding
    ],
)
def test_tokens_are_the_positions_that_are_no_padding(batch, expected):
    assert int(tokens_of(batch)) == expected


@pytest.mark.parametrize("batch", [[1, 2], {"x": IDS}, IDS])
def test_other_batches_need_a_rule(batch):
    with pytest.raises(ValueError, match="batches are no mappings with a tensor input_ids"):
        tokens_of(batch)


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_what_is_added_is_collected_once(kind):
    trainer = Trainer(accelerator="cpu", barebones=True)
    count = TokenCount(kind)
    for tokens in (3, 4):
        count.add(tokens)
    assert count.total == 0
    assert count.collect(trainer) == count.total == 7
    assert count.collect(trainer) == 7
    count.add(5)
    assert count.collect(trainer) == 12


def test_numbers_and_tensors_add_up():
    trainer = Trainer(accelerator="cpu", barebones=True)
    count = TokenCount(lambda batch: batch)
    for tokens in (2**40, torch.tensor(2**40), torch.tensor(1, dtype=torch.int32)):
        count.add(tokens)
    assert count.collect(trainer) == 2**41 + 1


class TwoByTwo:
    """A strategy of four processes, of which two by two split a layer and see the same batch."""

    root_device = torch.device("cpu")
    distributed_sampler_kwargs = {"num_replicas": 2, "rank": 0}  # noqa: RUF012

    def reduce(self, tensor, reduce_op):
        assert reduce_op == "sum"
        return tensor * 4


class Ranks:
    strategy, world_size = TwoByTwo(), 4


def test_ranks_that_share_a_batch_count_it_once():
    count = TokenCount(len)
    count.add("abc")
    assert count.collect(Ranks()) == 6
