"""Curves and schedules from logs that loggers of Lightning wrote, and from logs written by hand."""

import re

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from rewarm.schedules.logs import read_curve, read_scalars, refined_from_log, warmup_of
from rewarm.schedules.published import constant, cosine, wsd
from rewarm.schedules.refinement import refined
from tests.schedule_logs import LAW, STEPS, write_log


@pytest.mark.parametrize("loss", ["train/loss", "val/loss"])
def test_a_log_is_read_as_the_curve_that_wrote_it(tmp_path, loss):
    schedule = wsd(40, 100, 0.1, "linear")
    curve = read_curve(write_log(tmp_path / "a.csv", schedule, loss=loss), loss)
    lrs = [1e-3 * schedule(n, STEPS) for n in range(1, STEPS + 1)]
    assert curve.lrs == pytest.approx(lrs, rel=1e-9)  # straight pieces whose corners are logged
    assert curve.steps == list(range(10, STEPS + 1, 10))
    assert curve.losses == pytest.approx([float(LAW(lrs, 40)[s - 1]) for s in curve.steps])
    assert curve.warmup == 40


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_logs_of_lightnings_loggers_are_read(tmp_path, kind):
    logger = kind(tmp_path, name="", version="")
    for step in range(50):
        logger.log_metrics({"lr": 1e-3 * (50 - step), "train/loss": 3.0 / (step + 1)}, step)
    logger.save()
    log = tmp_path if kind is TensorBoardLogger else tmp_path / "metrics.csv"
    curve = read_curve(str(log), skip=20)
    assert curve.steps == list(range(21, 51))
    assert curve.lrs == pytest.approx([1e-3 * n for n in range(50, 0, -1)])
    assert curve.losses == pytest.approx([3.0 / n for n in range(21, 51)])


def test_what_a_log_lacks_is_named(tmp_path):
    log = write_log(tmp_path / "a.csv", constant())
    for call, said in (
        (
            lambda: read_curve(log, "val/loss"),
            "a.csv: there is no 'val/loss'; there are epoch, lr, train/loss",
        ),
        (lambda: read_curve(log, skip=400), "a.csv: 'train/loss' has nothing after step 400"),
        (lambda: read_curve("nowhere.csv"), "nowhere.csv: no such file or folder"),
        (lambda: read_curve(str(tmp_path)), "there are no TensorBoard files in this folder"),
        (lambda: refined_from_log(log), "a.csv: there is no 'train/grad_norm_l1'"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            call()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("step,lr,train/loss\n1,x,2\n", "a.csv:2: 'lr' is 'x', no number"),
        ("lr,train/loss\n1,2\n", "a.csv:2: there is no `step`"),
        ("step,lr,train/loss\n1,1e-3,2\n", "a.csv: 'lr' is logged only once"),
    ],
)
def test_a_log_that_is_none_is_named(tmp_path, content, said):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_curve(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(("schedule", "warmup"), [(cosine(40), 40), (constant(), 0), (cosine(0), 0)])
def test_the_warm_up_is_seen_in_the_lrs(schedule, warmup):
    assert warmup_of([schedule(n, 100) for n in range(1, 101)]) == warmup


def test_a_schedule_is_refined_from_the_norms_in_a_log(tmp_path):
    norms = [5.0 / (n + 1) + 1.0 for n in range(50)]
    lines = ["step,train/grad_norm_l1,train/grad_norm_l2"]
    lines += [f"{10 * n + 9},{norm},{norm**0.5}" for n, norm in enumerate(norms)]
    lines.insert(20, "188,inf,inf")  # a step that the loss scaling skipped
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    log = str(tmp_path / "a.csv")
    ours, expected = refined_from_log(log), refined(norms)
    assert [ours(n, 100) for n in range(101)] == pytest.approx([expected(n, 100) for n in range(101)])
    ours, expected = refined_from_log(log, "l2", points=50), refined([n**0.5 for n in norms], "l2", points=50)
    assert [ours(n, 100) for n in range(101)] == pytest.approx([expected(n, 100) for n in range(101)])


def test_norms_at_uneven_steps_are_taken_to_even_ones(tmp_path):
    lines = ["step,train/grad_norm_l1"] + [f"{n},{100.0 + n}" for n in (0, 1, 2, 50, 99)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    ours = refined_from_log(str(tmp_path / "a.csv"), smoothing=0.0)
    expected = refined([100.0 + n for n in range(100)], smoothing=0.0)
    assert [ours(n, 50) for n in range(51)] == pytest.approx([expected(n, 50) for n in range(51)], abs=1e-9)


def test_of_a_step_that_was_repeated_after_a_crash_the_latest_value_counts(tmp_path):
    for value in (1.0, 2.0):
        writer = SummaryWriter(tmp_path)
        writer.add_scalar("train/loss", value, 5, walltime=1000.0 + value)
        writer.close()
    assert read_scalars(tmp_path) == {"train/loss": [(5, 2.0)]}
