"""A few of the faults of `make faults` with every change, and that the comparison would notice.

What fails here also leaves out a run of `make faults`, which says more.
"""

import functools
import json
import random
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests import fits, tiny
from tests.faults import faults, runs
from tests.faults.comparison import differences
from tests.faults.processes import Process

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Makes runs that are left alone, each once."""

    @functools.cache
    def make(name, strategy="one process", without=""):
        return faults.Whole(name, tmp_path_factory.mktemp(name), strategy, without)

    return make


def meet(fault, run, folder, number=0):
    """What comes of a fault, which may have to be tried more than once."""
    for attempt in range(20):
        outcome = fault(run, folder / str(attempt), random.Random(attempt), number)
        if outcome is not None:
            return outcome
    raise AssertionError("the run was always over before")


@pytest.mark.parametrize("name", runs.RUNS)
def test_killed_again_and_again_a_run_ends_with_equal_bits_and_logs(whole, tmp_path, name):
    assert meet(faults.killed_often, whole(name), tmp_path).differences == []


@pytest.mark.parametrize("name", ["CurriculumSFT", "GRPO"])
def test_killed_while_saving_a_run_ends_with_equal_bits_and_logs(whole, tmp_path, name):
    def killed_while_saving(run, folder, rng, number):
        return faults.interrupted(run, folder, [run.moment(rng, "saving")])

    outcome = meet(killed_while_saving, whole(name), tmp_path)
    assert outcome.differences == []
    assert outcome.messages == []  # nothing torn has the name of a checkpoint


@pytest.mark.parametrize("name", ["ContinualPretraining", "DPO"])
def test_sigterm_loses_no_step(whole, tmp_path, name):
    assert meet(faults.terminated, whole(name), tmp_path).differences == []


@pytest.mark.parametrize("fault", [faults.truncated, faults.flipped])
def test_a_damaged_checkpoint_is_found_and_the_one_before_taken(whole, tmp_path, fault):
    assert meet(fault, whole("CurriculumSFT"), tmp_path).differences == []


def test_a_full_disk_leaves_the_last_good_checkpoint(whole, tmp_path):
    try:
        outcome = meet(faults.disk_full, whole("CurriculumSFT"), tmp_path)
    except PermissionError as error:
        pytest.skip(str(error))
    assert outcome.differences == []


def test_a_killed_rank_ends_the_other_one_and_both_resume(whole, tmp_path):
    assert meet(faults.rank_killed, whole("CurriculumSFT", "ddp"), tmp_path).differences == []


def test_a_checkpoint_that_cannot_be_written_is_one_line_on_the_command_line(tmp_path):
    files = fits.Files(tmp_path / "files")
    data = {"train": files.sft, "tokenizer": files.tokenizer, "max_length": 48, "batch_size": 2}
    keep = {"dirpath": str(tmp_path / "checkpoints"), "every_n_train_steps": 1}
    trainer = {"callbacks": [{"class_path": "rewarm.callbacks.checkpoint.Checkpoint", "init_args": keep}]}
    config = {
        "model": {"class_path": "rewarm.CurriculumSFT", "init_args": {"model": tiny.LLAMA}},
        "data": {"class_path": "rewarm.InstructionData", "init_args": data},
        "trainer": trainer | {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.max_steps"]
    good = tmp_path / "checkpoints/step=1.ckpt"

    assert Process(tmp_path / "before", runs.command, [*fit, "1"]).end(100).exit_code == 0
    more = [*fit, "2", "--ckpt_path", str(good)]
    full = Process(tmp_path / "full", runs.command, more, 100_000).end(100)
    assert full.exit_code == 2
    assert "Traceback" not in full.output
    *_, said = full.output.splitlines()
    assert said.startswith("rewarm: error: the checkpoint")
    assert said.endswith(f"the last good one is {good}")
    assert sorted(path.name for path in good.parent.iterdir()) == [good.name]
    assert Process(tmp_path / "after", runs.command, more).end(100).exit_code == 0
    assert (good.parent / "step=2.ckpt").is_file()


# --- the comparison -------------------------------------------------------------------------------------


def test_two_undisturbed_runs_are_equal(whole, tmp_path):
    outcome = faults.interrupted(whole("CurriculumSFT"), tmp_path, [])
    assert outcome is None  # nobody interrupted it
    assert differences(whole("CurriculumSFT").folder, tmp_path) == []


def test_the_comparison_notices_a_run_that_resumes_without_its_random_state(whole, tmp_path):
    run = whole("CurriculumSFT", without="ExactResume")

    def killed_halfway(run, folder, rng, number):
        return faults.interrupted(run, folder, [run.moment(rng, "validation")])

    assert meet(killed_halfway, run, tmp_path).differences != []


def spoil_model(folder):
    weights = load_file(folder / "model/model.safetensors")
    weights["lm_head.weight"][0, 0] += 1e-6
    save_file(weights, folder / "model/model.safetensors")


def spoil_optimizer(folder):
    path = folder / f"checkpoints/step={runs.STEPS}.ckpt"
    checkpoint = torch.load(path)
    checkpoint["optimizer_states"][0]["state"][0]["exp_avg"][0, 0] += 1e-9
    torch.save(checkpoint, path)


def edit_log(folder, edit):
    lines = (folder / "log").read_text().splitlines()
    (folder / "log").write_text("".join(f"{line}\n" for line in edit(lines)))


def repeat_with_another_loss(lines):
    return [*lines, json.dumps({**json.loads(lines[0]), "train/loss": 0.0})]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_model, "model.lm_head.weight: other numbers"),
        (spoil_optimizer, "checkpoint.optimizer_states.0.state.0.exp_avg: other numbers"),
        (lambda folder: edit_log(folder, lambda lines: lines[1:]), "never logged"),
        (lambda folder: edit_log(folder, repeat_with_another_loss), "instead of"),
    ],
)
def test_the_comparison_notices(whole, tmp_path, spoil, said):
    other = shutil.copytree(whole("CurriculumSFT").folder, tmp_path / "other")
    spoil(other)
    (difference,) = differences(whole("CurriculumSFT").folder, other)
    assert said in difference
