"""Killed while it saves, on a full disk, within a window: there is a whole checkpoint, and it resumes."""

import errno
import logging
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from rewarm.callbacks import checkpoint as module
from rewarm.callbacks.checkpoint import Checkpoint
from rewarm.checkpoints.placing import partial
from rewarm.checkpoints.whole import newest_whole, verify
from tests.callbacks import checkpoint_runs
from tests.callbacks.checkpoint_runs import At, FullDisk, Kill, Run, equal, fit, read

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings(
        "ignore:The number of training batches .* is smaller than the logging interval"
    ),
]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- resuming -----------------------------------------------------------------------------------------------

SCHEDULES = {
    "no validation": {},
    "validation at the end of a step": {"validates": True, "val_check_interval": 4},
    "validation within a step": {"validates": True, "val_check_interval": 3},
    "epochs": {"max_steps": -1, "max_epochs": 3, "batches": 5},
    "validation after each epoch": {"max_steps": -1, "max_epochs": 3, "batches": 5, "validates": True},
    "validation after every second epoch": {
        "max_steps": -1,
        "max_epochs": 4,
        "batches": 3,
        "validates": True,
        "check_val_every_n_epoch": 2,
    },
    "validation across epochs": {
        "batches": 5,
        "validates": True,
        "val_check_interval": 6,
        "check_val_every_n_epoch": None,
    },
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_resumed_at_any_step_it_trains_validates_and_logs_as_if_nothing_had_been(tmp_path, name):
    options = SCHEDULES[name]
    fit(tmp_path, callbacks=[Checkpoint(str(tmp_path / "all"), every_n_train_steps=1, keep=99)], **options)
    weights, lines = read(tmp_path, "whole")
    assert ("val" in lines[-1] or "val" in lines[-2]) == ("validates" in options)
    for step in range(1, max(weights)):
        path = tmp_path / "all" / f"step={step}.ckpt"
        callbacks = [Checkpoint(str(tmp_path / "rest"), every_n_train_steps=99)]
        fit(tmp_path, name="rest", ckpt_path=path, seed=step, callbacks=callbacks, **options)
        rest, logged = read(tmp_path, "rest")
        expected = {later: weights[later] for later in weights if later >= min(rest)}
        assert min(rest) in (step, step + 1)
        assert equal((rest, logged), (expected, lines[-len(logged) :])), f"resumed at {step}"
        # A process that is killed right after it has saved a step has not logged it, so it is logged again.
        again = "loss" in logged[0] and logged[0]["step"] == step - 1
        assert sum("loss" in line for line in logged) == max(weights) - step + again
        assert again or "validates" in options


class Counted(Callback):
    """Has seen so many batches end."""

    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, *_):
        self.batches += 1

    def state_dict(self):
        return {"batches": self.batches}


def test_a_checkpoint_is_of_a_whole_window_and_of_all_that_other_callbacks_did_in_it(tmp_path):
    callbacks = [Checkpoint(str(tmp_path / "c"), every_n_train_steps=1, keep=9), Counted()]
    fit(tmp_path, callbacks=callbacks, accumulate_grad_batches=3, batches=10, max_steps=5)
    # The last window of the first epoch has one batch.
    for step, batches in {1: 3, 2: 6, 3: 9, 4: 10, 5: 13}.items():
        state = torch.load(tmp_path / "c" / f"step={step}.ckpt", weights_only=True)
        assert (state["global_step"], state["callbacks"]["Counted"]["batches"]) == (step, batches)


def test_a_resumed_run_does_not_write_the_step_again_that_it_came_from(tmp_path):
    fit(tmp_path, callbacks=[Checkpoint(str(tmp_path / "c"), 2)], max_steps=4)
    path = tmp_path / "c" / "step=4.ckpt"
    before = path.stat().st_mtime_ns
    # With Lightning's own, the first batch of the next window is enough.
    fit(tmp_path, ckpt_path=path, callbacks=[Checkpoint(str(tmp_path / "c"), 2, keep=9)], max_steps=6)
    assert path.stat().st_mtime_ns == before
    assert names(tmp_path / "c") == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]


# --- which ones there are -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "expected"), [(1, ["step=8.ckpt"]), (3, ["step=3.ckpt", "step=6.ckpt", "step=8.ckpt"])]
)
def test_the_last_few_are_kept_and_the_last_step_is_among_them(tmp_path, keep, expected):
    fit(tmp_path, callbacks=[Checkpoint(str(tmp_path / "c"), every_n_train_steps=3, keep=keep)])
    assert names(tmp_path / "c") == expected


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 5},
        {"max_steps": -1, "max_epochs": 2, "batches": 5},
        {"max_steps": -1, "max_epochs": 2, "batches": 5, "validates": True},
    ],
)
def test_a_finished_run_resumes_as_finished(tmp_path, options):
    fit(tmp_path, callbacks=[Checkpoint(str(tmp_path / "c"))], **options)
    (path,) = (tmp_path / "c").iterdir()
    batches = Counted()
    callback = Checkpoint(str(tmp_path / "c"))
    trainer = fit(tmp_path, name="rest", ckpt_path=path, callbacks=[callback, batches], **options)
    assert (batches.batches, path.name) == (0, f"step={trainer.global_step}.ckpt")
    assert callback.best_model_path == str(path)


def test_a_finished_run_goes_on_when_it_gets_more_steps(tmp_path):
    fit(tmp_path, callbacks=[Checkpoint(str(tmp_path / "c"))], max_steps=3)
    fit(tmp_path, name="rest", ckpt_path=tmp_path / "c" / "step=3.ckpt", seed=5)
    fit(tmp_path)
    (weights, lines), (rest, logged) = read(tmp_path, "whole"), read(tmp_path, "rest")
    assert equal((rest, logged), ({step: weights[step] for step in rest}, lines[3:]))


def test_a_run_that_was_stopped_early_has_its_last_step_too(tmp_path):
    stops = EarlyStopping("val", mode="min", divergence_threshold=-1e9)
    options = {"validates": True, "val_check_interval": 4, "max_steps": -1, "max_epochs": 5}
    trainer = fit(tmp_path, callbacks=[stops, Checkpoint(str(tmp_path / "c"))], **options)
    assert trainer.global_step == 2
    assert names(tmp_path / "c") == ["step=2.ckpt"]


class Stop(At):
    """Stops the training within a step, as `Trainer(max_time=...)` does."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop |= trainer.fit_loop.batch_idx == self.batch


def test_a_run_that_was_stopped_within_a_step_leaves_its_weights(tmp_path):
    trainer = fit(tmp_path, callbacks=[Stop(4), Checkpoint(str(tmp_path / "c"))])
    assert trainer.global_step == 2
    state = torch.load(tmp_path / "c" / "step=2.ckpt", weights_only=True)["state_dict"]
    last = read(tmp_path, "whole")[0][2]
    assert all(torch.equal(state[name], last[name]) for name in last)


def test_checkpoints_of_later_steps_are_told_and_left_alone(tmp_path, caplog):
    fit(tmp_path, callbacks=[Checkpoint(str(tmp_path / "c"), 3, keep=9)])
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, callbacks=[Checkpoint(str(tmp_path / "c"), 1, keep=1)], max_steps=4)
    assert "later steps than 0 (step=8.ckpt, step=6.ckpt, step=3.ckpt)" in caplog.text
    assert names(tmp_path / "c") == ["step=4.ckpt", "step=6.ckpt", "step=8.ckpt"]


def test_a_moved_folder_resumes_without_a_warning_and_knows_its_checkpoints(tmp_path):
    fit(tmp_path, callbacks=[Checkpoint(str(tmp_path / "old"), 2, keep=3)])
    (tmp_path / "old").rename(tmp_path / "new")
    callback = Checkpoint(str(tmp_path / "new"), 5, keep=3)
    fit(tmp_path, ckpt_path=tmp_path / "new" / "step=8.ckpt", callbacks=[callback], max_steps=9)
    assert names(tmp_path / "new") == ["step=6.ckpt", "step=8.ckpt", "step=9.ckpt"]
    assert {Path(path).name: int(step) for path, step in callback.best_k_models.items()} == {
        "step=9.ckpt": 9,
        "step=8.ckpt": 8,
        "step=6.ckpt": 6,
    }
    assert callback.best_model_path == callback.last_model_path == str(tmp_path / "new" / "step=9.ckpt")
    assert callback.kth_best_model_path == str(tmp_path / "new" / "step=6.ckpt")


def test_without_a_folder_they_go_where_lightning_puts_them(tmp_path):
    fit(tmp_path, callbacks=[Checkpoint()], max_steps=1)
    (path,) = tmp_path.rglob("*.ckpt")
    fit(tmp_path / "other", callbacks=[ModelCheckpoint()], max_steps=1)
    (other,) = (tmp_path / "other").rglob("*.ckpt")
    assert path.parent.relative_to(tmp_path) == other.parent.relative_to(tmp_path / "other")


def test_the_temporary_folder_of_the_machine_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    fit(tmp_path, callbacks=[Checkpoint(str(tmp_path / "c"))], max_steps=1)
    verify(tmp_path / "c" / "step=1.ckpt")
    assert tempfile.tempdir == str(tmp_path / "nowhere")


def test_a_trial_run_writes_nothing(tmp_path):
    fit(tmp_path, callbacks=[Checkpoint(str(tmp_path / "c"), 1)], fast_dev_run=True)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_train_steps": 0}, "every_n_train_steps is 0; it must be at least 1"),
        ({"keep": 0}, "keep is 0; it must be at least 1"),
        ({"dirpath": "s3://bucket/run"}, "dirpath is 's3://bucket/run'; it must be a local folder"),
    ],
)
def test_a_wrong_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Checkpoint(**options)


# --- killed while saving ------------------------------------------------------------------------------------


def resumes_to_the_same_end(folder, whole, strategy="one"):
    """Resume what was killed, with the parts that it left, and compare with the run that wasn't."""
    checkpoint = newest_whole(folder / "checkpoints", pytest.fail)
    assert checkpoint is not None
    run = Run(folder, strategy, 2, name="rest", ckpt_path=checkpoint, seed=9)
    assert set(run.end()) == {0}, run.output
    weights, lines = read(whole, "whole")
    rest, logged = read(folder, "rest")
    assert equal((rest, logged), ({step: weights[step] for step in rest}, lines[-len(logged) :]))
    assert names(folder / "checkpoints") == ["step=6.ckpt", "step=8.ckpt"]
    return checkpoint.name


def test_killed_at_any_change_to_the_disk_while_it_saves_a_whole_one_is_left_and_resumes(tmp_path):
    assert Run(tmp_path / "whole").end() == [0]
    found = set()
    for change in range(20):
        folder = tmp_path / str(change)
        run = Run(folder, every=2, others=(Kill(11, change),))
        if run.end() == [0]:
            break
        if change < 8:  # of the save of step 6
            found.add(resumes_to_the_same_end(folder, tmp_path / "whole"))
    assert found == {"step=4.ckpt", "step=6.ckpt"}
    assert change > 8


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_while_it_saves_its_shards_leaves_a_whole_one(tmp_path, rank):
    assert Run(tmp_path / "whole", "fsdp2").end() == [0, 0]
    found = []
    for change in (0, 1, 2, 5, 8, 11, 14, 17) if rank == 0 else (0, 1):
        folder = tmp_path / str(change)
        codes = Run(folder, "fsdp2", 2, others=(Kill(11, change, rank=rank),)).end()
        assert codes[rank] == 9
        assert codes[1 - rank] not in (0, None)
        found.append(resumes_to_the_same_end(folder, tmp_path / "whole", "fsdp2"))
    assert found == sorted(found)
    assert ("step=6.ckpt" in found) == (rank == 0)


def test_what_a_killed_run_left_half_done_is_removed_at_the_next_start(tmp_path):
    left = partial(tmp_path / "c" / "step=77.ckpt")
    left.mkdir(parents=True)
    (left / "tmp1").write_bytes(b"part")
    fit(tmp_path, callbacks=[Checkpoint(str(tmp_path / "c"))], max_steps=1)
    assert names(tmp_path / "c") == ["step=1.ckpt"]


# --- a full disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "rank"),
    [
        ("one", 0),
        pytest.param("ddp", 0, marks=pytest.mark.dist),
        pytest.param("fsdp2", 0, marks=pytest.mark.dist),
        pytest.param("fsdp2", 1, marks=pytest.mark.dist),
    ],
)
def test_a_full_disk_ends_all_ranks_with_one_error_that_names_the_last_good_checkpoint(
    tmp_path, strategy, rank
):
    run = Run(tmp_path, strategy, 2, others=(FullDisk(7, 2000, rank=rank),), width=99)
    codes = run.end()
    folder = tmp_path / "checkpoints"
    assert codes == [1] * len(codes)
    assert names(folder) == ["step=2.ckpt"]
    verify(folder / "step=2.ckpt")
    named = f"OSError: the checkpoint {folder / 'step=4.ckpt'} could not be written ("
    last = f"; the last good one is {folder / 'step=2.ckpt'}"
    for output in run.outputs:
        (line,) = [line for line in output.splitlines() if line.startswith(named)]
        assert line.endswith(last)
        assert f"[Errno {errno.EFBIG}]" in line
        assert (f"(rank {rank}: " in line) == (len(codes) > 1)


def test_a_full_file_system_is_named(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        with pytest.raises(OSError, match=r"step=8\.ckpt could not be written \(\[Errno 28\] No space left"):
            fit(tmp_path, callbacks=[Checkpoint(str(small), keep=9, every_n_train_steps=4)], width=2000)
        assert names(small) == ["step=4.ckpt"]
        verify(small / "step=4.ckpt")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_what_is_no_fault_of_the_disk_stays_what_it_is(tmp_path):
    class Unpicklable(Counted):
        def state_dict(self):
            return {"function": lambda: None}

    with pytest.raises(AttributeError, match="lambda"):
        fit(tmp_path, callbacks=[Checkpoint(str(tmp_path / "c"), 1), Unpicklable()])


def test_one_save_per_step_is_enough(tmp_path, monkeypatch):
    saved = []
    original = module.save_checkpoint
    monkeypatch.setattr(
        module, "save_checkpoint", lambda t, path, keep: saved.append(path.name) or original(t, path, keep)
    )

    class Eager(Callback):
        def on_train_batch_end(self, trainer, *_):
            checkpoint.save(trainer)

    checkpoint = Checkpoint(str(tmp_path / "c"), every_n_train_steps=1)
    fit(tmp_path, callbacks=[Eager(), checkpoint], max_steps=2, accumulate_grad_batches=1)
    assert saved == ["step=1.ckpt", "step=2.ckpt"]


def test_the_runs_of_these_tests_can_differ(tmp_path):
    fit(tmp_path)
    fit(tmp_path, name="other", seed=1)
    assert not checkpoint_runs.equal(read(tmp_path, "whole"), read(tmp_path, "other"))
