"""Statistics against dense logits, in value and in gradient."""

import pytest
import torch

from rewarm.functional import token_statistics as module
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.functional.token_statistics import token_statistics

N, D, V, K = 11, 5, 13, 3


def case(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    hidden, weight, bias = leaf(N, D), leaf(V, D), leaf(V)
    targets = torch.randint(V, (N,), generator=generator)
    targets[::4] = IGNORE_INDEX
    return hidden, weight, bias, targets, torch.randint(V, (N, K), generator=generator)


def dense(hidden, weight, bias, targets, candidates, temperature, softcap):
    logits = hidden @ weight.T + (0.0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    logprobs = logits.log_softmax(1)
    known = targets != IGNORE_INDEX
    return {
        "logprobs": torch.where(known, logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0], 0.0),
        "logsumexp": torch.where(known, logits.logsumexp(1), 0.0),
        "mean_logprobs": torch.where(known, logprobs.mean(1), 0.0),
        "candidates": torch.where(known[:, None], logprobs.gather(1, candidates), 0.0),
        "entropy": torch.where(known, -(logprobs.exp() * logprobs).sum(1), 0.0).detach(),
    }


ALL = ["logsumexp", "mean_logprobs", "candidates", "entropy"]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (2.0, None), (0.7, 3.0)])
@pytest.mark.parametrize("chunk_bytes", [1, 2**27])
def test_values_and_gradients_are_those_of_dense_logits(
    with_bias, temperature, softcap, chunk_bytes, monkeypatch
):
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    hidden, weight, bias, targets, candidates = case()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    head = {"bias": bias if with_bias else None, "temperature": temperature, "softcap": softcap}
    wanted = [name for name in ALL if softcap is None or name != "mean_logprobs"]
    values = token_statistics(hidden, weight, targets, wanted, candidates=candidates, **head)
    expected = dense(hidden, weight, head["bias"], targets, candidates, temperature, softcap)
    assert values.keys() == {"logprobs", *wanted}
    for name in values:
        torch.testing.assert_close(values[name], expected[name], rtol=1e-10, atol=1e-10)
        if name == "entropy":
            assert not values[name].requires_grad
            continue
        upstream = torch.randn(values[name].shape, dtype=torch.float64)
        ours = torch.autograd.grad(values[name], leaves, upstream, retain_graph=True)
        theirs = torch.autograd.grad(expected[name], leaves, upstream, retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_nothing_but_what_is_asked_for_is_returned():
    hidden, weight, _, targets, _ = case(dtype=torch.float32)
    assert list(token_statistics(hidden, weight, targets, [])) == ["logprobs"]
    assert list(token_statistics(hidden, weight, targets, ["entropy"])) == ["logprobs", "entropy"]


def test_without_targets_everything_is_zero_and_backward_still_runs():
    hidden, weight, bias, targets, candidates = case()
    none = torch.full_like(targets, IGNORE_INDEX)
    values = token_statistics(hidden, weight, none, ALL, candidates=candidates, bias=bias)
    assert all((value == 0).all() for value in values.values())
    sum(value.sum() for name, value in values.items() if name != "entropy").backward()
    assert (hidden.grad == 0).all()


def test_bfloat16_hidden_states_give_float32():
    hidden, weight, _, targets, candidates = case(dtype=torch.bfloat16)
    values = token_statistics(hidden, weight, targets, ALL, candidates=candidates)
    wide = token_statistics(hidden.float(), weight.float(), targets, ALL, candidates=candidates)
    for name, value in values.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wide[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"statistics": ["variance"]}, "statistics holds 'variance'; known are 'entropy'"),
        ({"statistics": ["candidates"]}, r"candidates has shape None; it must be \(11, K\)"),
        ({"statistics": ["mean_logprobs"], "softcap": 3.0}, "not possible with softcap 3.0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(options, named):
    hidden, weight, _, targets, _ = case()
    with pytest.raises(ValueError, match=named):
        token_statistics(hidden, weight, targets, **options)


def test_a_number_of_targets_that_is_known_changes_nothing_and_must_be_right():
    hidden, weight, _, targets, candidates = case()
    known = int((targets != IGNORE_INDEX).sum())
    values = token_statistics(hidden, weight, targets, ALL, candidates=candidates, num_targets=known)
    expected = token_statistics(hidden, weight, targets, ALL, candidates=candidates)
    for name, value in values.items():
        assert torch.equal(value, expected[name])
    with pytest.raises(ValueError, match=f"num_targets is {known - 1}, but targets has {known}"):
        token_statistics(hidden, weight, targets, ALL, candidates=candidates, num_targets=known - 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_nothing_waits_when_the_number_of_targets_is_known():
    hidden, weight, _, targets, candidates = (value.cuda().detach() for value in case(dtype=torch.float32))
    known = int((targets != IGNORE_INDEX).sum())
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    expected = token_statistics(*leaves, targets, ALL, candidates=candidates)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = token_statistics(*leaves, targets, ALL, candidates=candidates, num_targets=known)
        (values["candidates"].sum() + values["logsumexp"].sum()).backward()
        with pytest.raises(RuntimeError, match="synchroniz"):
            token_statistics(*leaves, targets, ALL, candidates=candidates)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name])
