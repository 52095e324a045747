"""Plans against the published values and sums done by hand."""

import math
import re

import pytest

from rewarm.schedules.rules import sft_share, split_budget, step_law_batch_tokens, step_law_lr


@pytest.mark.parametrize(
    ("parameters", "tokens", "lr", "batch"),
    [
        (125e6, 2.5e9, 2.317e-3, 134_788),
        (1e9, 1e11, 1.632e-3, 1_107_715),
        (7e9, 1.4e12, 9.166e-4, 4_998_815),
    ],
)
def test_the_step_law_has_its_published_values(parameters, tokens, lr, batch):
    assert float(f"{step_law_lr(parameters, tokens):.3e}") == lr
    assert round(step_law_batch_tokens(tokens)) == batch


def test_the_step_law_is_a_power_law_in_both():
    for factor in (2.0, 10.0):
        assert step_law_lr(factor * 1e9, 1e11) / step_law_lr(1e9, 1e11) == pytest.approx(factor**-0.713)
        assert step_law_lr(1e9, factor * 1e11) / step_law_lr(1e9, 1e11) == pytest.approx(factor**0.307)


def test_small_budgets_are_all_supervised_and_no_budget_is_without():
    assert {sft_share(n) for n in (1, 100, 999)} == {1.0}
    shares = [sft_share(n) for n in (1000, 2000, 5000, 9999, 10_000, 10**7)]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (0.5, 0.1)
    assert sft_share(math.sqrt(1e7)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1000, 0.25, 2.0, 1.0), (125, 750)),
        ((1000, 1.0, 3.0, 1.0), (333, 0)),
        ((1000, 0.0, 3.0, 4.0), (0, 250)),
        ((30, 0.1, 1.0, 1.0), (3, 27)),
        ((0.3, 1.0, 0.1, 1.0), (3, 0)),
        ((10, 0.5, 4.0, 3.0), (1, 2)),  # what one example leaves of its share goes to pairs
    ],
)
def test_a_budget_buys_what_it_pays_for(arguments, expected):
    assert split_budget(*arguments) == expected


@pytest.mark.parametrize("share", [0.0, 0.01, 1 / 3, 0.5, 0.999, 1.0])
def test_a_budget_is_never_passed_and_nearly_all_spent(share):
    for budget in (1.0, 99.0, 1234.5, 1e6):
        for prices in ((1.0, 1.0), (0.7, 2.3), (5.0, 0.1)):
            examples, pairs = split_budget(budget, share, *prices)
            spent = examples * prices[0] + pairs * prices[1]
            assert spent <= budget * (1 + 1e-9)
            assert budget - spent < (prices[1] if share < 1 else prices[0])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: step_law_lr(0, 1e9), "parameters is 0; it must be finite and > 0"),
        (lambda: step_law_lr(1e9, -1.0), "tokens is -1.0"),
        (lambda: step_law_batch_tokens(math.inf), "tokens is inf"),
        (lambda: sft_share(0), "examples is 0"),
        (lambda: split_budget(0, 0.5), "budget is 0"),
        (lambda: split_budget(10, 1.5), "share is 1.5; it must be in [0, 1]"),
        (lambda: split_budget(10, 0.5, sft_cost=0.0), "sft_cost is 0.0"),
        (lambda: split_budget(10, 0.5, preference_cost=math.nan), "preference_cost is nan"),
    ],
)
def test_wrong_arguments_are_refused(call, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        call()
