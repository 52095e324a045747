"""The backends against each other and against torch's own fused linear cross entropy."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from rewarm.functional.logprob import IGNORE_INDEX, token_logprobs

# TRITON_INTERPRET must be set before triton is imported, hence a process of its own. D < V: Liger chunks.
# The interpreter has neither float arguments with methods nor libdevice's tanh: `Cap` and `tanh` stand in.
INTERPRETED = """
import json, sys
import liger_kernel.ops.cross_entropy
import torch
import triton.language as tl
from rewarm.functional.logprob import IGNORE_INDEX, token_logprobs

class Cap(float):
    def to(self, dtype):
        return self

    def __truediv__(self, other):
        return Cap(float(self) / other)

def tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1

liger_kernel.ops.cross_entropy.tanh = tanh

CASES = {
    "plain": {},
    "bias": {"with_bias": True},
    "temperature": {"with_bias": True, "temperature": 0.7},
    "softcap": {"softcap": Cap(2.0)},
    "softcap-temperature": {"with_bias": True, "softcap": Cap(2.0), "temperature": 1.6},
    "masked": {"masked": 4},
    "all-masked": {"masked": 11},
    "frozen-weight": {"frozen": True},
}
results = {}
for name, case in CASES.items():
    torch.manual_seed(0)
    case = dict(case)
    masked, frozen = case.pop("masked", 0), case.pop("frozen", False)
    hidden, weight = torch.randn(11, 8, requires_grad=True), torch.randn(37, 8, requires_grad=not frozen)
    bias = torch.randn(37, requires_grad=True) if case.pop("with_bias", False) else None
    targets, upstream = torch.randint(37, (11,)), torch.randn(11)
    targets[:masked] = IGNORE_INDEX
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    found = {}
    for backend in ("liger", "dense"):
        values = token_logprobs(hidden, weight, targets, bias=bias, backend=backend, **case)
        found[backend] = [values.detach(), *torch.autograd.grad(values, leaves, upstream)]
    results[name] = [float((x - y).abs().max()) for x, y in zip(found["liger"], found["dense"], strict=True)]
try:
    token_logprobs(hidden, weight, targets + 30, backend="liger")
except ValueError as error:
    results["out-of-range"] = str(error)
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("liger_kernel")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "bias",
        "temperature",
        "softcap",
        "softcap-temperature",
        "masked",
        "all-masked",
        "frozen-weight",
    ],
)
def test_liger_has_the_dense_values_and_per_token_gradients(interpreted, case):
    # float32 on both sides, numbers of order 10: a few units in the last place.
    assert max(interpreted[case]) < 2e-5


def test_liger_refuses_targets_that_its_kernel_would_read_past_the_end_for(interpreted):
    assert "allowed: 0 to 36" in interpreted["out-of-range"]


def build(dtype, device="cpu", n=500, d=64, v=3000):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(device, dtype).requires_grad_()
    weight = (0.2 * torch.randn(v, d, generator=generator)).to(device, dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=generator)
    targets[::7] = IGNORE_INDEX
    return hidden, weight, targets.to(device), torch.randn(n, generator=generator).to(device)


def run(hidden, weight, targets, upstream, **options):
    values = token_logprobs(hidden, weight, targets, **options)
    return values.detach(), *torch.autograd.grad(values, (hidden, weight), upstream.to(values.dtype))


def relative_errors(results, truth):
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(results, truth, strict=True)]


def truth_of(hidden, weight, targets, upstream, **options):
    leaves = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    return run(*leaves, targets, upstream, backend="dense", **options)


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13 has no linear_cross_entropy"
)
@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_values_and_gradients_are_those_of_torch_linear_cross_entropy(backend):
    hidden, weight, targets, upstream = build(torch.float64, n=60, d=16, v=200)
    losses = F.linear_cross_entropy(hidden, weight, targets, reduction="none", ignore_index=IGNORE_INDEX)
    expected = (-losses.detach(), *torch.autograd.grad(-losses, (hidden, weight), upstream.double()))
    for ours, theirs in zip(run(hidden, weight, targets, upstream, backend=backend), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["torch", "liger", "auto"])
@pytest.mark.parametrize("head", [{}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": 1.6}])
def test_on_cuda_float32_agrees_with_float64(backend, head):
    if backend == "liger":
        pytest.importorskip("liger_kernel")
    inputs = build(torch.float32, "cuda")
    assert max(relative_errors(run(*inputs, backend=backend, **head), truth_of(*inputs, **head))) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", [{"backend": "liger"}, {"backend": "torch"}, {"chunk_size": 64}])
@pytest.mark.parametrize("autocast", [False, True])
def test_on_cuda_bfloat16_is_no_further_from_float64_than_dense(options, autocast):
    if options.get("backend") == "liger":
        pytest.importorskip("liger_kernel")
    inputs = build(torch.float32 if autocast else torch.bfloat16, "cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        ours, dense = run(*inputs, **options), run(*inputs, backend="dense")
    truth = truth_of(*inputs)
    assert ours[0].dtype == torch.float32
    for error, allowed in zip(relative_errors(ours, truth), relative_errors(dense, truth), strict=True):
        # Liger rounds at other places than dense does: the same size of error, not the same error.
        assert error <= 1.2 * allowed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_torch_backend_synchronises_only_to_count_its_targets():
    hidden, weight, targets, upstream = build(torch.bfloat16, "cuda")
    num_targets = int((targets != IGNORE_INDEX).sum())
    expected = run(hidden, weight, targets, upstream, chunk_size=64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(hidden, weight, targets, upstream, chunk_size=64, num_targets=num_targets)
        with pytest.raises(RuntimeError, match="synchroniz"):
            token_logprobs(hidden, weight, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("size", [100, 1000, 3001, 151_936])
def test_on_cuda_softmax_and_its_logarithm_in_place_are_those_in_another_buffer(size):
    logits = 9 * torch.randn(300, size, device="cuda")
    for function in (torch.softmax, torch.log_softmax):
        expected, values = function(logits, 1), logits.clone()
        function(values, 1, out=values)
        assert torch.equal(values, expected)
