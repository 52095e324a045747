"""What a training step costs in floating-point operations, and what a device can do at most."""

from __future__ import annotations

import re

from torch import nn

# Dense bf16 FLOP/s of one device and bytes per second of its memory, from NVIDIA's data sheets (which print
# twice those FLOP/s, with sparsity, for most of them). The first name that appears as a word in the device's
# name counts, so the variants stand before the family.
_DEVICES = {
    "B200": (2.25e15, 8.0e12),
    "H200 NVL": (835e12, 4.8e12),
    "H200": (989e12, 4.8e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.0e12),
    "L40S": (362e12, 864e9),
    "L4": (121e12, 300e9),
}


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device.

    Args:
        device_name: Name of the device, as `torch.cuda.get_device_name()` gives it.

    Returns:
        FLOP/s, or None for a device that is not in the table. A MIG slice is not: it has only a part of the
        device.

    Example:
        >>> peak_flops("NVIDIA H200"), peak_flops("NVIDIA A100-SXM4-80GB"), peak_flops("Some GPU")
        (989000000000000.0, 312000000000000.0, None)

    Source: NVIDIA's data sheets. Differs: nothing.
    """
    found = _find(device_name)
    return found and found[0]


def memory_bandwidth(device_name: str) -> float | None:
    """Bytes per second that a device reads from its memory at most.

    Args:
        device_name: Name of the device, as for `peak_flops`.

    Returns:
        Bytes per second, or None for a device that is not in the table. For an A100 it is that of the model
        of 80 GB.

    Example:
        >>> memory_bandwidth("NVIDIA H200")
        4800000000000.0

    Source: NVIDIA's data sheets. Differs: nothing.
    """
    found = _find(device_name)
    return found and found[1]


def _find(device_name: str) -> tuple[float, float] | None:
    if "MIG" in device_name.split():
        return None
    for name, rates in _DEVICES.items():
        if re.search(rf"\b{name}\b", device_name):
            return rates
    return None


def matmul_parameters(module: nn.Module) -> int:
    """Number of weights that each token is multiplied with: those of all `nn.Linear` layers, the head's too.

    Embedding tables are looked up, so they don't count; a head that shares its weight with the embedding
    counts once, as a head. Biases and vectors (norms) don't count. Sizes are the layers' own, so sharded or
    quantised weights count in full.

    Args:
        module: A model, for example a transformers causal language model.

    Returns:
        N_mm >= 0.

    Raises:
        ValueError: If a parameter of two or more dimensions belongs to neither an `nn.Linear` nor an
            `nn.Embedding`, for example stacked experts or a convolution: how often it is used is not known
            here.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.Linear(8, 10))
        >>> matmul_parameters(model)
        112

    Source: the N of the formula below, counted on the module itself (ours).
    """
    counted: dict[int, int] = {}
    known: set[int] = set()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            counted[id(layer.weight)] = layer.in_features * layer.out_features
        if isinstance(layer, nn.Linear | nn.Embedding):
            known.add(id(layer.weight))
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in known:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)} and is the weight of no nn.Linear or"
                " nn.Embedding; its FLOPs are not known"
            )
    return sum(counted.values())


def training_flops_per_token(
    num_matmul_parameters: int, num_layers: int, attention_width: int, sequence_length: float
) -> float:
    """Floating-point operations of a forward and backward pass, per token.

    6 N_mm + 12 L W S

    Every weight costs a multiplication and an addition in the forward pass and twice that in the backward
    pass; attention scores and values cost the second term. The convention does not count recomputed
    activations, and counts the full S x S scores: for a causal model that skips the masked half, the second
    term is half of what is given here.

    Args:
        num_matmul_parameters: N_mm, weights multiplied with each token, see `matmul_parameters`, all of them
            trained.
        num_layers: Attention layers L.
        attention_width: W, query heads times their size (not always the hidden size).
        sequence_length: S, tokens that a token attends to before masking; of packed rows the documents'
            lengths, not the rows'.

    Returns:
        FLOPs per token.

    Raises:
        ValueError: If an argument is negative.

    Example:
        >>> training_flops_per_token(1_235_746_816, num_layers=16, attention_width=2048, sequence_length=4096)
        9025093632.0

    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B. Differs: nothing.
    """
    for name, value in {
        "num_matmul_parameters": num_matmul_parameters,
        "num_layers": num_layers,
        "attention_width": attention_width,
        "sequence_length": sequence_length,
    }.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")
    return 6.0 * num_matmul_parameters + 12.0 * num_layers * attention_width * sequence_length
