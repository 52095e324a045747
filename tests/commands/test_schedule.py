"""What the picture and the table of schedules show, read back from the files."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from rewarm.cli import main
from rewarm.commands.schedule import LRCurve, config_curves, draw, schedule
from rewarm.schedules.phases import Phase, Schedule
from rewarm.schedules.published import branch, cosine, linear, power

CURVES = {
    "cosine": [3e-4 * cosine(10)(n, 100) for n in range(1, 101)],
    "linear, short": [1e-4 * linear(5)(n, 60) for n in range(1, 61)],
}


def test_the_table_has_every_value_in_full(tmp_path):
    draw(CURVES, csv=tmp_path / "lr.csv")
    with (tmp_path / "lr.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "cosine", "linear, short"]
    assert [row[0] for row in rows] == [str(n) for n in range(1, 101)]
    for column, values in enumerate(CURVES.values(), start=1):
        cells = [row[column] for row in rows]
        assert [float(cell) for cell in cells if cell] == values
        assert set(cells[len(values) :]) <= {""}


def pixels(path, colour):
    """Rows and columns of the pixels of a colour below the legend, which is at the top."""
    image = imread(path)[60:, :, :3]
    return np.nonzero(np.abs(image - np.array(to_rgb(colour))).max(-1) < 0.02)


def test_the_picture_shows_every_curve(tmp_path):
    draw({"up": [0.0, 1.0], "flat": [0.25] * 2}, plot=tmp_path / "lr.png")
    up_rows, up_columns = pixels(tmp_path / "lr.png", "C0")
    flat_rows, flat_columns = pixels(tmp_path / "lr.png", "C1")
    bottom, top = up_rows.max(), up_rows.min()  # rows count from the top
    assert up_rows[up_columns.argmin()] == pytest.approx(bottom, abs=3)
    assert up_rows[up_columns.argmax()] == pytest.approx(top, abs=3)
    assert (bottom - flat_rows.mean()) / (bottom - top) == pytest.approx(0.25, abs=0.01)
    assert np.ptp(up_columns) == pytest.approx(np.ptp(flat_columns), abs=5)
    assert np.ptp(up_columns) > 900
    assert bottom - top > 400


def test_both_files_and_their_folders_are_made(tmp_path):
    draw(CURVES, tmp_path / "a" / "lr.png", tmp_path / "b" / "c" / "lr.csv")
    assert (tmp_path / "a" / "lr.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "b" / "c" / "lr.csv").exists()


def test_a_run_of_one_step_is_visible(tmp_path):
    draw({"one": [1e-3]}, plot=tmp_path / "lr.png")
    assert len(pixels(tmp_path / "lr.png", "C0")[0]) > 20


def test_the_suffix_is_the_format(tmp_path):
    draw(CURVES, plot=tmp_path / "lr.svg")
    assert "<svg" in (tmp_path / "lr.svg").read_text()
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        draw(CURVES, plot=tmp_path / "lr.xyz")


@pytest.mark.parametrize("curves", [{}, {"none": []}, {"some": [1.0], "none": []}])
def test_curves_without_steps_are_refused(tmp_path, curves):
    with pytest.raises(ValueError, match=r"curves have \["):
        draw(curves, csv=tmp_path / "lr.csv")


def test_nowhere_to_write_is_refused():
    with pytest.raises(ValueError, match="plot and csv are None"):
        draw(CURVES)


def test_curves_with_distances_of_their_own_share_a_table(tmp_path):
    curves = {"a": LRCurve([1.0, 2.0], 10, "token"), "b": LRCurve([3.0, 4.0, 5.0], 5, "token")}
    draw(curves, csv=tmp_path / "lr.csv", plot=tmp_path / "lr.png")
    assert (tmp_path / "lr.csv").read_text() == "token,a,b\n5,,3.0\n10,1.0,4.0\n15,,5.0\n20,2.0,\n"


def test_steps_and_tokens_have_no_common_axis(tmp_path):
    with pytest.raises(ValueError, match="some in steps and some in tokens"):
        draw({"a": [1.0], "b": LRCurve([1.0], 10, "token")}, csv=tmp_path / "lr.csv")


# --- configs ------------------------------------------------------------------------------------------------

OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5}}


def config(tmp_path, schedule, optimizer=OPTIMIZER, max_steps=10, ckpt_path=None, **arguments):
    model = {"class_path": "rewarm.CurriculumSFT", "init_args": {"model": "m"}}
    if optimizer is not None:
        model["init_args"]["optimizer"] = optimizer
    content = {
        "model": model,
        "data": {"class_path": "rewarm.InstructionData", "init_args": {"train": "t", "tokenizer": "t"}},
        "trainer": {
            "max_steps": max_steps,
            "callbacks": [
                {"class_path": "rewarm.LRSchedule", "init_args": {"schedule": schedule, **arguments}}
            ],
        },
        "ckpt_path": ckpt_path,
    }
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def named(name, **arguments):
    return {"class_path": f"rewarm.schedules.published.{name}", "init_args": arguments}


def test_a_config_gives_the_rate_of_every_step(tmp_path):
    path = config(tmp_path, named("linear", warmup=2))
    (curve,) = config_curves(path).values()
    assert (curve.every, curve.unit) == (1, "step")
    assert curve.lrs == pytest.approx([0.5 * linear(2)(n, 10) for n in range(1, 11)])
    assert config_curves(path, steps=20)[""].lrs == pytest.approx(
        [0.5 * linear(2)(n, 20) for n in range(1, 21)]
    )
    assert max(config_curves(path, lr=3.0)[""].lrs) == 3.0


def test_phases_written_out_in_a_config_are_drawn(tmp_path):
    phases = [{"shape": "linear", "length": 4, "end": 1.0}, {"shape": "cosine", "end": 0.1}]
    section = {"class_path": "rewarm.schedules.phases.Schedule", "init_args": {"phases": phases, "start": 0}}
    expected = Schedule([Phase("linear", 4, 1.0), Phase("cosine", None, 0.1)], 0.0)
    assert config_curves(config(tmp_path, section))[""].lrs == pytest.approx(
        [0.5 * expected(n, 10) for n in range(1, 11)]
    )


def test_a_schedule_in_tokens_is_drawn_over_tokens(tmp_path):
    path = config(
        tmp_path,
        named("power", batch_size=128),
        unit="tokens",
        total_tokens=10**11,
        max_steps=-1,
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
    )
    curve = config_curves(path)[""]
    assert (len(curve.lrs), curve.every, curve.unit) == (1000, 10**8, "token")
    assert curve.lrs[9] == pytest.approx(0.01316, rel=1e-3)
    assert curve.lrs == pytest.approx([0.02 * power(128)(n * 10**8, 10**11) for n in range(1, 1001)])


def test_multiplied_groups_have_curves_of_their_own(tmp_path, capsys):
    path = config(tmp_path, named("constant"), max_steps=2, multipliers={"1": 0.1})
    schedule([path])
    assert capsys.readouterr().out == "step,a,a (1)\n1,0.5,0.05\n2,0.5,0.05\n"


def checkpoint(tmp_path, lr=0.25, **content):
    path = tmp_path / "stable.ckpt"
    torch.save({"global_step": 6, "optimizer_states": [{"param_groups": [{"lr": lr}]}], **content}, path)
    return str(path)


def test_a_branch_is_drawn_from_the_lr_of_its_checkpoint_over_the_steps_that_are_left(tmp_path):
    arguments = {"mode": "branch", "phase": "b", "ckpt_path": checkpoint(tmp_path)}
    curve = config_curves(config(tmp_path, named("branch"), max_steps=16, **arguments))[""]
    assert curve.lrs == pytest.approx([0.25 * branch()(n, 10) for n in range(1, 11)])


def test_a_rewarm_is_drawn_over_the_steps_that_are_left(tmp_path):
    arguments = {"mode": "rewarm", "phase": "r", "ckpt_path": checkpoint(tmp_path)}
    curve = config_curves(config(tmp_path, named("cosine", warmup=2), max_steps=16, **arguments))[""]
    assert curve.lrs == pytest.approx([0.5 * cosine(2)(n, 10) for n in range(1, 11)])


def test_several_configs_are_drawn_in_one_picture(tmp_path):
    one = config(tmp_path, named("constant"))
    other = Path(one).rename(tmp_path / "b.yaml")
    one = config(tmp_path, named("linear", warmup=0))
    schedule([one, str(other)], plot=str(tmp_path / "lr.png"), csv=str(tmp_path / "lr.csv"))
    assert len(pixels(tmp_path / "lr.png", "C0")[0]) > 100
    assert len(pixels(tmp_path / "lr.png", "C1")[0]) > 100
    assert (tmp_path / "lr.csv").read_text().splitlines()[:2] == ["step,a,b", "1,0.45,0.5"]


def test_configs_of_one_name_are_told_apart_by_their_folders(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    one = Path(config(tmp_path, named("constant"), max_steps=1))
    other = one.rename(tmp_path / "other" / "a.yaml")
    one = config(tmp_path, named("linear", warmup=0), max_steps=1)
    schedule([one, str(other)])
    assert capsys.readouterr().out == f"step,{one},{other}\n1,0.0,0.5\n"


def test_phases_that_do_not_add_up_are_named_with_their_config(tmp_path):
    with pytest.raises(ValueError, match=r"a.yaml: total is 10; the phases' lengths \[8, None, 4\] need 12"):
        config_curves(config(tmp_path, named("wsd", warmup=8, decay=4)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_steps": -1}, "trainer.max_steps is not set, so give --steps"),
        ({"optimizer": {**OPTIMIZER, "init_args": {"lr": -0.5}}}, "a.yaml: lr is -0.5; it must be > 0"),
        ({"optimizer": None}, "neither optimizer.init_args.lr nor lr, so give --lr"),
        ({"unit": "tokens"}, "total_tokens is not set, so the schedule has no end to draw to"),
        ({"mode": "branch", "phase": "b"}, "a branch begins with the LR of its checkpoint: set ckpt_path"),
        (
            {"mode": "branch", "phase": "b", "ckpt_path": "folder"},
            "it must be a file, or give --steps and --lr",
        ),
    ],
)
def test_what_a_config_lacks_is_named(tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        config_curves(config(tmp_path, named("branch"), **arguments))


def test_a_checkpoint_of_weights_alone_is_named(tmp_path):
    path = checkpoint(tmp_path, optimizer_states=[])
    with pytest.raises(ValueError, match=r"stable.ckpt', which has weights alone and no LR"):
        config_curves(config(tmp_path, named("branch"), mode="branch", phase="b", ckpt_path=path))


def test_another_file_is_named_in_one_line(tmp_path, capsys):
    (tmp_path / "model.yaml").write_text("model_type: llama\n")
    with pytest.raises(SystemExit):
        main(["schedule", str(tmp_path / "model.yaml"), "--steps", "5"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rewarm: error: {tmp_path / 'model.yaml'} is no config of `rewarm fit`: ")
    assert "model_type" in line


def test_a_config_without_a_schedule_is_named(tmp_path):
    path = Path(config(tmp_path, named("constant")))
    content = yaml.safe_load(path.read_text())
    content["trainer"]["callbacks"] = [{"class_path": "rewarm.ExactResume"}]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="a.yaml: trainer.callbacks has no rewarm.LRSchedule"):
        config_curves(str(path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "nowhere.yaml: no such file"),
        ({"steps": 0}, "steps is 0; it must be above 0"),
        ({"lr": -1.0}, "lr is -1.0; it must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        schedule(["nowhere.yaml"], **arguments)


def test_the_datas_pacing_is_drawn_below(tmp_path):
    root = Path(__file__).parents[2]
    paced, plain = (str(root / "configs" / name) for name in ("curriculum_sft.yaml", "dpo.yaml"))
    visible = config_curves(paced)[""].visible
    # sqrt(t (1 - 0.01) / 600 + 0.01)
    assert [round(high, 4) for _, high in (visible[0], visible[300], visible[600])] == [0.1, 0.7106, 1.0]
    assert {low for low, _ in visible} == {0.0}
    assert config_curves(plain, 100)[""].visible is None
    schedule([paced, plain], steps=100, plot=str(tmp_path / "both.png"))
    schedule([plain], steps=100, plot=str(tmp_path / "one.png"))
    sizes = [imread(tmp_path / name).shape[:2] for name in ("both.png", "one.png")]
    assert sizes == [(975, 1200), (675, 1200)]
