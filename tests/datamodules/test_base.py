"""What the data modules share: their place among the ranks, what is left of an epoch, fits that resume."""

import itertools
import math
import multiprocessing
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import rewarm
from rewarm.datamodules.base import LanguageData
from tests import fits, tiny
from tests.datamodules import rank_few_rows
from tests.distributed.ranks import on_ranks


@pytest.fixture
def files(tmp_path):
    return fits.Files(tmp_path / "files")


class Seen(Callback):
    """Which examples every training batch had and what it said of its window; saves where told."""

    def __init__(self, save_at=None, path=None):
        self.batches, self.epochs, self.save_at, self.path = [], [], save_at, path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((tuple(batch["ids"]), batch["window"]))
        self.epochs.append(trainer.current_epoch)

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


def test_alone_the_rank_is_0_of_1_and_else_that_of_the_trainer(files):
    data = LanguageData(files.tokenizer, 1, 1)
    assert (data.rank, data.world_size) == (0, 1)
    data.trainer = SimpleNamespace(lightning_module=None, global_rank=2, world_size=3)
    assert (data.rank, data.world_size) == (2, 3)


def test_ranks_see_other_halves_of_every_batch(files):
    data = fits.instructions(files, batch_size=4)
    data.setup()
    alone = [set(batch["ids"]) for batch in data.train_dataloader()]
    halves = []
    for rank in range(2):
        part = fits.instructions(files, batch_size=2)
        part.setup()
        part.trainer = SimpleNamespace(
            lightning_module=None,
            global_rank=rank,
            world_size=2,
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


# --- resumed with other batches -------------------------------------------------------------------------


class Steps(Seen):
    """Which examples every optimizer step of every epoch had, on how many batches; saves where told."""

    def __init__(self, save_at=None, path=None):
        super().__init__()
        self.steps, self.save_after, self.saved, self._begun = [], save_at, path, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == len(self.steps) + self._begun:
            return
        taken = sum(step["batches"] for step in self.steps)
        batches = self.batches[taken:]
        rows = [number for ids, _ in batches for number in ids]
        assert {window["sequences"] for _, window in batches} == {len(rows)}  # what the loss divides by
        self.steps.append({"epoch": self.epochs[taken], "rows": rows, "batches": len(batches)})
        if len(self.steps) == self.save_after:
            trainer.save_checkpoint(self.saved)
            trainer.should_stop = True

    def on_train_start(self, trainer, pl_module):
        self._begun = trainer.global_step


def train(data, accumulate, ckpt_path=None, save_at=None, path=None, **options):
    steps = Steps(save_at, path)
    trainer = fits.trainer(callbacks=[steps], accumulate_grad_batches=accumulate, **options)
    trainer.fit(rewarm.CurriculumSFT(tiny.LLAMA, optimizer=fits.sgd()), datamodule=data, ckpt_path=ckpt_path)
    return steps.steps, trainer


def steps_of_an_epoch(batch_size, accumulate):
    return math.ceil(math.ceil(48 / batch_size) / accumulate)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((6, 1), (3, 2)),  # the same rows per step
        ((4, 2), (5, 1)),
        ((5, 2), (4, 3)),
        ((3, 2), (20, 1)),
    ],
)
@pytest.mark.parametrize("stopped", [1, 3, "at the end"])
def test_resumed_with_other_batches_every_epoch_shows_every_example_once(
    files, tmp_path, first, then, stopped
):
    """As on another number of ranks: 48 rows in steps of other sizes, saved after some steps of an epoch."""
    if stopped == "at the end":
        stopped = steps_of_an_epoch(*first)
    saved = str(tmp_path / "saved.ckpt")
    data = fits.instructions(files, batch_size=first[0])
    begun, _ = train(data, first[1], save_at=stopped, path=saved, max_epochs=3)
    rest, trainer = train(fits.instructions(files, batch_size=then[0]), then[1], saved, max_epochs=3)
    assert len(begun) == stopped
    assert trainer.global_step == len(begun) + len(rest)
    for epoch in range(3):
        rows = [number for step in (*begun, *rest) if step["epoch"] == epoch for number in step["rows"]]
        assert sorted(rows) == list(range(48))
    # All steps but an epoch's last take whole windows, and none more rows than it should.
    for step, following in zip(rest, [*rest[1:], {"epoch": 3}], strict=True):
        assert 0 < len(step["rows"]) <= then[0] * then[1]
        assert step["batches"] == then[1] or step["epoch"] != following["epoch"]
    assert len([step for step in rest if step["epoch"] == 2]) == steps_of_an_epoch(*then)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (rewarm.CurriculumSFT, lambda files, size: fits.instructions(files, packing=True, batch_size=size)),
        (
            rewarm.ContinualPretraining,
            lambda files, size: fits.corpus(
                files, replay={"old": files.old}, replay_fraction=0.25, batch_size=size
            ),
        ),
    ],
    ids=["packed", "mixed"],
)
def test_resumed_with_other_batches_the_stream_of_rows_goes_on(files, tmp_path, kind, make):
    saved = str(tmp_path / "saved.ckpt")

    def rows(size, accumulate, max_steps, ckpt_path=None):
        seen = Seen(save_at=4, path=saved)
        trainer = fits.trainer(max_steps=max_steps, accumulate_grad_batches=accumulate, callbacks=[seen])
        trainer.fit(kind(tiny.LLAMA, fits.sgd()), datamodule=make(files, size), ckpt_path=ckpt_path)
        return [number for ids, _ in seen.batches for number in ids]

    whole = rows(1, 1, 40)
    begun = rows(2, 2, 2)
    rest = rows(3, 1, 6, saved)
    assert len(rest) >= 12
    assert begun + rest == whole[: len(begun + rest)]


@pytest.mark.parametrize("then", [(2, 3), (1, 4)])
@pytest.mark.parametrize("stopped", [2, 3])
def test_a_limited_epoch_keeps_its_place_and_its_windows(files, tmp_path, then, stopped):
    saved, options = str(tmp_path / "saved.ckpt"), {"max_epochs": 2, "limit_train_batches": 6}
    train(fits.instructions(files), 2, save_at=stopped, path=saved, **options)
    rest, _ = train(fits.instructions(files, batch_size=then[0]), then[1], saved, **options)
    done = 6 if stopped == 3 else 4 // then[1] * then[1]
    assert sum(step["batches"] for step in rest if step["epoch"] == 0) == 6 - done
    assert sum(step["batches"] for step in rest if step["epoch"] == 1) == 6


def test_a_window_that_was_begun_is_taken_anew_with_other_batches(files, tmp_path):
    saved = str(tmp_path / "saved.ckpt")
    begun, _ = fit(fits.instructions(files), save_at=5, path=saved, max_epochs=1, accumulate_grad_batches=3)
    rest, _ = train(fits.instructions(files, batch_size=4), 2, saved, max_epochs=1)
    taken = [number for ids, _ in begun[:3] for number in ids]
    assert sorted([*taken, *(number for step in rest for number in step["rows"])]) == list(range(48))


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_run_saved_at_the_end_of_an_epoch_goes_on_with_the_order_of_the_next(files, tmp_path):
    def go(ckpt_path=None):
        checkpoint = ModelCheckpoint(
            tmp_path / str(ckpt_path is None), "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )
        seen = Seen()
        trainer = fits.trainer(max_epochs=3, callbacks=[seen, checkpoint], enable_checkpointing=True)
        module = rewarm.CurriculumSFT(tiny.LLAMA, optimizer=fits.sgd())
        trainer.fit(module, datamodule=fits.instructions(files), ckpt_path=ckpt_path)
        return seen.batches

    whole = go()
    assert go(str(tmp_path / "True" / "epoch=0.ckpt")) == whole[24:]


@pytest.mark.usefixtures("no_worker_outlives_the_test")
@pytest.mark.parametrize("workers", [(1, 0), (0, 1)])
def test_a_fit_may_go_on_with_another_number_of_workers(files, tmp_path, workers):
    saved, options = str(tmp_path / "saved.ckpt"), {"max_steps": 6}
    whole, _ = fit(fits.instructions(files, num_workers=workers[0]), save_at=3, path=saved, **options)
    rest, _ = fit(fits.instructions(files, num_workers=workers[1]), saved, **options)
    assert rest == whole[3:]


def test_other_rows_per_step_are_told_once_with_both_numbers(files, tmp_path, caplog):
    saved = str(tmp_path / "saved.ckpt")
    fit(fits.instructions(files), save_at=1, path=saved, max_steps=1)
    fit(fits.instructions(files, batch_size=1), saved, max_steps=2, accumulate_grad_batches=2)
    assert "an optimizer step takes" not in caplog.text
    fit(fits.instructions(files, batch_size=3), saved, max_steps=2, accumulate_grad_batches=2)
    said = [record.message for record in caplog.records if "an optimizer step takes" in record.message]
    assert said == ["an optimizer step takes 6 rows; it took 2 where the checkpoint was made"]


# --- other data -----------------------------------------------------------------------------------------


def lines(path, change):
    """Change the lines of a file."""
    path = Path(path)
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def resumes(files, tmp_path, change, **options):
    """Save a fit, change its files or settings, and go on with it."""
    saved = str(tmp_path / "saved.ckpt")
    fit(fits.instructions(files), save_at=2, path=saved, max_steps=2)
    change(files)
    fit(fits.instructions(files, **options), saved, max_steps=3)


@pytest.mark.parametrize(
    ("change", "options", "now"),
    [
        (lambda files: lines(files.sft, lambda rows: rows[:-1]), {}, 47),
        (lambda files: lines(files.sft, lambda rows: rows[::-1]), {}, 48),
        (lambda files: lines(files.sft, lambda rows: [rows[0].replace("+", "-"), *rows[1:]]), {}, 48),
        (lambda files: None, {"max_length": 20, "overlong": "keep_start"}, 48),
        (lambda files: None, {"max_length": 20, "overlong": "drop"}, 24),
        (lambda files: None, {"score": "difficulty", "order": "ascending"}, 48),
        (
            lambda files: lines(
                f"{files.tokenizer}/tokenizer.json", lambda rows: [row.replace('"x"', '"X"') for row in rows]
            ),
            {},
            48,
        ),
    ],
    ids=["fewer rows", "another order", "another row", "truncated", "dropped", "scored", "tokenizer"],
)
def test_a_fit_does_not_go_on_with_other_data(files, tmp_path, change, options, now):
    with pytest.raises(ValueError, match="the checkpoint was made with") as caught:
        resumes(files, tmp_path, change, **options)
    (first, then), count = str(caught.value).split("(fingerprint ")[1].split("), now there are "), now
    second = then.split("(")[1].split(")")[0]
    assert len(first) == len(second) == 8
    assert first != second
    assert str(caught.value) == (
        f"{files.sft} (train): the checkpoint was made with 48 examples (fingerprint {first}), now there are"
        f" {count} ({second}); resume with the same data, or start a new run from an exported model"
    )


def test_the_same_data_may_lie_elsewhere_and_be_validated_and_packed_otherwise(files, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(files.sft, tmp_path / "elsewhere" / "renamed.jsonl")
    shutil.copy(moved, files.sft)
    saved = str(tmp_path / "saved.ckpt")
    fit(fits.instructions(files), save_at=2, path=saved, max_steps=2)
    Path(files.sft).unlink()
    data = rewarm.InstructionData(str(moved), files.tokenizer, max_length=60, batch_size=2, val=str(moved))
    batches, _ = fit(data, saved, max_steps=3)
    assert len(batches) == 1


def test_a_checkpoint_is_validated_on_any_data(files, tmp_path):
    saved = str(tmp_path / "saved.ckpt")
    fit(fits.instructions(files), save_at=2, path=saved, max_steps=2)
    lines(files.sft, lambda rows: rows[:-1])
    data = fits.instructions(files, val=files.sft)
    (found,) = fits.trainer().validate(rewarm.CurriculumSFT(tiny.LLAMA), data, ckpt_path=saved, verbose=False)
    assert found["val/loss"] > 0


def test_a_checkpoint_without_a_fingerprint_is_accepted(files, tmp_path):
    saved = str(tmp_path / "saved.ckpt")
    whole, _ = fit(fits.instructions(files), save_at=2, path=saved, max_steps=4)
    state = torch.load(saved, weights_only=True)  # nothing but plain values
    del state["InstructionData"]
    torch.save(state, saved)
    rest, _ = fit(fits.instructions(files), saved, max_steps=4)
    assert rest == whole[2:]


# --- few rows ---------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_never_has_a_row_trains_and_validates_with_the_others(tmp_path):
    ranks = on_ranks(2, rank_few_rows.run_sharded_and_not, tmp_path)
    alone = rank_few_rows.run(tmp_path / "alone", 1, lambda: "auto")
    untrained = rewarm.CurriculumSFT(tiny.LLAMA)
    torch.manual_seed(0)
    untrained.configure_model()
    for strategy, rank in itertools.product(("ddp", "fsdp2"), range(2)):
        found = ranks[rank][strategy]
        for name, (weights, validated) in alone.items():
            assert fits.distance(found[name][0], weights) < 1e-6, f"{name}, {strategy}"
            assert found[name][1] == pytest.approx(validated, rel=1e-6)
            assert fits.distance(weights, fits.weights(untrained)) > 1e-3


# --- the rest -------------------------------------------------------------------------------------------


def test_starting_an_epoch_leaves_the_random_state_of_torch_alone(files):
    data = fits.instructions(files)
    data.setup()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_reach_a_cpu_as_they_are_and_only_tensors_move(files, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    data = fits.corpus(files)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    there = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert there.keys() == batch.keys()
    assert all(there[name] is value for name, value in batch.items())
    assert pinned == []
    there = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert there[name].device.type == "meta"
        else:
            assert there[name] is value


def test_batches_reach_a_cuda_device_from_pinned_memory(files, monkeypatch):
    pinned, copied = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, *where, **how: copied.append((tensor, where, how)) or tensor
    )
    batch = {"input_ids": torch.zeros(1, 2), "ids": [3], "counts": {"tokens": 1}}
    fits.corpus(files).transfer_batch_to_device(batch, torch.device("cuda", 0), 0)
    assert [id(tensor) for tensor in pinned] == [id(batch["input_ids"])]
    ((_, where, how),) = copied
    assert (where, how) == ((torch.device("cuda", 0),), {"non_blocking": True})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_on_a_gpu_is_that_of_the_host(files):
    data = fits.corpus(files)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    there = data.transfer_batch_to_device(batch, torch.device("cuda"), 0)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert there[name].is_cuda
            assert torch.equal(there[name].cpu(), value)
        else:
            assert there[name] is value


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: LanguageData("t", batch_size=0, max_length=1), "batch_size is 0; it must be at least 1"),
        (lambda: LanguageData("t", batch_size=1, max_length=0), "max_length is 0; it must be at least 1"),
        (lambda: LanguageData("t", 1, 1, num_workers=-1), "num_workers is -1; it must be at least 0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(act, named):
    with pytest.raises(ValueError, match=named):
        act()


class Stop(Callback):
    def on_train_batch_end(self, *_):
        raise SystemExit(143)


def test_the_workers_of_a_fit_end_with_it(tmp_path):
    data = fits.instructions(fits.Files(tmp_path), num_workers=1)
    fits.trainer(max_steps=1).fit(rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw()), datamodule=data)
    assert multiprocessing.active_children() == []


def test_the_workers_of_a_fit_end_with_an_exception(tmp_path):
    """Or the process would wait for them, which outlive the SIGTERM that it then sends them."""
    data = fits.instructions(fits.Files(tmp_path), num_workers=1)
    with pytest.raises(SystemExit) as held:
        fits.trainer(max_steps=2, callbacks=[Stop()]).fit(
            rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw()), datamodule=data
        )
    assert multiprocessing.active_children() == [], held  # which keeps everything alive
