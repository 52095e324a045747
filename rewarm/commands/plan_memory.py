"""`rewarm plan memory`: what training steps take on each device, memory by part, what fits, time."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from rewarm.checks import above
from rewarm.commands.fit import made_model, read_config
from rewarm.costs.cost_rates import Rates, measured_for
from rewarm.costs.cost_step import work_cost
from rewarm.costs.cost_work import Work, read_work
from rewarm.functional.flops import memory_bandwidth, peak_flops

# Share of a device's memory for tensors, ours: the rest is the CUDA context, libraries' workspaces, gaps.
_USABLE = 0.92
# Share of a GPU's peak that training reaches: Llama 3 (arXiv:2407.21783, table 4) 38 % to 43 % on H100s.
_MFU = 0.4


def plan_memory(
    configs: Sequence[str],
    *,
    overlay: Sequence[str] = (),
    model: str | None = None,
    devices: int | None = None,
    memory: float | None = None,
    device: str | None = None,
    measure: bool = False,
    prompt_length: int | None = None,
) -> None:
    """Print peak memory and time of a step, by part; nothing is trained.

    The data of the configs need not be there.

    Args:
        configs: Config files of `rewarm fit`, a column each.
        overlay: Further config files on top of each of them, such as configs/trainer/fsdp.yaml.
        model: Model in place of theirs: a Hugging Face folder or id, or a YAML file with the fields of a
            config.
        devices: Processes over all nodes, >= 1; without it, as the configs say.
        memory: GiB of one device, > 0; without it, those of the CUDA device here, if any.
        device: GPU to tell the time for, such as H200; without it, the one here, if any.
        measure: Tell the time for this machine, by measuring what it reaches.
        prompt_length: Tokens of the longest prompt, >= 1; GRPO needs it.

    Raises:
        ValueError: If an argument is out of range, or a config has no prediction.
    """
    if memory is not None:
        above(0, memory=memory)
    source: str | dict[str, Any] | None = model
    if model is not None and Path(model).suffix in (".yaml", ".yml"):
        if not Path(model).is_file():
            raise ValueError(f"model is {model!r}: no such file")
        source = yaml.safe_load(Path(model).read_text())
    if torch.cuda.is_available():
        device = device or torch.cuda.get_device_name()
        memory = memory or torch.cuda.get_device_properties(0).total_memory / 2**30
    works = [
        work_of(config, overlay, model=source, devices=devices, prompt_length=prompt_length)
        for config in configs
    ]
    if device is not None:
        works = [replace(work, on_cpu=False) for work in works]
    rates: list[Rates] = []
    if measure:
        rates = measured_for(works)
    elif device is not None:
        rates = [_published(device)] * len(works)
    costs = [work_cost(work) for work in works]
    table = {
        "": [work.name for work in works],
        "method": [type(work.module).__name__ for work in works],
        "rows x positions": [f"{work.rows} x {work.length}" for work in works],
        "devices": [str(work.replicas * work.ways) for work in works],
        "precision": [work.precision for work in works],
    }
    for part in dict.fromkeys(part for cost in costs for part in cost.parts):
        table[part] = [_size(cost.parts.get(part, 0.0)) for cost in costs]
    table["peak memory"] = [_size(cost.total_bytes) for cost in costs]
    notes = ["Per device, at the moment when most is held; rows as long as they may be."]
    if memory is not None:
        limit = _USABLE * memory * 2**30
        table["fits"] = ["yes" if cost.total_bytes <= limit else "no" for cost in costs]
        notes.append(f"What fits takes at most {_USABLE:.0%} of {memory:.4g} GiB.")
    table["TFLOP per step"] = [f"{cost.flops / 1e12:.4g}" for cost in costs]
    if rates:
        timed = zip(rates, costs, strict=True)
        table["seconds per step"] = [f"{rate.step_seconds(cost):.3g}" for rate, cost in timed]
        notes.append(f"Time at {rates[0].source}.")
    width = max(len(cell) for cells in table.values() for cell in cells) + 2
    for name, cells in table.items():
        sys.stdout.write(f"{name:<18}" + "".join(cell.rjust(width) for cell in cells) + "\n")
    sys.stdout.write(" ".join(notes) + "\n")


def work_of(
    config: str,
    overlays: Sequence[str] = (),
    *,
    model: str | dict[str, Any] | None = None,
    devices: int | None = None,
    prompt_length: int | None = None,
) -> Work:
    """Return the training step that a config describes.

    Args:
        config: Config file of `rewarm fit`.
        overlays: Further config files on top of it.
        model: Model in place of the config's.
        devices: Processes over all nodes, >= 1; None as the config says.
        prompt_length: Tokens of the longest prompt, for `GRPO`, >= 1.

    Raises:
        ValueError: If an argument is out of range, the config is none or says something that has no
            prediction.
    """
    parsed = read_config(config, overlays)
    if not parsed.get("model"):
        raise ValueError(f"{config}: no model section")
    if model is not None:
        parsed.model.init_args.model = model
    data = parsed.data.init_args if parsed.get("data") else {}
    module = made_model(parsed)
    return read_work(config, parsed.trainer, module, data, devices=devices, prompt_length=prompt_length)


def _published(device: str) -> Rates:
    peak, bandwidth = peak_flops(device), memory_bandwidth(device)
    if peak is None or bandwidth is None:
        raise ValueError(f"device is {device!r}, whose peak is not known here")
    return Rates(_MFU * peak, math.inf, bandwidth, f"{_MFU:.0%} of the peak of {device}")


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
