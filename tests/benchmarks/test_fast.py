"""The benchmarks of speed run and write what they say; what they find is in benchmarks/RESULTS.md."""

import importlib
import json
import math

import pytest
import torch

from benchmarks import head, long_run, overhead, sequence_length
from rewarm.functional import logprob


@pytest.mark.parametrize(
    ("name", "num_rows"), [("head", 3), ("sequence_length", 6), ("attention", 2), ("generation", 3)]
)
def test_a_benchmark_writes_its_table_and_its_plot(name, num_rows, tmp_path, monkeypatch, capfd):
    threads = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", [name, "--quick", "--output", str(tmp_path)])
    importlib.import_module(f"benchmarks.{name}").main()
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["settings"]["quick"] is True
    assert len(result["rows"]) >= num_rows
    assert capfd.readouterr().out.count("\n") > len(result["rows"])
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_peak_of_the_head_is_within_a_third_of_its_floor(monkeypatch):
    # Chunks so small that there are many, as at full size, and so large that a second one would show.
    monkeypatch.setattr(logprob, "_CPU_CHUNK_BYTES", (2**19, 2**19))
    monkeypatch.setattr(logprob, "_KEEP_BYTES", 2**19)
    shape = (1024, 32, 2000)
    tensors, ways = head.inputs(*shape, "cpu"), head.heads("cpu")
    floor = head.floor_bytes(*shape, "cpu")
    assert floor == 4 * (1024 * 32 + 2000 * 32) + 2**19
    peak = head.peak_bytes(lambda: head.run(ways["torch"], *tensors), "cpu")
    assert 0.9 * floor < peak < 1.3 * floor
    with torch.autocast("cpu", torch.bfloat16):
        peak = head.peak_bytes(lambda: head.run(ways["torch"], *tensors), "cpu")
    assert peak < 1.3 * floor
    # All logits, their softmax, and its gradient.
    assert head.peak_bytes(lambda: head.run(ways["dense"], *tensors), "cpu") > 2 * 4 * 1024 * 2000


def test_peak_bytes_counts_what_is_alive_at_once():
    def work():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        return torch.empty(600, dtype=torch.uint8), torch.empty(700, dtype=torch.uint8)

    assert 1300 <= head.peak_bytes(work, "cpu") < 1500


def test_a_way_that_is_wrong_is_refused(monkeypatch):
    ways = head.heads("cpu")
    wrong = lambda hidden, weight, targets: ways["torch"](hidden, weight, targets) * 1.0001  # noqa: E731
    monkeypatch.setattr(head, "heads", lambda device: {"dense": ways["dense"], "wrong": wrong})
    with pytest.raises(ValueError, match=r"wrong at \(64, 8, 100\)"):
        head.measure((64, 8, 100), 1, "cpu")


def test_the_crossover_is_where_liger_wins_for_good():
    def row(tokens, way, ms):
        return {"tokens": tokens, "vocabulary": 10, "way": way, "ms": ms}

    rows = [row(tokens, "torch", tokens) for tokens in (1, 2, 4, 8)]
    assert head.crossover([*rows, row(1, "liger", 0.5), row(2, "liger", 3), row(4, "liger", 3)]) is None
    assert head.crossover([*rows[:3], row(1, "liger", 0.5), row(2, "liger", 3), row(4, "liger", 3)]) == 40
    rows[3]["ms"] = math.nan  # out of memory
    assert head.crossover([*rows, row(4, "liger", 5), row(8, "liger", 9)]) == 80


def test_the_slope_and_its_interval_are_those_of_a_straight_line():
    slope, half = long_run.slope(range(20), [3.0 + 2.0 * x for x in range(20)])
    assert slope == pytest.approx(2.0)
    assert half == pytest.approx(0.0, abs=1e-9)
    noise = torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()
    slope, half = long_run.slope(range(20), noise)
    # Written out with matrices.
    design = torch.stack([torch.ones(20), torch.arange(20.0)], 1).double()
    y = torch.tensor(noise, dtype=torch.float64)
    beta = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    variance = ((y - design @ beta) ** 2).sum() / 18
    error = (variance * torch.linalg.inv(design.T @ design)[1, 1]).sqrt()
    assert slope == pytest.approx(float(beta[1]))
    assert half == pytest.approx(2.101 * float(error), rel=2e-3)


def test_a_growing_run_shows_in_its_row():
    watch = long_run.Watch(10)
    watch.seconds = [math.nan] + [1e-3 * (100 + 0.1 * step) for step in range(1, 200)]
    watch.memory = [(2**20 * block, block, 2 * block) for block in range(20)]
    found = long_run.row("sft", watch)
    mean = float(found["ms/step"])
    assert float(found["% slower per 1000 steps"].split()[0]) == pytest.approx(1e4 * 1.0 / mean, rel=0.01)
    assert found["MiB more per 1000 steps"].startswith("+100.00 +- 0.00")
    assert found["tensors"] == "2 to 19"


def test_rows_of_a_length_hold_whole_documents():
    assert sequence_length.places(8, 4, None).tolist() == [[0, 1, 2, 3]] * 2
    assert sequence_length.places(8, 4, 2).tolist() == [[0, 1, 0, 1]] * 2


# What Lightning says of a fit without validation data, or without progress bar and logger.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_bare_loop_and_the_fits_that_are_timed_take_the_same_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "UNTIMED", 2)
    ends = []

    def adamw(parameters):
        kept = list(parameters)
        kept = [p for g in kept for p in g["params"]] if isinstance(kept[0], dict) else kept
        ends.append(kept)
        return torch.optim.AdamW(kept, lr=1e-3)

    monkeypatch.setattr(overhead, "adamw", adamw)
    known = overhead.systems(5, tmp_path)
    for name in ("bare loop", "Lightning, plain module", "CurriculumSFT, no callbacks", "with LRSchedule"):
        torch.manual_seed(0)
        assert known[name]() > 0.0
    # Vectors decay in some and not in others.
    loop, plain, ours, scheduled = ([p for p in parameters if p.ndim > 1] for parameters in ends)
    for fit in (plain, ours):
        for one, other in zip(fit, loop, strict=True):
            torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5)
    assert not torch.allclose(scheduled[0], loop[0], rtol=0.0, atol=1e-5)
