"""The learning rates that real fits use: straight, accumulated, resumed, re-warmed."""

import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, TensorDataset

from rewarm.callbacks.lr_schedule import LRSchedule
from rewarm.functional.schedule import constant, cosine, linear, wsd

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
    assert saved == {"LRSchedule": {"phase": "first", "anchor": 0}}


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
    assert torch.load(killed, weights_only=True)["callbacks"]["LRSchedule"] == {
        "phase": "second",
        "anchor": 20,
    }


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


def test_phases_that_do_not_fit_are_refused_before_the_first_step():
    net = Net()
    with pytest.raises(ValueError, match=r"total is 10; the phases' lengths .* need 100"):
        fit(net, LRSchedule(cosine(100)), max_steps=10)
    assert net.used == []


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
        ({"mode": "restart"}, "mode is 'restart'; it must be 'resume' or 'rewarm'"),
        ({"mode": "rewarm"}, "phase is ''; mode='rewarm' needs a name"),
        ({"reset_optimizer": True}, "reset_optimizer is True; mode='resume' keeps the optimizer"),
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
    assert set(fit(TwoGroups(0.1), LRSchedule(linear(2)), max_steps=6).trainer.callback_metrics) == {"lr"}


def test_groups_of_several_optimizers_are_logged_by_index():
    net = fit(TwoOptimizers(), LRSchedule(linear(0)), max_steps=12)
    assert set(net.trainer.callback_metrics) == {"lr/0.0", "lr/1.0"}


def test_logging_can_be_left_out():
    assert fit(Net(), LRSchedule(linear(2), log=False), max_steps=4).trainer.callback_metrics == {}


def test_a_barebones_trainer_is_left_in_peace():
    trainer = Trainer(accelerator="cpu", barebones=True, max_steps=6, callbacks=[LRSchedule(linear(2))])
    net = Net()
    trainer.fit(net, loader())
    assert net.used == expected(linear(2), 6)
