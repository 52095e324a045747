"""Calls of a sharded model with whole weights, by ranks that call it as often as each needs to."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.tensor import DTensor

from rewarm.lightning_modules.policy import Policy
from rewarm.rollouts.ranks import place
from rewarm.rollouts.sharded import call_unsharded
from tests import fits, tiny
from tests.distributed.ranks import on_ranks
from tests.lightning_modules.test_policy import model
from tests.lightning_modules.test_sharding import mesh, sharded, step

LLAMA = {**tiny.LLAMA, "num_key_value_heads": 2}
ROW = torch.arange(3, 12)[None]


class Module(LightningModule):
    def __init__(self, policy):
        super().__init__()
        self.policy = policy


def trainer_of(module, strategy=None):
    """As much of a Trainer as `call_unsharded` and `place` read."""
    return SimpleNamespace(strategy=strategy, lightning_module=module, global_rank=0, world_size=1)


def test_without_shards_it_is_an_ordinary_call():
    module = Module(Policy(model(LLAMA)))
    assert call_unsharded(trainer_of(module), module.policy.model, lambda: "called") == "called"
    assert place(trainer_of(module)) == (0, 1, None)


def test_the_older_kind_of_sharding_is_refused_with_what_takes_its_place():
    module = Module(Policy(model(LLAMA)))
    with pytest.raises(ValueError, match="strategy is FSDPStrategy, .* use rewarm.FSDP2Strategy"):
        call_unsharded(trainer_of(module, FSDPStrategy()), module.policy.model, lambda: "called")


def call(kind):
    """On a rank: logits of as many calls as its number, and whether all is as it was afterwards."""
    ways = 2 if kind == "tensor parallel" else 1
    places, source = mesh(ways), model(LLAMA)
    # Ranks that share a layer call it together.
    wanted = 2 if ways == 2 else torch.distributed.get_rank()
    _, expected = step(Policy(source))
    with torch.no_grad():
        logits = source(ROW).logits
    module = Module(sharded(LLAMA, source, ways))
    module._device_mesh = places
    trainer = trainer_of(module)

    def several():
        with torch.no_grad():
            return [module.policy.model(ROW).logits for _ in range(wanted)]

    results = [call_unsharded(trainer, module.policy.model, several) for _ in range(2)]
    for calls in results:
        assert len(calls) == wanted
        for found in calls:
            torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    data = places["data_parallel"]
    assert place(trainer)[:2] == (data.get_local_rank(), data.size())
    _, gradients = step(module.policy, data.get_local_rank(), data.size())
    assert fits.distance(gradients, expected) < 1e-5


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["FSDP2", "tensor parallel"])
def test_ranks_call_whole_weights_as_often_as_each_needs_and_train_on(kind):
    on_ranks(2, call, kind)
