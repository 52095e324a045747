"""Fits find the law that made the curves; predictions are as far off as they say."""

import math
import random
import re

import pytest
import torch

from rewarm.schedules.law_fits import (
    Curve,
    fit_annealing_law,
    fit_error,
    fit_multi_power_law,
    predict_loss,
    relative_errors,
)
from rewarm.schedules.loss_laws import AnnealingLaw, MultiPowerLaw
from rewarm.schedules.phases import Phase, Schedule
from rewarm.schedules.published import constant, cosine, wsd

ANNEALING = AnnealingLaw(2.6, 0.43, 0.55, 20.0, decay=0.99)
MULTI = MultiPowerLaw(2.375, 0.654, 0.429, 523.4, 2.025, 0.594, 0.635)  # of 400M parameters, in the paper
STEPS, WARMUP = 1000, 50


def two_stages():
    return Schedule(
        [Phase("linear", WARMUP, 1.0), Phase("constant", 400), Phase("jump", 0, 0.3), Phase("constant")], 0.0
    )


def rates(schedule, total=STEPS, peak=1e-3):
    return [peak * schedule(n, total) for n in range(1, total + 1)]


def measured(law, schedule, noise=0.0, seed=0, peak=1e-3, every=20):
    lrs, rng = rates(schedule, peak=peak), random.Random(seed)
    steps = list(range(every, STEPS + 1, every))
    losses = [loss * math.exp(rng.gauss(0, noise)) for loss in law(lrs, WARMUP, steps).tolist()]
    return Curve(lrs, steps, losses, WARMUP)


def annealing_curves(noise=0.0, seed=0):
    schedules = (cosine(WARMUP, 0.1), constant(WARMUP))
    return [measured(ANNEALING, s, noise, 10 * seed + n) for n, s in enumerate(schedules)]


def multi_curves(noise=0.0, seed=0):
    schedules = (cosine(WARMUP, 0.1), constant(WARMUP), two_stages())
    return [measured(MULTI, s, noise, 10 * seed + n, peak=3e-4) for n, s in enumerate(schedules)]


def values(law):
    return [getattr(law, name) for name in type(law).__dataclass_fields__]


def test_the_annealing_law_that_made_the_curves_is_found():
    assert values(fit_annealing_law(annealing_curves(), decay=0.99)) == pytest.approx(
        values(ANNEALING), rel=1e-5
    )


def test_one_curve_is_enough_for_the_annealing_law():
    found = fit_annealing_law(annealing_curves()[:1], decay=0.99)
    assert values(found) == pytest.approx(values(ANNEALING), rel=1e-3)


def test_the_decay_that_made_the_curves_is_chosen():
    found = fit_annealing_law(annealing_curves(noise=1e-3), decay=None)
    assert found.decay == 0.99
    assert values(found) == pytest.approx(values(ANNEALING), rel=0.05)


def test_with_noise_the_annealing_law_is_found_within_it():
    found = fit_annealing_law(annealing_curves(noise=2e-3), decay=0.99)
    assert values(found) == pytest.approx(values(ANNEALING), rel=0.05)
    assert fit_error(found, annealing_curves(noise=2e-3)) == pytest.approx(2e-3, rel=0.2)


def test_a_few_wild_losses_do_not_move_the_fit():
    first, second = annealing_curves(noise=5e-4)
    wild = [loss * (1.5 if n in (7, 21) else 1.0) for n, loss in enumerate(first.losses)]
    found = fit_annealing_law([Curve(first.lrs, first.steps, wild, WARMUP), second], decay=0.99)
    assert values(found) == pytest.approx(values(ANNEALING), rel=0.05)


def test_the_unit_of_the_lr_does_not_matter():
    first, second = annealing_curves(noise=1e-3)
    scaled = [
        Curve([1e4 * lr for lr in curve.lrs], curve.steps, curve.losses, WARMUP) for curve in (first, second)
    ]
    one, other = (fit_annealing_law(curves, decay=0.99) for curves in ([first, second], scaled))
    target = rates(wsd(WARMUP, 200))
    there = float(other([1e4 * lr for lr in target], WARMUP)[-1])
    assert there == pytest.approx(float(one(target, WARMUP)[-1]), rel=1e-6)


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_the_multi_power_law_predicts_schedules_that_it_was_not_fitted_to(noise):
    found = fit_multi_power_law(multi_curves(noise))
    assert fit_error(found, multi_curves(noise)) < max(1e-4, 1.2 * noise)
    assert (found.loss0, found.a, found.alpha) == pytest.approx((2.375, 0.654, 0.429), rel=0.02)
    for schedule, total in ((wsd(WARMUP, 200), STEPS), (cosine(WARMUP, 0.1), 3 * STEPS)):
        lrs = rates(schedule, total, peak=3e-4)
        true = float(MULTI(lrs, WARMUP, [total]))
        assert float(found(lrs, WARMUP, [total])) == pytest.approx(true, rel=max(1e-4, 3 * noise))


def test_a_start_at_the_answer_stays_there():
    assert values(fit_annealing_law(annealing_curves(), start=ANNEALING)) == pytest.approx(
        values(ANNEALING), rel=1e-9
    )
    # Taking neighbouring changes together moves it a little.
    assert values(fit_multi_power_law(multi_curves(), start=MULTI)) == pytest.approx(values(MULTI), rel=0.01)


def test_the_fit_is_a_minimum_in_every_direction():
    curves = annealing_curves(noise=5e-3)
    found = fit_annealing_law(curves, decay=0.99)

    def objective(law):
        errors = [math.log(1 + e) for curve in curves for e in relative_errors(law, curve).tolist()]
        return sum(0.5 * e * e if abs(e) <= 1e-3 else 1e-3 * (abs(e) - 5e-4) for e in errors)

    at = values(found)[:4]
    for place in range(4):
        for factor in (0.999, 1.001):
            moved = [value * (factor if n == place else 1.0) for n, value in enumerate(at)]
            assert objective(AnnealingLaw(*moved, decay=0.99)) > objective(found)


def test_predictions_are_as_far_off_as_they_say():
    target = rates(wsd(WARMUP, 300), 1500)
    true = float(ANNEALING(target, WARMUP)[-1])
    off = []
    for seed in range(12):
        curves = annealing_curves(noise=3e-3, seed=seed)
        predicted = predict_loss(fit_annealing_law(curves, decay=0.99), curves, target, WARMUP)
        assert 0 < predicted.error < 0.05
        off.append((predicted.loss - true) / predicted.error)
    assert sum(abs(one) < 2 for one in off) >= 11
    assert max(abs(one) for one in off) > 0.1  # the error is not just large


def test_the_error_is_that_of_the_jackknife_and_of_the_fit_together():
    curves, target = annealing_curves(noise=3e-3), rates(wsd(WARMUP, 300), 1500)
    whole = fit_annealing_law(curves, decay=0.99)
    predicted = []
    for left_out in range(2):
        for block in range(5):  # of ten points each
            curve, other = curves[left_out], curves[1 - left_out]
            kept = [n for n in range(50) if n // 10 != block]
            rest = Curve(curve.lrs, [20 * (n + 1) for n in kept], [curve.losses[n] for n in kept], WARMUP)
            refitted = fit_annealing_law([rest, other], start=whole)
            predicted.append(float(refitted(target, WARMUP)[-1]))
    mean = sum(predicted) / 10
    variance = 9 / 10 * sum((one - mean) ** 2 for one in predicted)
    found = predict_loss(whole, curves, target, WARMUP)
    assert variance > 1e-7
    assert found.error == pytest.approx(
        math.sqrt(variance + (fit_error(whole, curves) * found.loss) ** 2), rel=1e-6
    )


def test_a_prediction_from_clean_curves_has_no_error():
    curves = multi_curves()
    target = rates(wsd(WARMUP, 200), peak=3e-4)
    found = predict_loss(fit_multi_power_law(curves, start=MULTI), curves, target, WARMUP)
    assert found.loss == pytest.approx(float(MULTI(target, WARMUP)[-1]), rel=1e-6)
    assert found.error < 1e-4


def test_more_noise_is_more_error():
    target = rates(wsd(WARMUP, 200))
    errors = []
    for noise in (1e-4, 1e-3, 1e-2):
        curves = annealing_curves(noise)
        errors.append(predict_loss(fit_annealing_law(curves, decay=0.99), curves, target, WARMUP).error)
    assert errors == sorted(errors)
    assert errors[2] > 10 * errors[0]


def test_relative_errors_are_those_of_each_point():
    curve = Curve([1e-3] * 10, [5, 10], [2.0, 3.0])
    law = AnnealingLaw(2.0, 0.1, 0.5, 1.0)
    expected = [float(law(curve.lrs)[4]) / 2.0 - 1, float(law(curve.lrs)[9]) / 3.0 - 1]
    assert relative_errors(law, curve).tolist() == pytest.approx(expected)
    assert fit_error(law, [curve, curve]) == pytest.approx(
        math.sqrt(sum(e * e for e in expected) / 2), rel=1e-12
    )


@pytest.mark.parametrize("seed", [0, 3])
def test_curves_that_leave_parameters_open_still_give_a_law(seed):
    # The decay does nothing here, so that what describes it can be anything.
    law, rng = AnnealingLaw(2.9, 0.03, 0.4, 0.0), random.Random(seed)
    curves = []
    for schedule in (cosine(20, 0.1), constant(20)):
        lrs = rates(schedule, 100, 3e-3)
        steps = list(range(15, 101, 5))
        losses = [loss * math.exp(rng.gauss(0, 0.003)) for loss in law(lrs, 20, steps).tolist()]
        curves.append(Curve(lrs, steps, losses, 20))
    found = fit_multi_power_law(curves)
    assert all(math.isfinite(value) for value in values(found))
    assert fit_error(found, curves) < 0.01


def test_a_fit_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    fit_annealing_law(annealing_curves(), decay=0.99)
    assert torch.equal(torch.get_rng_state(), before)


FLAT = Curve([1e-3] * 20, list(range(1, 21)), [3.0] * 20)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Curve([1.0], [1], []), "steps has 1 entries and losses 0"),
        (lambda: Curve([1.0], [], []), "steps has 0 entries and losses 0"),
        (lambda: Curve([1.0, -1.0], [1], [2.0]), "lrs must be finite and >= 0"),
        (lambda: Curve([0.0, 0.0], [1], [2.0]), "lrs must be finite and >= 0, and not all 0"),
        (lambda: Curve([1.0], [2], [2.0]), "steps must ascend within 1 and 1"),
        (lambda: Curve([1.0], [0], [2.0]), "steps must ascend within 1 and 1"),
        (lambda: Curve([1.0] * 3, [2, 1], [2.0, 2.0]), "steps must ascend"),
        (lambda: Curve([1.0], [1], [math.nan]), "losses must be finite and > 0"),
        (lambda: Curve([1.0], [1], [0.0]), "losses must be finite and > 0"),
        (lambda: Curve([1.0], [1], [2.0], warmup=1), "warmup is 1; it must be in [0, 1)"),
        (lambda: fit_annealing_law([FLAT]), "curves have no LR that decreases after the warm-up"),
        (lambda: fit_multi_power_law([FLAT]), "curves have no LR that decreases after the warm-up"),
        (lambda: fit_annealing_law([Curve([1.0, 0.5], [1, 2], [3.0, 2.0])]), "curves have 2 points together"),
        (lambda: fit_annealing_law([]), "curves have 0 points together"),
        (lambda: predict_loss(ANNEALING, [FLAT], [1e-3], blocks=1), "blocks is 1; it must be >= 2"),
    ],
)
def test_what_cannot_be_fitted_is_refused(call, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        call()
