"""The comparison runs, counts what it says, and refuses to compare systems that do different things."""

import itertools
import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.peers import __main__ as peers
from benchmarks.peers import clock as clocks
from benchmarks.peers.report import markdown, plot, table
from benchmarks.peers.work import CPU, GPU, quick

SFT = replace(CPU[0], steps=2)


def result(seconds: float, losses=(8.0, 7.0, 6.0, 5.0), targets=(10, 10, 30, 50)):
    return {
        "losses": list(losses),
        "positions": [100] * 4,
        "tokens": [80] * 4,
        "targets": list(targets),
        "seconds": [seconds, seconds],
        "cpu_seconds": 4.0 * seconds,
        "phases": {"data": 0.5 * seconds, "fwd+bwd": 1.5 * seconds},
        "startup": 3.0,
        "rss_bytes": 2**30,
    }


def test_time_is_charged_to_phases_and_the_first_two_steps_are_not_timed(monkeypatch):
    times = itertools.count(100.0)
    monkeypatch.setattr(clocks.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(times))
    clock = clocks.Clock(began=90.0)
    for step in range(5):
        clock.mark("data")
        clock.mark("fwd+bwd")
        if step == 3:
            clock.mark("fwd+bwd")
        clock.mark("optimizer")
        clock.losses.append(float(step))
        clock.count(step, step, step)
        clock.end_step()
    clock.count(9, 9, 9)  # a batch that was read ahead
    found = clock.result()
    assert found["seconds"] == [4.0, 5.0, 4.0]
    assert found["phases"] == {"data": 3.0, "fwd+bwd": 4.0, "optimizer": 3.0, "rest": 3.0}
    assert (
        found["startup"] == 14.0
    )  # the first step ends with the fourth mark, and the clock is read once more
    assert found["losses"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert found["positions"] == found["tokens"] == found["targets"] == [0, 1, 2, 3, 4]
    assert found["rss_bytes"] > 10**7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_phases_on_a_gpu_add_up_to_the_steps():
    clock, values = clocks.Clock(began=0.0), torch.randn(2048, 2048, device="cuda")
    for _ in range(5):
        clock.mark("data")
        values = (values @ values).tanh()
        clock.mark("fwd+bwd")
        clock.losses.append(values.mean())
        clock.count(1, values.numel(), (values > 0).sum())
        clock.end_step()
    found = clock.result()
    assert len(found["seconds"]) == 3
    assert sum(found["phases"].values()) == pytest.approx(sum(found["seconds"]), rel=1e-3)
    assert found["phases"]["fwd+bwd"] > 0.0
    assert found["cuda_bytes"] >= values.numel() * 4


def test_losses_are_compared_step_by_step_where_the_steps_are_the_same():
    ours = result(1.0)
    peers.check_losses(SFT, ours, result(1.0, losses=(8.001, 7.0, 6.0, 5.0)))
    with pytest.raises(ValueError, match=r"the losses differ, 7.10000 and 7.00000 of rewarm"):
        peers.check_losses(SFT, ours, result(1.0, losses=(8.0, 7.1, 6.0, 4.9)))
    packed = result(1.0, losses=(8.0, 7.1, 6.0, 4.9), targets=(20, 20, 20, 20))
    peers.check_losses(SFT, ours, packed)
    with pytest.raises(ValueError, match="the losses differ, 6.2"):
        peers.check_losses(SFT, ours, packed | {"losses": [8.0, 7.0, 5.0, 5.0]})


def test_a_ratio_is_of_rates_in_the_same_repeat():
    found = {
        "rewarm": [result(1.0), result(2.0), result(4.0)],
        "TRL": [result(2.0), result(2.0), result(2.0)],
    }
    ours, other = peers.summary(SFT, found, flops_per_token=1000.0, cpu_time=False)
    assert (ours["rate"], other["rate"]) == (20.0, 20.0)  # (30 + 50) targets in 4 seconds
    assert ours["ratios"] == [1.0, 1.0, 1.0]
    assert (other["ratios"], other["ratio"]) == ([2.0, 1.0, 0.5], 1.0)
    assert other["padding_share"] == pytest.approx(0.2)
    assert (other["tokens_per_second"], other["flops_per_second"]) == (40.0, 40000.0)
    assert other["phases"] == {"data": 0.25, "fwd+bwd": 0.75}
    # Of dpo, pairs are counted.
    assert peers.rate(replace(SFT, method="dpo"), result(1.0), cpu_time=False) == SFT.batch_size
    assert peers.rate(SFT, result(1.0), cpu_time=True) == 20.0


def test_systems_do_what_they_can():
    both = {"TRL": "trl/python", "LitGPT": "litgpt/python"}
    can = {work.name: list(peers.systems(work, both)) for work in CPU}
    assert can["sft"] == can["pretraining"] == ["rewarm", "TRL", "LitGPT", "bare loop"]
    assert can["sft-packed"] == ["rewarm", "TRL", "bare loop"]
    assert can["dpo"] == can["grpo"] == ["rewarm", "TRL"]
    assert list(peers.systems(CPU[0], {})) == ["rewarm", "bare loop"]


def test_works_have_names_of_their_own_and_real_sizes():
    for works in (CPU, GPU):
        assert len({work.name for work in works}) == len(works)
        assert {work.method for work in works} == {"sft", "pretraining", "dpo", "grpo"}
        assert all(work.batch_size % work.group == 0 for work in works if work.method == "grpo")
    sizes = {
        peers.matmul_parameters(peers.build_empty(work.model)) for work in GPU if "head_dim" in work.model
    }
    # Qwen3-0.6B, Llama-3.2-1B and Qwen3-1.7B, without vectors.
    assert [round(size / 1e9, 2) for size in sorted(sizes)] == [0.6, 1.24, 1.72]
    assert all(quick(work).model["model_type"] == work.model["model_type"] for work in CPU + GPU)


def test_the_tables_and_the_plot_have_every_system(tmp_path):
    found = {"rewarm": [result(1.0), result(1.0)], "TRL": [result(2.0), result(3.0)]}
    rows = peers.summary(SFT, found, 1e6, False)
    assert table(rows, peak=1e9).row_count == 2
    lines = markdown(rows, peak=1e9).splitlines()
    assert lines[:3] == ["| work | against TRL |", "| --- | --- |", "| sft | 2.50 (2.00 to 3.00) |"]
    assert lines[-1].startswith("| sft | TRL | 16.7 targets/s | 32 | 20% | 1.00 GiB | 0 (MFU 3.2%) |")
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_is_not_there_is_left_out_and_said_so(capsys):
    console = peers.Console()
    assert peers.installed("TRL", "trl", None, console) == {}
    assert peers.installed("LitGPT", "a_module_that_nobody_has", sys.executable, console) == {}
    assert peers.installed("json", "json", sys.executable, console) == {"json": sys.executable}
    said = " ".join(capsys.readouterr().out.split())
    assert "TRL is left out: its Python was not given" in said
    assert "cannot import a_module_that_nobody_has" in said


@pytest.mark.slow
def test_a_quick_run_writes_its_results(tmp_path, monkeypatch, capsys):
    command = ["peers", "--works", "gpu", "--quick", "--work", "sft-packed-0.6b", "--markdown"]
    monkeypatch.setattr(
        "sys.argv", [*command, "--output", str(tmp_path / "peers.json"), "--ours", "backend=dense"]
    )
    peers.main()
    found = json.loads((tmp_path / "peers.json").read_text())
    assert [row["system"] for row in found["rows"]] == ["rewarm", "bare loop"]
    assert found["problems"] == []
    ours, loop = (row["results"][0] for row in found["rows"])
    assert ours["losses"] == pytest.approx(loop["losses"], rel=1e-4)
    assert len(ours["seconds"]) == 2
    for row in found["rows"]:
        assert sum(row["phases"].values()) == pytest.approx(1.0)
    assert (tmp_path / "peers.png").is_file()
    assert "| work | against bare loop |" in capsys.readouterr().out
