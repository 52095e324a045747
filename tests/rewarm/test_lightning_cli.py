import csv

import pytest
import yaml

from rewarm.lightning_cli import write_schedules

CONFIG = {
    "model": {
        "class_path": "rewarm.CurriculumSFT",
        "init_args": {
            "model": "m",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5}},
        },
    },
    "data": {"class_path": "rewarm.InstructionData", "init_args": {"train": "t", "tokenizer": "t"}},
    "trainer": {
        "max_steps": 10,
        "callbacks": [
            {
                "class_path": "rewarm.LRSchedule",
                "init_args": {
                    "schedule": {"class_path": "rewarm.linear", "init_args": {"warmup": 2, "end": 0.0}}
                },
            }
        ],
    },
}


def write(tmp_path, **trainer):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "trainer": {**CONFIG["trainer"], **trainer}}))
    return str(path)


def test_the_table_holds_the_rate_of_every_step(tmp_path):
    write_schedules([write(tmp_path)], None, None, str(tmp_path / "lr.csv"))
    rows = list(csv.DictReader((tmp_path / "lr.csv").read_text().splitlines()))
    assert [float(row["a"]) for row in rows] == pytest.approx(
        [0.25, 0.5] + [0.5 * (10 - n) / 8 for n in range(3, 11)]
    )


def test_steps_can_be_given_and_the_plot_is_a_picture(tmp_path):
    write_schedules([write(tmp_path, max_steps=-1)], 20, str(tmp_path / "lr.png"), None)
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("trainer", "message"),
    [({"max_steps": -1}, "give --steps"), ({"callbacks": []}, "has no rewarm.LRSchedule")],
)
def test_what_a_config_lacks_is_named(tmp_path, trainer, message):
    with pytest.raises(ValueError, match=message):
        write_schedules([write(tmp_path, **trainer)], None, None, None)


def test_a_missing_config_is_named():
    with pytest.raises(ValueError, match="nowhere.yaml: no such file"):
        write_schedules(["nowhere.yaml"], None, None, None)
