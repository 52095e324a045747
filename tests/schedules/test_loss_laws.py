"""Laws against their double sums written out in plain Python."""

import math

import pytest
import torch

from rewarm.schedules.loss_laws import (
    AnnealingLaw,
    MultiPowerLaw,
    annealing_areas,
    changes_of,
    reduction,
)
from rewarm.schedules.published import cosine, rewarmed, wsd, wsds


def rates(schedule, total=60, peak=1e-3):
    return [peak * schedule(n, total) for n in range(1, total + 1)]


SCHEDULES = [
    cosine(6, 0.1),
    wsd(0, 20, 0.0),
    wsds([30, 30], 6),
    rewarmed([30, 30], 0.2),
]


def test_the_areas_have_the_published_values():
    lrs = [1.0] * 5 + torch.linspace(1, 0, 6, dtype=torch.float64).tolist()
    s1, s2 = annealing_areas(lrs, decay=0.9)
    assert float(s1[-1]) == pytest.approx(8.0, abs=1e-12)
    assert float(s2[-1]) == pytest.approx(2.62882, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_the_annealing_area_is_the_papers_double_sum(schedule, decay):
    lrs = rates(schedule)
    s1, s2 = annealing_areas(lrs, decay=decay)
    for s in (1, 2, 17, 40, 60):
        assert float(s1[s - 1]) == pytest.approx(math.fsum(lrs[:s]), rel=1e-12)
        double = math.fsum(
            (lrs[k - 1] - lrs[k]) * decay ** (i - k) for i in range(1, s) for k in range(1, i + 1)
        )
        assert float(s2[s - 1]) == pytest.approx(double, rel=1e-9, abs=1e-15)


def test_a_warm_up_counts_as_constant_in_the_annealing_law():
    lrs = rates(cosine(6, 0.1))
    level = [lrs[5]] * 6 + lrs[6:]
    for got, expected in zip(annealing_areas(lrs, warmup=6), annealing_areas(level), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_annealing_law_is_its_formula(schedule):
    lrs, law = rates(schedule), AnnealingLaw(2.5, 0.4, 0.55, 30.0, decay=0.95)
    s1, s2 = annealing_areas(lrs, decay=0.95)
    for s, loss in enumerate(law(lrs).tolist()):
        assert loss == pytest.approx(2.5 + 0.4 * float(s1[s]) ** -0.55 - 30.0 * float(s2[s]), rel=1e-12)


MULTI = MultiPowerLaw(2.375, 0.654, 0.429, 523.4, 2.025, 0.594, 0.635)


def multi_power(lrs, warmup, t):
    """The formula with its two sums; step k has lrs[k - 1], and the step before the first one its LR."""
    first = max(warmup, 1) + 1
    total = math.fsum(lrs[:t])
    lower = 0.0
    for k in range(first, t + 1):
        drop, here = lrs[k - 2] - lrs[k - 1], math.fsum(lrs[k - 1 : t])
        if drop and here:
            x = MULTI.c * lrs[k - 1] ** -MULTI.gamma * here if lrs[k - 1] else math.inf
            lower += drop * (1 - (1 + x) ** -MULTI.beta)
    return MULTI.loss0 + MULTI.a * total**-MULTI.alpha - MULTI.b * lower


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 6])
def test_the_multi_power_law_is_its_formula(schedule, warmup):
    lrs = rates(schedule)
    losses = MULTI(lrs, warmup)
    for t in range(1, 61):
        assert float(losses[t - 1]) == pytest.approx(multi_power(lrs, warmup, t), rel=1e-9)


def test_a_constant_lr_leaves_both_laws_a_power_law():
    lrs = [1e-3] * 50
    sums = [1e-3 * n for n in range(1, 51)]
    assert MULTI(lrs).tolist() == pytest.approx([2.375 + 0.654 * s**-0.429 for s in sums])
    assert AnnealingLaw(2.0, 0.5, 0.5, 100.0)(lrs).tolist() == pytest.approx(
        [2.0 + 0.5 * s**-0.5 for s in sums]
    )


def test_a_lower_lr_after_a_decay_reduces_the_loss_more_than_none():
    steady, decayed = [1e-3] * 100, [1e-3] * 60 + [2e-4] * 40
    power_alone = 2.375 + 0.654 * math.fsum(decayed) ** -0.429
    assert float(MULTI(decayed)[-1]) < power_alone
    assert float(MULTI(steady)[-1]) == pytest.approx(2.375 + 0.654 * 0.1**-0.429)


@pytest.mark.parametrize("law", [MULTI, AnnealingLaw(2.5, 0.4, 0.55, 30.0)])
def test_asking_for_some_steps_gives_those(law):
    lrs = rates(cosine(6), total=600)
    assert torch.equal(law(lrs, 6, [1, 300, 600]), law(lrs, 6)[[0, 299, 599]])


def test_neighbouring_changes_taken_together_change_little():
    lrs = torch.tensor(rates(cosine(20, 0.1), 2000), dtype=torch.float64)
    sums, knobs = lrs.cumsum(0)[99::100], torch.tensor([2.025, 0.594, 0.635], dtype=torch.float64)
    whole, few = changes_of(lrs, 20), changes_of(lrs, 20, most=100)
    assert (len(whole.drops), len(few.drops)) == (1980, 100)
    assert float(few.drops.sum()) == pytest.approx(float(whole.drops.sum()), rel=1e-12)
    exact = reduction(whole, sums, *knobs)
    assert torch.allclose(reduction(few, sums, *knobs), exact, atol=0.01 * float(exact.max()))


def test_the_gradient_of_the_reduction_is_that_of_finite_differences():
    lrs = torch.tensor(rates(wsd(6, 20)), dtype=torch.float64)
    knobs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 0.6, 0.6)]
    sums = lrs.cumsum(0)[[10, 45, 59]]
    assert torch.autograd.gradcheck(
        lambda *knobs: 1e3 * reduction(changes_of(lrs, 6), sums, *knobs), knobs, eps=1e-6
    )


@pytest.mark.parametrize("call", [MULTI, AnnealingLaw(2.0, 0.5, 0.5, 1.0), annealing_areas])
@pytest.mark.parametrize("warmup", [-1, 10])
def test_a_warm_up_out_of_range_is_refused(call, warmup):
    with pytest.raises(ValueError, match=rf"warmup is {warmup}; it must be in \[0, 10\)"):
        call([1e-3] * 10, warmup)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay is {decay}; it must be in"):
        annealing_areas([1.0], decay=decay)
