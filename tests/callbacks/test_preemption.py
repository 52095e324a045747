"""SIGTERM ends a run at the end of a step, on all ranks, and it goes on as if nothing had been."""

import signal
import threading

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from rewarm.callbacks import checkpoint, preemption
from rewarm.callbacks.checkpoint import Checkpoint
from rewarm.callbacks.preemption import Preemption
from rewarm.checkpoints.whole import verify
from tests.callbacks.checkpoint_runs import At, Run, Signal, equal, fit, read

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def saved(folder):
    """The names of the checkpoints, all of them whole."""
    paths = sorted((folder / "checkpoints").iterdir())
    for path in paths:
        verify(path)
    return [path.name for path in paths]


def goes_on(folder, name, strategy="one", **options):
    """Resume from a checkpoint; whether it ends as the uninterrupted run `whole` in all that it did."""
    path = folder / "checkpoints" / name
    rest = Run(folder, strategy, name="rest", ckpt_path=path, seed=7, **options)
    assert set(rest.end()) == {0}, rest.output
    return equal(read(folder, "whole"), read(folder, "cut", "rest"))


VALIDATION = {"validates": True, "val_check_interval": 4}


@pytest.mark.parametrize(
    ("options", "place", "step"),
    [
        # The first of two batches of the fourth step.
        ({}, {"batch": 7}, 4),
        ({}, {"batch": 8}, 4),
        # Validation is due after it.
        (VALIDATION, {"batch": 8}, 4),
        (VALIDATION, {"batch": 2, "hook": "on_validation_batch_start"}, 2),
        # Validation within the fifth step.
        ({"validates": True, "val_check_interval": 9}, {"batch": 2, "hook": "on_validation_batch_start"}, 5),
        # Before the training begins; Lightning's handlers are in place by then.
        ({}, {"batch": 1, "hook": "on_train_start"}, 1),
        # The last batch of an epoch, and of the run.
        ({"batches": 3}, {"batch": 3}, 2),
        ({}, {"batch": 16}, 8),
    ],
)
def test_it_ends_with_the_step_and_goes_on_as_if_nothing_had_been(tmp_path, options, place, step):
    assert Run(tmp_path, **options).end() == [0]
    run = Run(tmp_path, name="cut", others=(Signal(signal.SIGTERM, **place),), **options)
    assert run.end() == [143], run.output
    assert saved(tmp_path) == [f"step={step}.ckpt"]
    where = tmp_path / "checkpoints" / f"step={step}.ckpt"
    assert run.output.count(f"SIGTERM: saved {where}, exit code 143\n") == 1
    if step < 8:
        assert goes_on(tmp_path, f"step={step}.ckpt", **options)


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("ranks", [(1,), (0,), (0, 1)])
def test_all_ranks_end_though_only_some_got_the_signal(tmp_path, strategy, ranks):
    assert Run(tmp_path, strategy).end() == [0, 0]
    signals = tuple(Signal(signal.SIGTERM, batch=7, rank=rank) for rank in ranks)
    run = Run(tmp_path, strategy, every=3, name="cut", others=signals)
    assert run.end(60.0) == [143, 143], run.output
    assert saved(tmp_path) == ["step=3.ckpt", "step=4.ckpt"]
    assert run.output.count("SIGTERM: saved") == 1
    assert goes_on(tmp_path, "step=4.ckpt", strategy)


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    twice = Signal(signal.SIGTERM, batch=3, times=2, seconds=preemption._ONE_SIGNAL_SECONDS + 0.1)
    assert Run(tmp_path, every=1, others=(twice,)).end() == [143]
    assert saved(tmp_path) == ["step=1.ckpt"]


def test_the_same_signal_by_several_ways_is_one(tmp_path):
    run = Run(tmp_path, every=1, others=(Signal(signal.SIGTERM, batch=3, times=3),))
    assert run.end() == [143]
    assert saved(tmp_path) == ["step=1.ckpt", "step=2.ckpt"]


@pytest.mark.dist
def test_workers_that_ignore_the_signal_deliver_the_rest_of_the_step(tmp_path):
    run = Run(tmp_path, others=(Signal(signal.SIGTERM, batch=7, children=True),), workers=True)
    assert run.end() == [143], run.output
    assert saved(tmp_path) == ["step=4.ckpt"]


class Last(Callback):
    """Knows how many batches have ended, and validations."""

    def __init__(self):
        self.seen = {"batches": 0, "validations": 0}

    def on_train_batch_end(self, *_):
        self.seen["batches"] += 1

    def on_validation_end(self, *_):
        self.seen["validations"] += 1

    def state_dict(self):
        return dict(self.seen)


def preempted(folder, batch, callbacks, **options):
    with pytest.raises(SystemExit) as stop:
        fit(folder, callbacks=[Signal(signal.SIGTERM, batch), *callbacks], **options)
    return stop.value.code


def test_what_is_saved_is_what_all_other_callbacks_left_wherever_it_stands(tmp_path):
    callbacks = [Preemption(), Checkpoint(str(tmp_path / "c"), 99), Last()]
    assert preempted(tmp_path, 8, callbacks, **VALIDATION) == 143
    state = torch.load(tmp_path / "c" / "step=4.ckpt", weights_only=True)
    assert state["callbacks"]["Last"] == {"batches": 8, "validations": 2}


def test_what_checkpoint_has_just_saved_is_not_saved_again(tmp_path, monkeypatch):
    steps = []
    original = checkpoint.save_checkpoint

    def counted(trainer, path, keep=None):
        steps.append(trainer.global_step)
        return original(trainer, path, keep)

    monkeypatch.setattr(checkpoint, "save_checkpoint", counted)
    monkeypatch.setattr(preemption, "save_checkpoint", counted)
    preempted(tmp_path, 7, [Preemption(), Checkpoint(str(tmp_path / "c"), 2)])
    preempted(tmp_path, 5, [Preemption(), Checkpoint(str(tmp_path / "d"), 2)])
    assert steps == [2, 4, 2, 3]


def test_with_lightnings_own_callback_it_saves_in_the_root_folder(tmp_path):
    callbacks = [Preemption(), ModelCheckpoint(tmp_path / "own", every_n_train_steps=3)]
    assert preempted(tmp_path, 8, callbacks) == 143
    assert saved(tmp_path) == ["step=4.ckpt"]
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["epoch=0-step=3.ckpt"]


def test_the_exit_code_can_be_chosen(tmp_path):
    assert preempted(tmp_path, 1, [Preemption(exit_code=7)]) == 7


@pytest.mark.parametrize("code", [0, 256, -15])
def test_an_exit_code_that_a_process_cannot_have_is_named(code):
    with pytest.raises(ValueError, match=rf"exit_code is {code}; it must be in \[1, 255\]"):
        Preemption(exit_code=code)


class Fails(At):
    def act(self):
        raise RuntimeError("on purpose")


def test_the_handlers_from_before_are_back_whatever_happened(tmp_path):
    def mine(*_): ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        fit(tmp_path, callbacks=[Preemption()], max_steps=1)
        assert signal.getsignal(signal.SIGTERM) is mine
        with pytest.raises(RuntimeError, match="on purpose"):
            fit(tmp_path, callbacks=[Preemption(), Fails(2)])
        assert signal.getsignal(signal.SIGTERM) is mine
        preempted(tmp_path, 1, [Preemption()])
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_one_callback_serves_several_fits(tmp_path):
    callback = Preemption()
    preempted(tmp_path, 3, [callback])
    assert fit(tmp_path, callbacks=[callback], max_steps=3).global_step == 3
    assert preempted(tmp_path, 5, [callback]) == 143
    assert saved(tmp_path) == ["step=2.ckpt", "step=3.ckpt"]


def test_outside_the_main_thread_it_says_that_it_cannot_work(tmp_path):
    errors = []

    def work():
        try:
            fit(tmp_path, callbacks=[Preemption()])
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == ["Preemption needs the training to run in the main thread, which gets the signals"]


# --- SLURM --------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path):
    """What SLURM sets for a job of one task, with a `scontrol` that writes down how it was called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    (tools / "scontrol").chmod(0o755)
    variables = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "JOB_ID": "1234", "JOB_NAME": "train"}
    variables |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    return {"PATH": f"{tools}:/usr/bin:/bin", **{f"SLURM_{name}": value for name, value in variables.items()}}


def requeued(tmp_path):
    path = tmp_path / "requeued"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("every", [None, 3])
def test_slurm_requeues_once_from_a_whole_step_and_the_restart_finds_it_and_ends_equal(
    tmp_path, slurm, every
):
    assert Run(tmp_path).end() == [0]
    # SLURM asks in the middle of step 4, twice, and ends the job in step 6.
    asked = (Signal(signal.SIGUSR1, batch=7, times=2), Signal(signal.SIGUSR1, batch=9))
    run = Run(tmp_path, every=every, name="cut", environment=slurm, others=(*asked, Fails(11)))
    assert run.end() == [1]
    assert "on purpose" in run.output
    assert requeued(tmp_path) == ["requeue 1234"]
    state = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert (state["global_step"], progress["processed"]) == (4, 8)
    assert not list(tmp_path.glob("hpc_ckpt_2*"))
    if every is not None:
        assert saved(tmp_path) == ["step=3.ckpt", "step=4.ckpt"]

    restarted = Run(tmp_path, name="rest", seed=7, environment=slurm)
    assert restarted.end() == [0]
    weights, lines = read(tmp_path, "whole")
    rest = read(tmp_path, "rest")
    assert equal(rest, ({step: weights[step] for step in (5, 6, 7, 8)} | {4: weights[4]}, lines[4:]))


def test_slurms_sigterm_saves_and_ends_too(tmp_path, slurm):
    run = Run(tmp_path, environment=slurm, others=(Signal(signal.SIGTERM, batch=7),))
    assert run.end() == [143]
    assert saved(tmp_path) == ["step=4.ckpt"]
    assert requeued(tmp_path) == []


@pytest.mark.dist
def test_slurm_requeues_though_only_one_rank_was_asked(tmp_path, slurm):
    many = slurm | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    run = Run(tmp_path, "ddp", environment=many, others=(Signal(signal.SIGUSR1, batch=7, rank=1),))
    assert run.end(60.0) == [0, 0], run.output
    assert requeued(tmp_path) == ["requeue 1234"]
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 4
