"""Costs without data against what the same work takes with data, and against counts by hand."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from rewarm.costs.cost_model import (
    CostTrace,
    Operation,
    seconds,
    trace_step,
    without_data,
)

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def llama(device="cpu"):
    with torch.device(device):
        return LlamaForCausalLM(CONFIG)


def empty_llama(dtype=None):
    model = llama("meta")
    without_data(model, dtype)
    return model


def forward(model, rows=2, length=48):
    ids = torch.zeros(rows, length, dtype=torch.long)
    return lambda: model(ids, use_cache=False).logits


def total(cost):
    return sum(cost.peak_parts.values())


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, **options)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_step_without_data_costs_what_the_step_with_data_does(narrow):
    def run(model):
        def autocast():
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                return forward(model)()

        return trace_step(autocast, adamw(model))

    real, predicted = run(llama()), run(empty_llama())
    assert predicted.peak_parts == real.peak_parts
    assert predicted.batch == real.batch
    assert predicted.update == real.update


def test_what_is_kept_for_backward_is_what_autograd_saves():
    model, saved = llama(), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model)()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    by_autograd = sum(size for pointer, size in saved.items() if pointer not in own)
    empty = empty_llama()
    cost = trace_step(forward(empty), torch.optim.SGD(empty.parameters(), lr=1.0))
    assert cost.peak_parts["activations"] == by_autograd


def test_parameters_gradients_and_optimizer_state_are_exact():
    model = llama()
    count = sum(p.numel() for p in model.parameters())
    for made, copies in (("AdamW", 2), ("SGD", 0)):
        empty = empty_llama()
        optimizer = getattr(torch.optim, made)(empty.parameters(), lr=1.0, fused=True)
        parts = trace_step(forward(empty), optimizer, accumulate=2).peak_parts
        assert parts["weights"] == parts["gradients"] == 4 * count
        steps = 4 * len(list(model.parameters()))  # AdamW counts them per parameter
        assert parts.get("optimizer", 0) == pytest.approx(4 * copies * count, abs=steps)


def test_memory_grows_with_rows_and_positions_and_falls_with_narrow_weights():
    peaks = [total(trace_step(forward(m, *size), adamw(m))) for size in SIZES for m in [empty_llama()]]
    assert peaks == sorted(set(peaks))
    narrow = empty_llama(torch.bfloat16)
    assert total(trace_step(forward(narrow, *SIZES[-1]), adamw(narrow))) < 0.7 * peaks[-1]


SIZES = [(1, 32), (2, 32), (2, 64), (8, 64)]


def test_shares_divide_their_parts_alone():
    model = empty_llama()
    whole = trace_step(forward(model), adamw(model))
    model = empty_llama()
    divided = trace_step(forward(model), adamw(model), shares={"weights": 0.25, "optimizer": 0.5})
    assert divided.peak_parts["weights"] == whole.peak_parts["weights"] / 4
    assert divided.peak_parts["optimizer"] == whole.peak_parts["optimizer"] / 2
    assert divided.peak_parts["activations"] == whole.peak_parts["activations"]


def test_flops_are_those_of_torchs_counter():
    model = llama()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        forward(model)().sum().backward()
    empty = empty_llama()
    empty.set_attn_implementation("eager")
    operations = trace_step(forward(empty), adamw(empty)).batch
    assert sum(operation.flops for operation in operations) == counter.get_total_flops()


def test_causal_attention_costs_half_of_all_pairs():
    query = torch.randn(1, 2, 64, 16, requires_grad=True)
    counts = []
    for causal in (False, True):
        with CostTrace() as trace:
            out = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=causal)
            counts.append(sum(operation.flops for operation in trace.operations))
            out.sum().backward()
        counts.append(sum(operation.flops for operation in trace.operations))
    product = 2 * 2 * 64 * 64 * 16  # of scores, or of values
    assert counts == [2 * product, 7 * product, product, 3.5 * product]


def test_freed_memory_is_not_held():
    with CostTrace() as trace:
        for _ in range(3):
            made = torch.ones(1024)
            del made
            gc.collect()
    assert trace.peak_bytes == 4096


def test_tied_weights_stay_tied():
    model = nn.ModuleList([nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)])
    model[1].weight = model[0].weight
    without_data(model)
    assert model[0].weight is model[1].weight
    assert len(list(model.parameters())) == 1


def test_time_is_the_slower_of_arithmetic_and_memory():
    operations = [Operation(8.0, 1), Operation(1.0, 8)]
    assert seconds(operations, 4.0, 2.0) == 2.0 + 4.0
    assert seconds(operations, 4.0) == 9.0 / 4.0
