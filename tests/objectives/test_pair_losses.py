"""Losses on pairs against golden values, written-out formulas and micro-batches."""

import math

import jsonargparse
import pytest
import torch

import rewarm
from rewarm.objectives.pair_losses import PairLoss, Pairs

ALL = {
    "sigmoid": rewarm.Sigmoid(beta=0.4),
    "smoothed": rewarm.Sigmoid(beta=0.4, label_smoothing=0.2),
    "nca": rewarm.NCA(beta=0.4),
    "ipo": rewarm.IPO(tau=0.4),
    "ipo summed": rewarm.IPO(tau=0.4, average=False),
    "chosen nll": rewarm.ChosenNLL(),
    "sum": rewarm.Sum([rewarm.IPO(0.3), rewarm.ChosenNLL(), rewarm.Sigmoid()], [0.5, 2.0, 1.0]),
}


def pairs(*values, **more):
    names = (
        "chosen",
        "rejected",
        "chosen_tokens",
        "rejected_tokens",
        "reference_chosen",
        "reference_rejected",
    )
    return Pairs(*(torch.tensor([float(v)]) for v in values[: len(names)]), **more)


GOLDEN = pairs(-12, -15, 6, 5, -13, -14)
"""The vector of the notes: log-ratios 1 and -1."""


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (rewarm.Sigmoid(beta=0.1), 0.598139),
        (rewarm.Sigmoid(beta=0.1, label_smoothing=0.1), 0.618139),
        (rewarm.NCA(beta=0.1), 1.338793),
        (rewarm.IPO(tau=0.1, average=False), 9.0),
        (rewarm.IPO(tau=0.1), 21.467778),
    ],
)
def test_losses_have_their_golden_values(loss, value):
    assert loss.values(GOLDEN).item() == pytest.approx(value, abs=2e-6)


def drawn(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sums = -20 * torch.rand(4, count, generator=generator, dtype=dtype)
    lengths = torch.randint(1, 9, (2, count), generator=generator).to(dtype)
    return sums[0], sums[1], *lengths, sums[2], sums[3]


def counts(parts):
    return {"pairs": torch.tensor(float(len(parts[0]))), "chosen_tokens": parts[2].sum()}


@pytest.mark.parametrize("name", ALL)
def test_the_shares_of_micro_batches_add_up_to_that_of_one_batch(name):
    parts = drawn(11)
    whole = ALL[name].share(Pairs(*parts), counts(parts))
    split = [
        ALL[name].share(Pairs(*(part[a:b] for part in parts)), counts(parts))
        for a, b in ((0, 3), (3, 4), (4, 11))
    ]
    assert sum(split).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_of_finite_differences_and_reach_the_policy_alone(name):
    chosen, rejected, *rest = drawn(4, torch.float64)
    for values in (chosen, rejected, *rest[2:]):
        values.requires_grad_(True)
    divide = {"pairs": torch.tensor(4.0), "chosen_tokens": torch.tensor(9.0)}
    assert torch.autograd.gradcheck(
        lambda c, r: ALL[name].share(Pairs(c, r, *rest), divide), (chosen, rejected)
    )
    frozen = [value.detach() for value in rest]
    ALL[name].share(Pairs(chosen, rejected, *frozen), divide).backward()
    assert chosen.grad is not None


@pytest.mark.parametrize("name", [name for name in ALL if name != "sum"])
def test_a_pair_has_the_same_loss_whatever_it_stands_beside(name):
    parts = drawn(6)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    whole = ALL[name].values(Pairs(*parts))
    moved = ALL[name].values(Pairs(*(part[order] for part in parts)))
    torch.testing.assert_close(moved, whole[order])
    assert whole.shape == (6,)
    assert ALL[name].values(Pairs(*(part[:0] for part in parts))).shape == (0,)


def test_ipo_is_least_where_the_margin_is_at_its_goal_and_overfits_none():
    margins = torch.tensor([2.0, 2.5, 3.0])
    zeros = torch.zeros(3)
    losses = rewarm.IPO(tau=0.2).values(Pairs(margins, zeros, zeros + 1, zeros + 1, zeros, zeros))
    assert losses.tolist() == [0.25, 0.0, 0.25]


def test_what_needs_a_reference_says_so_and_what_needs_none_does_without():
    bare = pairs(-12, -15, 6, 5)
    for loss in (rewarm.Sigmoid(), rewarm.NCA(), rewarm.IPO()):
        assert loss.needs_reference
        with pytest.raises(ValueError, match="the pairs have no log-probabilities of a reference"):
            loss.values(bare)
    assert not rewarm.ChosenNLL().needs_reference
    assert rewarm.ChosenNLL().values(bare).item() == 12.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rewarm.Sigmoid(beta=0.0), "beta is 0.0; it must be above 0"),
        (lambda: rewarm.Sigmoid(label_smoothing=0.5), r"label_smoothing is 0.5; it must be in \[0, 0.5\)"),
        (lambda: rewarm.NCA(beta=-1.0), "beta is -1.0; it must be above 0"),
        (lambda: rewarm.IPO(tau=math.nan), "tau is nan; it must be above 0"),
    ],
)
def test_values_out_of_range_are_refused_where_the_loss_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Margin(PairLoss):
    """A loss of somebody else's: a hinge on the margin that a column asks for."""

    def values(self, pairs):
        return (pairs.columns["margin"] - (pairs.chosen_logratios - pairs.rejected_logratios)).clamp(min=0)


def test_a_loss_of_ones_own_may_read_a_numeric_column():
    asked = pairs(-12, -15, 6, 5, -13, -14, columns={"margin": torch.tensor([5.0])})
    assert Margin().values(asked).item() == 3.0


def test_a_loss_is_made_from_a_config():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=PairLoss | rewarm.Sum)
    given = {"class_path": "rewarm.IPO", "init_args": {"tau": 0.2}}
    assert parser.instantiate(parser.parse_object({"loss": given})).loss == rewarm.IPO(tau=0.2)
    given = {
        "class_path": "rewarm.Sum",
        "init_args": {"losses": [given, {"class_path": "rewarm.ChosenNLL"}], "weights": [1.0, 0.5]},
    }
    made = parser.instantiate(parser.parse_object({"loss": given})).loss
    assert made.terms == ((1.0, rewarm.IPO(tau=0.2)), (0.5, rewarm.ChosenNLL()))
