"""Losses as objects: what each is at its neutral setting, and how their shares add up."""

import math
import pickle

import jsonargparse
import pytest
import torch

import rewarm
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.objectives.token_losses import TASK_COUNT, TokenLoss

B, T, K = 3, 6, 4
NEUTRAL = {
    "NLL": rewarm.NLL(),
    "label smoothing 0": rewarm.LabelSmoothing(0.0),
    "z 0": rewarm.ZLoss(0.0),
    "DFT of power 0": rewarm.DFT(0.0),
    "all tokens": rewarm.EntropySFT(token_ratio=1.0),
    "no repetition": rewarm.DITTO(),
    "one task": rewarm.MultiTask({"a": 1.0}),
    "a certain teacher": rewarm.Distillation(at_temperature=1.0),
    "both": rewarm.ZLoss(0.0, rewarm.MultiTask({"a": 1.0}, rewarm.LabelSmoothing(0.0))),
}


def case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(50, (B, T), generator=generator)
    targets[:, :2] = IGNORE_INDEX
    known = targets != IGNORE_INDEX
    logprobs = torch.where(known, -3 * torch.rand(B, T, generator=generator), 0.0)
    statistics = {
        "entropy": torch.where(known, 2 * torch.rand(B, T, generator=generator), 0.0),
        "logsumexp": torch.where(known, torch.randn(B, T, generator=generator), 0.0),
        "mean_logprobs": torch.where(known, -5.0, 0.0),
        "candidates": torch.where(known, logprobs, 0.0)[..., None],
    }
    batch = {
        "targets": targets,
        "tasks": torch.where(known, 0, -1),
        "teacher_logprobs": torch.zeros(B, T, 1),
    }
    tokens = float(known.sum())
    counts = {"tokens": torch.tensor(tokens), TASK_COUNT + "a": torch.tensor(tokens)}
    return logprobs, batch, statistics, counts


@pytest.mark.parametrize("name", NEUTRAL)
def test_at_its_neutral_setting_every_loss_is_nll(name):
    logprobs, batch, statistics, counts = case()
    share = NEUTRAL[name].share(logprobs, batch, statistics, counts)
    assert share.item() == pytest.approx(-logprobs.sum().item() / 12, rel=1e-6)


@pytest.mark.parametrize("name", NEUTRAL)
def test_weights_multiply_every_loss(name):
    logprobs, batch, statistics, counts = case()
    weights = torch.rand(B, T)
    share = NEUTRAL[name].share(logprobs, batch | {"weights": weights}, statistics, counts)
    assert share.item() == pytest.approx(-(weights * logprobs).sum().item() / 12, rel=1e-6)


LOSSES = {
    "smoothed": rewarm.LabelSmoothing(0.2),
    "z": rewarm.ZLoss(0.1),
    "dft": rewarm.DFT(),
    "entropy": rewarm.EntropySFT(0.5, 1.0),
    "distillation": rewarm.Distillation(),
}


def written_out(name, lp, mean, lse, student, teacher):
    if name == "smoothed":
        return -0.8 * lp - 0.2 * mean
    if name == "z":
        return -lp + 0.1 * lse**2
    if name == "dft":
        return -math.exp(lp) * lp
    q, p = math.exp(teacher), math.exp(student)
    rest = (1 - q) * (math.log(1 - q) - math.log(1 - p)) if q < 1 else 0.0
    return 4.0 * (q * (teacher - student) + rest)


@pytest.mark.parametrize("name", ["smoothed", "z", "dft", "distillation"])
def test_a_share_is_the_written_out_sum(name):
    logprobs, batch, statistics, counts = case(1)
    batch["teacher_logprobs"] = torch.full((B, T, 1), -0.7)
    expected = 0.0
    for b in range(B):
        for t in range(2, T):
            one = [
                statistics[key][b, t].flatten()[0].item()
                for key in ("mean_logprobs", "logsumexp", "candidates")
            ]
            expected += written_out(name, logprobs[b, t].item(), *one, -0.7) / 12
    share = LOSSES[name].share(logprobs, batch, statistics, counts)
    assert share.item() == pytest.approx(expected, rel=1e-4)


def test_entropy_sft_divides_by_what_it_keeps_of_the_whole_step():
    logprobs, batch, statistics, counts = case(2)
    doubt = (-logprobs - statistics["entropy"])[batch["targets"] != IGNORE_INDEX]
    kept = doubt.topk(6).indices
    expected = -logprobs[batch["targets"] != IGNORE_INDEX][kept].sum() / 6
    share = LOSSES["entropy"].share(logprobs, batch, statistics, counts)
    assert share.item() == pytest.approx(expected.item(), rel=1e-6)
    twice = {"tokens": counts["tokens"] * 2}
    assert LOSSES["entropy"].share(logprobs, batch, statistics, twice).item() == pytest.approx(
        share.item() / 2
    )


def test_tasks_are_means_of_their_own():
    logprobs, batch, statistics, counts = case(3)
    batch["tasks"][0, 2:] = 1  # 4 of 12 targets
    counts = counts | {TASK_COUNT + "a": torch.tensor(8.0), TASK_COUNT + "b": torch.tensor(4.0)}
    share = rewarm.MultiTask({"b": 0.25, "a": 0.75}).share(logprobs, batch, statistics, counts)
    expected = -0.75 * logprobs[1:].sum() / 8 - 0.25 * logprobs[0].sum() / 4
    assert share.item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"weights names the tasks \['a', 'c'\], the data have \['a', 'b'\]"):
        rewarm.MultiTask({"a": 1.0, "c": 1.0}).share(logprobs, batch, statistics, counts)


def test_repeated_tokens_are_measured_against_the_time_before():
    p = torch.tensor([[0.5, 0.25, 0.8, 0.9]])
    batch = {"targets": torch.zeros(1, 4).long(), "repeats": torch.tensor([[0, 0, 2, 2]])}
    values = rewarm.DITTO(decay=0.5).values(p.log(), batch, {})
    expected = [-math.log(0.5), -math.log(0.25), -math.log(1 - (0.8 - 0.25)), -math.log(1 - (0.9 - 0.125))]
    assert values[0].tolist() == pytest.approx(expected, rel=1e-5)
    low = rewarm.DITTO(decay=1.0, one_sided=True).values(
        torch.tensor([[0.9, 0.5]]).log(), {"repeats": torch.tensor([[0, 1]])}, {}
    )
    assert low[0, 1].item() == 0.0


def test_every_loss_can_be_named_in_a_config_and_pickled():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--loss", type=TokenLoss | None)
    config = {
        "class_path": "rewarm.ZLoss",
        "init_args": {"coefficient": 1e-3, "loss": {"class_path": "rewarm.DFT", "init_args": {"power": 0.5}}},
    }
    made = parser.instantiate_classes(parser.parse_object({"loss": config})).loss
    assert made == rewarm.ZLoss(1e-3, rewarm.DFT(0.5))
    for loss in (*NEUTRAL.values(), *LOSSES.values()):
        assert pickle.loads(pickle.dumps(loss)) == loss


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: rewarm.LabelSmoothing(1.0), "smoothing is 1.0"),
        (lambda: rewarm.ZLoss(-1.0), "coefficient is -1.0"),
        (lambda: rewarm.DFT(2.0), "power is 2.0"),
        (lambda: rewarm.EntropySFT(0.0), "token_ratio is 0.0"),
        (lambda: rewarm.EntropySFT(0.5, -1.0), "entropy_weight is -1.0"),
        (lambda: rewarm.DITTO(1.5), "decay is 1.5"),
        (lambda: rewarm.MultiTask({"a": -1.0}), r"task_weights is \[-1.0\]"),
        (lambda: rewarm.Distillation(0.0), "temperature is 0.0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(make, named):
    with pytest.raises(ValueError, match=named):
        make()
