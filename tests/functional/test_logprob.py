import logging
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical
from torch.utils.flop_counter import FlopCounterMode

from rewarm.functional import logprob
from rewarm.functional.logprob import IGNORE_INDEX, token_logprobs

N, D, V = 13, 6, 29
HEADS = [
    pytest.param({}, id="plain"),
    pytest.param({"temperature": 0.7}, id="temperature"),
    pytest.param({"softcap": 3.0}, id="softcap"),
    pytest.param({"softcap": 3.0, "temperature": 1.6}, id="softcap-temperature"),
]


def build(seed=0, n=N, d=D, v=V, masked=0, dtype=torch.float64, with_bias=True):
    """Leaves (hidden, weight, bias), targets (some masked), and an upstream gradient for each token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = (
        torch.randn(v, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        if with_bias
        else None
    )
    targets = torch.randint(v, (n,), generator=generator)
    targets[torch.randperm(n, generator=generator)[:masked]] = IGNORE_INDEX
    upstream = torch.randn(n, generator=generator, dtype=torch.float64)
    return hidden, weight, bias, targets, upstream


def double_copies(*tensors):
    return tuple(None if t is None else t.detach().double().requires_grad_() for t in tensors)


def run(hidden, weight, bias, targets, upstream, **options):
    """Values and the gradients of hidden, weight and bias."""
    values = token_logprobs(hidden, weight, targets, bias=bias, **options)
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    return values.detach(), *torch.autograd.grad(values, leaves, upstream.to(values.dtype))


def assert_all_close(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def written_out(hidden, weight, bias, targets, upstream, temperature=1.0, softcap=None):
    """Values and gradients by loops over Python floats, from the definitions."""
    (n, d), v = hidden.shape, len(weight)
    h, w, b = hidden.tolist(), weight.tolist(), bias.tolist()
    values, grad_h = [0.0] * n, [[0.0] * d for _ in range(n)]
    grad_w, grad_b = [[0.0] * d for _ in range(v)], [0.0] * v
    for i, target in enumerate(targets.tolist()):
        if target == IGNORE_INDEX:
            continue
        scores, slopes = [], []
        for j in range(v):
            z = sum(h[i][k] * w[j][k] for k in range(d)) + b[j]
            capped = z if softcap is None else softcap * math.tanh(z / softcap)
            slope = 1.0 if softcap is None else 1.0 - math.tanh(z / softcap) ** 2
            scores.append(capped / temperature)
            slopes.append(slope / temperature)
        norm = math.fsum(math.exp(s) for s in scores)
        values[i] = scores[target] - math.log(norm)
        for j in range(v):
            grad_z = float(upstream[i]) * ((j == target) - math.exp(scores[j]) / norm) * slopes[j]
            grad_b[j] += grad_z
            for k in range(d):
                grad_h[i][k] += grad_z * w[j][k]
                grad_w[j][k] += grad_z * h[i][k]
    return tuple(torch.tensor(result, dtype=torch.float64) for result in (values, grad_h, grad_w, grad_b))


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_are_those_of_the_written_out_loops(backend, head):
    inputs = build(masked=4)
    assert_all_close(run(*inputs, backend=backend, **head), written_out(*inputs, **head), 1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, N - 1, N, 100, None])
@pytest.mark.parametrize("head", HEADS)
def test_the_chunk_size_changes_nothing(chunk_size, head):
    inputs = build(masked=2)
    expected = run(*inputs, backend="dense", **head)
    assert_all_close(run(*inputs, chunk_size=chunk_size, **head), expected, 1e-12)


@pytest.mark.parametrize("chunk_size", [4, None])
@pytest.mark.parametrize("head", HEADS)
def test_gradcheck_in_float64(chunk_size, head):
    hidden, weight, bias, targets, _ = build(n=5, d=3, v=7, masked=1)

    def logprobs(hidden, weight, bias):
        return token_logprobs(hidden, weight, targets, bias=bias, chunk_size=chunk_size, **head)

    assert torch.autograd.gradcheck(logprobs, (hidden, weight, bias))


@pytest.mark.parametrize("chunk_size", [7, None])
@pytest.mark.parametrize("head", HEADS)
def test_float32_agrees_with_float64_to_rounding(chunk_size, head):
    hidden, weight, bias, targets, upstream = build(dtype=torch.float32, n=40, v=300)
    expected = run(*double_copies(hidden, weight, bias), targets, upstream, backend="dense", **head)
    actual = run(hidden, weight, bias, targets, upstream, chunk_size=chunk_size, **head)
    assert actual[0].dtype == torch.float32
    assert_all_close(actual, expected, 2e-5)


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_is_nearer_to_float64_than_dense_bfloat16(head):
    hidden, weight, bias, targets, upstream = build(dtype=torch.bfloat16, n=64, d=32, v=500)
    exact = run(*double_copies(hidden, weight, bias), targets, upstream, backend="dense", **head)
    ours = run(hidden, weight, bias, targets, upstream, chunk_size=7, **head)
    dense = run(hidden, weight, bias, targets, upstream, backend="dense", **head)
    assert ours[0].dtype == torch.float32
    assert [grad.dtype for grad in ours[1:]] == [torch.bfloat16] * 3
    for value, reference, truth in zip(ours, dense, exact, strict=True):
        assert (value.double() - truth).norm() <= 1.01 * (reference.double() - truth).norm()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_keep_their_parameters_dtype_and_no_accuracy_is_lost(hidden_dtype):
    hidden, weight, bias, targets, upstream = build(dtype=torch.float32, n=64, d=32, v=500)
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    exact = run(*double_copies(hidden, weight, bias), targets, upstream, backend="dense")
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(hidden, weight, bias, targets, upstream, chunk_size=7)
        dense = run(hidden, weight, bias, targets, upstream, backend="dense")
        values = token_logprobs(hidden, weight, targets, bias=bias, chunk_size=7)
    outside = torch.autograd.grad(values, (hidden, weight, bias), upstream.float())
    assert ours[0].dtype == torch.float32
    assert [grad.dtype for grad in ours[1:]] == [hidden_dtype, torch.float32, torch.float32]
    assert_all_close(outside, ours[1:], 0.0)
    for value, reference, truth in zip(ours, dense, exact, strict=True):
        assert (value.double() - truth).norm() <= (reference.double() - truth).norm()


@pytest.mark.parametrize("chunk_size", [7, None])
@pytest.mark.parametrize("head", HEADS)
def test_operands_as_narrow_as_on_tensor_cores_are_no_worse_than_dense_bfloat16(
    monkeypatch, chunk_size, head
):
    def add_product(out, left, right, *, beta=1, alpha=1):
        assert (left.dtype, right.dtype, out.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        return torch.addmm(out, left.float(), right.float(), beta=beta, alpha=alpha, out=out)

    hidden, weight, bias, targets, upstream = build(dtype=torch.bfloat16, n=64, d=32, v=500)
    exact = run(*double_copies(hidden, weight, bias), targets, upstream, backend="dense", **head)
    dense = run(hidden, weight, bias, targets, upstream, backend="dense", **head)
    monkeypatch.setattr(logprob, "_operand_dtype", lambda hidden: torch.bfloat16)
    monkeypatch.setattr(logprob, "_add_product", add_product)
    ours = run(hidden, weight, bias, targets, upstream, chunk_size=chunk_size, **head)
    for value, reference, truth in zip(ours, dense, exact, strict=True):
        assert (value.double() - truth).norm() <= 1.05 * (reference.double() - truth).norm()


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_masked_positions_give_what_slicing_them_away_gives(backend):
    hidden, weight, bias, targets, upstream = build(masked=5)
    kept = targets != IGNORE_INDEX
    values, grad_hidden, *grad_head = run(hidden, weight, bias, targets, upstream, backend=backend)
    sliced = hidden.detach()[kept].requires_grad_()
    expected, expected_hidden, *expected_head = run(
        sliced, weight, bias, targets[kept], upstream[kept], backend=backend
    )
    assert_all_close(
        (values[kept], grad_hidden[kept], *grad_head), (expected, expected_hidden, *expected_head), 1e-12
    )
    assert not values[~kept].any()
    assert not grad_hidden[~kept].any()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("with_entropy", [False, True])
def test_added_masked_rows_change_nothing_even_when_they_hold_nan(seed, with_entropy):
    hidden, weight, bias, targets, upstream = build(seed, masked=seed)
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(N + 4, generator=generator)[:N].sort().values
    longer = torch.full((N + 4, D), float("nan"), dtype=torch.float64).index_copy(0, place, hidden.detach())
    longer_targets = torch.full((N + 4,), IGNORE_INDEX).index_copy(0, place, targets)
    longer_upstream = torch.ones(N + 4, dtype=torch.float64).index_copy(0, place, upstream)

    values, grad_hidden, *grad_head = run(hidden, weight, bias, targets, upstream)
    longer.requires_grad_()
    more_values, more_hidden, *more_head = run(longer, weight, bias, longer_targets, longer_upstream)
    expected, actual = (values, grad_hidden, *grad_head), (more_values[place], more_hidden[place], *more_head)
    if with_entropy:
        expected = token_logprobs(hidden, weight, targets, with_entropy=True)
        actual = [x[place] for x in token_logprobs(longer, weight, longer_targets, with_entropy=True)]
    assert_all_close(actual, expected, 0.0)


@pytest.mark.parametrize("backend", ["auto", "torch", "dense"])
@pytest.mark.parametrize("n", [0, 6])
def test_without_any_target_the_result_is_zero_and_every_parameter_gets_a_zero_gradient(backend, n):
    hidden, weight, bias, targets, _ = build(n=n, masked=n, dtype=torch.float32)
    values, entropy = token_logprobs(hidden, weight, targets, bias=bias, with_entropy=True, backend=backend)
    values.sum().backward()
    assert torch.equal(values, torch.zeros(n))
    assert torch.equal(entropy, torch.zeros(n))
    for leaf in (hidden, weight, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_tied_head_adds_both_of_its_gradients():
    _, weight, _, targets, upstream = build()
    inputs = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))

    def grad(backend):
        embedding = weight.detach().clone().requires_grad_()
        values = token_logprobs(
            torch.tanh(F.embedding(inputs, embedding)), embedding, targets, backend=backend
        )
        return torch.autograd.grad(values, embedding, upstream)

    assert_all_close(grad("torch"), grad("dense"), 1e-12)


@pytest.mark.parametrize("chunk_size", [4, None])
def test_a_second_backward_through_a_kept_graph_gives_the_same_gradients(chunk_size):
    hidden, weight, _, targets, upstream = build()
    values = token_logprobs(hidden, weight, targets, chunk_size=chunk_size)
    first = torch.autograd.grad(values, (hidden, weight), upstream, retain_graph=True)
    assert_all_close(
        torch.autograd.grad(values, (hidden, weight), 2 * upstream), [2 * g for g in first], 1e-15
    )


def test_differentiating_twice_is_refused_rather_than_wrong():
    hidden, weight, _, targets, _ = build()
    (grad,) = torch.autograd.grad(
        (token_logprobs(hidden, weight, targets) ** 2).sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("frozen", "products"), [(None, 4), ("weight", 3), ("hidden", 3)])
def test_only_kept_tokens_and_trained_sides_cost_matrix_products(frozen, products):
    hidden, weight, _, targets, upstream = build(masked=3, with_bias=False)
    expected = dict(zip(("hidden", "weight"), run(hidden, weight, None, targets, upstream)[1:], strict=True))
    leaves = {"hidden": hidden, "weight": weight}
    if frozen:
        leaves[frozen].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        token_logprobs(hidden, weight, targets, chunk_size=4).backward(upstream)
    assert counter.get_total_flops() == products * 2 * (N - 3) * D * V
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            assert_all_close([leaf.grad], [expected[name]], 1e-12)


def saved_numbers(**options):
    hidden, weight, _, targets, _ = build(n=64, v=200, with_bias=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda t: t):
        token_logprobs(hidden, weight, targets, **options)
    return sum(saved)


def test_backward_keeps_no_logits_beyond_the_small_vocabulary_limit(monkeypatch):
    inputs = 64 * D + 200 * D + 64
    assert saved_numbers() == inputs + 64 * 200
    assert saved_numbers(chunk_size=16) == inputs
    monkeypatch.setattr(logprob, "_KEEP_BYTES", 4 * 64 * 200 - 1)
    assert saved_numbers() == inputs


def test_chunks_follow_the_byte_budget_and_are_even():
    rows = 2**26 // (4 * 32000)
    assert logprob.rows_per_chunk(10 * rows, 32000, 1024, "cpu") == rows
    assert logprob.rows_per_chunk(rows + 1, 32000, 1024, "cpu") == math.ceil((rows + 1) / 2)
    assert logprob.rows_per_chunk(5, 2**30, 64, "cpu") == 1
    assert logprob.rows_per_chunk(4096, 64, 32, "cpu") == 4096
    assert logprob.rows_per_chunk(10**6, 32000, 1024, "cuda") == pytest.approx(8 * rows, rel=0.05)


def test_chunks_of_a_narrow_model_are_smaller_but_fill_the_cache():
    assert logprob.rows_per_chunk(8000, 16000, 200, "cpu") == 400  # twice the width
    assert logprob.rows_per_chunk(2**16, 4096, 64, "cpu") == 2**24 // (4 * 4096)


@pytest.mark.parametrize("size", [2, 1000, 30_000])
def test_softmax_and_its_logarithm_in_place_are_those_in_another_buffer(size):
    logits = 9 * torch.randn(7, size, generator=torch.Generator().manual_seed(0))
    for function in (torch.softmax, torch.log_softmax):
        expected, values = function(logits, 1), logits.clone()
        function(values, 1, out=values)
        assert torch.equal(values, expected)


@pytest.mark.parametrize("backend", ["auto", "torch", "dense"])
@pytest.mark.parametrize("masked", [0, 4, N])
def test_a_known_number_of_targets_changes_nothing(backend, masked):
    inputs = build(masked=masked)
    assert_all_close(
        run(*inputs, backend=backend, num_targets=N - masked), run(*inputs, backend=backend), 0.0
    )


@pytest.mark.parametrize("wrong", [0, N - 5, N - 3, N])
def test_a_wrong_number_of_targets_is_refused(wrong):
    hidden, weight, _, targets, _ = build(masked=4)
    with pytest.raises(ValueError, match=f"num_targets is {wrong}, but targets has {N - 4}"):
        token_logprobs(hidden, weight, targets, num_targets=wrong)


def test_places_of_a_known_number_of_targets_need_no_look_at_the_values():
    is_target = torch.tensor([True, False, True, True, False])
    assert logprob._known_places(is_target, 3).tolist() == [0, 2, 3]
    assert logprob._known_places(~is_target & is_target, 0).tolist() == []
    for wrong in (2, 4):
        with pytest.raises(RuntimeError, match="num_targets is not the number of targets"):
            logprob._known_places(is_target, wrong)


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("head", HEADS)
def test_entropy_is_that_of_the_categorical_distribution_and_carries_no_gradient(backend, head):
    hidden, weight, bias, targets, upstream = build(masked=3)
    values, entropy = token_logprobs(
        hidden, weight, targets, bias=bias, with_entropy=True, backend=backend, **head
    )
    logits = (hidden @ weight.T + bias).detach()
    if "softcap" in head:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    expected = Categorical(logits=logits / head.get("temperature", 1.0)).entropy()
    assert_all_close([entropy], [expected.masked_fill(targets == IGNORE_INDEX, 0.0)], 1e-12)
    assert not entropy.requires_grad
    gradients = torch.autograd.grad(values, (hidden, weight, bias), upstream)
    assert_all_close(gradients, run(hidden, weight, bias, targets, upstream, **head)[1:], 1e-12)


def test_entropy_of_bfloat16_input_is_float32_and_exact_to_float32_rounding():
    hidden, weight, _, targets, _ = build(dtype=torch.bfloat16, v=500)
    _, entropy = token_logprobs(hidden, weight, targets, with_entropy=True)
    expected = Categorical(logits=hidden.double() @ weight.double().T).entropy()
    assert entropy.dtype == torch.float32
    assert_all_close([entropy], [expected], 2e-6)


@pytest.mark.parametrize("chunk_size", [4, None])
def test_a_token_ruled_out_by_a_bias_of_minus_infinity_stays_finite(chunk_size):
    hidden, weight, bias, _, upstream = build()
    with torch.no_grad():
        bias[1] = -math.inf
    targets = torch.full((N,), 2)
    values, entropy = token_logprobs(
        hidden, weight, targets, bias=bias, with_entropy=True, chunk_size=chunk_size
    )
    allowed = [j for j in range(V) if j != 1]
    logits = (hidden @ weight.T + bias).detach()[:, allowed]
    assert_all_close(
        [values, entropy], [logits.log_softmax(1)[:, 1], Categorical(logits=logits).entropy()], 1e-12
    )
    gradients = torch.autograd.grad(values, (hidden, weight, bias), upstream)
    assert all(grad.isfinite().all() for grad in gradients)
    assert not gradients[1][1].any()


def test_large_logits_neither_overflow_nor_lose_the_answer():
    hidden, weight = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1e4], [0.0]])
    values, entropy = token_logprobs(hidden, weight, torch.tensor([0, 0]), with_entropy=True)
    assert values.tolist() == [0.0, -1e4]
    assert entropy.abs().tolist() == [0.0, 0.0]


def test_auto_is_torch_on_the_cpu_and_says_so_once(caplog):
    logprob._log_choice.cache_clear()
    inputs = build()
    with caplog.at_level(logging.INFO, logger="rewarm.functional.logprob"):
        results = [run(*inputs, backend="auto") for _ in range(3)]
    assert [record.getMessage() for record in caplog.records] == [
        "log-probabilities: backend 'auto' is 'torch' (hidden is on device 'cpu')"
    ]
    assert_all_close(results[0], run(*inputs), 0.0)


def test_auto_on_cuda_is_liger_from_a_number_of_logits_on(monkeypatch):
    monkeypatch.setattr(logprob, "_load_liger", lambda: (None, None))
    for num_logits, needs_torch, expected in (
        (logprob._LIGER_LOGITS - 1, False, "torch"),
        (logprob._LIGER_LOGITS, False, "liger"),
        (logprob._LIGER_LOGITS, True, "torch"),
    ):
        choice = logprob._choose_backend("cuda", torch.bfloat16, num_logits, needs_torch=needs_torch)
        assert choice == expected
    monkeypatch.setattr(logprob, "_load_liger", lambda: (None, "not here"))
    assert logprob._choose_backend("cuda", torch.bfloat16, 2**40, needs_torch=False) == "torch"


def test_liger_off_cuda_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, weight, _, targets, _ = build(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="'liger' cannot run: hidden is on device 'cpu'; allowed: 'cuda'"):
        token_logprobs(hidden, weight, targets, backend="liger")


def test_liger_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    logprob._load_liger.cache_clear()
    hidden, weight, _, targets, _ = build(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="liger-kernel cannot be imported"):
        token_logprobs(hidden, weight, targets, backend="liger")
    logprob._load_liger.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "backend is 'triton'; allowed: 'auto', 'torch', 'liger', 'dense'"),
        (
            {"backend": "liger", "with_entropy": True},
            "with_entropy=True is not possible with backend 'liger'",
        ),
        (
            {"backend": "dense", "chunk_size": 4},
            "chunk_size=4 is for the 'torch' backend only, backend is 'dense'",
        ),
        ({"temperature": 0.0}, "temperature is 0.0; allowed: > 0"),
        ({"temperature": math.nan}, "temperature is nan; allowed: > 0"),
        ({"softcap": -1.0}, "softcap is -1.0; allowed: > 0"),
        ({"chunk_size": 0}, "chunk_size is 0; allowed: > 0"),
        ({"hidden": torch.zeros(1, N, D)}, r"hidden is torch.float32 of shape \(1, 13, 6\)"),
        ({"weight": torch.zeros(V, D + 1)}, r"weight has shape \(29, 7\); allowed: \(V, 6\)"),
        ({"weight": torch.zeros(V, D)}, "weight is torch.float32; allowed without autocast: hidden's dtype"),
        ({"bias": torch.zeros(V + 1)}, r"bias has shape \(30,\); allowed: \(29,\)"),
        ({"targets": torch.zeros(N)}, "targets is torch.float32"),
        ({"num_targets": -1}, "num_targets is -1; allowed: 0 to 13, or None"),
        ({"num_targets": N + 1}, "num_targets is 14; allowed: 0 to 13, or None"),
        ({"targets": torch.full((N,), V)}, "targets go from 29 to 29; allowed: 0 to 28, or -100 for none"),
        ({"targets": torch.full((N,), -1)}, "targets go from -1 to -1; allowed: 0 to 28, or -100 for none"),
    ],
)
def test_bad_arguments_are_named_with_what_is_allowed(change, message):
    hidden, weight, _, targets, _ = build()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments)
