"""Averages of real fits against means of independently recorded weights."""

import functools
import itertools
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

from rewarm.callbacks.checkpoint_averaging import CheckpointAveraging
from tests.distributed.ranks import on_ranks

pytestmark = [
    # lightning 2.6 with torch 2.13.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    # Workers would only slow these fits down, and the epochs are short.
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Net(LightningModule):
    """Two layers with a tied weight, a frozen one, a buffer; remembers what validation saw."""

    def __init__(self, lr=0.05):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))
        self.lr = lr
        self.validated, self.live = [], []

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return self.frozen(self.second(self.first(batch))).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(weights(self))

    def on_train_start(self):
        self.step = self.trainer.global_step
        self.started = weights(self)

    def on_train_batch_end(self, *args):
        if self.trainer.global_step != self.step:
            self.step = self.trainer.global_step
            self.live.append(weights(self))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Keep(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def weights(module):
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def loader(batches=8, dtype=torch.float32):
    x = torch.randn(2 * batches, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(x.to(dtype), batch_size=2)


def trainer(*callbacks, **settings):
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "max_epochs": 1,
    }
    return Trainer(callbacks=list(callbacks), **quiet | settings)


def fit(averaging, *callbacks, net=None, batches=8, data=None, ckpt_path=None, **settings):
    net = net or Net()
    run = trainer(averaging, *callbacks, **settings)
    run.fit(net, data or loader(batches), loader(1), ckpt_path=ckpt_path)
    return net, run


def weighted(snapshots, shares):
    return {
        n: sum(share * s[n].double() for share, s in zip(shares, snapshots, strict=True))
        for n in snapshots[0]
    }


def mean(snapshots):
    return weighted(snapshots, [1 / len(snapshots)] * len(snapshots))


def assert_near(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].double(), value.double(), **tolerance or {"rtol": 1e-6, "atol": 1e-7}
        )


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[n], expected[n]) for n in expected)


def differ(a, b):
    return any(not torch.equal(a[n], b[n]) for n in a)


# --- what is averaged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "accumulate", "steps"),
    [
        ({"k": 3, "every_n_steps": 1}, 1, [6, 7, 8]),
        ({"k": 3, "every_n_steps": 2}, 1, [4, 6, 8]),
        ({"k": 6, "every_n_steps": 2}, 1, [2, 4, 6, 8]),
        ({"k": 6, "every_n_steps": 3, "start_step": 2}, 1, [2, 5, 8]),
        ({"k": 1, "every_n_steps": 3}, 1, [6]),
        ({"k": 2, "every_n_steps": 1}, 2, [3, 4]),
        ({"k": 6, "every_n_steps": 1}, 3, [1, 2, 3]),
    ],
)
def test_last_k_is_the_mean_of_the_weights_after_these_optimizer_steps(settings, accumulate, steps):
    averaging = CheckpointAveraging(**settings)
    net, _ = fit(averaging, accumulate_grad_batches=accumulate)
    assert averaging.num_snapshots == len(steps)
    assert_near(weights(net), mean([net.live[step - 1] for step in steps]))


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"k": 3, "weights": [1.0, 2.0, 5.0]}, [1 / 8, 2 / 8, 5 / 8]),
        ({"k": 3, "weights": [0.5, 0.0, 0.5]}, [1 / 2, 0, 1 / 2]),
        ({"k": 4, "weights": "linear"}, [1 / 4] * 4),
        ({"k": 4, "weights": "sqrt"}, [math.sqrt(j / 4) - math.sqrt((j - 1) / 4) for j in range(1, 5)]),
        ({"k": 2, "weights": "cosine"}, [1 / 2, 1 / 2]),
        # fewer snapshots than k
        ({"k": 6, "weights": [9.0, 9.0, 1.0, 2.0, 3.0, 4.0], "every_n_steps": 2}, [0.1, 0.2, 0.3, 0.4]),
        (
            {"k": 8, "weights": "sqrt", "every_n_steps": 2},
            [math.sqrt(j / 4) - math.sqrt((j - 1) / 4) for j in range(1, 5)],
        ),
    ],
)
def test_the_last_snapshots_may_have_weights(settings, shares):
    every = settings.get("every_n_steps", 1)
    net, _ = fit(CheckpointAveraging(**{"every_n_steps": 1} | settings))
    used = net.live[every - 1 :: every][-len(shares) :]
    assert_near(weights(net), weighted(used, shares))


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        (None, [1 / 3] * 3),
        ("sqrt", [math.sqrt(j / 3) - math.sqrt((j - 1) / 3) for j in (1, 2, 3)]),
        ([1.0, 0.0, 3.0], [1 / 4, 0, 3 / 4]),
    ],
)
def test_a_window_is_the_mean_of_its_snapshots_until_the_next_one_is_whole(given, shares):
    averaging = CheckpointAveraging("window", k=3, every_n_steps=1, weights=given)
    net, _ = fit(averaging, val_check_interval=1, num_sanity_val_steps=0)
    for step, seen in enumerate(net.validated, 1):
        if step >= 3:
            whole = step - step % 3
            expected = weighted(net.live[whole - 3 : whole], shares)
        else:
            proportions = [share / sum(shares[:step]) for share in shares[:step]]
            expected = weighted(net.live[:step], proportions)
        assert_near(seen, expected, rtol=1e-6, atol=1e-6)
    assert averaging.num_snapshots == 3


@pytest.mark.parametrize(("every", "decay"), [(1, 0.5), (1, 0.9), (3, 0.7)])
def test_ema_is_the_bias_corrected_float64_recursion(every, decay):
    averaging = CheckpointAveraging("ema", decay=decay, every_n_steps=every)
    net, _ = fit(averaging)
    used = net.live[every - 1 :: every]
    zero_started = {n: torch.zeros_like(w, dtype=torch.float64) for n, w in used[0].items()}
    for snapshot in used:
        zero_started = {n: decay * a + (1 - decay) * snapshot[n].double() for n, a in zero_started.items()}
    expected = {n: a / (1 - decay ** len(used)) for n, a in zero_started.items()}
    assert averaging.num_snapshots == len(used)
    assert_near(weights(net), expected, rtol=1e-5, atol=1e-6)


def test_ema_with_decay_zero_is_the_current_weights():
    net, _ = fit(CheckpointAveraging("ema", decay=0.0))
    assert_same(weights(net), net.live[-1])


@pytest.mark.parametrize(
    "averaging",
    [
        ("last_k", {"every_n_steps": 1}),
        ("last_k", {"every_n_steps": 1, "weights": "cosine"}),
        ("window", {"every_n_steps": 1, "weights": "sqrt"}),
        ("ema", {"decay": 0.9}),
    ],
)
def test_equal_checkpoints_average_to_themselves_exactly(averaging):
    mode, settings = averaging
    start = weights(Net())
    net, _ = fit(CheckpointAveraging(mode, **settings), net=Net(lr=0.0))
    assert_same(weights(net), start)


def test_bfloat16_weights_are_averaged_in_float32():
    averaging = CheckpointAveraging(k=4, every_n_steps=1)
    net, _ = fit(averaging, data=loader(dtype=torch.bfloat16), precision="bf16-true")
    assert {b.dtype for b in averaging.averages.rows[0]} == {torch.float32}
    assert net.first.weight.dtype == torch.bfloat16
    expected = {n: w.bfloat16() for n, w in mean(net.live[-4:]).items()}
    assert_near(weights(net), expected, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize(("mode", "rows"), [("last_k", 3), ("window", 2), ("ema", 1)])
def test_buffers_hold_the_trainable_elements_so_often_and_tied_weights_once(mode, rows):
    averaging = CheckpointAveraging(mode, every_n_steps=1, **({"k": 3} if mode != "ema" else {}))
    net, _ = fit(averaging)
    trainable = 9 + 3 + 3  # one shared matrix, two biases; the frozen layer and the buffer are out
    held = [t for buffers in averaging.averages.rows for t in buffers]
    assert sum(t.numel() for t in held) == rows * trainable
    assert len({t.data_ptr() for t in held}) == len(held)
    assert not any(isinstance(value, nn.Module) for value in vars(averaging.averages).values())
    assert net.second.weight is net.first.weight


# --- when the average is in place ---------------------------------------------------------------------------


def test_validation_sees_the_average_and_training_goes_on_from_live_weights():
    averaging = CheckpointAveraging(k=2, every_n_steps=2)
    net, _ = fit(averaging, val_check_interval=1, num_sanity_val_steps=1)
    start = weights(Net())
    sanity, first, *later = net.validated
    assert_same(sanity, start)
    assert_same(first, net.live[0])  # no snapshot yet
    for step, seen in enumerate(later, 2):
        last = step - step % 2
        assert_near(seen, mean([net.live[i - 1] for i in (last - 2, last) if i > 0]))
    plain = Net()
    trainer().fit(plain, loader())
    for with_averaging, without in zip(net.live, plain.live, strict=True):
        assert_same(with_averaging, without)


def test_validate_false_validates_and_apply_at_end_false_leaves_live_weights():
    averaging = CheckpointAveraging(every_n_steps=1, validate=False, apply_at_end=False)
    net, _ = fit(averaging, val_check_interval=1, num_sanity_val_steps=0)
    for seen, live in zip(net.validated, net.live, strict=True):
        assert_same(seen, live)
    assert_same(weights(net), net.live[-1])


def test_live_weights_are_back_after_validation_raised(tmp_path):
    class Breaks(Net):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            raise RuntimeError("broken")

    net = Breaks()
    saver = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=1)
    with pytest.raises(RuntimeError, match="broken"):
        fit(CheckpointAveraging(every_n_steps=1), saver, net=net, num_sanity_val_steps=0)
    assert differ(net.validated[0], net.live[-1])
    assert_same(weights(net), net.live[-1])
    (path,) = tmp_path.glob("*.ckpt")
    assert_same(trained(torch.load(path)), net.live[-1])


def test_a_second_fit_goes_on_from_the_live_weights():
    averaging = CheckpointAveraging(every_n_steps=3)
    net, run = fit(averaging)
    assert differ(weights(net), net.live[-1])
    run.fit_loop.max_epochs = 2
    run.fit(net, loader(), loader(1))
    assert_same(net.started, net.live[7])
    assert_near(weights(net), mean([net.live[step - 1] for step in (3, 6, 9, 12, 15)]))


def test_a_new_fit_starts_a_new_average():
    averaging = CheckpointAveraging(every_n_steps=1)
    fit(averaging, net=Net(lr=0.5))
    net, _ = fit(averaging)
    assert_same(net.validated[0], weights(Net()))  # the sanity check
    assert_near(weights(net), mean(net.live[-6:]))


def test_a_fit_without_snapshots_says_so():
    with pytest.warns(UserWarning, match=r"took no snapshot in 8 steps \(start_step=0, every_n_steps=100\)"):
        net, _ = fit(CheckpointAveraging())
    assert_same(weights(net), net.live[-1])


def test_number_of_snapshots_is_logged():
    logger = Keep()
    averaging = CheckpointAveraging(k=2, every_n_steps=2)
    fit(averaging, logger=logger, log_every_n_steps=2)
    rows = [row["averaging/snapshots"] for _, row in logger.rows if "averaging/snapshots" in row]
    assert rows == [1.0, 2.0, 2.0, 2.0]


# --- access -------------------------------------------------------------------------------------------------


def test_averaged_state_dict_has_all_keys_and_shares_nothing():
    averaging = CheckpointAveraging(k=3, every_n_steps=1, apply_at_end=False)
    net, _ = fit(averaging)
    state = averaging.averaged_state_dict(net)
    assert state.keys() == net.state_dict().keys()
    expected = mean(net.live[-3:])
    assert_near({n: state[n] for n in expected}, expected)
    assert torch.equal(state["second.weight"], state["first.weight"])
    assert torch.equal(state["frozen.weight"], net.frozen.weight)
    assert_same(weights(net), net.live[-1])
    state["first.weight"].zero_()
    assert_same(weights(net), net.live[-1])


def test_averaged_puts_the_average_in_place_within_the_block_alone():
    averaging = CheckpointAveraging(k=3, every_n_steps=1, apply_at_end=False)
    net, _ = fit(averaging)
    with averaging.averaged(net):
        assert_near(weights(net), mean(net.live[-3:]))
    assert_same(weights(net), net.live[-1])
    with pytest.raises(RuntimeError), averaging.averaged(net):
        net(torch.zeros(1))  # not defined
    assert_same(weights(net), net.live[-1])
    with pytest.raises(RuntimeError, match="no snapshot yet"):
        CheckpointAveraging().averaged_state_dict(net)


# --- checkpoints --------------------------------------------------------------------------------------------


class SaveDuringValidation(Callback):
    """Saves while the average is in place."""

    def __init__(self, path):
        self.path = path

    def on_validation_epoch_end(self, trainer, pl_module):
        self.in_place = weights(pl_module)
        trainer.save_checkpoint(self.path)
        assert_same(weights(pl_module), self.in_place)


def trained(checkpoint):
    return {n: v for n, v in checkpoint["state_dict"].items() if n in weights(Net())}


def test_checkpoints_hold_live_weights_whenever_they_are_saved(tmp_path):
    during = SaveDuringValidation(tmp_path / "during.ckpt")
    every = ModelCheckpoint(tmp_path / "every", filename="end", save_last=True)
    net, run = fit(CheckpointAveraging(every_n_steps=1), during, every, num_sanity_val_steps=0)
    in_place = weights(net)
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert_same(weights(net), in_place)
    live = net.live[-1]
    assert differ(during.in_place, live)
    assert differ(in_place, live)
    for path in ("during.ckpt", "every/end.ckpt", "every/last.ckpt", "after.ckpt"):
        checkpoint = torch.load(tmp_path / path)
        assert_same(trained(checkpoint), live)
        tied = checkpoint["state_dict"]["second.weight"]
        assert torch.equal(tied, live["first.weight"])
        assert tied.data_ptr() == checkpoint["state_dict"]["first.weight"].data_ptr()
        assert torch.equal(checkpoint["state_dict"]["frozen.weight"], net.frozen.weight)
        averages = checkpoint["callbacks"]["CheckpointAveraging"]["averages"]
        assert [len(row) for row in averages] == [3] * 6


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "last_k", "k": 5, "every_n_steps": 2, "start_step": 1},
        {"mode": "last_k", "k": 2, "every_n_steps": 3, "device": "cpu"},
        {"mode": "last_k", "k": 4, "every_n_steps": 1, "weights": "sqrt"},
        {"mode": "window", "k": 5, "every_n_steps": 1, "weights": [1.0, 2.0, 0.0, 1.0, 3.0]},
        {"mode": "window", "k": 2, "every_n_steps": 2},
        {"mode": "ema", "decay": 0.9},
        {"mode": "ema", "decay": 0.9, "every_n_steps": 3},
    ],
)
@pytest.mark.parametrize("saved", ["by ModelCheckpoint", "after the fit", "during validation"])
def test_resuming_is_exact(settings, saved, tmp_path):
    straight = CheckpointAveraging(**settings)
    net, _ = fit(straight, batches=4, max_epochs=3)

    during = SaveDuringValidation(tmp_path / "during validation.ckpt")
    every = ModelCheckpoint(tmp_path, filename="by ModelCheckpoint")
    cut, run = fit(CheckpointAveraging(**settings), during, every, batches=4, max_epochs=2)
    run.save_checkpoint(tmp_path / "after the fit.ckpt")
    resumed = CheckpointAveraging(**settings)
    net2, _ = fit(resumed, every, batches=4, max_epochs=3, ckpt_path=tmp_path / f"{saved}.ckpt")

    assert [len(n.live) for n in (net, cut, net2)] == [12, 8, 4]
    assert_same(net2.live[0], net.live[8])
    assert_same(net2.live[-1], net.live[-1])
    assert_same(weights(net2), weights(net))
    assert_same(net2.validated[-1], net.validated[-1])
    assert resumed._num_taken == straight._num_taken
    for row, expected in zip(resumed.averages.rows, straight.averages.rows, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(row, expected, strict=True))


def test_resuming_a_finished_run_puts_the_average_in_place(tmp_path):
    net, run = fit(CheckpointAveraging(every_n_steps=1))
    run.save_checkpoint(tmp_path / "done.ckpt")
    again, _ = fit(CheckpointAveraging(every_n_steps=1), ckpt_path=tmp_path / "done.ckpt")
    assert again.live == []
    assert_same(weights(again), weights(net))


def test_a_snapshot_that_the_checkpoint_missed_is_taken_on_resume(tmp_path):
    class SaveBefore(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

    net = Net()
    trainer(SaveBefore(), CheckpointAveraging(every_n_steps=4)).fit(net, loader(4))
    assert torch.load(tmp_path / "four.ckpt")["callbacks"]["CheckpointAveraging"]["averages"] == []
    straight, _ = fit(CheckpointAveraging(every_n_steps=4), batches=4, max_epochs=2)
    resumed, _ = fit(
        CheckpointAveraging(every_n_steps=4), batches=4, max_epochs=2, ckpt_path=tmp_path / "four.ckpt"
    )
    assert_same(weights(resumed), weights(straight))


def test_a_loaded_checkpoint_is_validated_and_tested_with_its_average(tmp_path):
    class WithTest(Net):
        test_step = Net.validation_step

    net, run = fit(CheckpointAveraging(every_n_steps=1))
    run.save_checkpoint(tmp_path / "done.ckpt")
    for verb in ("validate", "test"):
        fresh = WithTest()
        getattr(trainer(CheckpointAveraging(every_n_steps=1)), verb)(
            fresh, loader(1), ckpt_path=tmp_path / "done.ckpt", verbose=False
        )
        assert_same(fresh.validated[-1], weights(net))
        assert_same(weights(fresh), net.live[-1])


def test_a_checkpoint_loaded_after_the_fit_replaces_weights_and_average(tmp_path):
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    net, run = fit(CheckpointAveraging(k=2, every_n_steps=1), every, max_epochs=2)
    run.validate(net, loader(1), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert_near(net.validated[-1], mean(net.live[6:8]))
    assert_same(weights(net), net.live[7])


def test_validating_after_the_fit_keeps_the_average_in_place():
    net, run = fit(CheckpointAveraging(every_n_steps=1))
    in_place = weights(net)
    run.validate(net, loader(1), verbose=False)
    assert_same(net.validated[-1], in_place)
    assert_same(weights(net), in_place)


def test_resuming_with_fewer_snapshots_keeps_the_newest(tmp_path):
    net, run = fit(CheckpointAveraging(k=6, every_n_steps=1))
    run.save_checkpoint(tmp_path / "six.ckpt")
    two = CheckpointAveraging(k=2, every_n_steps=1)
    again, _ = fit(two, ckpt_path=tmp_path / "six.ckpt")
    assert_near(weights(again), mean(net.live[-2:]))


def test_a_checkpoint_says_what_share_each_row_has(tmp_path):
    settings = {"last_k": {"weights": [1.0, 0.0, 3.0]}, "window": {}, "ema": {}}
    for mode, options in settings.items():
        k = {} if mode == "ema" else {"k": 3}
        net, run = fit(CheckpointAveraging(mode, every_n_steps=1, **k, **options))
        run.save_checkpoint(tmp_path / "a.ckpt")
        state = torch.load(tmp_path / "a.ckpt")["callbacks"]["CheckpointAveraging"]
        rows = [dict(zip(state["names"], row, strict=True)) for row in state["averages"]]
        assert_near(weights(net), weighted(rows, state["weights"]))


def test_a_window_goes_on_only_with_the_weights_that_it_began_with(tmp_path):
    _, run = fit(CheckpointAveraging("window", k=5, every_n_steps=1))
    run.save_checkpoint(tmp_path / "a.ckpt")
    for settings in ({"k": 4}, {"k": 5, "weights": "sqrt"}):
        with pytest.raises(ValueError, match=r"the weights in a window are \[.*was averaged with \[0.2, "):
            fit(CheckpointAveraging("window", every_n_steps=1, **settings), ckpt_path=tmp_path / "a.ckpt")


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    _, run = fit(CheckpointAveraging(every_n_steps=1))
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="mode is 'ema', but the checkpoint was averaged with 'last_k'"):
        fit(CheckpointAveraging("ema"), ckpt_path=tmp_path / "a.ckpt")
    fewer = Net()
    fewer.first.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"differ in \['first.bias'\]"):
        trainer(CheckpointAveraging(every_n_steps=1)).validate(
            fewer, loader(1), ckpt_path=tmp_path / "a.ckpt", verbose=False
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "mean"}, "mode is 'mean'"),
        ({"k": 0}, "k is 0"),
        ({"mode": "ema", "k": 3}, "mode 'ema' does not have it"),
        ({"mode": "ema", "weights": "linear"}, "mode 'ema' has none"),
        ({"mode": "window", "decay": 0.9}, "only mode 'ema' has it"),
        ({"weights": "up"}, "shape is 'up'"),
        ({"weights": [1.0]}, r"weights is \[1.0\]; it must be 6 numbers"),
        ({"weights": [1.0, 0.0], "k": 2}, "the last above 0"),
        ({"weights": [-1.0, 2.0], "k": 2}, "0 or more"),
        ({"weights": [math.inf, 2.0], "k": 2}, "2 numbers"),
        ({"weights": [math.nan, 2.0], "k": 2}, "2 numbers"),
        ({"decay": 0.9}, "only mode 'ema' has it"),
        ({"mode": "ema", "decay": 1.0}, "decay is 1.0"),
        ({"every_n_steps": 0}, "every_n_steps is 0"),
        ({"start_step": -1}, "start_step is -1"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CheckpointAveraging(**settings)


def test_a_module_without_trainable_weights_is_refused():
    class Fixed(Net):
        def configure_optimizers(self):
            return None

    net = Fixed().requires_grad_(False)
    averaging = CheckpointAveraging()
    with pytest.raises(ValueError, match="Fixed has no trainable parameters"):
        averaging.averages.find(net)


# --- shards -------------------------------------------------------------------------------------------------


class Sharded(LightningModule):
    """Shards its layers; remembers its weights after every step, whole."""

    def __init__(self):
        super().__init__()
        self.net, self.live = None, []

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
            fully_shard(self.net[1], mesh=self.device_mesh["data_parallel"])
            # The root keeps its gathered weights after a forward pass without backward.
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch).square().mean())

    def on_train_batch_end(self, *args):
        self.live.append(full(self))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def full(net):
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return [parameter.detach().full_tensor().clone() for parameter in net.parameters()]


def fit_sharded(averaging, epochs, ckpt=None, save=None):
    data = DataLoader(torch.arange(24.0).view(8, 3) / 24, batch_size=2)
    net = Sharded()
    run = trainer(
        *([averaging] if averaging else []),
        devices=2,
        strategy=ModelParallelStrategy(2, 1),
        max_epochs=epochs,
        use_distributed_sampler=False,
    )
    run.fit(net, data, data, ckpt_path=ckpt)
    if save:
        run.save_checkpoint(save)
    return net, averaging


def average_shards(folder):
    """On a rank: a plain run, averaged ones, and the same stopped and resumed."""
    same = functools.partial(torch.testing.assert_close, rtol=0.0, atol=0.0)
    plain, _ = fit_sharded(None, 3)
    roots = [math.sqrt(j / 3) for j in range(4)]
    for mode, given, shares in (
        ("last_k", None, [1 / 3] * 3),
        ("window", "sqrt", [after - before for before, after in itertools.pairwise(roots)]),
    ):
        make = functools.partial(CheckpointAveraging, mode, k=3, every_n_steps=2, weights=given)
        net, straight = fit_sharded(make(), 3)
        # Validation between the epochs leaves no trace in training.
        same(net.live, plain.live)
        columns = zip(*(net.live[i] for i in (7, 9, 11)), strict=True)
        average = [sum(share * w for share, w in zip(shares, column, strict=True)) for column in columns]
        torch.testing.assert_close(full(net), average)
        assert sum(b.numel() for b in straight.averages.rows[0]) < sum(p.numel() for p in net.parameters())
        # Saved with the average in place, by both ranks, a window half done; resumed from live weights.
        fit_sharded(make(), 2, save=folder / f"{mode}.ckpt")
        again, resumed = fit_sharded(make(), 3, ckpt=folder / f"{mode}.ckpt")
        same(again.live[0], net.live[8])
        same(full(again), full(net))
        same(resumed.averages.rows, straight.averages.rows)


@pytest.mark.dist
def test_two_ranks_average_their_shards_and_resume_exactly(tmp_path):
    on_ranks(2, average_shards, tmp_path)
