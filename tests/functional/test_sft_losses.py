"""Fine-tuning losses against loops over whole distributions, their gradients, and their neutral settings."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewarm.functional.sft_losses import (
    dft_loss,
    distillation_loss,
    ditto_loss,
    label_smoothing_loss,
    nll_loss,
    num_selected_tokens,
    select_tokens,
    task_token_weights,
    z_loss,
)

B, T, V = 3, 7, 11


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Head(NamedTuple):
    """What the losses get of each token's distribution."""

    logprobs: Tensor
    mean_logprobs: Tensor
    logsumexps: Tensor
    entropies: Tensor


def head(logits, targets):
    logprobs = logits.log_softmax(-1)
    return Head(
        logprobs.gather(-1, targets[..., None]).squeeze(-1),
        logprobs.mean(-1),
        logits.logsumexp(-1),
        -(logprobs.exp() * logprobs).sum(-1),
    )


@pytest.fixture
def logits():
    return (2 * torch.randn(B, T, V, generator=rng(), dtype=torch.float64)).requires_grad_()


@pytest.fixture
def targets():
    return torch.randint(V, (B, T), generator=rng(1))


def distribution(row):
    """A token's probabilities by a loop over Python floats."""
    exponentials = [math.exp(z) for z in row]
    return [e / math.fsum(exponentials) for e in exponentials]


def by_loop(function, logits, targets):
    """function(probabilities, target, logits) for each token."""
    return torch.tensor(
        [
            [function(distribution(z), y, z) for z, y in zip(zs, ys, strict=True)]
            for zs, ys in zip(logits.tolist(), targets.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


# --- values and gradients -------------------------------------------------------------------------


def test_nll_is_the_cross_entropy(logits, targets):
    losses = nll_loss(head(logits, targets).logprobs)
    assert_same(losses, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, T))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_equals_a_loop_and_torchs(logits, targets, smoothing):
    given = head(logits, targets)
    losses = label_smoothing_loss(given.logprobs, given.mean_logprobs, smoothing=smoothing)
    expected = by_loop(
        lambda p, y, _: -sum(((1 - smoothing) * (v == y) + smoothing / V) * math.log(p[v]) for v in range(V)),
        logits,
        targets,
    )
    assert_same(losses.detach(), expected)
    torchs = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing
    )
    assert_same(losses, torchs.view(B, T))


@pytest.mark.parametrize("coefficient", [0.0, 1e-4, 0.5])
def test_the_z_loss_equals_a_loop(logits, targets, coefficient):
    losses = z_loss(head(logits, targets).logsumexps, coefficient=coefficient)
    expected = by_loop(
        lambda p, y, z: coefficient * math.log(math.fsum(map(math.exp, z))) ** 2, logits, targets
    )
    assert_same(losses.detach(), expected)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_dft_equals_a_loop_and_its_weight_carries_no_gradient(logits, targets, power):
    losses = dft_loss(head(logits, targets).logprobs, power=power)
    assert_same(losses.detach(), by_loop(lambda p, y, _: -(p[y] ** power) * math.log(p[y]), logits, targets))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    p = logits.detach().softmax(-1)
    chosen = p.gather(-1, targets[..., None])
    assert_same(gradient, chosen**power * (p - F.one_hot(targets, V)))


def test_the_gradient_of_dft_is_that_of_the_probability(logits, targets):
    logprobs = head(logits, targets).logprobs
    (gradient,) = torch.autograd.grad(dft_loss(logprobs).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-logprobs.exp().sum(), logits)
    assert_same(gradient, expected)


def test_gradients_are_those_of_finite_differences(logits, targets):
    def smoothed(z):
        given = head(z, targets)
        return label_smoothing_loss(given.logprobs, given.mean_logprobs, smoothing=0.2)

    def with_z(z):
        given = head(z, targets)
        return nll_loss(given.logprobs) + z_loss(given.logsumexps, coefficient=0.1)

    def selected(z):
        given = head(z, targets)
        mask = torch.ones(B, T, dtype=torch.bool)
        return nll_loss(given.logprobs) * select_tokens(
            given.logprobs, given.entropies, mask, token_ratio=0.5, entropy_weight=0.8
        )

    earlier = torch.full((B, T), -1)
    earlier[:, 4:] = torch.tensor([1, 2, 3])
    unmoved = logits.detach().clone()

    def repeated(z):
        # Only repeated tokens' own logits move: the earlier probabilities carry no gradient.
        held = torch.cat([unmoved[:, :4], z[:, 4:]], 1)
        return ditto_loss(head(held, targets).logprobs, earlier, decay=0.5)[:, 4:]

    places = torch.topk(torch.rand(B, T, V, generator=rng(2)), 4).indices
    teacher = torch.randn(B, T, V, generator=rng(3), dtype=torch.float64).log_softmax(-1).gather(-1, places)

    def distilled(z):
        return distillation_loss((z / 2).log_softmax(-1).gather(-1, places), teacher, temperature=2.0)

    for loss in (smoothed, with_z, selected, repeated, distilled):
        assert torch.autograd.gradcheck(loss, logits), loss.__name__


# --- Entropy-SFT ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("weight", [0.0, 0.8, 3.0])
def test_selection_keeps_the_largest_excess_of_error_over_doubt(logits, targets, ratio, weight):
    mask = torch.rand(B, T, generator=rng(4)) < 0.7
    given = head(logits, targets)
    found = select_tokens(given.logprobs, given.entropies, mask, token_ratio=ratio, entropy_weight=weight)
    places = [(b, t) for b in range(B) for t in range(T) if mask[b, t]]

    def excess(place):
        p = distribution(logits[place].tolist())
        return -math.log(p[targets[place]]) + weight * sum(q * math.log(q) for q in p)

    wanted = sorted(places, key=excess, reverse=True)[: max(1, int(ratio * len(places)))]
    assert {(int(b), int(t)) for b, t in found.nonzero()} == set(wanted)
    assert found.sum() == num_selected_tokens(len(places), ratio)


def test_the_mean_over_the_selected_is_the_published_loss(logits, targets):
    given = head(logits, targets)
    mask = torch.ones(B, T, dtype=torch.bool)
    kept = select_tokens(given.logprobs, given.entropies, mask, token_ratio=0.3, entropy_weight=0.8)
    loss = (nll_loss(given.logprobs) * kept).sum() / num_selected_tokens(B * T, 0.3)
    errors = -given.logprobs.flatten() - 0.8 * given.entropies.flatten()
    published = -given.logprobs.flatten()[errors.topk(int(0.3 * B * T)).indices].mean()
    assert_same(loss, published)


def test_selection_among_ties_and_among_nothing_has_its_number():
    zeros = torch.zeros(2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    options = {"token_ratio": 0.39, "entropy_weight": 1.0}
    assert select_tokens(zeros, zeros, mask, **options).sum() == 3
    assert select_tokens(zeros, zeros, ~mask, **options).sum() == 0
    mask[0] = False
    found = select_tokens(zeros, zeros, mask, **options, num_tokens=5)
    assert torch.equal(found, select_tokens(zeros, zeros, mask, **options))
    assert found.sum() == 1
    assert not found[0].any()
    assert [num_selected_tokens(n, 0.2) for n in (0, 1, 4, 5, 9, 10, 11)] == [0, 1, 1, 1, 1, 2, 2]


# --- DITTO ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("one_sided", [False, True])
def test_ditto_equals_a_loop(logits, targets, decay, one_sided):
    earlier = torch.tensor([[-1, -1, 0, 1, 2, 3, 4], [-1] * 7, [-1, -1, -1, -1, 1, 2, -1]])
    logprobs = head(logits, targets).logprobs
    losses = ditto_loss(logprobs, earlier, decay=decay, one_sided=one_sided)
    p = logprobs.exp().tolist()
    for b in range(B):
        for t in range(T):
            before = int(earlier[b, t])
            difference = p[b][t] - decay * p[b][before]
            difference = max(difference, 0.0) if one_sided else abs(difference)
            expected = -math.log(1 - difference) if before >= 0 else -math.log(p[b][t])
            assert losses[b, t].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_no_gradient_reaches_the_earlier_token():
    logprobs = torch.tensor([[0.4, 0.3]], dtype=torch.float64).log().requires_grad_()
    loss = ditto_loss(logprobs, torch.tensor([[-1, 0]]))[0, 1]
    (gradient,) = torch.autograd.grad(loss, logprobs)
    # d/dlog p of -log(1 - (p - 0.2)) = p / (1 - (p - 0.2))
    assert_same(gradient, torch.tensor([[0.0, 0.3 / 0.9]], dtype=torch.float64))


def test_a_repetition_that_decays_as_wanted_costs_nothing():
    logprobs = torch.tensor([[0.8, 0.4, 0.2, 0.1]]).log()
    earlier = torch.tensor([[-1, 0, 1, 2]])
    assert ditto_loss(logprobs, earlier)[0, 1:].abs().max() < 1e-6
    rising, falling = torch.tensor([[0.2, 0.9]]).log(), torch.tensor([[0.9, 0.1]]).log()
    pair = torch.tensor([[-1, 0]])
    assert ditto_loss(rising, pair)[0, 1] > 1.0
    assert ditto_loss(falling, pair)[0, 1] > 0.3
    assert ditto_loss(falling, pair, one_sided=True)[0, 1] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_certain_repetition_has_a_finite_loss_and_gradient(dtype):
    logprobs = torch.tensor([[-200.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = ditto_loss(logprobs, torch.tensor([[-1, 0]]), decay=0.5)[0, 1]
    loss.backward()
    assert 10 < loss < 40
    assert logprobs.grad.isfinite().all()


# --- several tasks --------------------------------------------------------------------------------


def test_weighted_tasks_are_a_weighted_sum_of_means_however_the_batch_is_cut(logits, targets):
    losses = nll_loss(head(logits, targets).logprobs)
    tasks = torch.randint(-1, 3, (B, T), generator=rng(5))
    counts = [int((tasks == k).sum()) for k in range(3)]
    shares = [0.5, 0.2, 0.3]
    expected = sum(w * losses[tasks == k].mean() for k, w in enumerate(shares))
    weights = task_token_weights(tasks, shares, counts)
    torch.testing.assert_close((weights * losses).sum(), expected, rtol=1e-6, atol=1e-6)
    rows = sum((task_token_weights(tasks[b], shares, counts) * losses[b]).sum() for b in range(B))
    torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-6)


def test_a_task_without_tokens_counts_for_nothing():
    assert task_token_weights(torch.tensor([0, 0]), [0.5, 0.5], [2, 0]).tolist() == [0.25, 0.25]


# --- distillation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_with_all_tokens_stored_it_is_the_full_divergence(logits, temperature):
    teacher_logits = 2 * torch.randn(B, T, V, generator=rng(6), dtype=torch.float64)
    student, teacher = ((z / temperature).log_softmax(-1) for z in (logits, teacher_logits))
    order = torch.rand(B, T, V, generator=rng(7)).argsort(-1)
    losses = distillation_loss(student.gather(-1, order), teacher.gather(-1, order), temperature=temperature)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(losses, temperature**2 * divergence, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_with_some_tokens_stored_the_others_are_one_more_token(logits, targets, k):
    teacher_logits = 2 * torch.randn(B, T, V, generator=rng(6), dtype=torch.float64)
    stored = (teacher_logits / 2).log_softmax(-1).topk(k)
    student = (logits / 2).log_softmax(-1).gather(-1, stored.indices)
    losses = distillation_loss(student, stored.values, temperature=2.0)
    for b in range(B):
        for t in range(T):
            q = distribution([z / 2 for z in teacher_logits[b, t].tolist()])
            p = distribution([z / 2 for z in logits[b, t].tolist()])
            kept = stored.indices[b, t].tolist()
            rest = [v for v in range(V) if v not in kept]
            pairs = [(q[v], p[v]) for v in kept] + [(sum(q[v] for v in rest), sum(p[v] for v in rest))]
            expected = 4 * sum(x * math.log(x / y) for x, y in pairs)
            assert losses[b, t].item() == pytest.approx(expected, rel=1e-9)


def test_a_teacher_normalised_over_what_was_stored_has_no_rest(logits):
    stored = torch.randn(B, T, V, generator=rng(6), dtype=torch.float64).topk(3)
    teacher = stored.values.log_softmax(-1)
    student = logits.log_softmax(-1).gather(-1, stored.indices)
    assert_same(distillation_loss(student, teacher), (teacher.exp() * (teacher - student)).sum(-1))


def test_a_student_like_its_teacher_costs_nothing_and_has_no_gradient(logits):
    student = (logits / 2).log_softmax(-1).topk(4).values
    losses = distillation_loss(student, student.detach(), temperature=2.0)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


def test_stored_zeros_and_a_student_sure_of_other_tokens_stay_finite():
    teacher = torch.tensor([[0.0, -torch.inf], [math.log(0.5), math.log(0.2)]])
    student = torch.tensor([[-60.0, -50.0], [math.log(0.7), math.log(0.3)]], requires_grad=True)
    losses = distillation_loss(student, teacher)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert losses[0].item() == pytest.approx(60.0)
    assert student.grad.isfinite().all()


# --- what holds for all ---------------------------------------------------------------------------


def test_all_reduce_to_nll_at_their_neutral_setting(logits, targets):
    given = head(logits, targets)
    nll = nll_loss(given.logprobs)
    mask = torch.ones(B, T, dtype=torch.bool)
    selected = select_tokens(given.logprobs, given.entropies, mask, token_ratio=1.0, entropy_weight=0.8)
    one_task = task_token_weights(torch.zeros(B, T, dtype=torch.int64), [1.0], [B * T])
    neutral = {
        "label smoothing": label_smoothing_loss(given.logprobs, given.mean_logprobs, smoothing=0.0),
        "z": nll + z_loss(given.logsumexps, coefficient=0.0),
        "dft": dft_loss(given.logprobs, power=0.0),
        "entropy": nll * selected,
        "ditto": ditto_loss(given.logprobs, torch.full((B, T), -1)),
        "distillation": distillation_loss(
            given.logprobs[..., None], torch.zeros(B, T, 1, dtype=torch.float64), temperature=1.0
        ),
        "tasks": nll * one_task.double() * (B * T),
    }
    for name, losses in neutral.items():
        tolerance = 1e-6 if name == "tasks" else 1e-12  # its weights are float32
        torch.testing.assert_close(
            losses, nll, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_positions_without_a_target_cost_nothing_and_get_no_gradient():
    zeros = torch.zeros(2, 3, requires_grad=True)
    earlier = torch.tensor([[-1, 0, 1], [-1, -1, -1]])
    losses = [
        nll_loss(zeros),
        label_smoothing_loss(zeros, zeros, smoothing=0.1),
        z_loss(zeros, coefficient=0.1),
        distillation_loss(zeros[..., None].expand(2, 3, 4), torch.zeros(2, 3, 4)),
        ditto_loss(zeros, earlier, decay=1.0),
    ]
    for loss in losses:
        assert loss.abs().max() == 0.0
    (dft,) = torch.autograd.grad(z_loss(zeros, coefficient=0.1).sum(), zeros)
    assert dft.abs().max() == 0.0


def test_half_precision_teachers_and_large_losses_stay_finite():
    logprobs = torch.tensor([-1e4, -1e-8, 0.0])
    assert dft_loss(logprobs).isfinite().all()
    assert label_smoothing_loss(logprobs, logprobs - 1e4, smoothing=0.5).isfinite().all()
    teacher = torch.tensor([[0.6, 0.4]]).log().bfloat16()
    student = torch.tensor([[0.5, 0.3]]).log()
    found = distillation_loss(student, teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(0.6 * math.log(1.2) + 0.4 * math.log(4 / 3), abs=2e-2)


ROW, MASK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
INTS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: label_smoothing_loss(ROW, ROW, smoothing=1.0), "smoothing is 1.0"),
        (lambda: label_smoothing_loss(ROW, ROW, smoothing=-0.1), "smoothing is -0.1"),
        (lambda: z_loss(ROW, coefficient=-1.0), "coefficient is -1.0"),
        (lambda: dft_loss(ROW, power=1.1), "power is 1.1"),
        (lambda: num_selected_tokens(5, 0.0), "token_ratio is 0.0"),
        (lambda: num_selected_tokens(5, math.nan), "token_ratio is nan"),
        (lambda: num_selected_tokens(-1, 0.5), "num_tokens is -1"),
        (
            lambda: select_tokens(ROW, ROW[:1], MASK, token_ratio=0.5, entropy_weight=1.0),
            r"entropies \(1, 3\)",
        ),
        (
            lambda: select_tokens(ROW, ROW, MASK, token_ratio=1.5, entropy_weight=1.0),
            "token_ratio is 1.5",
        ),
        (
            lambda: select_tokens(ROW, ROW, MASK, token_ratio=0.5, entropy_weight=-1.0),
            "entropy_weight is -1.0",
        ),
        (lambda: ditto_loss(ROW, INTS - 1, decay=1.5), "decay is 1.5"),
        (lambda: ditto_loss(ROW, INTS[:1]), r"earlier \(1, 3\)"),
        (lambda: ditto_loss(ROW, INTS), "not before its own"),
        (lambda: task_token_weights(INTS, [1.0], [1, 2]), "1 task_weights but 2 task_counts"),
        (lambda: task_token_weights(INTS, [-1.0], [1]), r"task_weights is \[-1.0\]"),
        (lambda: task_token_weights(INTS, [1.0], [-1]), r"task_counts is \[-1\]"),
        (lambda: task_token_weights(INTS + 1, [1.0], [1]), "outside of -1 to 0"),
        (lambda: distillation_loss(ROW, ROW[:1]), r"teacher_logprobs \(1, 3\)"),
        (lambda: distillation_loss(ROW, ROW, temperature=0.0), "temperature is 0.0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(act, named):
    with pytest.raises(ValueError, match=named):
        act()
