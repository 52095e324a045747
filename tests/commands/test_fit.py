import os
import sys

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from rewarm import cli
from rewarm.commands.fit import _check_sizes, checkpoint_to_load

# --- which checkpoint is loaded -----------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("rewarm.commands.fit.rank_zero_info", lines.append)
    return lines


def checkpoints(folder, *steps):
    folder.mkdir()
    for step in steps:
        torch.save({"global_step": step, "lr_schedulers": []}, folder / f"step={step}.ckpt")
    return folder


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_of_a_folder_the_newest_whole_one_is_taken_and_damaged_ones_are_told(tmp_path, said, command):
    folder = checkpoints(tmp_path / "run", 2, 10, 30)
    os.truncate(folder / "step=30.ckpt", 100)
    assert checkpoint_to_load(folder, command) == str(folder / "step=10.ckpt")
    assert said[0].startswith(f"{folder}/step=30.ckpt: the checkpoint is damaged (")
    assert said[1:] == [f"ckpt_path {folder}: step=10.ckpt is the newest whole checkpoint"]
    assert (folder / "step=30.ckpt").exists()


@pytest.mark.parametrize("name", ["run", "nowhere"])
def test_a_folder_without_any_starts_a_fit_from_the_beginning_and_nothing_else(tmp_path, said, name):
    (tmp_path / "run").mkdir()
    folder = tmp_path / name
    assert checkpoint_to_load(folder, "fit") is None
    assert said == [f"ckpt_path {folder}: no whole checkpoint yet, so this starts from the beginning"]
    with pytest.raises(ValueError, match=f"ckpt_path .*{name}: no whole checkpoint in this folder"):
        checkpoint_to_load(folder, "predict")


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_damaged_or_missing_one_is_named_with_the_newest_whole_one_beside_it(tmp_path, said, command):
    folder = checkpoints(tmp_path / "run", 2, 10)
    assert checkpoint_to_load(folder / "step=10.ckpt", command) == str(folder / "step=10.ckpt")
    os.truncate(folder / "step=10.ckpt", 100)
    beside = r"the newest whole one is .*run/step=2\.ckpt"
    with pytest.raises(
        ValueError, match=rf"ckpt_path .*step=10\.ckpt: the checkpoint is damaged \(.*\); {beside}"
    ):
        checkpoint_to_load(folder / "step=10.ckpt", command)
    with pytest.raises(ValueError, match=rf"ckpt_path .*step=3\.ckpt: no such checkpoint file; {beside}"):
        checkpoint_to_load(folder / "step=3.ckpt", command)
    os.truncate(folder / "step=2.ckpt", 0)
    with pytest.raises(ValueError, match="there is no whole one beside it"):
        checkpoint_to_load(folder / "step=2.ckpt", command)
    assert said == []


def test_a_folder_of_shards_is_one_checkpoint(tmp_path, said):
    path = tmp_path / "run" / "step=4.ckpt"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"step=4\.ckpt: the checkpoint is damaged \(\.metadata is missing\)"
    ):
        checkpoint_to_load(path, "fit")


def test_weights_alone_can_be_tested_and_not_gone_on_from(tmp_path):
    torch.save({"state_dict": {}, "global_step": 3}, tmp_path / "step=3.ckpt")
    assert checkpoint_to_load(tmp_path / "step=3.ckpt", "test") == str(tmp_path / "step=3.ckpt")
    with pytest.raises(ValueError, match=r"step=3\.ckpt has weights alone \(save_weights_only\)"):
        checkpoint_to_load(tmp_path / "step=3.ckpt", "fit")


BORING = {
    "model": {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"},
    "data": {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"},
    "trainer": {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "max_steps": 4,
    },
}


def rewarm(tmp_path, monkeypatch, *arguments, **trainer):
    saving = {
        "class_path": "rewarm.callbacks.checkpoint.Checkpoint",
        "init_args": {"dirpath": str(tmp_path / "run"), "every_n_train_steps": 2},
    }
    config = {**BORING, "trainer": {**BORING["trainer"], "callbacks": [saving], **trainer}}
    (tmp_path / "boring.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["rewarm"])
    cli.main([arguments[0], "--config", str(tmp_path / "boring.yaml"), *arguments[1:]])


boring = pytest.mark.filterwarnings(
    "ignore:The '(train|val|test)_dataloader' does not have many workers",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)


@boring
def test_the_same_command_starts_and_goes_on(tmp_path, monkeypatch, said):
    folder = str(tmp_path / "run")
    rewarm(tmp_path, monkeypatch, "fit", "--ckpt_path", folder)
    os.truncate(tmp_path / "run" / "step=4.ckpt", 100)
    rewarm(tmp_path, monkeypatch, "fit", "--ckpt_path", folder, max_steps=6)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step=4.ckpt", "step=6.ckpt"]
    assert [line.rsplit(": ", 1)[-1].split(" (")[0] for line in said] == [
        "no whole checkpoint yet, so this starts from the beginning",
        "the checkpoint is damaged",
        "step=2.ckpt is the newest whole checkpoint",
    ]
    rewarm(tmp_path, monkeypatch, "test", "--ckpt_path", folder)
    assert said[-1].endswith("step=6.ckpt is the newest whole checkpoint")


def error(tmp_path, monkeypatch, capsys, *arguments, **trainer):
    with pytest.raises(SystemExit) as stop:
        rewarm(tmp_path, monkeypatch, *arguments, **trainer)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rewarm: error:")]
    return line


def test_a_damaged_checkpoint_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.ckpt").write_bytes(b"")
    line = error(tmp_path, monkeypatch, capsys, "fit", "--ckpt_path", str(tmp_path / "a.ckpt"))
    assert (
        "a.ckpt: the checkpoint is damaged (File is not a zip file); there is no whole one beside it" in line
    )


# --- processes that don't fit -------------------------------------------------------------------------------


def test_sizes_that_do_not_fit_the_processes_are_named_before_any_process_waits():
    trainer = Trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(2, 2), logger=False)
    with pytest.raises(
        ValueError, match="2 and tensor_parallel_size 2, which makes 4 processes, but .* make 2"
    ):
        _check_sizes(trainer.strategy, trainer.num_nodes)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(2, 1), logger=False)
    _check_sizes(trainer.strategy, trainer.num_nodes)


def test_sizes_are_checked_by_the_command(tmp_path, monkeypatch, capsys):
    strategy = {
        "class_path": "ModelParallelStrategy",
        "init_args": {"data_parallel_size": 3, "tensor_parallel_size": 1},
    }
    line = error(tmp_path, monkeypatch, capsys, "fit", strategy=strategy, devices=2)
    assert "data_parallel_size is 3 and tensor_parallel_size 1, which makes 3 processes" in line


def test_a_job_script_without_tasks_per_node_is_one_line(tmp_path, monkeypatch, capsys):
    for name, value in {"NTASKS": "2", "JOB_ID": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    line = error(tmp_path, monkeypatch, capsys, "fit", devices=2, strategy="ddp")
    assert "`--ntasks=2`" in line
    assert "Use `--ntasks-per-node=2` instead" in line


def test_devices_that_differ_from_torchruns_are_one_line(tmp_path, monkeypatch, capsys):
    variables = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = error(tmp_path, monkeypatch, capsys, "fit", devices=2, strategy="ddp")
    assert "`devices=2` and `num_nodes=1`" in line
    assert "does not match the world size (4)" in line


GONE = {
    "DPO.beta": ("model", {"model": "nowhere", "beta": 0.1}, "loss=rewarm.Sigmoid(beta=...)"),
    "GRPO.normalise": (
        "model",
        {"model": "nowhere", "normalise": "token"},
        "weights=rewarm.PerToken(), rewarm.PerSequence() or rewarm.PerConstant(tokens)",
    ),
    "PreferenceData.scores": (
        "data",
        {"train": "nowhere.jsonl", "tokenizer": "nowhere", "scores": "scores.parquet"},
        "score_table= (the table; score= names the column in it)",
    ),
    "InstructionData.length_window": (
        "data",
        {"train": "nowhere.jsonl", "tokenizer": "nowhere", "length_window": 4},
        "length_bucket=",
    ),
}


def said_of(arguments, monkeypatch, capsys):
    """The line in which the command line ends."""
    monkeypatch.setattr(sys, "argv", ["rewarm"])
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", GONE)
@pytest.mark.parametrize("place", ["file", "pass-through"])
def test_what_to_write_for_an_argument_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys, name, place):
    section, given, now = GONE[name]
    kind, argument = name.split(".")
    described = {"class_path": f"rewarm.{kind}", "init_args": dict(given)}
    if place == "pass-through":  # what the parser does not check reaches the constructor
        described["dict_kwargs"] = {argument: described["init_args"].pop(argument)}
    config = {
        "model": {"class_path": "rewarm.DPO", "init_args": {"model": "nowhere"}},
        "data": {"class_path": "rewarm.PreferenceData", "init_args": {"train": "no", "tokenizer": "no"}},
        "trainer": {"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        section: described,
    }
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config))
    said = said_of(["fit", "--config", str(tmp_path / "old.yaml")], monkeypatch, capsys)
    assert said == f"rewarm: error: {kind} has no argument {argument!r} any more; write {now}"


def test_a_flag_and_a_subclass_are_told_of_an_argument_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("import rewarm\nclass Mine(rewarm.DPO):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "new.yaml").write_text("model: {class_path: mine.Mine, init_args: {model: nowhere}}\n")
    arguments = ["fit", "--config", str(tmp_path / "new.yaml"), "--model.nll_weight", "1"]
    assert "Mine has no argument 'nll_weight' any more; write loss=rewarm.Sum(" in said_of(
        arguments, monkeypatch, capsys
    )


def test_other_commands_that_read_configs_tell_of_an_argument_that_is_gone(tmp_path, monkeypatch, capsys):
    config = {"model": {"class_path": "rewarm.DPO", "init_args": {"model": "nowhere", "beta": 0.1}}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config))
    said = said_of(["schedule", str(tmp_path / "old.yaml")], monkeypatch, capsys)
    assert said.endswith("DPO has no argument 'beta' any more; write loss=rewarm.Sigmoid(beta=...)")


def test_an_option_that_never_was_is_told_as_before(tmp_path, monkeypatch, capsys):
    config = {"model": {"class_path": "rewarm.DPO", "init_args": {"model": "nowhere", "betta": 0.1}}}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    said = said_of(["fit", "--config", str(tmp_path / "wrong.yaml")], monkeypatch, capsys)
    assert "'betta' is not accepted" in said
