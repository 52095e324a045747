import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from rewarm.checkpoints.whole import newest_whole
from rewarm.pipelines import pipeline as module
from rewarm.pipelines.pipeline import checkpoint_to_resume, read_pipeline, run_pipeline, write_overlay
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


# --- where a stage goes on ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["run", "fit"])
def test_a_folder_that_no_pipeline_made_is_left_alone(tmp_path, kind):
    (tmp_path / "c.yaml").write_text("{}")
    stage = counting(tmp_path, "mine") if kind == "run" else {"name": "mine", "fit": str(tmp_path / "c.yaml")}
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "thesis.tex").write_text("three years")
    with pytest.raises(ValueError, match="mine has files that no pipeline made: give another --output"):
        run_pipeline(pipeline(tmp_path, [stage]), str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out" / "mine").iterdir()] == ["thesis.tex"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", range(4))
def test_killed_between_making_a_folder_and_noting_that_a_stage_is_finished_it_goes_on(
    tmp_path, monkeypatch, call
):
    path = pipeline(tmp_path, [counting(tmp_path)])
    calls = iter(range(99))

    def maybe_killed(original):
        def wrapped(*args, **kwargs):
            if next(calls) == call:
                raise Killed
            return original(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_marker", maybe_killed(module._write_marker))
        patch.setattr(Path, "replace", maybe_killed(Path.replace))
        with pytest.raises(Killed):
            run_pipeline(path, str(tmp_path / "out"))
    run_pipeline(path, str(tmp_path / "out"))
    assert runs(tmp_path) == ("xx" if call > 1 else "x")
    run_pipeline(path, str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "count" / "stage.json").read_text())["finished"]
    assert runs(tmp_path) == ("xx" if call > 1 else "x")


def test_ranks_take_the_choice_of_this_launch_and_not_of_an_earlier_one(tmp_path):
    (tmp_path / "c.yaml").write_text("{}")
    (stage,) = read_pipeline(pipeline(tmp_path, [{"name": "a", "fit": str(tmp_path / "c.yaml")}]), "out", [])
    folder = tmp_path / "a"
    checkpoints_of = folder / "checkpoints"
    folder.mkdir()
    for step in (5, 20):
        results = {}

        def ask(rank, results=results):
            results[rank] = module._ask(folder, stage, rank)["resume"]

        others = [threading.Thread(target=ask, args=(rank,)) for rank in (1, 2)]
        others[0].start()  # before rank 0 has begun
        while not list(folder.glob(".rank-1-*")):
            time.sleep(0.01)
        shutil.rmtree(checkpoints_of, ignore_errors=True)
        checkpoints(checkpoints_of, step)
        marker = module._read_marker(folder, stage) or {"seconds": 0.0}
        late = threading.Timer(0.3, others[1].start)
        late.start()
        known = module._prepare(folder, stage, 3, marker)
        late.join()
        for thread in others:
            thread.join(10.0)
        assert results == {1: str(checkpoints_of / f"step={step}.ckpt"), 2: known["resume"]}
        assert len(known["ranks"]) == 2


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, (1, 4)),
        # In an allocation, but not started by srun.
        ({"SLURM_NTASKS": "4"}, (0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, (0, 1)),
    ],
)
def test_the_launcher_tells_how_many_ranks_there_are(monkeypatch, variables, place):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert module._place() == place


# --- SIGTERM ------------------------------------------------------------------------------------------------


def started(path, output, **options):
    command = [sys.executable, "-m", "rewarm", "run", path, "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def test_sigterm_reaches_the_command_and_the_pipeline_waits_for_it_and_ends_with_143(tmp_path):
    code = (
        "import pathlib, signal, sys, time; here = pathlib.Path(sys.argv[1])\n"
        "def stop(*_):\n    time.sleep(0.5); (here / 'tidy').touch(); sys.exit(143)\n"
        "if not (here.parent / 'again').exists():\n"
        "    signal.signal(signal.SIGTERM, stop); (here.parent / 'again').touch(); time.sleep(60)\n"
    )
    stages = [{"name": "slow", "run": ["python", "-c", code, "$stage"]}, counting(tmp_path, "after")]
    path, output = pipeline(tmp_path, stages), tmp_path / "out"
    process = started(path, output)
    while not (output / "again").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "stage slow was stopped by SIGTERM; the same command goes on" in said
    assert (output / "slow" / "tidy").exists()
    assert not json.loads((output / "slow" / "stage.json").read_text())["finished"]
    assert not (tmp_path / "after.runs").exists()
    run_pipeline(path, str(output))
    assert runs(tmp_path, "after") == "x"


def test_a_stage_that_ends_well_in_spite_of_sigterm_is_finished(tmp_path):
    code = "import signal, sys, time, pathlib; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    code += f"pathlib.Path(r'{tmp_path}/ready').touch(); time.sleep(60)"
    path, output = pipeline(tmp_path, [{"name": "a", "run": ["python", "-c", code]}]), tmp_path / "out"
    process = started(path, output)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert json.loads((output / "a" / "stage.json").read_text())["finished"]


# --- several ranks ------------------------------------------------------------------------------------------


def fingerprint(tmp_path, **changes):
    config = {
        "data": {"init_args": {"batch_size": 8, "seed": 0}},
        "trainer": {"max_steps": 5, "num_nodes": 2, "accumulate_grad_batches": 4},
    }
    settings = {"trainer.devices": 8, "trainer.strategy.init_args.timeout": "0:10:00"}
    for name, value in changes.items():
        if name in ("batch_size", "seed"):
            config["data"]["init_args"][name] = value
        elif name in config["trainer"]:
            config["trainer"][name] = value
        else:
            settings[f"trainer.{name}"] = value
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    stages = [{"name": "a", "fit": str(tmp_path / "c.yaml"), "set": settings}]
    (stage,) = read_pipeline(pipeline(tmp_path, stages), "out", [])
    return stage.fingerprint


def test_a_stage_may_go_on_elsewhere_and_in_other_batches_but_not_with_other_settings(tmp_path):
    as_it_was = fingerprint(tmp_path)
    elsewhere = {"num_nodes": 1, "devices": 4, "accelerator": "cpu", "strategy.class_path": "x"}
    assert fingerprint(tmp_path, **elsewhere, batch_size=2, accumulate_grad_batches=64) == as_it_was
    for change in ({"max_steps": 6}, {"seed": 1}, {"precision": "bf16-mixed"}):
        assert fingerprint(tmp_path, **change) != as_it_was


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels don't tell a process of its parent's end")
def test_a_stage_ends_when_its_pipeline_is_killed(tmp_path):
    code = f"import os, pathlib, time; pathlib.Path(r'{tmp_path}/pid').write_text(str(os.getpid()))\n"
    code += "time.sleep(60)"
    path = pipeline(tmp_path, [{"name": "a", "run": ["python", "-c", code]}])
    process = started(path, tmp_path / "out")
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=30)
    proc = Path("/proc", (tmp_path / "pid").read_text(), "cmdline")
    deadline = time.monotonic() + 30.0
    while proc.exists() and proc.read_bytes():  # gone, or waiting for init to notice
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels don't tell a process of its parent's end")
def test_a_rank_whose_launcher_is_killed_ends_as_by_sigterm(tmp_path):
    code = f"import pathlib, time; pathlib.Path(r'{tmp_path}/ready').touch(); time.sleep(60)"
    path = pipeline(tmp_path, [{"name": "a", "run": ["python", "-c", code]}])
    agent = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'rewarm', *sys.argv[1:]])"
    process = subprocess.Popen(
        [sys.executable, "-c", agent, "run", path, "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    )
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    said, _ = process.communicate(timeout=30)  # until the rank has ended, too, and closed its end
    assert "stage a was stopped by SIGTERM; the same command goes on" in said


def test_every_stage_of_several_ranks_has_a_port_of_its_own_to_meet_at(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert module._environment(None) == dict(os.environ)
    changed = dict(module._environment(1234).items() - os.environ.items())
    assert changed == {"MASTER_PORT": "1234", "TORCHELASTIC_USE_AGENT_STORE": "False"}


def test_a_rank_that_waits_for_a_dead_rank_0_ends_with_its_address(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.001)
    path = pipeline(tmp_path, [counting(tmp_path)])
    with socket.socket() as agent:
        agent.bind(("127.0.0.1", 0))
        port = agent.getsockname()[1]  # nobody listens at it
        for name, value in {
            "RANK": 1,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with pytest.raises(ValueError, match=rf"rank 0 \(127.0.0.1, port {port}\) has ended or cannot be"):
            run_pipeline(path, str(tmp_path / "out"))


def test_ranks_that_never_come_are_missed_with_the_folder_that_they_must_share(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROLL_CALL_SECONDS", 0.1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "c.yaml").write_text("{}")
    path = pipeline(tmp_path, [{"name": "a", "fit": str(tmp_path / "c.yaml")}])
    with pytest.raises(
        ValueError, match="out/a: after 0 s 0 of 2 are here: it must be on a file system that"
    ):
        run_pipeline(path, str(tmp_path / "out"))


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
    while not list(checkpoints.glob("step=*.ckpt")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = (tmp_path / "killed" / "one" / "stage.json").stat().st_mtime_ns
    resumed_from = newest_whole(checkpoints, pytest.fail)
    assert torch.load(resumed_from, weights_only=True)["global_step"] < 60
    # As if the disk had lost a newer one.
    (checkpoints / "step=59.ckpt").write_bytes(resumed_from.read_bytes()[:5000])

    done = subprocess.run([*command, str(tmp_path / "killed")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "one: finished before" in done.stdout
    assert "renamed to step=59.ckpt.damaged" in done.stdout
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

    # As if it had been killed after the export, before it could note that the stage is finished.
    marker = tmp_path / "killed" / "two" / "stage.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"finished": False}))
    done = subprocess.run([*command, str(tmp_path / "killed")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "step=60.ckpt" in done.stderr
    again = weights(tmp_path / "killed" / "two" / "hf")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert json.loads((tmp_path / "killed" / "report.json").read_text())[1]["steps"] == 60


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
    assert not list((tmp_path / "out" / "one").glob(".rank*"))
    state = torch.load(tmp_path / "out" / "one" / "checkpoints" / "step=4.ckpt", weights_only=True)
    (loader,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert loader["loader"]["epoch_rows"] == 4 * 8 * 2  # of both ranks


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("launcher", ["one process", "lightning", "torchrun"])
def test_a_terminated_pipeline_saves_and_goes_on_to_the_same_weights(tmp_path, launcher):
    """Under torchrun the agent signals whole process groups: `rewarm run` and its stage both get SIGTERM."""
    document = yaml.safe_load(Path(training(tmp_path)).read_text())
    ranks = {"trainer.max_steps": 300}
    if launcher != "one process":
        ranks = {"trainer.max_steps": 120, "trainer.devices": 2, "trainer.strategy": "ddp"}
    document["stages"] = document["stages"][:1]
    document["stages"][0]["set"] |= ranks
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(document))
    run = ["-m", "rewarm", "run", str(tmp_path / "pipeline.yaml"), "--output"]
    if launcher == "torchrun":
        run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *run]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([sys.executable, *run, str(whole)], check=True, capture_output=True, timeout=250)

    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([sys.executable, *run, str(cut)], stdout=said, stderr=said)
        while not list((cut / "one" / "checkpoints").glob("step=*.ckpt")):
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.01)
        process.terminate()
        process.wait(100)
    text = (tmp_path / "said").read_text()
    assert process.returncode == (1 if launcher == "torchrun" else 143), text
    assert "stage one was stopped by SIGTERM; the same command goes on" in text
    newest = newest_whole(cut / "one" / "checkpoints", pytest.fail)
    assert f"SIGTERM: saved {newest}, exit code 143" in text
    assert torch.load(newest, weights_only=True)["global_step"] < ranks["trainer.max_steps"]
    assert not json.loads((cut / "one" / "stage.json").read_text())["finished"]

    subprocess.run([sys.executable, *run, str(cut)], check=True, capture_output=True, timeout=250)
    expected, found = weights(whole / "one" / "hf"), weights(cut / "one" / "hf")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
