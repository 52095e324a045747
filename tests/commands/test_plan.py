"""Plans as printed, from logs that loggers of Lightning wrote and from logs written by hand."""

import math
import random
import re

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rewarm.cli import main
from rewarm.commands.plan import plan_budget, plan_loss, plan_lr, read_curve, refined_from_log, warmup_of
from rewarm.schedules.loss_laws import AnnealingLaw
from rewarm.schedules.published import constant, cosine, wsd
from rewarm.schedules.refined import refined

LAW = AnnealingLaw(2.6, 0.43, 0.55, 20.0, decay=0.99)
STEPS = 400


def write_log(path, schedule, noise=0.0, seed=0, total=STEPS, every=10, loss="train/loss"):
    """A log as CSVLogger writes it: training steps from 0, gaps where something else is logged."""
    rng = random.Random(seed)
    lrs = [1e-3 * schedule(n, total) for n in range(1, total + 1)]
    losses = LAW(lrs, warmup_of(lrs)).tolist()
    lines = [f"epoch,lr,step,{loss}"]
    for step in range(every, total + 1, every):
        lines.append(f"0,{lrs[step - 1]!r},{step - 1},")
        shift = 0 if loss.startswith("val/") else 1
        lines.append(f"0,,{step - shift},{losses[step - 1] * math.exp(rng.gauss(0, noise))!r}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_the_step_law_is_printed_with_its_limits(capsys):
    plan_lr(1e9, 1e11, sequence_length=2048)
    out = capsys.readouterr().out
    assert "peak learning rate 1.632e-03\n" in out
    assert "batch 1,107,715 tokens (540.9 sequences), 90,276 steps\n" in out
    assert "not for continued pretraining or fine-tuning" in out
    with pytest.raises(ValueError, match="sequence_length is 0; it must be >= 1"):
        plan_lr(1e9, 1e11, sequence_length=0)


def test_a_budget_is_printed_with_its_limits(capsys):
    plan_budget(3000.0, sft_cost=1.0, preference_cost=0.5)
    out = capsys.readouterr().out
    assert out.startswith("supervised examples 927 (31% of the budget), preference pairs 4,146\n")
    assert "below 1,000 examples supervised alone is best" in out
    assert "ours" in out
    plan_budget(3000.0, share=0.0)
    assert capsys.readouterr().out == "supervised examples 0 (0% of the budget), preference pairs 3,000\n"
    with pytest.raises(ValueError, match="sft_cost is 0"):
        plan_budget(10.0, sft_cost=0.0)


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


def config(tmp_path, schedule, **trainer):
    content = {
        "model": {
            "class_path": "rewarm.CurriculumSFT",
            "init_args": {
                "model": "m",
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            },
        },
        "data": {"class_path": "rewarm.InstructionData", "init_args": {"train": "t", "tokenizer": "t"}},
        "trainer": {
            "max_steps": 600,
            "callbacks": [
                {"class_path": "rewarm.LRSchedule", "init_args": {"schedule": schedule, **trainer}}
            ],
        },
    }
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "new.yaml")


def test_the_loss_of_a_config_is_predicted_from_logs(tmp_path, capsys):
    logs = [
        write_log(tmp_path / f"{n}.csv", schedule, noise=1e-3, seed=n)
        for n, schedule in enumerate((cosine(40, 0.1), constant(40)))
    ]
    held_out = write_log(tmp_path / "held.csv", wsd(40, 100, 0.1), noise=1e-3, seed=9)
    wanted = {"class_path": "rewarm.schedules.published.wsd", "init_args": {"warmup": 40, "decay": 150}}
    plan_loss(logs, [config(tmp_path, wanted)], held_out=[held_out])
    out = capsys.readouterr().out
    assert "decay=0.99)" in out  # that of the law, chosen among eight
    assert float(re.search(r"held.csv: ([\d.]+)% off", out)[1]) == pytest.approx(0.1, abs=0.1)
    loss, error = map(float, re.search(r"train/loss ([\d.]+) \+- ([\d.]+) after 600 steps", out).groups())
    lrs = [1e-3 * wsd(40, 150)(n, 600) for n in range(1, 601)]
    assert loss == pytest.approx(float(LAW(lrs, 40)[-1]), abs=3 * error)
    assert 0 < error < 0.02


def test_plans_are_made_from_the_command_line(tmp_path, capsys):
    main(["plan", "lr", "--parameters", "1e9", "--tokens", "1e11", "--sequence-length", "2048"])
    main(["plan", "budget", "3000", "--preference-cost", "0.5"])
    out = capsys.readouterr().out
    assert "batch 1,107,715 tokens (540.9 sequences)" in out
    assert "preference pairs 4,146" in out
    logs = [
        write_log(tmp_path / f"{n}.csv", schedule)
        for n, schedule in enumerate((cosine(40, 0.1), constant(40)))
    ]
    path = config(tmp_path, {"class_path": "rewarm.wsd", "init_args": {"warmup": 40, "decay": 150}})
    main(
        ["plan", "loss", *logs, "--decay", "0.99", "--configs", path, "--held-out", logs[0], "--steps", "700"]
    )
    out = capsys.readouterr().out
    assert out.startswith("AnnealingLaw(loss0=")
    assert "0.csv: 0.00% off, at its end " in out
    lrs = [1e-3 * wsd(40, 150)(n, 700) for n in range(1, 701)]
    loss = re.search(r"train/loss ([\d.]+) \+- [\d.]+ after 700 steps", out)[1]
    assert float(loss) == pytest.approx(float(LAW(lrs, 40)[-1]), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lr", "--parameters", "-1", "--tokens", "1"], "parameters is -1.0; it must be finite and > 0"),
        (["budget", "10", "--share", "2"], "share is 2.0; it must be in [0, 1]"),
        (["loss", "nowhere.csv"], "nowhere.csv: no such file or folder"),
    ],
)
def test_a_wrong_plan_is_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert capsys.readouterr().err == f"rewarm: error: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"law": "chinchilla"}, "law is 'chinchilla'; it must be 'annealing' or 'multi-power'"),
        ({"law": "multi-power", "decay": 0.9}, "decay is 0.9, but law is 'multi-power', which has none"),
        ({"skip": -1}, "skip is -1; it must be >= 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        plan_loss(["a.csv"], **arguments)


def test_a_schedule_in_tokens_has_no_predicted_loss(tmp_path):
    wanted = {"class_path": "rewarm.schedules.published.constant"}
    path = config(tmp_path, wanted, unit="tokens", total_tokens=1000)
    with pytest.raises(ValueError, match="the schedule is in tokens, but the laws are in steps"):
        plan_loss(["a.csv"], [path])


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
