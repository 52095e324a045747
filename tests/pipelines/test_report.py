import json

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from rewarm.pipelines.report import write_report


def stage(folder, name, scalars, seconds=12.0, model="elsewhere/hf"):
    writer = SummaryWriter(folder / name / "logs")
    for tag, points in scalars.items():
        for step, value in points:
            writer.add_scalar(tag, value, step)
    writer.close()
    (folder / name / "logs" / "config.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "rewarm.DPO", "init_args": {"model": model}}})
    )
    (folder / name / "stage.json").write_text(json.dumps({"seconds": seconds}))


def test_the_report_says_what_was_logged(tmp_path, capsys):
    scalars = {
        "train/loss": [(0, 2.0), (9, 1.5)],
        "lr": [(0, 0.1), (9, 0.2)],
        "throughput/tokens_per_s": [(4, 100.0), (9, 300.0), (14, 200.0)],
        "val/loss/new": [(4, 3.0), (9, 2.5)],
        "val/loss/old": [(9, 1.0)],
        "val/pass_rate": [(9, 0.5)],
        "val/pass_rate_low": [(9, 0.4)],
        "val/pass_rate_high": [(9, 0.6)],
        "val/pass_rate/1": [(9, 0.9)],
        "val/pass_rate/10": [(9, 0.1)],
        "val/short": [(9, 0.25)],
        "val/short_low": [(9, 0.2)],
        "val/short_high": [(9, 0.3)],
    }
    stage(tmp_path, "one", scalars)
    (entry,) = write_report(tmp_path, ["one"])
    assert entry == json.loads((tmp_path / "report.json").read_text())[0]
    assert (entry["name"], entry["method"], entry["steps"], entry["seconds"]) == ("one", "DPO", 10, 12.0)
    assert entry["tokens_per_s"] == 200.0
    assert entry["train_loss"] == 1.5
    assert entry["losses"] == {"new": 2.5, "old": 1.0}
    assert entry["pass_rate"]["mean"] == 0.5
    assert entry["pass_rate"]["interval_95"] == pytest.approx([0.4, 0.6])
    assert entry["pass_rate"]["groups"] == pytest.approx({"1": 0.9, "10": 0.1})
    assert entry["other_rates"]["short"]["mean"] == 0.25
    shown = capsys.readouterr().out + (tmp_path / "report.md").read_text()
    for text in ("50.0 % (40.0 to 60.0)", "new 2.500", "short 25.0 %", "| one | 90.0 % | 10.0 % |"):
        assert text in shown
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_steps_are_counted_also_where_training_logged_none(tmp_path):
    stage(
        tmp_path,
        "short",
        {"val/pass_rate": [(3, 0.5)], "val/pass_rate_low": [(3, 0.4)], "val/pass_rate_high": [(3, 0.6)]},
    )
    (entry,) = write_report(tmp_path, ["short"])
    assert entry["steps"] == 3


def losses(**domains):
    return {f"val/loss/{name}": list(enumerate(values)) for name, values in domains.items()}


def test_what_is_forgotten_is_measured_along_the_stages_that_the_weights_went_through(tmp_path, capsys):
    stage(tmp_path, "first", losses(old=[3.0, 1.0]))
    stage(tmp_path, "second", losses(old=[1.5, 1.25], new=[4.0, 2.0]), model=str(tmp_path / "first" / "hf"))
    stage(tmp_path, "aside", losses(old=[2.0, 5.0], new=[1.0]), model=str(tmp_path / "first" / "hf"))
    stage(tmp_path, "silent", {"train/loss": [(0, 1.0)]}, model=str(tmp_path / "second" / "hf"))
    stage(tmp_path, "third", losses(new=[2.5, 2.25]), model=str(tmp_path / "silent" / "hf"))
    stage(tmp_path, "apart", losses(old=[6.0]), model={"model_type": "llama"})
    names = ["first", "second", "aside", "silent", "third", "apart"]
    entries = {entry["name"]: entry["forgetting"] for entry in write_report(tmp_path, names)}

    def row(before, best, best_in, now, forgotten):
        return {"before": before, "best": best, "best_in": best_in, "now": now, "forgotten": forgotten}

    assert entries == {
        "first": {"old": row(3.0, 1.0, "first", 1.0, 0.0)},
        "second": {"old": row(1.0, 1.0, "first", 1.25, 0.25), "new": row(4.0, 2.0, "second", 2.0, 0.0)},
        "aside": {"old": row(1.0, 1.0, "first", 5.0, 4.0), "new": row(1.0, 1.0, "aside", 1.0, 0.0)},
        "silent": {},
        "third": {"new": row(2.0, 2.0, "second", 2.25, 0.25)},
        "apart": {"old": row(6.0, 6.0, "apart", 6.0, 0.0)},
    }
    assert "| aside | old | 1.000 | 1.000 (first) | 5.000 | 4.000 |" in (tmp_path / "report.md").read_text()
    assert "4.000" in capsys.readouterr().out


def test_without_losses_by_domain_the_report_has_no_table_of_forgetting(tmp_path):
    stage(tmp_path, "one", {"val/loss": [(3, 0.5)]})
    write_report(tmp_path, ["one"])
    assert "forgotten" not in (tmp_path / "report.md").read_text()
