"""Random streams that go on where the checkpoint was written; whole fits are in test_resume.py."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from rewarm.callbacks.exact_resume import ExactResume, random_state, set_random_state
from tests import fits

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


def draws():
    """From every stream, the second normal of a pair too: both Python and NumPy keep it back."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
    ]


def seed(number):
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(number)


def test_every_stream_is_restored():
    seed(0)
    draws()
    state = random_state()
    expected = [draws() for _ in range(3)]
    seed(1)
    assert draws() != expected[0]
    set_random_state(state)
    assert [draws() for _ in range(3)] == expected


def test_the_state_survives_a_file_that_is_read_without_trust(tmp_path):
    seed(0)
    torch.save(ExactResume().state_dict(), tmp_path / "state.pt")
    expected = draws()
    seed(1)
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True)["ranks"][0])
    assert draws() == expected


class Drawing(LightningModule):
    """Somebody else's module, whose every step draws from all streams."""

    def __init__(self):
        super().__init__()
        self.net, self.drawn = nn.Linear(2, 1), []

    def training_step(self, batch, batch_idx):
        self.drawn.append(draws())
        return self.net(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, steps, callbacks, ckpt_path=None):
    module = Drawing()
    saving = ModelCheckpoint(
        folder, "{step}", save_top_k=-1, every_n_train_steps=1, auto_insert_metric_name=False
    )
    trainer = fits.trainer(max_steps=steps, callbacks=[*callbacks, saving], enable_checkpointing=True)
    trainer.fit(module, DataLoader(torch.ones(8, 2)), ckpt_path=ckpt_path)
    return module.drawn


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_fit_draws_what_the_uninterrupted_one_drew(tmp_path, step):
    seed(0)
    whole = fit(tmp_path, 6, [ExactResume()])
    seed(1)
    path = str(tmp_path / f"{step}.ckpt")
    assert fit(tmp_path / "rest", 6, [ExactResume()], path) == whole[step:]


def test_without_it_a_resumed_fit_draws_something_else(tmp_path):
    seed(0)
    whole = fit(tmp_path, 6, [])
    seed(1)
    assert fit(tmp_path / "rest", 6, [], str(tmp_path / "3.ckpt")) != whole[3:]


def test_it_restores_once_only(tmp_path):
    seed(0)
    callback = ExactResume()
    callback.load_state_dict(callback.state_dict())
    drawn = fit(tmp_path, 3, [callback])
    assert len({str(one) for one in drawn}) == 3


def test_a_rank_that_is_new_keeps_its_own_state():
    callback = ExactResume()
    callback.load_state_dict({"ranks": [random_state()]})

    class Second:
        global_rank = 1

    seed(5)
    before = random_state()
    callback.on_train_batch_start(Second(), None, None, 0)
    assert random_state()["python"] == before["python"]
    assert torch.equal(random_state()["torch"], before["torch"])
