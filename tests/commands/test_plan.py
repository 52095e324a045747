"""Plans as printed, from logs of runs that obey a known law."""

import re

import pytest
import yaml

from rewarm.cli import main
from rewarm.commands.plan import plan_budget, plan_loss, plan_lr
from rewarm.schedules.published import constant, cosine, wsd
from tests.schedule_logs import LAW, write_log


def test_the_step_law_is_printed_with_its_limits(capsys):
    plan_lr(parameters=1e9, tokens=1e11, sequence_length=2048)
    out = capsys.readouterr().out
    assert "peak learning rate 1.632e-03\n" in out
    assert "batch 1,107,715 tokens (540.9 sequences), 90,276 steps\n" in out
    assert "not for continued pretraining or fine-tuning" in out
    with pytest.raises(ValueError, match="sequence_length is 0; it must be at least 1"):
        plan_lr(parameters=1e9, tokens=1e11, sequence_length=0)


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
    plan_loss(logs, configs=[config(tmp_path, wanted)], held_out=[held_out])
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
        ({"law": "chinchilla"}, "law is 'chinchilla'; it must be one of 'annealing', 'multi-power'"),
        ({"law": "multi-power", "decay": 0.9}, "decay is 0.9, but law is 'multi-power', which has none"),
        ({"skip": -1}, "skip is -1; it must be at least 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        plan_loss(["a.csv"], **arguments)


def test_a_schedule_in_tokens_has_no_predicted_loss(tmp_path):
    wanted = {"class_path": "rewarm.schedules.published.constant"}
    path = config(tmp_path, wanted, unit="tokens", total_tokens=1000)
    with pytest.raises(ValueError, match="the schedule is in tokens, but the laws are in steps"):
        plan_loss(["a.csv"], configs=[path])
