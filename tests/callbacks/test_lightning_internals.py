"""What is not published of Lightning is there, under its name, and does what the callbacks take it to do."""

import inspect
import signal
from datetime import timedelta

import lightning
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rewarm.callbacks import lightning_internals as internals
from rewarm.lightning_modules.fsdp2_strategy import parallel_sizes
from tests import fits

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]

NAMES = {
    "logs_now": ["_logger_connector", "should_update_logs"],
    "step_in_logs": ["_batches_that_stepped"],
    "metrics_for_loggers": ["_logger_connector", "metrics"],
    "log_step_now": ["_logger_connector", "update_train_step_metrics"],
    "validates_by_clock": ["_val_check_time_interval"],
    "validation_is_due": ["_should_check_val_fx", "_data_fetcher"],
    "may_stop_early": ["_can_stop_early"],
    "take_received_sigterm": ["_signal_connector", "received_sigterm"],
    "cluster_environment": ["_accelerator_connector", "cluster_environment"],
    "saves_shards": ["_save_distributed_checkpoint"],
    "note_saved_step": ["_last_global_step_saved"],
}
"""What each function touches."""


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        if self.current_epoch == 0:
            self.log("first", 1.0)
        self.log("loss", loss := self.layer(batch[0]).sum(), on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoOptimizers(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.log("loss", loss := self.layer(batch[0]).sum(), on_step=True, on_epoch=False)
        loss.backward()
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)], []


class Logger(DummyLogger):
    """Keeps what it was told."""

    def __init__(self):
        super().__init__()
        self.told = []

    def log_metrics(self, metrics, step=None):
        self.told.append((step, dict(metrics)))


class At(Callback):
    """Takes something down at the end of every batch."""

    def __init__(self, look):
        self.look, self.found = look, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.found.append(self.look(trainer))


def fit(look, module=None, batches=6, **options):
    at, logger = At(look), Logger()
    trainer = fits.trainer(callbacks=[at], logger=logger, **{"max_epochs": 1} | options)
    loaders = [DataLoader(TensorDataset(torch.randn(number, 2)), 1) for number in (batches, 1)]
    trainer.fit(module or Net(), *loaders)
    return at.found, logger.told


def test_the_installed_version_is_one_that_was_tried():
    assert lightning.__version__ in internals.TRIED, (
        f"Lightning {lightning.__version__} is new to us: if the other tests here pass, add it to TRIED"
    )


def test_each_function_has_its_names_listed_here():
    functions = dict(inspect.getmembers(internals, inspect.isfunction))
    assert functions.keys() == NAMES.keys()
    for name, function in functions.items():
        for private in NAMES[name]:
            assert private in inspect.getsource(function), name
        _, _, reason = inspect.getdoc(function).partition("\n\n")
        assert reason, f"{name}: no reason is given"
        assert not reason.startswith(("Args:", "Returns:", "Example:")), f"{name}: no reason is given"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logs_are_due_in_the_batches_of_which_loggers_are_told(accumulate):
    options = {"log_every_n_steps": 2, "accumulate_grad_batches": accumulate}
    due, told = fit(lambda t: (internals.logs_now(t), internals.step_in_logs(t)), **options)
    assert sorted({step for now, step in due if now}) == [step for step, _ in told] != []


def test_logs_count_the_batches_that_stepped_and_not_the_steps_of_each_optimizer():
    def look(trainer):
        return internals.step_in_logs(trainer), trainer.global_step

    found, told = fit(look, TwoOptimizers())
    assert found == [(n, 2 * n + 2) for n in range(6)]
    assert [step for step, _ in told] == [step for step, _ in found]


def test_the_metrics_are_those_that_loggers_get_in_this_batch():
    found, told = fit(lambda t: (internals.metrics_for_loggers(t), set(t.logged_metrics)), max_epochs=2)
    assert len(told) == 12
    for (ours, _), (_, theirs) in zip(found, told, strict=True):
        assert {name: float(value) for name, value in ours.items()} == {
            name: value for name, value in theirs.items() if name != "epoch"
        }
    last, public = found[-1]
    assert set(last) == {"loss"}
    assert public == {"loss", "first"}


def test_a_step_can_be_logged_before_its_time():
    once, (told_once, told_twice) = [], (fit(lambda t: None)[1], fit(internals.log_step_now)[1])
    for row in told_twice:
        if row not in once:
            once.append(row)
    assert len(told_twice) == 2 * len(told_once)
    assert [(step, set(metrics)) for step, metrics in once] == [
        (step, set(metrics)) for step, metrics in told_once
    ]


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({}, [5]),
        ({"val_check_interval": 2}, [1, 3, 5]),
        ({"check_val_every_n_epoch": 2, "max_epochs": 2}, [11]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 4, "max_epochs": 2}, [3, 7, 11]),
        ({"val_check_interval": 3, "accumulate_grad_batches": 4}, [2, 5]),
    ],
)
def test_validation_is_due_where_it_follows(options, due):
    class Validated(Callback):
        batches = 0
        found = ()

        def on_train_batch_end(self, *_):
            self.batches += 1

        def on_validation_start(self, *_):
            self.found = (*self.found, self.batches - 1)

    validated = Validated()
    at = At(internals.validation_is_due)
    trainer = fits.trainer(callbacks=[validated, at], **{"max_epochs": 1} | options)
    trainer.fit(Net(), *(DataLoader(TensorDataset(torch.randn(number, 2)), 1) for number in (6, 1)))
    assert [number for number, is_due in enumerate(at.found) if is_due] == due == list(validated.found)


def test_validation_by_the_clock_is_known_as_such():
    assert not internals.validates_by_clock(fits.trainer())
    assert not internals.validates_by_clock(fits.trainer(val_check_interval=0.5))
    assert internals.validates_by_clock(fits.trainer(val_check_interval=timedelta(seconds=3)))


def test_a_run_may_stop_early_once_it_has_done_the_least():
    found, _ = fit(internals.may_stop_early, min_steps=8, max_epochs=2)
    assert found == [False] * 7 + [True] * 5
    found, _ = fit(internals.may_stop_early, min_epochs=1, max_epochs=2)
    assert found == [False] * 6 + [True] * 6
    assert fit(internals.may_stop_early, min_steps=None)[0] == [True] * 6


def test_a_sigterm_that_lightning_has_got_is_taken_from_it():
    def look(trainer):
        signal.raise_signal(signal.SIGTERM)
        public = trainer.received_sigterm
        return public, internals.take_received_sigterm(trainer), trainer.received_sigterm

    found, _ = fit(look)
    assert found == [(True, True, False)] * 6


def test_one_process_has_a_cluster_environment_too(monkeypatch):
    trainer = fits.trainer()
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    assert isinstance(internals.cluster_environment(trainer), LightningEnvironment)
    assert not hasattr(trainer.strategy, "cluster_environment")
    slurm = SLURMEnvironment(auto_requeue=False)
    monkeypatch.setattr(SLURMEnvironment, "validate_settings", lambda *_: None)
    assert internals.cluster_environment(fits.trainer(plugins=[slurm])) is slurm


def test_a_strategy_says_whether_it_saves_shards():
    for choice in (True, False):
        strategy = ModelParallelStrategy(save_distributed_checkpoint=choice)
        assert internals.saves_shards(strategy) is choice
        assert "_save_distributed_checkpoint" in vars(strategy)
    assert internals.saves_shards(SingleDeviceStrategy())


def test_a_strategy_has_its_sizes_under_these_names():
    strategy = ModelParallelStrategy(data_parallel_size="auto", tensor_parallel_size=2)
    assert parallel_sizes(strategy) == ("auto", 2)
    assert parallel_sizes(strategy, 3) == parallel_sizes(strategy) == (3, 2)
    names = {"_data_parallel_size", "_tensor_parallel_size"}
    assert all(hasattr(strategy, name) and name in inspect.getsource(parallel_sizes) for name in names)
    assert vars(strategy).items() >= {"_data_parallel_size": 3, "_tensor_parallel_size": 2}.items()


def test_a_checkpoint_callback_says_at_which_step_it_saved_last(tmp_path):
    own, noted = ModelCheckpoint(tmp_path, every_n_train_steps=2), ModelCheckpoint(tmp_path)
    trainer = fits.trainer(callbacks=[own], max_steps=5, enable_checkpointing=True)
    trainer.fit(Net(), *(DataLoader(TensorDataset(torch.randn(number, 2)), 1) for number in (6, 1)))
    internals.note_saved_step(noted, 4)
    assert vars(noted)["_last_global_step_saved"] == vars(own)["_last_global_step_saved"] == 4
