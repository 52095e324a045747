import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from rewarm.pipeline import newest_checkpoint, read_pipeline, run_pipeline, write_overlay
from tests import tiny


def pipeline(tmp_path, stages, variables=None):
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"vars": variables or {}, "stages": stages}))
    return str(path)


def counting(tmp_path, name="count", fail=False):
    """A stage that notes each of its runs in a file."""
    code = f"open(r'{tmp_path}/{name}.runs','a').write('x')" + ("; raise SystemExit(3)" if fail else "")
    return {"name": name, "run": ["python", "-c", code]}


def runs(tmp_path, name="count"):
    return (tmp_path / f"{name}.runs").read_text()


def test_a_finished_stage_is_not_run_again(tmp_path):
    path = pipeline(tmp_path, [counting(tmp_path)])
    for _ in range(2):
        run_pipeline(path, str(tmp_path / "out"))
    assert runs(tmp_path) == "x"


def test_a_failed_stage_is_named_and_what_follows_does_not_run(tmp_path):
    path = pipeline(tmp_path, [counting(tmp_path, "bad", fail=True), counting(tmp_path, "after")])
    with pytest.raises(ValueError, match="stage bad failed with exit code 3"):
        run_pipeline(path, str(tmp_path / "out"))
    assert not (tmp_path / "after.runs").exists()
    with pytest.raises(ValueError, match="stage bad"):
        run_pipeline(path, str(tmp_path / "out"))
    assert runs(tmp_path, "bad") == "xx"


def test_an_interrupted_command_starts_with_an_empty_folder(tmp_path):
    code = "import sys, pathlib; p = pathlib.Path(sys.argv[1], 'made'); p.mkdir(); (p / 'f').touch()"
    code += (
        f"; n = pathlib.Path(r'{tmp_path}/tries'); n.open('a').write('x'); sys.exit(len(n.read_text()) == 1)"
    )
    path = pipeline(tmp_path, [{"name": "a", "run": ["python", "-c", code, "$stage"]}])
    with pytest.raises(ValueError, match="stage a failed"):
        run_pipeline(path, str(tmp_path / "out"))
    assert (tmp_path / "out" / "a" / "made" / "f").exists()
    run_pipeline(path, str(tmp_path / "out"))
    assert (tmp_path / "tries").read_text() == "xx"


def test_a_changed_stage_refuses_the_old_folder_and_touches_nothing(tmp_path):
    run_pipeline(pipeline(tmp_path, [counting(tmp_path)]), str(tmp_path / "out"))
    changed = counting(tmp_path)
    changed["run"].append("more")
    with pytest.raises(ValueError, match="made with other settings"):
        run_pipeline(pipeline(tmp_path, [changed]), str(tmp_path / "out"))
    assert runs(tmp_path) == "x"


def test_a_change_reaches_the_stages_after_it(tmp_path):
    def prints(first):
        return [
            stage.fingerprint
            for stage in read_pipeline(pipeline(tmp_path, [first, counting(tmp_path, "b")]), "o", [])
        ]

    before, after = prints(counting(tmp_path, "a")), prints(counting(tmp_path, "a", fail=True))
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_variables_are_filled_in_with_their_types(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("{}")
    stages = [
        {
            "name": "a",
            "fit": str(config),
            "set": {"x.n": "$n", "x.text": "${n}0 in $stage", "x.list": ["$kind", "$output"]},
        }
    ]
    path = pipeline(tmp_path, stages, {"n": 3, "kind": {"model_type": "llama"}})
    (stage,) = read_pipeline(path, "out", ["n=5"])
    assert stage.settings == {"x": {"n": 5, "text": "50 in out/a", "list": [{"model_type": "llama"}, "out"]}}


@pytest.mark.parametrize(
    ("document", "settings", "message"),
    [
        ({"stages": []}, [], "must have `stages`"),
        ({"stages": [{"name": "a"}]}, [], "either `run` or `fit`"),
        ({"stages": [{"name": "a b", "run": "x"}]}, [], "use letters"),
        ({"stages": [{"name": "a", "run": "$nope"}]}, [], "no variable nope; known are"),
        ({"vars": {"train": None}, "stages": [{"name": "a", "run": "x $train"}]}, [], "give --set train"),
        ({"stages": [{"name": "a", "fit": "nowhere.yaml"}]}, [], "config nowhere.yaml: no such file"),
        ({"stages": [{"name": "a", "run": "x"}] * 2}, [], "two stages are named 'a'"),
        ({"stages": [{"name": "a", "run": "x"}]}, ["seed=1"], "has no such variable"),
        ({"stages": [{"name": "a", "run": "x"}]}, ["seed"], "must be key=value"),
    ],
)
def test_a_wrong_pipeline_is_named(tmp_path, document, settings, message):
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ValueError, match=message):
        run_pipeline(str(path), str(tmp_path / "out"), settings)
    assert not (tmp_path / "out").exists()


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml: no such file"):
        read_pipeline("nowhere.yaml", "out", [])
    (tmp_path / "p.yaml").write_text("stages: [")
    with pytest.raises(ValueError, match="not YAML"):
        read_pipeline(str(tmp_path / "p.yaml"), "out", [])


def test_the_newest_checkpoint_is_the_one_of_the_latest_step(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 20, 100):
        (tmp_path / f"step={step}.ckpt").touch()
    assert newest_checkpoint(tmp_path).name == "step=100.ckpt"


def training(tmp_path):
    """Two stages that train, the second from what the first wrote."""
    base = {
        "model": {
            "class_path": "rewarm.CurriculumSFT",
            "init_args": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}},
        },
        "data": {
            "class_path": "rewarm.InstructionData",
            "init_args": {
                "train": tiny.write_jsonl(tmp_path / "train.jsonl", tiny.sums(64)),
                "tokenizer": tiny.save_tokenizer(tmp_path / "tokenizer"),
                "max_length": 32,
                "batch_size": 8,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 60,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": [
                {
                    "class_path": "rewarm.LRSchedule",
                    "init_args": {"schedule": {"class_path": "rewarm.cosine"}},
                }
            ],
        },
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(base))
    stages = [
        {
            "name": "one",
            "fit": str(tmp_path / "sft.yaml"),
            "set": {"model.init_args.model": dict(tiny.LLAMA)},
            "checkpoint_every": 10,
        },
        {
            "name": "two",
            "fit": str(tmp_path / "sft.yaml"),
            "set": {"model.init_args.model": "$output/one/hf"},
            "checkpoint_every": 10,
        },
    ]
    return pipeline(tmp_path, stages)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_a_killed_pipeline_goes_on_to_the_same_weights_and_repeats_no_finished_stage(tmp_path):
    path = training(tmp_path)
    command = [sys.executable, "-m", "rewarm", "run", path, "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, timeout=200)

    process = subprocess.Popen(
        [*command, str(tmp_path / "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoints = tmp_path / "killed" / "two" / "checkpoints"
    while newest_checkpoint(checkpoints) is None:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = (tmp_path / "killed" / "one" / "stage.json").stat().st_mtime_ns
    resumed_from = newest_checkpoint(checkpoints)
    assert torch.load(resumed_from, weights_only=True)["global_step"] < 60

    done = subprocess.run([*command, str(tmp_path / "killed")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "one: finished before" in done.stdout
    assert (tmp_path / "killed" / "one" / "stage.json").stat().st_mtime_ns == first
    assert "Restor" in done.stderr + done.stdout

    whole, killed = weights(tmp_path / "whole" / "two" / "hf"), weights(tmp_path / "killed" / "two" / "hf")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    report = json.loads((tmp_path / "killed" / "report.json").read_text())
    assert [(entry["name"], entry["method"], entry["steps"]) for entry in report] == [
        ("one", "CurriculumSFT", 60),
        ("two", "CurriculumSFT", 60),
    ]
    assert (tmp_path / "killed" / "curves.png").stat().st_size > 1000


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
            ]
        }
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    added = [{"class_path": "rewarm.SampleTable"}]
    stages = [{"name": "a", "fit": str(tmp_path / "c.yaml"), "set": {"trainer.callbacks+": added}}]
    (stage,) = read_pipeline(pipeline(tmp_path, stages), str(tmp_path / "out"), [])
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
        "ModelCheckpoint",
    ]
    assert shown[1][1] == {"window": 7}
    assert shown[2][1] == {"monitor": "val/loss"}
    assert shown[5][1] == {"folder": str(tmp_path / "out" / "a" / "hf")}
    assert "callbacks+" not in trainer


@pytest.mark.slow
@pytest.mark.dist
def test_under_torchrun_commands_run_once_and_training_on_all_ranks(tmp_path):
    document = yaml.safe_load(Path(training(tmp_path)).read_text())
    settings = document["stages"][0]["set"]
    settings |= {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_steps": 4}
    document["stages"][0]["checkpoint_every"] = 2
    document["stages"] = [counting(tmp_path), document["stages"][0]]
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(document))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "rewarm", "run"]
    done = subprocess.run(
        [*launch, str(tmp_path / "pipeline.yaml"), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert runs(tmp_path) == "x"
    (entry,) = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (entry["name"], entry["steps"]) == ("one", 4)
    state = torch.load(newest_checkpoint(tmp_path / "out" / "one" / "checkpoints"), weights_only=True)
    (loader,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert loader["loader"]["_index_sampler_state"]["epoch_rows"] == 4 * 8 * 2  # of both ranks
