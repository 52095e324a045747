"""Averages of checkpoints against loops in float64."""

import itertools
import math
import weakref

import pytest
import torch

from rewarm.functional import averaging
from rewarm.functional.averaging import (
    debiased_decay,
    ema_,
    ema_weights,
    greedy_soup,
    mean_weights,
    merge,
    merge_decay,
)
from rewarm.schedules.decay_weights import decay_weights


def checkpoints(k, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (7,), (), (2, 2, 2)]
    return [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(k)]


def weighted_sum(lists, weights):
    return [
        sum(w * t.double() for w, t in zip(weights, column, strict=True))
        for column in zip(*lists, strict=True)
    ]


def test_ema_weights_of_six_checkpoints_are_the_papers():
    golden = [0.328, 0.082, 0.102, 0.128, 0.160, 0.200]
    assert ema_weights(0.2, 6) == pytest.approx(golden, abs=5e-4)


@pytest.mark.parametrize("k", [1, 2, 6, 9])
@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0])
def test_ema_weights_are_those_of_the_recursion(alpha, k):
    expected = []
    for i in range(k):  # the recursion on unit vectors gives the weights
        expected = [1.0] if i == 0 else [(1 - alpha) * w for w in expected] + [alpha]
    assert ema_weights(alpha, k) == pytest.approx(expected, abs=1e-12)
    assert sum(ema_weights(alpha, k)) == pytest.approx(1.0)


@pytest.mark.parametrize("k", [1, 2, 6, 9])
@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0])
def test_debiased_ema_weights_fall_geometrically_from_the_newest(alpha, k):
    weights = ema_weights(alpha, k, debias=True)
    assert sum(weights) == pytest.approx(1.0)
    for older, newer in itertools.pairwise(weights):
        assert older == pytest.approx((1 - alpha) * newer)


def test_mean_weights_are_equal():
    assert mean_weights(5) == [0.2] * 5


@pytest.mark.parametrize("weights", [mean_weights(4), decay_weights([0.5, 0.3, 0.1]), [0.0, 2.0, 0.0, 1.0]])
def test_merge_decay_builds_each_windows_weighted_mean_in_one_buffer(weights):
    lists = checkpoints(12)
    buffer = [torch.full_like(t, math.nan) for t in lists[0]]  # what was there before does not matter
    for t, tensors in enumerate(lists, 1):
        ema_(buffer, tensors, merge_decay(weights, t))
        if t % 4 == 0:
            shares = [weight / sum(weights) for weight in weights]
            expected = weighted_sum(lists[t - 4 : t], shares)
            for tensor, mean in zip(buffer, expected, strict=True):
                torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)


def test_within_a_window_the_mean_is_that_of_its_values_so_far():
    buffer = [torch.zeros(1)]
    seen = []
    for t, value in enumerate([3.0, 5.0, 1.0, 9.0, 2.0, 4.0, 6.0], 1):
        ema_(buffer, [torch.tensor([value])], merge_decay(mean_weights(3), t))
        seen.append(buffer[0].item())
    assert seen == pytest.approx([3.0, 4.0, 3.0, 9.0, 5.5, 5.0, 6.0])


@pytest.mark.parametrize("seed", range(20))
def test_a_greedy_soup_is_what_the_recipe_of_the_paper_cooks(seed):
    points = torch.randn(7, 2, generator=torch.Generator().manual_seed(seed))
    asked = []

    def score(chosen):
        asked.append(tuple(chosen))
        return -float((points[chosen].mean(0) - 0.3).norm())

    alone = [score([index]) for index in range(7)]
    soup = greedy_soup(alone, score)
    # the recipe: sort by score; ingredients <- ingredients + [i] if the mean with it is no worse
    ingredients = []
    for index in sorted(range(7), key=lambda i: alone[i], reverse=True):
        if not ingredients or score([*ingredients, index]) >= score(ingredients):
            ingredients.append(index)
    assert soup == ingredients
    assert score(soup) >= max(alone)


def test_a_greedy_soup_asks_once_per_further_checkpoint_and_takes_equals():
    asked = []

    def score(chosen):
        asked.append(chosen)
        return 1.0

    assert greedy_soup([0.5, 1.0, 0.7], score) == [1, 2, 0]
    assert asked == [[1, 2], [1, 2, 0]]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 0.999999])
def test_debiased_decay_gives_the_zero_started_average_divided_by_its_weights(decay):
    values = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0]
    zero_started, average = 0.0, math.nan
    for t, value in enumerate(values, 1):
        zero_started = decay * zero_started + (1 - decay) * value
        d = debiased_decay(decay, t)
        average = value if t == 1 else d * average + (1 - d) * value
        assert average == pytest.approx(zero_started / (1 - decay**t), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_equals_a_float64_loop(dtype):
    lists = checkpoints(30, dtype=dtype)
    averages = [t.float() for t in lists[0]]
    reference = [t.double() for t in lists[0]]
    for tensors in lists[1:]:
        ema_(averages, tensors, 0.9)
        reference = [0.9 * r + 0.1 * t.double() for r, t in zip(reference, tensors, strict=True)]
    for average, expected in zip(averages, reference, strict=True):
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)


def test_ema_with_decay_zero_is_the_current_weights():
    first, second = checkpoints(2)
    averages = [t.clone() for t in first]
    ema_(averages, second, 0.0)
    assert all(torch.equal(a, t) for a, t in zip(averages, second, strict=True))


def test_ema_of_bfloat16_parameters_moves_where_a_bfloat16_buffer_stalls():
    average, target = [torch.tensor([1.0])], [torch.tensor([1.5], dtype=torch.bfloat16)]
    stalled = torch.tensor([1.0], dtype=torch.bfloat16)
    for _ in range(2000):
        ema_(average, target, 0.999)
        stalled.lerp_(target[0], 0.001)
    assert stalled.item() == 1.0
    assert average[0].item() == pytest.approx(1.5 - 0.5 * 0.999**2000, abs=1e-3)


def test_ema_does_not_depend_on_the_bucket_size(monkeypatch):
    first, second = checkpoints(2)
    whole, split = [t.clone() for t in first], [t.clone() for t in first]
    ema_(whole, second, 0.7)
    monkeypatch.setattr(averaging, "_BUCKET_ELEMENTS", 8)
    ema_(split, second, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True))


def test_a_large_tensor_is_cast_a_few_rows_at_a_time(monkeypatch):
    average = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    tensor = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = average.lerp(tensor.float(), 0.3)
    monkeypatch.setattr(averaging, "_BUCKET_ELEMENTS", 16)
    casts = []
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *a, **k: casts.append(self.numel()) or to(self, *a, **k)
    )
    ema_([average], [tensor], 0.7)
    monkeypatch.undo()
    assert torch.equal(average, expected)
    assert max(casts) <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "weights", [mean_weights(4), ema_weights(0.2, 4), [0.0, 0.5, 0.0, 0.5], [1.0, 0.0, 0.0, 0.0]]
)
def test_merge_equals_the_weighted_sum_in_float64(weights, dtype):
    lists = checkpoints(4, dtype=dtype)
    for merged, expected in zip(merge(lists, weights), weighted_sum(lists, weights), strict=True):
        assert merged.dtype == torch.float32
        torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)


def test_merge_writes_where_it_is_told_to():
    lists = checkpoints(3)
    out = [torch.full_like(t, math.inf) for t in lists[0]]
    merged = merge(iter(lists), mean_weights(3), out)
    assert all(m is o for m, o in zip(merged, out, strict=True))
    assert all(torch.equal(o, m) for o, m in zip(out, merge(lists, mean_weights(3)), strict=True))


@pytest.mark.parametrize("k", [1, 3, 6, 7])
def test_equal_checkpoints_merge_to_themselves_exactly(k):
    (checkpoint,) = checkpoints(1)
    for weights in (mean_weights(k), ema_weights(0.2, k)):
        merged = merge([checkpoint] * k, weights)
        assert all(torch.equal(m, t) for m, t in zip(merged, checkpoint, strict=True))


def test_merge_holds_one_checkpoint_at_a_time_and_leaves_it_alone():
    before = None

    def load():
        nonlocal before
        for i in range(4):
            assert before is None or before() is None, "the checkpoint before is still in memory"
            tensor = torch.full((3,), float(i))
            before = weakref.ref(tensor)
            tensors = [tensor]
            del tensor
            yield tensors
            assert tensors[0].tolist() == [float(i)] * 3
            del tensors

    assert merge(load(), mean_weights(4))[0].tolist() == pytest.approx([1.5] * 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_weights(0), "k is 0"),
        (lambda: ema_weights(0.0, 3), "alpha is 0.0"),
        (lambda: ema_weights(0.2, 0), "k is 0"),
        (lambda: merge_decay([], 1), "not all 0"),
        (lambda: merge_decay([1.0, -1.0], 1), "0 or more"),
        (lambda: merge_decay([0.0], 1), "not all 0"),
        (lambda: merge_decay([1.0], 0), "num_updates is 0"),
        (lambda: greedy_soup([], max), "at least one"),
        (lambda: greedy_soup([1.0, math.nan], max), "all finite"),
        (lambda: greedy_soup([1.0, 0.0], lambda chosen: math.nan), r"checkpoints \[0, 1\] scores nan"),
        (lambda: debiased_decay(1.0, 3), "decay is 1.0"),
        (lambda: debiased_decay(0.9, 0), "num_updates is 0"),
        (lambda: ema_([torch.zeros(2)], [torch.zeros(2)], 1.5), "decay is 1.5"),
        (lambda: ema_([torch.zeros(2)], [torch.zeros(3)], 0.5), r"shape \(3,\)"),
        (lambda: ema_([torch.zeros(2)], [], 0.5), "1 averages and 0 tensors"),
        (lambda: ema_([torch.zeros(2).bfloat16()], [torch.zeros(2)], 0.5), "kept in float32"),
        (lambda: merge(checkpoints(2), [0.5, 0.6]), "sum to 1"),
        (lambda: merge([[torch.zeros(2)]], [1.0], [torch.zeros(3)]), r"shape \(2,\), its average has \(3,\)"),
        (lambda: merge([[torch.zeros(2)]], [1.0], [torch.zeros(2).half()]), "kept in float32"),
        (lambda: merge(checkpoints(2), [1.5, -0.5]), "0 or more"),
        (lambda: merge([], []), "sum to 1"),
        (lambda: merge(checkpoints(2), mean_weights(3)), "2 entries for 3 weights"),
        (lambda: merge(checkpoints(4), mean_weights(3)), "more entries for 3 weights"),
        (lambda: merge([[torch.arange(3)]], [1.0]), "int64"),
        (lambda: merge([[torch.zeros(2)], [torch.zeros(3)]], [0.5, 0.5]), r"shape \(3,\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
