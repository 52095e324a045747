"""A step is told when it ends, once, whatever a step is made of."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rewarm.callbacks.ended_steps import EndedSteps
from tests import fits

pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")


class Net(LightningModule):
    """A linear layer whose optimizer tells of its steps; some batches it passes over."""

    def __init__(self, passed_over=(), manual=0):
        super().__init__()
        self.layer, self.passed_over, self.manual = nn.Linear(2, 1), passed_over, manual
        self.automatic_optimization = not manual
        self.batches = 0
        self.stepped = []  # the number of the batch, at every step of an optimizer

    def training_step(self, batch, batch_idx):
        self.batches += 1
        if self.manual:
            self.layer(batch[0]).sum().backward()
            if self.batches % 2 == 0:
                for optimizer in self.optimizers():
                    optimizer.step()
                    self.stepped.append(self.batches)
            return None
        return None if self.batches in self.passed_over else self.layer(batch[0]).sum()

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.stepped.append(self.batches)

    def configure_optimizers(self):
        if self.manual:
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(self.manual)], []
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watch(Callback):
    """Takes down after which batches a step has ended, and which of them are every third or fifth."""

    def __init__(self):
        self.steps, self.ended, self.thirds, self.fifths = EndedSteps(), [], [], []

    def on_train_start(self, trainer, module):
        self.steps.begin(trainer)

    def on_train_batch_end(self, trainer, module, *_):
        if self.steps.look(trainer):
            self.ended.append(module.batches)
        self.thirds += [self.steps.now] * self.steps.reached(3)
        self.fifths += [self.steps.now] * self.steps.reached(5, start=1)


def fit(module=None, ckpt_path=None, batches=7, **options):
    module, watch = module or Net(), Watch()
    trainer = fits.trainer(callbacks=[watch], **{"max_epochs": 2} | options)
    loader = DataLoader(TensorDataset(torch.randn(batches, 2)), 1)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, watch, trainer


def test_every_batch_is_a_step_without_accumulation():
    module, watch, _ = fit()
    assert watch.ended == module.stepped == list(range(1, 15))
    assert watch.thirds == [3, 6, 9, 12]
    assert watch.fifths == [1, 6, 11]


def test_with_accumulation_the_last_batch_of_a_window_and_of_an_epoch_ends_a_step():
    module, watch, _ = fit(accumulate_grad_batches=3)
    assert watch.ended == module.stepped == [3, 6, 7, 10, 13, 14]
    assert watch.thirds == [3, 6]
    assert watch.fifths == [1, 6]


def test_batches_that_training_passes_over_still_end_their_step():
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        module, watch, trainer = fit(Net(passed_over=(2, 3, 4)), accumulate_grad_batches=2)
    assert watch.ended == module.stepped == [2, 4, 6, 7, 9, 11, 13, 14]
    assert trainer.global_step == len(watch.ended)


def test_after_a_resume_only_new_steps_are_told(tmp_path):
    _, watch, trainer = fit(max_epochs=1, accumulate_grad_batches=3)
    assert len(watch.ended) == 3
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    module, watch, trainer = fit(ckpt_path=tmp_path / "3.ckpt", accumulate_grad_batches=3)
    assert watch.ended == module.stepped == [3, 6, 7]
    assert trainer.global_step == 6
    assert watch.thirds == [6]


def test_a_second_fit_begins_anew():
    module, watch, _ = fit(max_epochs=1)
    trainer = fits.trainer(callbacks=[watch], max_epochs=1)
    trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(2, 2)), 1))
    assert watch.ended == [*module.stepped, 1, 2]


def test_steps_of_several_optimizers_are_counted_and_none_of_the_multiples_is_lost():
    module, watch, trainer = fit(Net(manual=2), batches=8, max_epochs=1)
    assert trainer.global_step == 8
    assert watch.ended == sorted(set(module.stepped)) == [2, 4, 6, 8]
    assert watch.thirds == [4, 6]
    assert watch.fifths == [2, 6]


def test_of_steps_without_a_look_all_multiples_are_counted():
    steps = EndedSteps()
    steps.before, steps.now = 2, 11
    assert steps.reached(3) == len([n for n in range(3, 12) if n % 3 == 0])
    assert steps.reached(2, start=5) == len([5, 7, 9, 11])
    assert steps.reached(100) == 0
