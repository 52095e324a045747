import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import rewarm
from rewarm.cli import main
from rewarm.commands.fit import config_parser
from rewarm.lightning_modules.policy import build_model
from rewarm.pipelines.pipeline import read_pipeline
from tests import fits, tiny

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "multi_node"
METHODS = ["continual_pretraining", "curriculum_sft", "dpo", "grpo"]


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_the_launch_file_is_bash(name):
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_the_guide_has_the_commands_of_the_launch_file(name):
    commands = re.findall(r"^#   (\S.*)", (FOLDER / name).read_text(), re.MULTILINE)
    assert commands
    guide = (ROOT / "docs" / "multi_node.md").read_text()
    assert all(command in guide for command in commands)


def test_a_host_without_its_number_is_told_so():
    environment = {name: value for name, value in os.environ.items() if name != "NODE_RANK"}
    done = subprocess.run(
        ["bash", str(FOLDER / "torchrun.sh"), "run"], capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0
    assert "NODE_RANK: set it to 0 on the first machine" in done.stderr


def test_the_pipeline_reads_and_ends_every_stage_with_the_overlay():
    stages = read_pipeline(str(FOLDER / "pipeline.yaml"), "out", {})
    assert [stage.name for stage in stages] == ["sft", "dpo"]
    assert all(stage.configs[-1].samefile(ROOT / "configs/trainer/multi_node.yaml") for stage in stages)
    assert stages[1].settings["model"]["init_args"]["model"] == "out/sft/hf"


@pytest.mark.parametrize("method", METHODS)
def test_every_config_has_each_callback_of_a_long_run_once_under_the_overlay(method):
    parser = config_parser()
    base = parser.parse_path(str(ROOT / f"configs/{method}.yaml"))
    overlay = yaml.safe_load((ROOT / "configs/trainer/multi_node.yaml").read_text())
    trainer = parser.parse_object(overlay, namespace=base).trainer
    names = [callback.class_path.rsplit(".", 1)[-1] for callback in trainer.callbacks]
    assert [names.count(name) for name in ("Checkpoint", "Preemption", "ExactResume")] == [1, 1, 1]
    assert "ModelCheckpoint" not in names
    assert "HuggingFaceExport" in names  # those of the config are still there


# What SLURM does, on this machine: `srun` starts the tasks, and ends all when one fails.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
nodes, tasks = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
places = [(node, task) for node in range(nodes) for task in range(tasks)]
running = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_NODEID": str(node), "SLURM_LOCALID": str(task),
                                    "SLURM_PROCID": str(rank), "REWARM_TEST_TASK": str(rank)}})
    for rank, (node, task) in enumerate(places)
]
with open("tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in running))
codes = [None] * len(running)
while None in codes:
    time.sleep(0.05)
    codes = [task.poll() for task in running]
    if any(codes):
        for task in running:
            task.send_signal(signal.SIGTERM)
sys.exit(max(abs(code) for code in codes))
"""
SCONTROL = """#!/bin/sh
echo "$@" > requeued
"""


def sbatch(folder: Path, arguments: list[str], **options: int) -> subprocess.Popen[bytes]:
    """Start the batch file as SLURM would; options go before those in the file, as on its command line."""
    lines = re.findall(r"^#SBATCH (.*)", (FOLDER / "slurm.sbatch").read_text(), re.MULTILINE)
    found = dict(re.findall(r"--([\w-]+)(?:=(\S+))?", " ".join(lines))) | options
    assert found["signal"].startswith("SIGUSR1@")
    assert {"requeue", "open-mode"} <= found.keys()
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": found["job-name"],
        "SLURM_NNODES": str(found["nodes"]),
        "SLURM_NTASKS_PER_NODE": str(found["ntasks-per-node"]),
        "SLURM_NTASKS": str(found["nodes"] * found["ntasks-per-node"]),
        "SLURM_CPUS_PER_TASK": str(found["cpus-per-task"]),
        "SLURM_NODELIST": "localhost,localhost",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            ["bash", str(FOLDER / "slurm.sbatch"), *arguments],
            cwd=folder,
            env={**os.environ, **job, "PATH": path, "GLOO_SOCKET_IFNAME": "lo"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.dist
@pytest.mark.slow
def test_under_slurm_a_job_whose_time_is_up_requeues_itself_and_loses_nothing(tmp_path):
    files = fits.Files(tmp_path / "files")
    torch.manual_seed(0)
    build_model(dict(tiny.LLAMA)).save_pretrained(tmp_path / "model")
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}}
    instructions = {"train": files.sft, "tokenizer": files.tokenizer, "max_length": 48, "batch_size": 2}
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "rewarm.CurriculumSFT",
            "init_args": {"model": str(tmp_path / "model"), "optimizer": sgd},
        },
        "data": {"class_path": "rewarm.InstructionData", "init_args": instructions},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "num_nodes": 2,
            "strategy": {"class_path": "rewarm.FSDP2Strategy", "init_args": {"timeout": "0:01:00"}},
            "max_steps": 80,
            "enable_progress_bar": False,
        },
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    stage = {"name": "sft", "fit": str(tmp_path / "sft.yaml"), "checkpoint_every": 20}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"stages": [stage]}))
    options = {"nodes": 2, "ntasks-per-node": 1, "cpus-per-task": 1}
    command = ["run", str(tmp_path / "pipeline.yaml"), "--output", str(tmp_path / "out")]

    def said() -> str:
        return (tmp_path / "log").read_text()

    job = sbatch(tmp_path, command, **options)
    while not list((tmp_path / "out").glob("sft/checkpoints/step=*")):
        assert job.poll() is None, said()
        time.sleep(0.05)
    # To the tasks alone: so do the usual ways of SLURM to track processes.
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    while not (tmp_path / "requeued").exists():
        assert job.poll() is None, said()
        time.sleep(0.05)
    for task in (tmp_path / "tasks").read_text().split():  # what SLURM does to a job that is requeued
        os.kill(int(task), signal.SIGTERM)
    assert job.wait(60) == 143, said()
    assert (tmp_path / "requeued").read_text() == "requeue 4242\n"

    again = sbatch(tmp_path, command, **options)
    assert again.wait(100) == 0, said()
    assert "Restored all states" in said()
    assert "MEMBER: 2/2" in said()

    module = rewarm.CurriculumSFT(
        str(tmp_path / "model"), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)
    )
    fits.trainer(max_steps=80).fit(module, datamodule=fits.instructions(files, batch_size=4))
    alone = {name.removeprefix("policy.model."): value for name, value in fits.weights(module).items()}
    trained = load_file(tmp_path / "out/sft/hf/model.safetensors")
    assert fits.distance({name: trained[name] for name in alone}, alone) < 1e-5

    shards = str(tmp_path / "out/sft/checkpoints/step=80.ckpt")
    main(["export", shards, "--output", str(tmp_path / "exported")])
    exported = load_file(tmp_path / "exported/model.safetensors")
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
