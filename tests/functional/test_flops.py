"""The FLOPs formula against torch's counter and published models."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rewarm.functional.flops import matmul_parameters, peak_flops, training_flops_per_token

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # attention is wider than the model
    "attn_implementation": "eager",
}


@pytest.mark.parametrize("tied", [False, True])
def test_formula_equals_the_counted_flops_of_a_llama_step(tied):
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    ids = torch.randint(0, 96, (2, 48))
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
    per_token = training_flops_per_token(matmul_parameters(model), 3, 4 * 32, 48)
    # The only matmul that the convention leaves out is the table of rotary angles, once per forward pass:
    # below 1e-3. Eager attention computes the masked half of the scores too, which the convention counts.
    assert counter.get_total_flops() == pytest.approx(per_token * ids.numel(), rel=1e-3)


def test_a_tied_head_counts_once_and_an_untied_embedding_never():
    blocks = 3 * (64 * 128 * 2 + 2 * 64 * 64 + 3 * 64 * 128)
    for tied in (False, True):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
        assert matmul_parameters(model) == blocks + 64 * 96


@pytest.mark.parametrize(
    ("model", "config", "width", "sequence_length", "gigaflops"),
    [
        (
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=128256,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=16,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=64,
                tie_word_embeddings=True,
            ),
            2048,
            4096,
            9.03,
        ),
        (
            Qwen3ForCausalLM,
            Qwen3Config(
                vocab_size=151936,
                hidden_size=1024,
                intermediate_size=3072,
                num_hidden_layers=28,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=128,
                tie_word_embeddings=True,
            ),
            2048,
            2048,
            4.99,
        ),
    ],
    ids=["Llama-3.2-1B", "Qwen3-0.6B"],
)
def test_real_models_cost_what_a_separate_count_gave(model, config, width, sequence_length, gigaflops):
    with torch.device("meta"):
        weights = matmul_parameters(model(config))
    cost = training_flops_per_token(weights, config.num_hidden_layers, width, sequence_length)
    assert cost / 1e9 == pytest.approx(gigaflops, abs=0.005)


def test_matmul_parameters_refuses_weights_it_does_not_know():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stacked = nn.Parameter(torch.zeros(4, 3, 3))

    with pytest.raises(ValueError, match=r"1.stacked has shape \(4, 3, 3\)"):
        matmul_parameters(nn.Sequential(nn.Linear(3, 3), Experts()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 2070", None),
    ],
)
def test_peak_is_found_by_whole_words(name, expected):
    assert peak_flops(name) == expected


def test_negative_sizes_are_named():
    with pytest.raises(ValueError, match="num_layers is -1"):
        training_flops_per_token(1, -1, 1, 1)
