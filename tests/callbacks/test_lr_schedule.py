"""The learning rates that real fits use: straight, accumulated, resumed, re-warmed, branched, by tokens."""

import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from rewarm.callbacks.lr_schedule import LRSchedule
from rewarm.cli import main
from rewarm.schedules.published import branch, constant, cosine, infinite, linear, wsd
from rewarm.schedules.refinement import refined
from tests import fits, tiny

pytestmark = [
    # Lightning 2.6 with torch 2.13.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    # Workers would only slow these fits down.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    # Said whenever the epoch is shorter than Trainer(log_every_n_steps=50).
    pytest.mark.filterwarnings(
        "ignore:The number of training batches .* is smaller than the logging interval"
    ),
    # All batches are equal here, so it does not matter where an epoch is resumed.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


class Net(LightningModule):
    """A linear regression that remembers the LRs its optimizer used."""

    def __init__(self, lr=1.0, optimizer=torch.optim.SGD, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)
        self.lr, self.make, self.settings = lr, optimizer, settings
        self.used, self.at_batch = [], []

    def note(self, optimizer, args, kwargs):
        lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.used.append(lrs[0] if len(lrs) == 1 else lrs)

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=self.lr, **self.settings)
        optimizer.register_step_post_hook(self.note)
        return optimizer

    def training_step(self, batch, batch_idx):
        self.at_batch.append(float(self.trainer.optimizers[0].param_groups[0]["lr"]))
        (x,) = batch
        return ((self.layer(x) - x.sum(1, keepdim=True)) ** 2).mean()

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.parameters()])


class SaveAt(Callback):
    """Saves a checkpoint after the given step, as a run that is killed later would have."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def loader(batches=20):
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    return DataLoader(TensorDataset(x.repeat(batches, 1)), batch_size=2)


def fit(net, *callbacks, batches=20, ckpt_path=None, save=None, **settings):
    settings = {"logger": False, "enable_checkpointing": False, **settings}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(net, loader(batches), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return net


def expected(schedule, total, peak=1.0, steps=None):
    return pytest.approx([peak * schedule(n, total) for n in range(1, (steps or total) + 1)], rel=1e-12)


def test_every_step_has_the_lr_of_its_position():
    schedule = wsd(warmup=4, decay=8, end=0.1)
    assert fit(Net(0.01), LRSchedule(schedule), max_steps=30).used == expected(schedule, 30, 0.01)


def test_the_weights_move_by_that_lr():
    class Slide(Net):
        def __init__(self):
            super().__init__(lr=0.5)
            self.path = [self.weights()]

        def training_step(self, batch, batch_idx):
            return sum(p.sum() for p in self.parameters())  # a gradient of one everywhere

        def on_train_batch_end(self, *args):
            self.path.append(self.weights())

    net = fit(Slide(), LRSchedule(linear(warmup=5)), max_steps=12)
    moved = [
        float((before - after).mean()) for before, after in zip(net.path[:-1], net.path[1:], strict=True)
    ]
    assert moved == pytest.approx([0.5 * linear(5)(n, 12) for n in range(1, 13)], abs=1e-6)
    assert moved[0] == pytest.approx(0.1, abs=1e-6)
    assert moved[-1] == 0.0


def test_an_lr_lasts_for_a_whole_accumulation_window():
    schedule = linear(warmup=2, end=0.1)
    # 10 batches in windows of 3 are 4 steps an epoch, the last window having one batch only.
    net = fit(Net(), LRSchedule(schedule), batches=10, max_epochs=2, accumulate_grad_batches=3)
    step = [schedule(n, 8) for n in range(1, 9)]
    assert net.used == pytest.approx(step)
    windows = [0] * 3 + [1] * 3 + [2] * 3 + [3] + [4] * 3 + [5] * 3 + [6] * 3 + [7]
    assert net.at_batch == pytest.approx([step[i] for i in windows])


def test_total_steps_ends_the_schedule_before_the_training():
    used = fit(Net(), LRSchedule(linear(0, end=0.5), total_steps=10), max_steps=15).used
    assert used == expected(linear(0, end=0.5), 10, steps=15)
    assert used[9:] == [0.5] * 6


def test_a_plain_function_will_do_as_schedule():
    assert fit(Net(), LRSchedule(lambda n, total: n / total), max_steps=4).used == [0.25, 0.5, 0.75, 1.0]


class TwoGroups(Net):
    names = ("slow", "fast")

    def configure_optimizers(self):
        groups = [
            {"params": [self.layer.bias], "lr": 0.1, "name": self.names[0]},
            {"params": [self.layer.weight], "name": self.names[1]},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.lr)
        optimizer.register_step_post_hook(self.note)
        return optimizer


def test_every_group_has_its_own_peak():
    net = fit(TwoGroups(1.0), LRSchedule(cosine(3)), max_steps=9)
    factors = [cosine(3)(n, 9) for n in range(1, 10)]
    assert net.used == [pytest.approx([0.1 * f, f]) for f in factors]


def test_a_groups_peak_can_be_multiplied_by_name():
    net = fit(TwoGroups(1.0), LRSchedule(cosine(3), multipliers={"fast": 0.5}), max_steps=9)
    factors = [cosine(3)(n, 9) for n in range(1, 10)]
    assert net.used == [pytest.approx([0.1 * f, 0.5 * f]) for f in factors]


def test_multipliers_last_through_a_resume_and_are_applied_once(tmp_path):
    def run(**settings):
        schedule = LRSchedule(linear(0), multipliers={"slow": 0.0, "fast": 3.0})
        return fit(TwoGroups(1.0), schedule, **settings)

    run(max_steps=5, save=tmp_path / "a.ckpt")
    resumed = run(max_steps=10, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.used == [pytest.approx([0.0, 3.0 * (1 - n / 10)]) for n in range(6, 11)]


def test_groups_without_a_name_are_multiplied_by_index():
    net = fit(TwoOptimizers(), LRSchedule(constant(), multipliers={"1.0": 5.0}), max_steps=6)
    assert net.used == [1.0, 1.0, 0.5] * 2


def test_a_multiplier_for_no_group_is_refused():
    with pytest.raises(ValueError, match="multipliers names quick; the groups are fast, slow"):
        fit(TwoGroups(), LRSchedule(constant(), multipliers={"quick": 2.0}), max_steps=2)


class TwoOptimizers(Net):
    """Manual optimization: the first optimizer steps twice for every step of the second."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        optimizers = [
            torch.optim.SGD([p], lr=lr) for p, lr in zip(self.parameters(), (1.0, 0.1), strict=True)
        ]
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self.note)
        return optimizers

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, first, second):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


def test_with_manual_optimization_every_step_of_any_optimizer_counts():
    net = fit(TwoOptimizers(), LRSchedule(linear(0)), max_steps=12)
    peaks = [1.0, 1.0, 0.1] * 4
    assert net.used == pytest.approx([peak * (1 - n / 12) for n, peak in enumerate(peaks, start=1)])


@pytest.mark.parametrize(
    ("net", "callbacks"), [(TwoOptimizers, []), (Net, [GradientAccumulationScheduler({0: 1, 1: 2})])]
)
def test_a_total_that_max_epochs_does_not_tell_is_asked_for(net, callbacks):
    with pytest.raises(ValueError, match="total_steps is None, and max_epochs does not tell"):
        fit(net(), LRSchedule(linear(0)), *callbacks, max_epochs=2)
    assert len(fit(net(), LRSchedule(linear(0), total_steps=9), *callbacks, max_epochs=2).used) > 9


@pytest.mark.parametrize("settings", [{"max_steps": 30}, {"max_epochs": 3}], ids=["steps", "epochs"])
@pytest.mark.parametrize("killed_after", [4, 10, 13, 29])
def test_resuming_anywhere_equals_never_having_stopped(tmp_path, settings, killed_after):
    def run(*callbacks, **more):
        net = Net(0.05, torch.optim.AdamW)
        return fit(
            net, LRSchedule(cosine(6)), *callbacks, batches=20, accumulate_grad_batches=2, **settings, **more
        )

    path = tmp_path / "killed.ckpt"
    straight = run(SaveAt(killed_after, path))
    resumed = run(ckpt_path=path)
    assert straight.used == expected(cosine(6), 30, 0.05)
    assert resumed.used == straight.used[killed_after:]
    assert torch.equal(resumed.weights(), straight.weights())


def test_a_checkpoint_holds_counters_and_no_setting(tmp_path):
    fit(Net(), LRSchedule(cosine(3), phase="first"), max_steps=6, save=tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    assert saved == {"LRSchedule": {"phase": "first", "anchor": 0, "tokens": None, "lrs": None}}


def test_a_resumed_run_has_the_peak_and_schedule_of_its_own_configuration(tmp_path):
    fit(Net(0.1), LRSchedule(linear(0)), max_steps=10, save=tmp_path / "a.ckpt")
    net = fit(Net(0.3), LRSchedule(cosine(4)), max_steps=30, ckpt_path=tmp_path / "a.ckpt")
    assert net.used == pytest.approx([0.3 * cosine(4)(n, 30) for n in range(11, 31)])


def test_schedulers_of_transformers_keep_the_peak_of_the_checkpoint(tmp_path):
    """Why LRSchedule exists: a new peak is ignored without a word, and the first step has the decayed LR."""
    transformers = pytest.importorskip("transformers")

    class Theirs(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, self.trainer.max_steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    path = tmp_path / "decayed.ckpt"
    fit(Theirs(0.001), max_steps=20, save=path)
    theirs = fit(Theirs(0.005), max_steps=60, ckpt_path=path).used
    assert theirs[0] == 0.0
    assert max(theirs) < 0.001

    fit(Net(0.001), LRSchedule(cosine(2, end=0.0)), max_steps=20, save=path)
    ours = fit(
        Net(0.005),
        LRSchedule(cosine(2, end=0.0), mode="rewarm", phase="new data"),
        max_steps=60,
        ckpt_path=path,
    ).used
    assert ours == expected(cosine(2, end=0.0), 40, 0.005)
    assert ours[:2] == [0.0025, 0.005]


@pytest.mark.parametrize("killed_after", [21, 35, 59])
@pytest.mark.parametrize("reset", [None, False])
def test_a_killed_rewarm_goes_on_as_if_never_stopped(tmp_path, killed_after, reset):
    decayed, killed = tmp_path / "decayed.ckpt", tmp_path / "killed.ckpt"
    fit(Net(0.01, torch.optim.AdamW), LRSchedule(cosine(2)), max_steps=20, save=decayed)

    def run(ckpt_path, *callbacks):
        schedule = LRSchedule(wsd(5, 10), mode="rewarm", phase="second", reset_optimizer=reset)
        return fit(Net(0.05, torch.optim.AdamW), schedule, *callbacks, max_steps=60, ckpt_path=ckpt_path)

    straight = run(decayed, SaveAt(killed_after, killed))
    resumed = run(killed)
    assert straight.used == expected(wsd(5, 10), 40, 0.05)
    assert resumed.used == straight.used[killed_after - 20 :]
    assert torch.equal(resumed.weights(), straight.weights())
    saved = torch.load(killed, weights_only=True)["callbacks"]["LRSchedule"]
    assert saved == {"phase": "second", "anchor": 20, "tokens": None, "lrs": None}


class RestoresLate(SingleDeviceStrategy):
    """Restores callbacks after `on_fit_start`, as the strategies for sharded models do."""

    restore_checkpoint_after_setup = True


def test_a_strategy_that_restores_late_changes_nothing(tmp_path):
    path = tmp_path / "decayed.ckpt"
    fit(Net(0.01, torch.optim.AdamW), LRSchedule(cosine(2)), max_steps=20, save=path)

    def run(**settings):
        schedule = LRSchedule(wsd(5, 10), mode="rewarm", phase="second")
        return fit(Net(0.05, torch.optim.AdamW), schedule, max_steps=60, ckpt_path=path, **settings)

    late, usual = run(strategy=RestoresLate(torch.device("cpu"))), run()
    assert late.used == usual.used == expected(wsd(5, 10), 40, 0.05)
    assert torch.equal(late.weights(), usual.weights())


def test_a_third_phase_starts_where_the_second_ended(tmp_path):
    paths = [tmp_path / f"{i}.ckpt" for i in range(2)]
    fit(Net(), LRSchedule(linear(0), mode="rewarm", phase="one"), max_steps=5, save=paths[0])
    fit(
        Net(),
        LRSchedule(linear(2), mode="rewarm", phase="two"),
        max_steps=15,
        ckpt_path=paths[0],
        save=paths[1],
    )
    three = fit(
        Net(3.0), LRSchedule(linear(4), mode="rewarm", phase="three"), max_steps=35, ckpt_path=paths[1]
    )
    assert three.used == expected(linear(4), 20, 3.0)


def test_a_rewarm_on_data_of_another_length_ends_with_the_training(tmp_path):
    path, killed = tmp_path / "decayed.ckpt", tmp_path / "killed.ckpt"
    fit(Net(), LRSchedule(linear(2)), batches=20, max_epochs=2, save=path)

    def run(ckpt_path, *callbacks):
        again = LRSchedule(linear(2), mode="rewarm", phase="short data")
        return fit(
            Net(), again, *callbacks, batches=7, max_epochs=5, accumulate_grad_batches=2, ckpt_path=ckpt_path
        )

    straight = run(path, SaveAt(45, killed))  # three epochs more, of four steps
    assert straight.used == expected(linear(2), 12)
    assert run(killed).used == straight.used[5:]


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adagrad, {})],
    ids=["AdamW", "SGD", "Adagrad"],
)
def test_a_fresh_optimizer_trains_like_a_new_run_from_these_weights(tmp_path, optimizer, settings):
    path = tmp_path / "decayed.ckpt"
    first = fit(Net(0.01, optimizer, **settings), LRSchedule(cosine(2)), max_steps=20, save=path)
    new = Net(0.02, optimizer, weight_decay=0.3, **settings)
    new.load_state_dict(first.state_dict())
    fit(new, LRSchedule(cosine(2)), max_steps=20)

    def run(reset):
        net = Net(0.02, optimizer, weight_decay=0.3, **settings)
        schedule = LRSchedule(cosine(2), mode="rewarm", phase="second", reset_optimizer=reset)
        return fit(net, schedule, max_steps=40, ckpt_path=path)

    fresh, kept = run(True), run(False)
    assert fresh.used == kept.used == new.used
    assert torch.equal(fresh.weights(), new.weights())
    assert not torch.allclose(kept.weights(), new.weights())


@pytest.mark.parametrize(("reset", "first_count"), [(None, 1), (True, 1), (False, 21)])
def test_the_optimizer_state_is_reset_or_kept_as_asked(tmp_path, reset, first_count):
    class Counts(Net):
        def on_train_batch_end(self, *args):
            self.counts = [
                *getattr(self, "counts", []),
                int(self.trainer.optimizers[0].state[self.layer.bias]["step"]),
            ]

    path = tmp_path / "decayed.ckpt"
    fit(Net(0.01, torch.optim.AdamW), LRSchedule(cosine(2)), max_steps=20, save=path)
    schedule = LRSchedule(cosine(2), mode="rewarm", phase="second", reset_optimizer=reset)
    net = fit(Counts(0.01, torch.optim.AdamW), schedule, max_steps=25, ckpt_path=path)
    assert net.counts == list(range(first_count, first_count + 5))


def test_a_checkpoint_without_a_schedule_can_be_rewarmed_or_resumed(tmp_path):
    path = tmp_path / "plain.ckpt"
    fit(Net(), max_steps=10, save=path)
    rewarmed = fit(Net(), LRSchedule(linear(2), mode="rewarm", phase="second"), max_steps=20, ckpt_path=path)
    assert rewarmed.used == expected(linear(2), 10)
    resumed = fit(Net(), LRSchedule(linear(2)), max_steps=20, ckpt_path=path)
    assert resumed.used == pytest.approx([linear(2)(n, 20) for n in range(11, 21)])


def test_a_rewarm_without_a_checkpoint_is_a_first_run():
    schedule = LRSchedule(linear(2), mode="rewarm", phase="first")
    assert fit(Net(), schedule, max_steps=10).used == expected(linear(2), 10)


def test_one_callback_serves_one_fit_after_another(tmp_path):
    path, killed = tmp_path / "decayed.ckpt", tmp_path / "killed.ckpt"
    fit(Net(), LRSchedule(linear(2)), max_steps=10, save=path)
    schedule = LRSchedule(linear(2), mode="rewarm", phase="second")
    straight = fit(Net(), schedule, SaveAt(25, killed), max_steps=30, ckpt_path=path).used
    assert straight == expected(linear(2), 20)
    assert fit(Net(), schedule, max_steps=30, ckpt_path=killed).used == straight[15:]
    assert fit(Net(), schedule, max_steps=15).used == expected(linear(2), 15)


def test_resuming_the_checkpoint_of_another_phase_is_refused(tmp_path):
    path = tmp_path / "first.ckpt"
    fit(Net(), LRSchedule(linear(2), phase="first"), max_steps=10, save=path)
    with pytest.raises(ValueError, match="phase is 'second', but the checkpoint has 'first'"):
        fit(Net(), LRSchedule(linear(2), phase="second"), max_steps=20, ckpt_path=path)


def test_a_module_with_its_own_scheduler_is_refused():
    class Own(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(
        ValueError, match=r"Own.configure_optimizers returns an LR scheduler, .* leave LRSchedule out"
    ):
        fit(Own(), LRSchedule(linear(2)), max_steps=10)


class Scheduled(Net):
    """Brings a scheduler of torch, stepped by Lightning."""

    def __init__(self, make, **arguments):
        super().__init__(**arguments)
        self.make_scheduler = make

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": "step"}]


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: n / 100
        ),  # sets LR 0 at once
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=5),
    ],
)
def test_a_modules_scheduler_is_replaced_if_so_asked(tmp_path, make):
    theirs, ours = tmp_path / "theirs.ckpt", tmp_path / "ours.ckpt"
    fit(Scheduled(make, lr=0.5), max_steps=10, save=theirs)

    def schedule():
        return LRSchedule(cosine(3), replace_scheduler=True)

    net = fit(Scheduled(make, lr=0.5), schedule(), max_steps=10, save=ours)
    assert net.used == expected(cosine(3), 10, 0.5)
    assert torch.load(ours, weights_only=True)["lr_schedulers"] == []
    resumed = fit(Scheduled(make, lr=0.5), schedule(), max_steps=20, ckpt_path=theirs)
    assert resumed.used == pytest.approx([0.5 * cosine(3)(n, 20) for n in range(11, 21)])


def test_a_scheduler_that_overwrote_the_peak_cannot_be_replaced():
    net = Scheduled(lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=10))
    with pytest.raises(ValueError, match="OneCycleLR has changed the optimizer's LR for good"):
        fit(net, LRSchedule(linear(2), replace_scheduler=True), max_steps=10)


def test_phases_that_do_not_fit_are_refused_before_the_first_step():
    net = Net()
    with pytest.raises(ValueError, match=r"total is 10; the phases' lengths .* need 100"):
        fit(net, LRSchedule(cosine(100)), max_steps=10)
    assert net.used == []


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_a_schedule_of_impossible_factors_is_refused(value):
    with pytest.raises(ValueError, match=f"schedule gives {value} at position 1; a factor of the LR must be"):
        fit(Net(), LRSchedule(lambda position, total: value), max_steps=5)


def test_a_negative_lr_is_refused():
    with pytest.raises(ValueError, match="Invalid learning rate: -0.1"):
        fit(Net(-0.1, torch.optim.AdamW), LRSchedule(constant()), max_steps=5)


def test_training_without_an_end_needs_a_schedule_without_an_end():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 30

    endless = {"max_epochs": -1, "max_steps": -1}
    assert fit(Net(), LRSchedule(constant(8)), Stop(), **endless).used == expected(
        constant(8), math.inf, steps=30
    )
    with pytest.raises(ValueError, match="total is inf"):
        fit(Net(), LRSchedule(cosine(8)), Stop(), **endless)


def test_a_group_added_during_training_is_refused():
    class Late(Net):
        def on_train_epoch_start(self):
            optimizer = self.trainer.optimizers[0]
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0})

    with pytest.raises(ValueError, match="param_groups are 2, but were 1 when the fit began"):
        fit(Late(), LRSchedule(linear(2)), max_steps=10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"total_steps": 0}, "total_steps is 0"),
        ({"mode": "restart"}, "mode is 'restart'; it must be one of 'resume', 'rewarm', 'branch'"),
        ({"mode": "rewarm"}, "phase is ''; mode='rewarm' needs a name"),
        ({"mode": "branch"}, "phase is ''; mode='branch' needs a name"),
        ({"reset_optimizer": True}, "reset_optimizer is True; mode='resume' keeps the optimizer"),
        (
            {"reset_optimizer": True, "mode": "branch", "phase": "a"},
            "reset_optimizer is True; mode='branch' keeps the optimizer",
        ),
        ({"unit": "epochs"}, "unit is 'epochs'; it must be one of 'steps', 'tokens'"),
        ({"total_tokens": 10}, "total_tokens is 10, but unit is 'steps'"),
        ({"unit": "tokens", "total_steps": 10}, "total_steps is 10, but unit is 'tokens'"),
        ({"unit": "tokens", "total_tokens": 0}, "total_tokens is 0; it must be at least 1"),
        ({"count_tokens": len}, "count_tokens is given, but unit is 'steps'"),
        ({"multipliers": {"0": -1.0}}, "multipliers has -1.0 for '0'; it must be finite and >= 0"),
        (
            {"multipliers": {"0": 0.1}, "mode": "branch", "phase": "a"},
            "multipliers are given; mode='branch' goes on with the checkpoint's LRs",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        LRSchedule(constant(), **arguments)


def test_an_lr_in_a_tensor_stays_that_tensor():
    class Held(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            self.held = optimizer.param_groups[0]["lr"]
            return optimizer

    net = fit(Held(torch.tensor(0.5)), LRSchedule(linear(2)), max_steps=8)
    assert net.used == pytest.approx([0.5 * linear(2)(n, 8) for n in range(1, 9)], abs=1e-7)
    assert net.trainer.optimizers[0].param_groups[0]["lr"] is net.held


def logged(tmp_path, net, **arguments):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(net, LRSchedule(linear(2), **arguments), max_steps=6, logger=logger, log_every_n_steps=2)

    return logger.experiment.metrics_file_path, net.trainer


def rows(path):
    with open(path) as file:
        header, *lines = (line.rstrip("\n").split(",") for line in file)
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_the_lr_of_a_step_is_logged_with_that_step(tmp_path):
    path, trainer = logged(tmp_path, Net(0.5))
    assert {int(row["step"]): float(row["lr"]) for row in rows(path)} == pytest.approx(
        {n - 1: 0.5 * linear(2)(n, 6) for n in (2, 4, 6)}
    )
    assert trainer.progress_bar_metrics == {}  # the bar has three decimals: it would say 0.000


def test_groups_with_different_peaks_are_logged_by_name(tmp_path):
    path, trainer = logged(tmp_path, TwoGroups(1.0))
    first = rows(path)[0]
    assert (float(first["lr/slow"]), float(first["lr/fast"])) == pytest.approx((0.1, 1.0))
    assert set(trainer.callback_metrics) == {"lr/slow", "lr/fast"}
    net = fit(TwoGroups(0.1), LRSchedule(linear(2)), max_steps=6, log_every_n_steps=2)
    assert set(net.trainer.callback_metrics) == {"lr"}


def test_groups_of_several_optimizers_are_logged_by_index():
    net = fit(TwoOptimizers(), LRSchedule(linear(0)), max_steps=12, log_every_n_steps=2)
    assert set(net.trainer.callback_metrics) == {"lr/0.0", "lr/1.0"}


def test_logging_can_be_left_out():
    net = fit(Net(), LRSchedule(linear(2), log=False), max_steps=4, log_every_n_steps=1)
    assert net.trainer.callback_metrics == {}


def test_steps_that_no_logger_sees_are_spared_the_logging(monkeypatch):
    logged = []
    monkeypatch.setattr(Net, "log_dict", lambda net, *_, **__: logged.append(net.trainer.global_step))
    fit(Net(), LRSchedule(linear(2)), max_steps=7, log_every_n_steps=3)
    assert logged == [3, 6]


def test_a_barebones_trainer_is_left_in_peace():
    trainer = Trainer(accelerator="cpu", barebones=True, max_steps=6, callbacks=[LRSchedule(linear(2))])
    net = Net()
    trainer.fit(net, loader())
    assert net.used == expected(linear(2), 6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize(
    ("schedule", "mode", "peak", "expected_lrs"),
    [
        (cosine(2, 0.0), "rewarm", 5e-3, [2.5e-3, 5e-3]),
        (branch(0.1, "cosine"), "branch", 5e-3, None),  # the cosine run left no LR to branch from
    ],
)
def test_from_the_command_line_too_the_first_step_after_a_cosine_run_has_the_new_lr(
    tmp_path, schedule, mode, peak, expected_lrs
):
    files = fits.Files(tmp_path)

    def run(folder, schedule, lr, max_steps, ckpt_path=None, **arguments):
        section = {"phases": [asdict(phase) for phase in schedule.phases], "start": schedule.start}
        callback = {"schedule": {"class_path": "rewarm.Schedule", "init_args": section}, **arguments}
        adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}}
        data = {"train": files.sft, "tokenizer": files.tokenizer, "max_length": 64, "batch_size": 2}
        content = {
            "model": {
                "class_path": "rewarm.CurriculumSFT",
                "init_args": {"model": tiny.LLAMA, "optimizer": adamw},
            },
            "data": {"class_path": "rewarm.InstructionData", "init_args": data},
            "trainer": {
                "accelerator": "cpu",
                "max_steps": max_steps,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [{"class_path": "rewarm.LRSchedule", "init_args": callback}],
                "logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": str(tmp_path), "name": folder, "version": ""},
                },
            },
            "ckpt_path": ckpt_path,
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        main(["fit", "--config", str(tmp_path / "config.yaml")])
        return [float(row["lr"]) for row in rows(tmp_path / folder / "metrics.csv") if row["lr"]]

    first = run("first", cosine(2, 0.0), 1e-3, 6)
    assert first == pytest.approx([1e-3 * cosine(2, 0.0)(n, 6) for n in range(1, 7)], rel=1e-5)
    (saved,) = (tmp_path / "first").rglob("*.ckpt")
    if expected_lrs is None:
        with pytest.raises(SystemExit):
            run("second", schedule, peak, 16, str(saved), mode=mode, phase="new")
        return
    second = run("second", schedule, peak, 16, str(saved), mode=mode, phase="new")
    assert second == pytest.approx([peak * schedule(n, 10) for n in range(1, 11)], rel=1e-5)
    assert second[:2] == pytest.approx(expected_lrs, rel=1e-5)


# --- branches -----------------------------------------------------------------------------------------------


def decay_from(path, *callbacks, lr=99.0, steps=30, make=branch, **settings):
    """A branch whose own LR must not matter."""
    schedule = LRSchedule(make(0.1, "cosine"), mode="branch", phase="short answers")
    net = Net(lr, torch.optim.AdamW, **settings)
    return fit(net, schedule, *callbacks, max_steps=steps, ckpt_path=path)


def test_a_branch_decays_from_the_lr_of_the_checkpoint_from_its_first_step(tmp_path):
    path = tmp_path / "stable.ckpt"
    fit(Net(0.01, torch.optim.AdamW), LRSchedule(constant(5)), max_steps=20, save=path)
    assert decay_from(path).used == expected(branch(0.1, "cosine"), 10, 0.01)
    assert decay_from(path, steps=60).used == expected(branch(0.1, "cosine"), 40, 0.01)


def test_a_stable_run_and_a_branch_are_one_wsd_run_to_the_last_bit(tmp_path):
    path = tmp_path / "stable.ckpt"
    fit(Net(0.01, torch.optim.AdamW), LRSchedule(constant(5)), max_steps=20, save=path)
    whole = fit(Net(0.01, torch.optim.AdamW), LRSchedule(wsd(5, 10, 0.1, "cosine")), max_steps=30)
    assert torch.equal(decay_from(path).weights(), whole.weights())


def test_a_branch_from_a_lowered_lr_goes_on_from_that(tmp_path):
    path = tmp_path / "cooled.ckpt"
    stable = infinite(2, 10, constant_factor=0.55)
    fit(Net(0.01, torch.optim.AdamW), LRSchedule(stable), max_steps=20, save=path)
    assert decay_from(path).used == expected(branch(0.1, "cosine"), 10, 0.0055)


def test_a_branch_goes_on_from_the_scheduler_of_a_foreign_run(tmp_path):
    path = tmp_path / "foreign.ckpt"
    fit(Scheduled(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.9), lr=0.5), max_steps=3, save=path)
    schedule = LRSchedule(branch(0.1, "cosine"), mode="branch", phase="ours")
    used = fit(Net(99.0), schedule, max_steps=13, ckpt_path=path).used
    assert used == expected(branch(0.1, "cosine"), 10, 0.5 * 0.9**3)


def test_a_branch_keeps_the_lrs_of_all_groups(tmp_path):
    path = tmp_path / "stable.ckpt"
    fit(TwoGroups(1.0), LRSchedule(constant(), multipliers={"fast": 0.5}), max_steps=5, save=path)
    schedule = LRSchedule(branch(), mode="branch", phase="b")
    net = fit(TwoGroups(9.0), schedule, max_steps=10, ckpt_path=path)
    factors = [branch()(n, 5) for n in range(1, 6)]
    assert net.used == [pytest.approx([0.1 * f, 0.5 * f]) for f in factors]


@pytest.mark.parametrize("killed_after", [21, 25, 29])
def test_a_killed_branch_goes_on_as_if_never_stopped(tmp_path, killed_after):
    stable, killed = tmp_path / "stable.ckpt", tmp_path / "killed.ckpt"
    fit(Net(0.01, torch.optim.AdamW), LRSchedule(constant(5)), max_steps=20, save=stable)
    straight = decay_from(stable, SaveAt(killed_after, killed))
    resumed = decay_from(killed)
    assert resumed.used == straight.used[killed_after - 20 :]
    assert torch.equal(resumed.weights(), straight.weights())
    saved = torch.load(killed, weights_only=True)["callbacks"]["LRSchedule"]
    assert saved == {"phase": "short answers", "anchor": 20, "tokens": None, "lrs": [[0.01]]}


class AtStart(Callback):
    """Copies the optimizer as the first step finds it."""

    def on_train_batch_start(self, trainer, *args):
        if not hasattr(self, "found"):
            state = trainer.optimizers[0].state_dict()
            self.found = {
                "state": {k: {n: v.clone() for n, v in one.items()} for k, one in state["state"].items()},
                "groups": [dict(group) for group in state["param_groups"]],
            }


@pytest.mark.parametrize(
    ("mode", "reset", "kept"),
    [("branch", None, True), ("rewarm", False, True), ("resume", None, True), ("rewarm", None, False)],
)
def test_the_optimizers_state_and_settings_are_what_the_mode_says(tmp_path, mode, reset, kept):
    path, start = tmp_path / "stable.ckpt", AtStart()
    fit(
        Net(0.01, torch.optim.AdamW, betas=(0.8, 0.9), weight_decay=0.3),
        LRSchedule(constant()),
        max_steps=20,
        save=path,
    )
    schedule = LRSchedule(branch(), mode=mode, phase="" if mode == "resume" else "new", reset_optimizer=reset)
    net = Net(0.02, torch.optim.AdamW, betas=(0.7, 0.95), weight_decay=0.1)
    fit(net, schedule, start, max_steps=25, ckpt_path=path)
    (saved,) = torch.load(path, weights_only=True)["optimizer_states"]
    (group,) = start.found["groups"]
    if kept:
        assert saved["state"].keys() == start.found["state"].keys()
        for number, one in saved["state"].items():
            assert one.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(value, start.found["state"][number][name]) for name, value in one.items())
        assert (group["betas"], group["weight_decay"]) == ((0.8, 0.9), 0.3)
    else:
        assert start.found["state"] == {}
        assert (group["betas"], group["weight_decay"]) == ((0.7, 0.95), 0.1)


def test_a_branch_needs_a_checkpoint_with_an_lr(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to branch from: give ckpt_path"):
        decay_from(None)
    weights = tmp_path / "weights.ckpt"
    fit(Net(0.01, torch.optim.AdamW), LRSchedule(constant()), max_steps=20).trainer.save_checkpoint(
        weights, weights_only=True
    )
    with pytest.raises(ValueError, match=r"weights.ckpt', which has weights alone: a branch needs"):
        decay_from(weights)
    decayed = tmp_path / "decayed.ckpt"
    fit(Net(0.01, torch.optim.AdamW), LRSchedule(linear()), max_steps=20, save=decayed)
    with pytest.raises(ValueError, match="the checkpoint's LR is 0: use mode='rewarm'"):
        decay_from(decayed)


def test_a_branch_must_begin_with_the_checkpoints_lr(tmp_path):
    path = tmp_path / "stable.ckpt"
    fit(Net(0.01, torch.optim.AdamW), LRSchedule(constant()), max_steps=20, save=path)
    with pytest.raises(ValueError, match="schedule starts at 0.0; a branch begins with the checkpoint's LR"):
        decay_from(path, make=lambda end, shape: wsd(2, 5, end, shape))


def test_a_branch_and_another_mode_do_not_go_on_with_each_other(tmp_path):
    stable, branched = tmp_path / "stable.ckpt", tmp_path / "branched.ckpt"
    named = {"phase": "short answers"}
    fit(Net(0.01, torch.optim.AdamW), LRSchedule(constant(), **named), max_steps=20, save=stable)
    with pytest.raises(ValueError, match="mode is 'branch', but phase 'short answers' .* is no branch"):
        decay_from(stable)
    fit(Net(0.01, torch.optim.AdamW), LRSchedule(constant(), phase="other"), max_steps=20, save=stable)
    decay_from(stable, SaveAt(25, branched))
    with pytest.raises(ValueError, match="mode is 'resume', but phase 'short answers' .* is a branch"):
        fit(Net(0.01, torch.optim.AdamW), LRSchedule(branch(), **named), max_steps=30, ckpt_path=branched)


# --- tokens -------------------------------------------------------------------------------------------------

LENGTHS = [7, 3, 9, 1, 5, 5, 2, 8, 4, 6, 3]  # of eleven batches of two rows


class Tokens(Net):
    """Reads batches of tokens; loses nothing by having only their sums."""

    def training_step(self, batch, batch_idx):
        x = batch["input_ids"].float()[:, :2] * 0.1
        return ((self.layer(x) - x.sum(1, keepdim=True)) ** 2).mean()


def token_batches():
    for length in LENGTHS:
        mask = torch.ones(2, 10, dtype=torch.long)
        mask[1, length:] = 0
        yield {"input_ids": torch.arange(20).reshape(2, 10) % (length + 1), "attention_mask": mask}


TOKENS = [10 + length for length in LENGTHS]


def fit_tokens(net, schedule, *callbacks, save=None, ckpt_path=None, loader=DataLoader, **settings):
    settings = {"logger": False, "enable_checkpointing": False, **settings}
    trainer = Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[schedule, *callbacks],
        **settings,
    )
    trainer.fit(net, loader(list(token_batches()), batch_size=None), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return net


def seen(accumulate, epochs):
    """Tokens by the end of every step."""
    ends, total = [], 0
    for _ in range(epochs):
        for start in range(0, len(TOKENS), accumulate):
            total += sum(TOKENS[start : start + accumulate])
            ends.append(total)
    return ends


@pytest.mark.parametrize("accumulate", [1, 3])
def test_in_tokens_a_step_has_the_lr_of_all_that_is_seen_by_its_end(accumulate):
    schedule, total = wsd(60, 100, 0.1), 2 * sum(TOKENS)
    net = fit_tokens(
        Tokens(0.5),
        LRSchedule(schedule, unit="tokens", total_tokens=total),
        max_epochs=2,
        accumulate_grad_batches=accumulate,
    )
    ends = seen(accumulate, 2)
    assert net.used == pytest.approx([0.5 * schedule(n, total) for n in ends], rel=1e-12)
    assert ends[-1] == total
    assert net.used[-1] == pytest.approx(0.05)


def test_batches_of_equal_size_make_tokens_and_steps_one_schedule():
    def count(batch):
        return 1000

    tokens = LRSchedule(wsd(4000, 0.5), unit="tokens", total_tokens=20_000, count_tokens=count)
    assert fit(Net(), tokens, max_steps=20).used == fit(Net(), LRSchedule(wsd(4, 0.5)), max_steps=20).used


# Within an epoch only the one of these loaders can go on, and only the other one at its end.
@pytest.mark.parametrize(
    ("killed_after", "loader"), [(1, StatefulDataLoader), (4, DataLoader), (6, StatefulDataLoader)]
)
def test_in_tokens_resuming_anywhere_equals_never_having_stopped(tmp_path, killed_after, loader):
    killed = tmp_path / "killed.ckpt"

    def run(*callbacks, **more):
        schedule = LRSchedule(cosine(50), unit="tokens", total_tokens=2 * sum(TOKENS))
        net = Tokens(0.05, torch.optim.AdamW)
        more |= {"max_epochs": 2, "accumulate_grad_batches": 3, "loader": loader}
        return fit_tokens(net, schedule, *callbacks, **more)

    straight = run(SaveAt(killed_after, killed))
    saved = torch.load(killed, weights_only=True)["callbacks"]["LRSchedule"]
    assert saved == {"phase": "", "anchor": 0, "tokens": seen(3, 2)[killed_after - 1], "lrs": None}
    resumed = run(ckpt_path=killed)
    assert resumed.used == straight.used[killed_after:]
    assert torch.equal(resumed.weights(), straight.weights())


def test_tokens_of_an_unfinished_window_are_in_the_checkpoint(tmp_path):
    class SaveAtBatch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "amid.ckpt")

    schedule = LRSchedule(constant(), unit="tokens")
    net = fit_tokens(Tokens(), schedule, SaveAtBatch(), max_epochs=1, accumulate_grad_batches=3)
    saved = torch.load(tmp_path / "amid.ckpt", weights_only=True)["callbacks"]["LRSchedule"]
    assert saved["tokens"] == sum(TOKENS[:5])
    net.trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["LRSchedule"]
    assert saved["tokens"] == sum(TOKENS)


def test_a_validation_after_the_fit_forgets_no_tokens():
    schedule = LRSchedule(constant(), unit="tokens")
    net = fit_tokens(Tokens(), schedule, max_epochs=1)
    schedule.setup(net.trainer, net, "validate")
    assert schedule.state_dict()["tokens"] == sum(TOKENS)


def test_a_rewarm_in_tokens_counts_from_the_checkpoint(tmp_path):
    path, killed = tmp_path / "old.ckpt", tmp_path / "killed.ckpt"
    fit_tokens(Tokens(), LRSchedule(constant(), unit="tokens"), max_epochs=1, save=path)

    def run(*callbacks, ckpt_path):
        schedule = LRSchedule(
            linear(40), mode="rewarm", phase="new", unit="tokens", total_tokens=2 * sum(TOKENS)
        )
        return fit_tokens(Tokens(0.5), schedule, *callbacks, max_epochs=3, ckpt_path=ckpt_path)

    straight = run(SaveAt(22, killed), ckpt_path=path)
    assert straight.used == pytest.approx([0.5 * linear(40)(n, 2 * sum(TOKENS)) for n in seen(1, 2)])
    assert run(ckpt_path=killed).used == straight.used[11:]


def test_ranks_are_asked_for_their_tokens_once_per_optimizer_step(monkeypatch):
    asked = []
    reduce = SingleDeviceStrategy.reduce

    def counting(self, tensor, *args, **kwargs):
        asked.append(int(tensor))
        return reduce(self, tensor, *args, **kwargs)

    monkeypatch.setattr(SingleDeviceStrategy, "reduce", counting)
    fit_tokens(Tokens(), LRSchedule(constant(), unit="tokens"), max_epochs=1, accumulate_grad_batches=4)
    # Lightning's own questions are about ones, zeros and the number of batches.
    assert [number for number in asked if number > len(TOKENS)] == [sum(TOKENS[i : i + 4]) for i in (0, 4, 8)]


def test_units_do_not_go_on_with_each_other(tmp_path):
    steps, tokens, plain = (tmp_path / f"{name}.ckpt" for name in ("steps", "tokens", "plain"))
    fit_tokens(Tokens(), LRSchedule(constant()), max_epochs=1, save=steps)
    fit_tokens(Tokens(), LRSchedule(constant(), unit="tokens"), max_epochs=1, save=tokens)
    fit(Net(), max_steps=11, save=plain)
    with pytest.raises(ValueError, match="unit is 'tokens', but phase '' of the checkpoint counts steps"):
        fit_tokens(Tokens(), LRSchedule(constant(), unit="tokens"), max_epochs=2, ckpt_path=steps)
    with pytest.raises(ValueError, match="unit is 'steps', but phase '' of the checkpoint counts tokens"):
        fit_tokens(Tokens(), LRSchedule(constant()), max_epochs=2, ckpt_path=tokens)
    with pytest.raises(ValueError, match="the checkpoint has no count of tokens: use mode='rewarm'"):
        fit_tokens(Tokens(), LRSchedule(constant(), unit="tokens"), max_epochs=2, ckpt_path=plain)


def test_batches_without_tokens_are_refused_before_the_first_step():
    net = Net()
    with pytest.raises(ValueError, match="so tokens need count_tokens"):
        fit(net, LRSchedule(constant(), unit="tokens"), max_steps=3)
    assert net.used == []


# --- curricula ----------------------------------------------------------------------------------------------


class Ordered(LightningDataModule):
    def __init__(self, order):
        super().__init__()
        self.order = order

    def train_dataloader(self):
        return loader()


def fit_ordered(order, schedule, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", enable_model_summary=False, callbacks=[LRSchedule(schedule)], **quiet, **settings
    )
    trainer.fit(Net(), datamodule=Ordered(order))


@pytest.mark.parametrize("schedule", [linear(2), cosine(2, 0.09), wsd(2, 5)])
def test_an_ascending_curriculum_with_a_decay_to_about_zero_is_warned_of(schedule):
    said = "Ordered has order='ascending', but the LR ends at .* the last examples hardly count"
    with pytest.warns(UserWarning, match=said):
        fit_ordered("ascending", schedule, max_steps=10)


@pytest.mark.parametrize(
    ("order", "schedule", "steps"),
    [
        ("ascending", wsd(2, 5, 0.33), 10),
        ("ascending", cosine(2, 0.1), 10),
        ("ascending", constant(2), 10),
        ("shuffled", linear(2), 10),
        ("descending", linear(2), 10),
    ],
)
def test_other_orders_and_ends_are_not_warned_of(order, schedule, steps):
    fit_ordered(order, schedule, max_steps=steps)  # warnings are errors


# --- gradient norms -----------------------------------------------------------------------------------------


def test_the_norms_of_whole_gradients_before_clipping_are_logged(tmp_path):
    true = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            flat = torch.cat([p.grad.flatten() for p in module.parameters()]).double()
            true.append([float(flat.abs().sum()), float(flat.square().sum().sqrt())])

    logger = CSVLogger(tmp_path, name="", version="")
    fit(
        Net(0.05),
        LRSchedule(linear(2), gradient_norms=True),
        Watch(),
        max_steps=6,
        logger=logger,
        log_every_n_steps=2,
        accumulate_grad_batches=3,
        gradient_clip_val=0.01,
    )
    found = {int(row["step"]): row for row in rows(logger.experiment.metrics_file_path)}
    for step in (1, 3, 5):
        norms = [float(found[step][f"train/grad_norm_{name}"]) for name in ("l1", "l2")]
        assert norms == pytest.approx(true[step], rel=1e-5)
        assert norms[1] > 0.01


def test_a_run_refined_from_its_own_norms_trains(tmp_path):
    norms = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *args):
            norms.append(float(trainer.callback_metrics["train/grad_norm_l1"]))

    fit(Net(0.01), LRSchedule(constant(), gradient_norms=True), Watch(), max_steps=20, log_every_n_steps=1)
    assert len(norms) == 20
    used = fit(Net(0.01), LRSchedule(refined(norms)), max_steps=20).used
    assert used == expected(refined(norms), 20, 0.01)
    assert max(used) > 0.008
    assert used[-1] == 0.0


def test_norms_that_a_strategy_hides_are_refused():
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match="gradient_norms is True; FSDPStrategy hides the gradients"):
        LRSchedule(constant(), gradient_norms=True).on_fit_start(trainer, Net())
