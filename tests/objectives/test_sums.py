"""Sums of losses of each kind, and what can't be added up."""

import pytest
import torch

import rewarm
from rewarm.objectives.pair_losses import Pairs
from tests.objectives.test_policy_losses import samples
from tests.objectives.test_token_losses import case


def test_a_sum_of_losses_of_pairs_divides_each_by_its_own_count():
    pairs = Pairs(
        *torch.tensor([[-6.0, -3.0], [-9.0, -1.0], [2.0, 4.0], [3.0, 1.0], [-6.0, -4.0], [-8.0, -1.0]])
    )
    counts = {"pairs": torch.tensor(5.0), "chosen_tokens": torch.tensor(12.0)}
    loss = rewarm.Sum([rewarm.IPO(0.5, average=False), rewarm.ChosenNLL()], [3.0, 0.5])
    expected = 3.0 * ((1.0 - 1.0) ** 2 + (1.0 - 1.0) ** 2) / 5 + 0.5 * 9.0 / 12
    assert loss.share(pairs, counts).item() == pytest.approx(expected)


def test_a_sum_of_losses_of_tokens_needs_what_its_parts_need_and_adds_their_shares():
    logprobs, batch, statistics, counts = case()
    parts = [rewarm.LabelSmoothing(0.2), rewarm.EntropySFT(0.5, 0.3), rewarm.NLL()]
    loss = rewarm.Sum(parts, [0.5, 2.0, 1.0])
    assert loss.needs == ("mean_logprobs", "entropy")
    shares = [part.share(logprobs, batch, statistics, counts).item() for part in parts]
    expected = 0.5 * shares[0] + 2.0 * shares[1] + shares[2]
    assert loss.share(logprobs, batch, statistics, counts).item() == pytest.approx(expected, rel=1e-6)


def test_a_sum_of_losses_of_samples_adds_their_values_and_joins_where_they_clip():
    given, parts = samples(), [rewarm.Clipped(0.1, 0.1), rewarm.GSPO(0.2, 0.2)]
    losses, clipped = rewarm.Sum(parts, [0.25, 3.0]).values(given)
    (one, one_clipped), (other, other_clipped) = (part.values(given) for part in parts)
    torch.testing.assert_close(losses, 0.25 * one + 3.0 * other)
    assert torch.equal(clipped, one_clipped | other_clipped)


@pytest.mark.parametrize(
    ("losses", "weights", "message"),
    [
        ([], [], "weights has 0 entries for 0 losses; it must be as many, and at least one"),
        ([rewarm.NLL()], [1.0, 2.0], "weights has 2 entries for 1 losses"),
        ([rewarm.NLL()], [float("nan")], r"weights is \[nan\]; it must be finite"),
        ([rewarm.NLL(), rewarm.Sigmoid()], [1.0, 1.0], "losses has NLL, Sigmoid; it must be all of tokens"),
        (
            [rewarm.NLL(), rewarm.Distillation(2.0)],
            [1.0, 1.0],
            r"losses has the temperatures \[1.0, 2.0\]; it must be one for all",
        ),
    ],
)
def test_what_can_not_be_added_up_is_refused(losses, weights, message):
    with pytest.raises(ValueError, match=message):
        rewarm.Sum(losses, weights)


def test_pairs_learn_from_a_sum_of_three(tmp_path):
    from tests import fits, tiny

    loss = rewarm.Sum([rewarm.Sigmoid(), rewarm.IPO(), rewarm.ChosenNLL()], [1.0, 0.01, 0.1])
    record = fits.Record()
    trainer = fits.trainer(max_steps=12, callbacks=[record])
    torch.manual_seed(0)
    trainer.fit(
        rewarm.DPO(tiny.LLAMA, fits.adamw(3e-3), loss=loss),
        datamodule=fits.preferences(fits.Files(tmp_path), batch_size=8),
    )
    assert record.metrics[-1]["train/loss"] < 0.5 * record.metrics[0]["train/loss"]
