"""The launch file, pipeline and trainer overlay of the multi-node guide, on two hosts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rewarm.checkpoints.whole import newest_first
from rewarm.commands.fit import run_lightning
from rewarm.lightning_modules.policy import build_model
from tests import fits, tiny
from tests.distributed.stages import fit_stages
from tests.distributed.two_hosts import Hosts, two_hosts, wait

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SECONDS = 150.0  # that a run may take at most, on a busy machine
TIMEOUT_SECONDS = 10  # after which ranks give up one that does not answer
CHECKPOINT_STEPS = 10


@pytest.fixture
def hosts(capsys):
    with two_hosts() as hosts:
        with capsys.disabled():
            kind = "network namespaces" if hosts.separate else "only two agents on loopback"
            sys.stdout.write(f"\ntwo hosts: {kind}\n")
        yield hosts


def run(
    hosts: Hosts, logs: Path, arguments: list[str], first: dict[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """Start the launch file on both hosts, as the guide says; the first may have more in its environment."""
    command = ["bash", str(ROOT / "examples/multi_node/torchrun.sh"), *arguments]
    processes = []
    for host, more in enumerate((first or {}, {})):
        environment = {"NNODES": "2", "NPROC_PER_NODE": "1", "NODE_RANK": str(host), **more}
        processes.append(hosts.start(host, command, logs / f"host{host}.log", environment))
    return processes


def said(logs: Path) -> str:
    return "\n".join((logs / f"host{host}.log").read_text(errors="replace") for host in (0, 1))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")


def model(folder: Path) -> str:
    torch.manual_seed(0)
    build_model(dict(tiny.LLAMA)).save_pretrained(folder)
    return str(folder)


# What AdamW's arguments have in common with it stays as it was, and fused SGD knows no shards.
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9, "fused": False}}
CPU = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "enable_progress_bar": False}


def overlay(path: Path, rows: int, **trainer: Any) -> str:
    """Write a config that makes any other tiny."""
    tiny_one = {
        "model": {"init_args": {"optimizer": SGD, "gradient_checkpointing": False}},
        "data": {"init_args": {"max_length": 96, "batch_size": rows}},
        "trainer": {**CPU, **trainer, "max_steps": 6, "accumulate_grad_batches": 2},
    }
    path.write_text(yaml.safe_dump(tiny_one))
    return str(path)


@pytest.mark.filterwarnings("ignore")  # Lightning's opinions on short runs
def test_two_hosts_have_the_weights_of_one_process_with_ddp_and_sharded(tmp_path, hosts, monkeypatch):
    files, start = fits.Files(tmp_path / "files"), model(tmp_path / "model")
    sft = {
        "model.init_args.model": start,
        "data.init_args.tokenizer": files.tokenizer,
        "data.init_args.train": files.sft,
        "data.init_args.val": files.sft,
    }
    dpo = {"data.init_args.tokenizer": files.tokenizer, "data.init_args.train": files.pairs}

    def fit(method: str, trainer: str, settings: dict[str, str]) -> list[str]:
        configs = ["--config", str(ROOT / f"configs/{method}.yaml"), "--config", trainer]
        return ["fit", *configs, *(f"--{name}={value}" for name, value in settings.items())]

    ddp = overlay(tmp_path / "ddp.yaml", 1, num_nodes=2, strategy="ddp")
    export = f"--trainer.callbacks+=rewarm.HuggingFaceExport --trainer.callbacks.folder={tmp_path}/ddp/hf"
    processes = run(hosts, tmp_path, [*fit("curriculum_sft", ddp, sft), *export.split()])

    monkeypatch.chdir(tmp_path)  # the configs write to runs/
    monkeypatch.setattr(sys, "argv", ["rewarm"])
    one = overlay(tmp_path / "one.yaml", 2)
    run_lightning(fit("curriculum_sft", one, sft))
    run_lightning(fit("dpo", one, dpo))
    assert wait(processes, SECONDS) == [0, 0], said(tmp_path)

    fsdp = overlay(tmp_path / "fsdp.yaml", 1, num_nodes=2, strategy={"class_path": "rewarm.FSDP2Strategy"})
    values = {"model": start, "tokenizer": files.tokenizer, "sft": files.sft, "val": files.sft}
    options = [f"--set={k}={v}" for k, v in {**values, "pairs": files.pairs, "trainer": fsdp}.items()]
    pipeline = str(ROOT / "examples/multi_node/pipeline.yaml")
    # The first rank comes late to the second stage, when the others may meet with what the first stage left.
    (tmp_path / "late").mkdir()
    late = "import sys, time; time.sleep(8.0 * any('dpo/overlay' in part for part in sys.orig_argv))\n"
    (tmp_path / "late" / "sitecustomize.py").write_text(late)
    arguments = ["run", pipeline, *options, "--output", str(tmp_path / "fsdp")]
    processes = run(hosts, tmp_path, arguments, {"PYTHONPATH": str(tmp_path / "late")})
    assert wait(processes, SECONDS) == [0, 0], said(tmp_path)

    before = load_file(tmp_path / "model/model.safetensors")
    for two, alone in (
        ("ddp", "runs/curriculum_sft"),
        ("fsdp/sft", "runs/curriculum_sft"),
        ("fsdp/dpo", "runs/dpo"),
    ):
        assert fits.distance(weights(tmp_path / two), weights(tmp_path / alone)) < 1e-6
        assert fits.distance(weights(tmp_path / two), before) > 1e-3
    for stage in ("sft", "dpo"):
        assert len(list((tmp_path / "fsdp" / stage / "logs").glob("events.*"))) == 1  # of rank 0 alone
    if hosts.separate:
        gradients = 3 * 12 * sum(4 * value.numel() for value in before.values())
        assert min(hosts.received(0), hosts.received(1)) > gradients


def test_a_sharded_run_survives_a_killed_rank_and_a_lost_network_bit_for_bit(tmp_path, hosts):
    files = fits.Files(tmp_path / "files")
    start, steps = model(tmp_path / "model"), 150
    sft = {
        "seed_everything": 0,
        "model": {"class_path": "rewarm.CurriculumSFT", "init_args": {"model": start, "optimizer": SGD}},
        "data": {
            "class_path": "rewarm.InstructionData",
            "init_args": {
                "train": files.sft,
                "tokenizer": files.tokenizer,
                "max_length": 48,
                "batch_size": 2,
            },
        },
        "trainer": {"max_steps": steps, "gradient_clip_val": 1.0},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(sft))
    stage = {
        "name": "sft",
        "fit": [str(tmp_path / "sft.yaml"), str(ROOT / "configs/trainer/multi_node.yaml")],
        "checkpoint_every": CHECKPOINT_STEPS,
        "set": {
            "trainer.strategy.init_args.timeout": f"0:00:{TIMEOUT_SECONDS}",
            **{f"trainer.{name}": value for name, value in CPU.items()},
        },
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"stages": [stage]}))

    def begin(name: str, logs: str) -> list[subprocess.Popen[bytes]]:
        (tmp_path / logs).mkdir()
        arguments = ["run", str(tmp_path / "pipeline.yaml"), "--output", str(tmp_path / name)]
        return run(hosts, tmp_path / logs, arguments)

    def until_a_checkpoint_after(step: int, processes: list[subprocess.Popen[bytes]]) -> int:
        while True:
            found = newest_first(tmp_path / "hurt" / "sft" / "checkpoints")
            newest = int(found[0].stem.removeprefix("step=")) if found else 0
            if newest > step:
                return newest
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)

    def ended_with_a_message(processes: list[subprocess.Popen[bytes]], logs: str) -> None:
        assert 0 not in wait(processes, SECONDS), said(tmp_path / logs)
        assert "rewarm: error: stage sft failed" in said(tmp_path / logs)
        assert hosts.running() == []

    one_host = ("--trainer.num_nodes=1", "--trainer.devices=2")
    fit_stages(str(tmp_path / "pipeline.yaml"), tmp_path / "whole", 2, *one_host)
    whole = weights(tmp_path / "whole" / "sft")

    processes = begin("hurt", "killed")
    step = until_a_checkpoint_after(0, processes)
    (rank,) = hosts.running(1, "rewarm fit")
    os.kill(rank, signal.SIGKILL)
    ended_with_a_message(processes, "killed")

    if hosts.separate:
        processes = begin("hurt", "unplugged")
        step = until_a_checkpoint_after(step, processes)
        hosts.unplug(1)
        ended_with_a_message(processes, "unplugged")
        hosts.plug_in(1)

    assert wait(begin("hurt", "resumed"), SECONDS) == [0, 0], said(tmp_path / "resumed")
    assert "Restored all states" in said(tmp_path / "resumed")
    hurt = weights(tmp_path / "hurt" / "sft")
    assert hurt.keys() == whole.keys()
    assert all(torch.equal(hurt[name], whole[name]) for name in whole)
