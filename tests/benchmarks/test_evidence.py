"""The evidence scripts run and write what they say; what they find is in their results."""

import importlib
import json
import math
import statistics

import pytest
import torch
from torch.nn import functional as F

from benchmarks.evidence.common import HeldOut, Source, interval, new_run, train


@pytest.mark.parametrize(
    "name",
    [
        "annealing_law",
        "branches",
        "replay",
        "rewarming",
        "item_response",
        "packing_fill",
        "ordering",
        "scorers",
    ],
)
def test_a_script_writes_its_table_and_its_plot(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--quick", "--seeds", "1", "--output", str(tmp_path)])
    importlib.import_module(f"benchmarks.evidence.{name}").main()
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert set(result) == {"date", "seconds", "cpu_seconds", "versions", "settings", "rows"}
    assert result["settings"]["quick"] is True
    assert len(capsys.readouterr().out.splitlines()) == len(result["rows"]) + 1
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * statistics.stdev([1, 2, 3, 4, 5]) / math.sqrt(5))
    assert math.isnan(interval([1.0])[1])


def test_text_follows_its_law_and_the_entropy_is_the_loss_of_that():
    source = Source(0, vocab_size=8)
    tokens = source.sample(2000, 17, seed=1)
    known = F.nll_loss(
        source.law[tokens[:, :-2], tokens[:, 1:-1]].log().flatten(0, 1), tokens[:, 2:].flatten()
    )
    assert source.entropy(tokens) == pytest.approx(float(known), rel=1e-5)
    counts = torch.zeros(8, 8, 8)
    counts.index_put_((tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]), torch.tensor(1.0), accumulate=True)
    often = counts.sum(-1) > 500
    found = counts[often] / counts[often].sum(-1, keepdim=True)
    torch.testing.assert_close(found, source.law[often], atol=0.06, rtol=0.0)


def test_a_tiny_model_learns():
    source = Source(0)
    held_out = HeldOut(source, 32)
    model, optimizer = new_run(0)
    before = held_out.loss(model)
    train(model, optimizer, source.batches(30, seed=2), [3e-3] * 30)
    assert 0 < held_out.loss(model) < before - 0.3
    with pytest.raises(ValueError, match=r"batches has 2 entries; there must be 3"):
        train(model, optimizer, source.batches(2, seed=2), [3e-3] * 3)


def test_likeness_one_is_the_same_law_and_zero_is_another():
    one = Source(0, vocab_size=8)
    assert torch.equal(Source(1, vocab_size=8, like=one, likeness=1.0).law, one.law)
    assert torch.equal(Source(1, vocab_size=8, like=one, likeness=0.0).law, Source(1, vocab_size=8).law)
