"""What the data modules share: their place among the ranks, what is left of an epoch, fits that resume."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

import rewarm
from rewarm.datamodules.base import LanguageData, check_overlong
from tests import fits, tiny


@pytest.fixture
def files(tmp_path):
    return fits.Files(tmp_path / "files")


class Seen(Callback):
    """Which examples every training batch had and what it said of its window; saves where told."""

    def __init__(self, save_at=None, path=None):
        self.batches, self.save_at, self.path = [], save_at, path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((tuple(batch["ids"]), batch["window"]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if len(self.batches) == self.save_at:
            trainer.save_checkpoint(self.path)


def fit(data, ckpt_path=None, save_at=None, path=None, **options):
    seen = Seen(save_at, path)
    trainer = fits.trainer(callbacks=[seen], **options)
    trainer.fit(rewarm.CurriculumSFT(tiny.LLAMA, optimizer=fits.sgd()), datamodule=data, ckpt_path=ckpt_path)
    return seen.batches, trainer


def test_the_tokenizer_is_loaded_once_and_only_when_used(files):
    LanguageData("nowhere", 1, 1)  # nothing is read yet
    data = LanguageData(files.tokenizer, batch_size=1, max_length=1)
    assert data.encoder is data.encoder
    assert data.tokenizer is data.encoder.tokenizer
    with pytest.raises(ValueError, match="tokenizer is 'nowhere'"):
        _ = LanguageData("nowhere", 1, 1).tokenizer


def test_alone_the_rank_is_0_of_1_and_else_that_of_the_strategy(files):
    data = LanguageData(files.tokenizer, 1, 1)
    assert (data.rank, data.world_size) == (0, 1)
    data.trainer = SimpleNamespace(strategy=SimpleNamespace())  # one device
    assert (data.rank, data.world_size) == (0, 1)
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(distributed_sampler_kwargs={"rank": 2, "num_replicas": 3})
    )
    assert (data.rank, data.world_size) == (2, 3)


def test_ranks_see_other_halves_of_every_batch(files):
    data = fits.instructions(files, batch_size=4)
    data.setup()
    alone = [set(batch["ids"]) for batch in data.train_dataloader()]
    halves = []
    for rank in range(2):
        part = fits.instructions(files, batch_size=2)
        part.setup()
        kwargs = {"rank": rank, "num_replicas": 2}
        part.trainer = SimpleNamespace(
            strategy=SimpleNamespace(distributed_sampler_kwargs=kwargs),
            accumulate_grad_batches=1,
            training=False,
        )
        halves.append([set(batch["ids"]) for batch in part.train_dataloader()])
    assert [first | second for first, second in zip(*halves, strict=True)] == alone
    assert all(first.isdisjoint(second) for first, second in zip(*halves, strict=True))


def test_in_a_fit_windows_end_with_the_epoch_or_with_its_limit(files):
    # 48 rows in batches of 2 make 24.
    batches, trainer = fit(
        fits.instructions(files), max_epochs=2, accumulate_grad_batches=3, limit_train_batches=5
    )
    sizes = [window["sequences"] for _, window in batches]
    assert sizes == [6, 6, 6, 4, 4] * 2
    assert trainer.global_step == 4
    # A limited epoch goes on where the one before ended.
    drawn = [number for ids, _ in batches for number in ids]
    assert len(set(drawn)) == 20


@pytest.mark.parametrize("cut", [5, 15, 20, 24, 29])
def test_a_fit_resumed_at_any_step_sees_the_batches_of_one_that_was_not(files, tmp_path, cut):
    """24 batches an epoch in windows of 5: the last window of an epoch has 4."""
    options = {"max_epochs": 2, "accumulate_grad_batches": 5}
    saved = str(tmp_path / "saved.ckpt")
    whole, _ = fit(fits.instructions(files), save_at=cut, path=saved, **options)
    assert len(whole) == 48
    rest, trainer = fit(fits.instructions(files), saved, **options)
    assert rest == whole[cut:]
    assert trainer.global_step == 10


def test_starting_an_epoch_leaves_the_random_state_of_torch_alone(files):
    data = fits.instructions(files)
    data.setup()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_straddling_tokens_are_counted_in_the_log(files, caplog):
    data = fits.instructions(files)
    data.encoder.straddled = 2
    data.setup()
    assert "2 sequences have a token across prompt and completion" in caplog.text
    assert data.encoder.straddled == 0


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: LanguageData("t", batch_size=0, max_length=1), "batch_size is 0; it must be at least 1"),
        (lambda: LanguageData("t", batch_size=1, max_length=0), "max_length is 0; it must be at least 1"),
        (lambda: LanguageData("t", 1, 1, num_workers=-1), "num_workers is -1; it must not be below 0"),
        (lambda: check_overlong("cut"), "overlong is 'cut'; known are 'error', 'drop', 'truncate'"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(act, named):
    with pytest.raises(ValueError, match=named):
        act()
    assert check_overlong("drop") == "drop"


def test_the_workers_of_a_fit_end_with_it(tmp_path):
    files = fits.Files(tmp_path)
    data = fits.instructions(files, num_workers=1)
    fits.trainer(max_steps=1).fit(rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw()), datamodule=data)
    assert multiprocessing.active_children() == []
