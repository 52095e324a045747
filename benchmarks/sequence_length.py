"""Cost per token of a training step against the length of rows, at the same number of tokens per step.

Run: python -m benchmarks.sequence_length --output FOLDER. Rows of 512 to 8,192 positions are one document, or
packed with documents of 128 tokens, with our attention by documents and with transformers' mask. Times are
those of a CUDA device, or CPU seconds of one core; beside them is what the count of floating-point operations
says for causal attention (half of the second term of `training_flops_per_token`), relative to
the shortest row.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.evidence.common import write
from rewarm.functional.document_attention import Documents
from rewarm.functional.flops import matmul_parameters, training_flops_per_token
from rewarm.lightning_modules.policy import DOCUMENTS, Policy, build_model

DOCUMENT = 128
KINDS = {
    "one document": (None, DOCUMENTS),
    "packed": (DOCUMENT, DOCUMENTS),
    "packed, mask": (DOCUMENT, "sdpa"),
}
CPU = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 4096}
GPU = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "vocab_size": 32_000}


def fields(size: dict[str, int]) -> dict[str, Any]:
    """A Llama with heads of 64."""
    heads = size["hidden_size"] // 64
    more = {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 8192}
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return {"model_type": "llama", "tie_word_embeddings": True} | size | more | special


def places(tokens: int, length: int, document: int | None) -> Tensor:
    """Position ids of rows of one length, each of one document or of several."""
    return (torch.arange(length) % (document or length)).repeat(tokens // length, 1)


class Step:
    """One optimizer step, again and again.

    Args:
        size: Of the model.
        attention: Which the model has.
        position_ids: Of the batch, whose tokens are random.
    """

    def __init__(self, size: dict[str, int], attention: str, position_ids: Tensor) -> None:
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.policy = Policy(build_model(fields(size), attention)).to(self.device)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), fused=True)
        # A loader would have made it, in a process of its own.
        self.documents = Documents(position_ids) if attention == DOCUMENTS else None
        tokens = torch.randint(size["vocab_size"], position_ids.shape)
        self.inputs = tuple(t.to(self.device) for t in (tokens, position_ids, tokens.roll(-1, 1)))

    def __call__(self) -> float:
        """Return its seconds."""
        on_cuda = self.device == "cuda"
        if on_cuda:
            torch.cuda.synchronize()
        clock = time.perf_counter if on_cuda else time.process_time
        began = clock()
        with torch.autocast(self.device, torch.bfloat16, enabled=on_cuda):
            loss = -self.policy(*self.inputs, documents=self.documents).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if on_cuda:
            torch.cuda.synchronize()
        return clock() - began


def measure(size: dict[str, int], tokens: int, lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each kind and length; they take turns."""
    model = build_model(fields(size))
    work = list(itertools.product(KINDS, lengths))
    found: dict[tuple[str, int], list[float]] = {one: [] for one in work}
    for _, (kind, length) in itertools.product(range(repeats), work):
        document, attention = KINDS[kind]
        step = Step(size, attention, places(tokens, length, document))
        step()
        found[kind, length].append(step())
    rows: list[dict[str, Any]] = []
    for (kind, length), its in found.items():
        attended = (KINDS[kind][0] or length) / 2
        cost = training_flops_per_token(
            matmul_parameters(model), size["num_hidden_layers"], size["hidden_size"], attended
        )
        first = next((row for row in rows if row["rows"] == kind), None)
        micros = 1e6 * statistics.median(its) / tokens
        rows.append(
            {
                "rows": kind,
                "positions": length,
                "us per token": micros,
                "MFLOP per token": cost / 1e6,
                "times the shortest": micros / first["us per token"] if first else 1.0,
                "FLOPs say": cost / (1e6 * first["MFLOP per token"]) if first else 1.0,
                "all us": [1e6 * value / tokens for value in its],
            }
        )
    return rows


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Cost per token of each kind, and what the count says, through the shortest row."""
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for number, kind in enumerate(KINDS):
        mine = [row for row in rows if row["rows"] == kind]
        x = [row["positions"] for row in mine]
        axes.plot(x, [row["us per token"] for row in mine], "o-", color=f"C{number}", label=kind)
        said = [mine[0]["us per token"] * row["FLOPs say"] for row in mine]
        axes.plot(x, said, "--", color=f"C{number}", lw=0.8)
    axes.plot([], [], "--", color="grey", label="by the count of FLOPs")
    axes.set(xscale="log", xlabel="positions per row", ylabel="microseconds per token", ylim=(0, None))
    axes.set_xticks(x, x)
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="for JSON and PNG")
    parser.add_argument("--repeats", type=int, default=3, help="of each length, in turns")
    parser.add_argument(
        "--quick", action="store_true", help="a small model and short rows, to see that it works"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    on_cuda = torch.cuda.is_available()
    size, tokens, lengths, repeats = CPU, 8192, [512, 1024, 2048, 4096, 8192], args.repeats
    if on_cuda:
        size, tokens = GPU, 65_536
    if args.quick:
        size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
        tokens, lengths, repeats = 512, [256, 512], 1
    rows = measure(size, tokens, lengths, repeats)
    where = torch.cuda.get_device_name() if on_cuda else "one CPU core"
    settings = {"device": where, "model": size, "tokens": tokens, "document": DOCUMENT, "repeats": repeats}
    write("sequence_length", args.output, settings | {"quick": args.quick}, rows, picture(rows))


if __name__ == "__main__":
    main()
