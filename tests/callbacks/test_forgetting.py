"""What the callback keeps against losses that were recorded and measured without it."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

import rewarm
from rewarm.callbacks.forgetting import Forgetting
from tests import fits, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging"),
]


class Keep(DummyLogger):
    """Keeps what is logged, by name and step."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.seen.setdefault(name, {})[step] = float(value)


def corpus(files):
    return fits.corpus(files, val={"new": files.new, "old": files.old})


def module(seed=0):
    torch.manual_seed(seed)
    return rewarm.ContinualPretraining(tiny.LLAMA, fits.adamw())


def fit(tmp_path, callback, steps=6, ckpt_path=None, save=None, **options):
    logger = Keep()
    defaults = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": -1}
    trainer = fits.trainer(max_steps=steps, logger=logger, callbacks=[callback], **defaults | options)
    trainer.fit(module(), datamodule=corpus(fits.Files(tmp_path)), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return logger.seen


def test_the_losses_are_those_that_validation_logged(tmp_path):
    callback = Forgetting()
    seen = fit(tmp_path, callback)
    for domain in ("new", "old"):
        # Lightning logs a validation at the index of the step before it, which counts from 0.
        logged = {step + (step > 0): loss for step, loss in seen[f"val/loss/{domain}"].items()}
        assert list(logged) == [0, 2, 4, 6]
        assert callback.losses[domain] == logged
        forgotten = {step: logged[step] - min(v for s, v in logged.items() if s <= step) for step in logged}
        assert seen[f"forgetting/{domain}"] == pytest.approx(forgotten)
    # A learning rate that high forgets: the test would see nothing otherwise.
    assert max(seen["forgetting/old"].values()) > 0 or max(seen["forgetting/new"].values()) > 0


def test_before_is_the_loss_of_the_untrained_model(tmp_path):
    callback = Forgetting()
    fit(tmp_path, callback)
    trainer = fits.trainer()
    trainer.validate(module(), datamodule=corpus(fits.Files(tmp_path)), verbose=False)
    for domain in ("new", "old"):
        assert callback.losses[domain][0] == pytest.approx(
            trainer.callback_metrics[f"val/loss/{domain}"].item()
        )


def test_validating_first_is_another_way_to_know_what_was_before(tmp_path):
    callback, data = Forgetting(), corpus(fits.Files(tmp_path))
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = fits.trainer(max_steps=4, callbacks=[callback], **options)
    model = module()
    trainer.validate(model, datamodule=data, verbose=False)
    trainer.fit(model, datamodule=data)
    assert list(callback.losses["old"]) == [0, 2, 4]


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_partial_sanity_check_is_no_measurement(tmp_path, sanity):
    callback = Forgetting()
    fit(tmp_path, callback, num_sanity_val_steps=sanity)
    assert list(callback.losses["old"]) == [2, 4, 6]


def test_a_resumed_run_tells_what_an_uninterrupted_one_tells(tmp_path, capsys):
    whole, first, second = Forgetting(), Forgetting(), Forgetting()
    fit(tmp_path, whole)
    expected = capsys.readouterr().out
    fit(tmp_path, first, steps=4, save=tmp_path / "4.ckpt")
    capsys.readouterr()
    fit(tmp_path, second, ckpt_path=tmp_path / "4.ckpt")
    assert second.losses == whole.losses
    assert capsys.readouterr().out == expected


def test_a_later_fit_of_the_same_callback_begins_anew(tmp_path):
    callback = Forgetting()
    fit(tmp_path, callback)
    once = callback.losses
    fit(tmp_path, callback, steps=2)
    assert callback.losses == {domain: {s: points[s] for s in (0, 2)} for domain, points in once.items()}


def test_the_table_has_before_best_now_and_forgotten(tmp_path, capsys):
    callback = Forgetting()
    fit(tmp_path, callback)
    out = capsys.readouterr().out
    for domain, points in callback.losses.items():
        best = min(points, key=points.get)
        (row,) = [line for line in out.splitlines() if f" {domain} " in line]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells == [
            domain,
            f"{points[0]:.3f} (0)",
            f"{points[best]:.3f} ({best})",
            f"{points[6]:.3f} (6)",
            f"{points[6] - points[best]:.3f}",
        ]


def test_the_picture_is_beside_the_logs_or_where_it_is_asked_for(tmp_path):
    fit(tmp_path, Forgetting(plot=str(tmp_path / "deep" / "losses.svg")))
    assert b"<svg" in (tmp_path / "deep" / "losses.svg").read_bytes()
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    options = {"logger": logger, "num_sanity_val_steps": -1, "val_check_interval": 2}
    trainer = fits.trainer(max_steps=2, callbacks=[Forgetting()], check_val_every_n_epoch=None, **options)
    trainer.fit(module(), datamodule=corpus(fits.Files(tmp_path)))
    assert (tmp_path / "logs" / "forgetting.png").read_bytes().startswith(b"\x89PNG")


class Other(LightningModule):
    """Somebody's module, with names of its own."""

    def __init__(self, names):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.names = names

    def training_step(self, batch, batch_idx):
        return self.weight.square() * batch.mean()

    def validation_step(self, batch, batch_idx):
        for name in self.names:
            self.log(name, self.weight.detach().square())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def other_fit(callback, names):
    loader = DataLoader(torch.ones(4), batch_size=1)
    fits.trainer(max_epochs=2, callbacks=[callback]).fit(Other(names), loader, loader)


def test_it_reads_the_losses_of_any_module(tmp_path):
    callback = Forgetting(prefix="nll-")
    other_fit(callback, ["nll-[b]", "accuracy"])
    weights = [0.8**4, 0.8**8]  # gradient 2 w at a rate of 0.1, four steps an epoch
    assert callback.losses == {"[b]": {4: pytest.approx(weights[0] ** 2), 8: pytest.approx(weights[1] ** 2)}}


def test_a_prefix_that_nothing_has_is_an_error_that_names_the_metrics():
    with pytest.raises(ValueError, match="prefix is 'val/loss/', but no logged metric .*: accuracy, nll"):
        other_fit(Forgetting(), ["nll", "accuracy"])
    with pytest.raises(ValueError, match="prefix is empty"):
        Forgetting(prefix="")


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_fit_without_validation_warns():
    loader = DataLoader(torch.ones(2), batch_size=1)
    trainer = fits.trainer(max_epochs=1, limit_val_batches=0, callbacks=[Forgetting()])
    with pytest.warns(UserWarning, match="Forgetting saw no validation"):
        trainer.fit(Other([]), loader)
