"""Pipelines as a whole: run, killed, stopped, gone on with, on one rank and on several."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from rewarm import cli
from rewarm.checkpoints.whole import newest_whole
from rewarm.commands.run import run
from rewarm.pipelines import processes, stages
from tests import tiny
from tests.distributed.stages import fit_stages
from tests.pipeline_files import counting, pipeline, runs


def test_a_finished_stage_is_not_run_again(tmp_path):
    path = pipeline(tmp_path, [counting(tmp_path)])
    for _ in range(2):
        run(path, output=str(tmp_path / "out"))
    assert runs(tmp_path) == "x"


def test_a_failed_stage_is_named_and_what_follows_does_not_run(tmp_path):
    path = pipeline(tmp_path, [counting(tmp_path, "bad", fail=True), counting(tmp_path, "after")])
    with pytest.raises(ValueError, match="stage bad failed with exit code 3"):
        run(path, output=str(tmp_path / "out"))
    assert not (tmp_path / "after.runs").exists()
    with pytest.raises(ValueError, match="stage bad"):
        run(path, output=str(tmp_path / "out"))
    assert runs(tmp_path, "bad") == "xx"


def test_a_stage_whose_config_has_an_argument_that_is_gone_tells_what_to_write(tmp_path, capfd):
    config = {"model": {"class_path": "rewarm.DPO", "init_args": {"model": "nowhere", "beta": 0.1}}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config))
    path = pipeline(tmp_path, [{"name": "dpo", "fit": str(tmp_path / "old.yaml")}])
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", path, "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    first, last = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rewarm: error:")]
    assert first.endswith("DPO has no argument 'beta' any more; write loss=rewarm.Sigmoid(beta=...)")
    assert "stage dpo failed with exit code 2" in last


def test_an_interrupted_command_starts_with_an_empty_folder(tmp_path):
    code = "import sys, pathlib; p = pathlib.Path(sys.argv[1], 'made'); p.mkdir(); (p / 'f').touch()"
    code += (
        f"; n = pathlib.Path(r'{tmp_path}/tries'); n.open('a').write('x'); sys.exit(len(n.read_text()) == 1)"
    )
    path = pipeline(tmp_path, [{"name": "a", "run": ["python", "-c", code, "$stage"]}])
    with pytest.raises(ValueError, match="stage a failed"):
        run(path, output=str(tmp_path / "out"))
    assert (tmp_path / "out" / "a" / "made" / "f").exists()
    run(path, output=str(tmp_path / "out"))
    assert (tmp_path / "tries").read_text() == "xx"


def test_a_changed_stage_refuses_the_old_folder_and_touches_nothing(tmp_path):
    run(pipeline(tmp_path, [counting(tmp_path)]), output=str(tmp_path / "out"))
    changed = counting(tmp_path)
    changed["run"].append("more")
    with pytest.raises(ValueError, match="made with other settings"):
        run(pipeline(tmp_path, [changed]), output=str(tmp_path / "out"))
    assert runs(tmp_path) == "x"


@pytest.mark.parametrize("kind", ["run", "fit"])
def test_a_folder_that_no_pipeline_made_is_left_alone(tmp_path, kind):
    (tmp_path / "c.yaml").write_text("{}")
    stage = counting(tmp_path, "mine") if kind == "run" else {"name": "mine", "fit": str(tmp_path / "c.yaml")}
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "thesis.tex").write_text("three years")
    with pytest.raises(
        ValueError, match=r"mine has files that no pipeline made \(thesis.tex\): give another --output"
    ):
        run(pipeline(tmp_path, [stage]), output=str(tmp_path / "out"))
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
        patch.setattr(stages, "_write_marker", maybe_killed(stages._write_marker))
        patch.setattr(Path, "replace", maybe_killed(Path.replace))
        with pytest.raises(Killed):
            run(path, output=str(tmp_path / "out"))
    run(path, output=str(tmp_path / "out"))
    assert runs(tmp_path) == ("xx" if call > 1 else "x")
    run(path, output=str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "count" / "stage.json").read_text())["finished"]
    assert runs(tmp_path) == ("xx" if call > 1 else "x")


def started(path, output, **options):
    command = [sys.executable, "-P", "-m", "rewarm", "run", path, "--output", str(output)]
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
    run(path, output=str(output))
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
    agent = "import subprocess, sys; subprocess.run([sys.executable, '-P', '-m', 'rewarm', *sys.argv[1:]])"
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


def test_a_rank_that_waits_for_a_dead_rank_0_ends_with_its_address(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_POLL_SECONDS", 0.001)
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
            run(path, output=str(tmp_path / "out"))


def test_ranks_that_never_come_are_missed_with_the_folder_that_they_must_share(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_ROLL_CALL_SECONDS", 0.1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "c.yaml").write_text("{}")
    path = pipeline(tmp_path, [{"name": "a", "fit": str(tmp_path / "c.yaml")}])
    with pytest.raises(
        ValueError, match="out/a: after 0 s 0 of 2 are here: it must be on a file system that"
    ):
        run(path, output=str(tmp_path / "out"))


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
    command = [sys.executable, "-P", "-m", "rewarm", "run", path, "--output"]
    fit_stages(path, tmp_path / "whole")

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


@pytest.mark.slow
@pytest.mark.dist
def test_under_torchrun_commands_run_once_and_training_on_all_ranks(tmp_path):
    document = yaml.safe_load(Path(training(tmp_path)).read_text())
    settings = document["stages"][0]["set"]
    settings |= {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_steps": 4}
    document["stages"][0]["checkpoint_every"] = 2
    document["stages"] = [counting(tmp_path), document["stages"][0]]
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(document))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "rewarm",
        "run",
    ]
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
    run = ["-P", "-m", "rewarm", "run", str(tmp_path / "pipeline.yaml"), "--output"]
    if launcher == "torchrun":
        run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *run[1:]]  # which has no -P
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit_stages(str(tmp_path / "pipeline.yaml"), whole, 1 if launcher == "one process" else 2)

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
