"""Where a stage goes on, and what it is started with."""

import os
import shutil
import threading
import time

import pytest
import torch
import yaml

from rewarm.pipelines import stages
from rewarm.pipelines.pipeline import read_pipeline
from rewarm.pipelines.stages import checkpoint_to_resume, write_overlay
from tests.pipeline_files import pipeline


def checkpoints(folder, *steps):
    folder.mkdir()
    for step in steps:
        torch.save({"global_step": step}, folder / f"step={step}.ckpt")
    return folder


def test_a_stage_goes_on_from_the_newest_whole_checkpoint_and_renames_damaged_ones(tmp_path):
    folder = checkpoints(tmp_path / "checkpoints", 5, 20, 100)
    os.truncate(folder / "step=100.ckpt", 300)
    (folder / "step=100.ckpt.damaged").mkdir()  # of an earlier time
    said = []
    assert checkpoint_to_resume(folder, said.append) == folder / "step=20.ckpt"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step=100.ckpt.damaged",
        "step=20.ckpt",
        "step=5.ckpt",
    ]
    assert (folder / "step=100.ckpt.damaged").stat().st_size == 300
    (line,) = said
    assert line.startswith(f"{folder}/step=100.ckpt: the checkpoint is damaged (")
    assert line.endswith("; renamed to step=100.ckpt.damaged")


def test_a_stage_starts_anew_if_all_are_damaged_and_says_so(tmp_path):
    folder = checkpoints(tmp_path / "checkpoints", 5, 20)
    for path in list(folder.iterdir()):
        path.write_bytes(b"")
    said = []
    assert checkpoint_to_resume(folder, said.append) is None
    assert len(said) == 3
    assert said[-1] == f"{folder} has no whole checkpoint left: the stage starts anew"
    assert checkpoint_to_resume(folder, pytest.fail) is None
    assert checkpoint_to_resume(tmp_path / "nowhere", pytest.fail) is None


def test_ranks_take_the_choice_of_this_launch_and_not_of_an_earlier_one(tmp_path):
    (tmp_path / "c.yaml").write_text("{}")
    (stage,) = read_pipeline(pipeline(tmp_path, [{"name": "a", "fit": str(tmp_path / "c.yaml")}]), "out", {})
    folder = tmp_path / "a"
    checkpoints_of = folder / "checkpoints"
    folder.mkdir()
    for step in (5, 20):
        results = {}

        def ask(rank, results=results):
            results[rank] = stages._ask(folder, stage, rank)["resume"]

        others = [threading.Thread(target=ask, args=(rank,)) for rank in (1, 2)]
        others[0].start()  # before rank 0 has begun
        while not list(folder.glob(".rank-1-*")):
            time.sleep(0.01)
        shutil.rmtree(checkpoints_of, ignore_errors=True)
        checkpoints(checkpoints_of, step)
        marker = stages.read_marker(folder, stage) or {"seconds": 0.0}
        late = threading.Timer(0.3, others[1].start)
        late.start()
        known = stages._prepare(folder, stage, 3, marker)
        late.join()
        for thread in others:
            thread.join(10.0)
        assert results == {1: str(checkpoints_of / f"step={step}.ckpt"), 2: known["resume"]}
        assert len(known["ranks"]) == 2


def test_a_stage_keeps_the_callbacks_of_its_config_but_for_those_that_the_pipeline_must_place(tmp_path):
    config = {
        "trainer": {
            "callbacks": [
                {"class_path": "rewarm.LRSchedule"},
                {"class_path": "rewarm.Throughput", "init_args": {"window": 7}},
                {"class_path": "rewarm.HuggingFaceExport", "init_args": {"folder": "elsewhere"}},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_epochs": 1},
                },
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"monitor": "val/loss"},
                },
                {"class_path": "rewarm.Checkpoint", "init_args": {"keep": 9}},
                {"class_path": "rewarm.Preemption", "init_args": {"exit_code": 7}},
            ]
        }
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    added = [{"class_path": "rewarm.SampleTable"}]
    entry = {"name": "a", "fit": str(tmp_path / "c.yaml"), "set": {"trainer.callbacks+": added}}
    (stage,) = read_pipeline(pipeline(tmp_path, [entry]), str(tmp_path / "out"), {})
    (tmp_path / "out" / "a").mkdir(parents=True)
    write_overlay(tmp_path / "out" / "a", stage)
    trainer = yaml.safe_load((tmp_path / "out" / "a" / "overlay.yaml").read_text())["trainer"]
    shown = [(c["class_path"].rsplit(".", 1)[-1], c.get("init_args", {})) for c in trainer["callbacks"]]
    assert [name for name, _ in shown] == [
        "LRSchedule",
        "Throughput",
        "ModelCheckpoint",
        "SampleTable",
        "ExactResume",
        "HuggingFaceExport",
        "Checkpoint",
        "Preemption",
    ]
    assert shown[1][1] == {"window": 7}
    assert shown[2][1] == {"monitor": "val/loss"}
    assert shown[5][1] == {"folder": str(tmp_path / "out" / "a" / "hf")}
    folder = str(tmp_path / "out" / "a" / "checkpoints")
    assert shown[6][1] == {"dirpath": folder, "every_n_train_steps": 100}
    assert shown[7][1] == {}
    assert "callbacks+" not in trainer


def run(tmp_path, output, marker=None):
    (stage,) = read_pipeline(pipeline(tmp_path, [{"name": "a", "run": ["true"]}]), str(output), {})
    folder = output / stage.name
    stages.run_stage(folder, stage, 0, 1, stages.read_marker(folder, stage) if marker is None else marker)
    return folder


@pytest.mark.parametrize("name", [".hidden", ".ssh/key", "visible"])
def test_a_folder_with_any_file_of_somebody_elses_is_left_as_it_is(tmp_path, name):
    foreign = tmp_path / "out" / "a" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(ValueError, match=r"files that no pipeline made \(.*\): give another --output"):
        run(tmp_path, tmp_path / "out")
    assert foreign.read_text() == "mine"


def test_a_folder_that_is_a_link_is_refused_and_links_inside_lead_nowhere(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(outside)
    with pytest.raises(ValueError, match="is a link, and what it leads to is not the pipeline's"):
        run(tmp_path, tmp_path / "out")
    folder = run(tmp_path, tmp_path / "other")
    (folder / "link").symlink_to(outside)
    (folder / "left").mkdir()
    run(tmp_path, tmp_path / "other")  # an interrupted command starts anew in an empty folder
    assert [path.name for path in folder.iterdir()] == ["stage.json"]
    assert (outside / "kept").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_note_is_named_with_what_to_do(tmp_path, text):
    folder = run(tmp_path, tmp_path / "out")
    (folder / "stage.json").write_text(text)
    with pytest.raises(ValueError, match=r"stage.json is damaged \(.*\): remove .*out/a to run"):
        run(tmp_path, tmp_path / "out")
