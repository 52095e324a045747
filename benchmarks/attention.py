"""Attention within documents against a mask over all pairs of positions: time of forward and backward.

Run: python -m benchmarks.attention --output FOLDER. Both ways take turns on the same weights and batches, and
their losses are compared first. On a machine with CUDA it measures a Qwen3-0.6B shape in bfloat16 there, else
the small model of `benchmarks.peers` in float32 on one CPU core. `computed` is the share of the batch's
positions that `attention: documents` computes: without padding, and with prompts that rows share only once.
Short packed rows are taken apart here, too, though training on a CPU attends to them under a mask: where that
pays is what `_SHORT_ROW` of `rewarm.functional.document_attention` is chosen by.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure

from benchmarks.evidence.common import write
from benchmarks.peers.work import QWEN3_06B, TINY
from rewarm.datamodules.loader import Batch, collate_rows
from rewarm.functional import document_attention
from rewarm.lightning_modules.policy import DOCUMENTS, Policy, build_model
from rewarm.text.encoding import Tokens

VOCAB = 4096


def sequence(prompt: int, completion: int, rng: random.Random, of: Tokens | None = None) -> Tokens:
    """Random tokens, perhaps after another's prompt."""
    tokens = torch.tensor([rng.randrange(3, VOCAB) for _ in range(prompt + completion)])
    if of is not None:
        tokens[:prompt] = of.tokens[:prompt]
    return Tokens(tokens, torch.arange(len(tokens)) >= prompt)


def packed(rows: int, length: int, rng: random.Random, shortest: int = 80, longest: int = 150) -> Batch:
    """Rows full of documents of 80 to 150 tokens or others, 40 % of them prompt."""
    made: list[list[Tokens]] = []
    for _ in range(rows):
        made.append([])
        left = length
        while left > 10:
            size = min(left, rng.randint(shortest, longest))
            made[-1].append(sequence(2 * size // 5, size + 1 - 2 * size // 5, rng))
            left -= size
    return collate_rows(made, 0, restart=True, pad_to=length)


def padded(rows: int, rng: random.Random) -> Batch:
    """Rows of one example each, 30 to 90 tokens of prompt and 30 to 180 of completion."""
    made = [[sequence(rng.randint(30, 90), rng.randint(30, 180), rng)] for _ in range(rows)]
    return collate_rows(made, 0, restart=False)


def alike(prompts: int, completions: int, prompt: int, rng: random.Random) -> Batch:
    """Rows of completions of 70 tokens, each `completions` after one prompt."""
    made = []
    for _ in range(prompts):
        first = sequence(prompt, 70, rng)
        made += [[first], *([sequence(prompt, 70, rng, first)] for _ in range(completions - 1))]
    return collate_rows(made, 0, restart=False)


def cases(scale: int) -> dict[str, Callable[[random.Random], Batch]]:
    """The batches by name; `scale` times as many rows on a large device."""
    known: dict[str, Callable[[random.Random], Batch]] = {
        "packed 8 x 512": lambda rng: packed(8 * scale, 512, rng),
        "packed 2 x 2048": lambda rng: packed(2 * scale, 2048, rng),
        "padded SFT rows": lambda rng: padded(16 * scale, rng),
        "packed 40 x 64, short documents": lambda rng: packed(40 * scale, 64, rng, 12, 30),
        "packed 40 x 64": lambda rng: packed(40 * scale, 64, rng, 30, 64),
        "packed 20 x 128, short documents": lambda rng: packed(20 * scale, 128, rng, 12, 60),
        "packed 20 x 128": lambda rng: packed(20 * scale, 128, rng, 40, 128),
        "packed 10 x 256, short documents": lambda rng: packed(10 * scale, 256, rng, 12, 80),
        "packed 10 x 256": lambda rng: packed(10 * scale, 256, rng, 80, 200),
    }
    for prompt in (10, 40, 100, 300):
        known[f"pairs, prompt {prompt}"] = lambda rng, prompt=prompt: alike(8 * scale, 2, prompt, rng)  # type: ignore[misc]
    known["groups of 8, prompt 100"] = lambda rng: alike(2 * scale, 8, 100, rng)
    return known


def policies(fields: dict[str, Any], device: str) -> dict[str, Policy]:
    """The same weights with both kinds of attention."""
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    made = {}
    for attention in ("sdpa", DOCUMENTS):
        torch.manual_seed(0)
        made[attention] = Policy(build_model(fields | special, attention)).to(device)
    return made


def run(policy: Policy, batch: Batch, device: str) -> tuple[float, float]:
    """Seconds of forward and backward, and the loss per target."""
    inputs = [batch[name].to(device) for name in ("input_ids", "position_ids", "targets")]
    policy.zero_grad()
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    began = clock()
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logprobs = policy(*inputs, documents=batch["documents"], num_targets=batch["num_targets"])
    loss = -logprobs.sum() / batch["num_targets"]
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began, loss.item()


def measure(name: str, batch: Batch, made: dict[str, Policy], repeats: int, device: str) -> dict[str, Any]:
    """A row of results."""
    losses = {kind: run(policy, batch, device)[1] for kind, policy in made.items()}
    tolerance = 1e-5 if device == "cpu" else 1e-2
    if abs(losses["sdpa"] - losses[DOCUMENTS]) > tolerance * losses["sdpa"]:
        raise ValueError(f"{name}: the losses differ, {losses}")
    times: dict[str, list[float]] = {kind: [] for kind in made}
    for _ in range(repeats):
        for kind, policy in made.items():
            times[kind].append(1e3 * run(policy, batch, device)[0])
    before, now = (statistics.median(times[kind]) for kind in ("sdpa", DOCUMENTS))
    rows, length = batch["documents"].shape
    positions = batch["input_ids"].numel()
    return {
        "batch": name,
        "positions": positions,
        "computed": rows * length / positions,
        "mask ms": before,
        "documents ms": now,
        "speed-up": before / now,
        "all mask ms": times["sdpa"],
        "all documents ms": times[DOCUMENTS],
    }


def picture(rows: list[dict[str, Any]]) -> Figure:
    """The speed-up of each batch."""
    figure = Figure(figsize=(6.4, 0.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([row["batch"] for row in rows], [row["speed-up"] for row in rows], color="tab:blue")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="grey", lw=0.8, ls="--")
    axes.set(xlabel="forward and backward: time with a mask / within documents")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="for JSON and PNG")
    parser.add_argument("--repeats", type=int, default=5, help="of each way, in turns")
    parser.add_argument("--quick", action="store_true", help="one layer and one repeat, to see that it works")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields, repeats = QWEN3_06B if device == "cuda" else TINY, 1 if args.quick else args.repeats
    fields = fields | {"max_position_embeddings": 4096} | ({"num_hidden_layers": 1} if args.quick else {})
    made = policies(fields, device)
    known = cases(1 if device == "cpu" or args.quick else 8)
    with mock.patch.object(document_attention, "_SHORT_ROW", 0):
        rows = [
            measure(name, make(random.Random(0)), made, repeats, device)
            for name, make in (list(known.items())[2:4] if args.quick else known.items())
        ]
    where = torch.cuda.get_device_name() if device == "cuda" else "one CPU core"
    settings = {"device": where, "repeats": repeats, "quick": args.quick}
    write("attention", args.output, settings, rows, picture(rows))


if __name__ == "__main__":
    main()
