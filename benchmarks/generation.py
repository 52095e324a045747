"""Tokens per second of our engine, of transformers' `generate` and of its continuous batching, in turns.

Run: python -m benchmarks.generation --output FOLDER. Models have random weights, and as many ids end a
completion as give the mean length asked for, so that ends are ragged; prompts are the same for all.
"""

import argparse
import logging
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.evidence.common import write
from benchmarks.peers.work import QWEN3_06B, TINY
from rewarm.lightning_modules.policy import build_model
from rewarm.rollouts.engine import TransformersEngine

PAD = 0
PAGE = 32  # positions per page of a paged cache on a CPU, which has to be told
SMALL = TINY | {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 64}
Sample = Callable[[], list[list[int]]]


@dataclass(frozen=True)
class Case:
    """One rollout.

    Attributes:
        name: Short and unique.
        model: Fields of a transformers config.
        prompts: How many.
        samples: Completions of each.
        prompt_tokens: Least and most.
        max_new_tokens: At most.
        end_share: Share of the vocabulary that ends a completion; 0 lets all reach `max_new_tokens`.
    """

    name: str
    model: dict[str, Any]
    prompts: int = 8
    samples: int = 8
    prompt_tokens: tuple[int, int] = (20, 60)
    max_new_tokens: int = 64
    end_share: float = 0.0


CPU = [
    Case("small", SMALL),
    Case("small, ragged", SMALL, end_share=1 / 32),
    Case("tiny", TINY),
    Case("tiny, ragged", TINY, end_share=1 / 32),
    Case("tiny, ragged, long", TINY, 4, 4, max_new_tokens=256, end_share=1 / 64),
]
GPU = [
    Case("0.6B", QWEN3_06B, 32, 8, (50, 300), 256),
    Case("0.6B, ragged", QWEN3_06B, 32, 8, (50, 300), 1024, 1 / 256),
]
QUICK = [Case("quick", SMALL, 2, 2, (3, 6), 8, 1 / 16)]


def systems(case: Case, device: torch.device) -> dict[str, Sample]:
    """Who samples the completions of a case, as tokens."""
    rng, size = random.Random(0), case.model["vocab_size"]
    ends = list(range(1, 1 + round(case.end_share * size)))
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    torch.manual_seed(0)
    # Continuous batching knows no other attention of its own accord.
    model: Any = build_model(case.model | special, "sdpa").eval().to(device)
    model = model.bfloat16() if device.type == "cuda" else model
    prompts = [
        [rng.randrange(len(ends) + 1, size) for _ in range(rng.randint(*case.prompt_tokens))]
        for _ in range(case.prompts)
    ]
    engine = TransformersEngine(case.max_new_tokens, eos_token_id=ends or size, pad_token_id=PAD)
    config = GenerationConfig(
        max_new_tokens=case.max_new_tokens,
        do_sample=True,
        top_k=0,
        num_return_sequences=case.samples,
        eos_token_id=ends or None,
        pad_token_id=PAD,
    )

    def ours() -> list[list[int]]:
        groups = engine.generate(model, prompts, case.samples, rng.randrange(2**32))
        return [completion.tokens for group in groups for completion in group]

    return {
        "rewarm": ours,
        "generate": lambda: generated(model, prompts, config, ends),
        "generate_batch": lambda: continuous(model, prompts, config),
    }


def generated(
    model: Any, prompts: list[list[int]], config: GenerationConfig, ends: list[int]
) -> list[list[int]]:
    """Complete prompts by `generate`, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    rows = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    stops = [next((n + 1 for n, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]


def continuous(model: Any, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """Complete prompts by continuous batching, with log-probabilities, as ours has them."""
    cache: dict[str, Any] = {"max_memory_percent": 0.3}
    if model.device.type == "cpu":
        longest = max(map(len, prompts)) + config.max_new_tokens
        pages = len(prompts) * config.num_return_sequences * -(-longest // PAGE)
        cache = {"page_size": PAGE, "num_blocks": pages, "max_batch_tokens": 512}
    options = ContinuousBatchingConfig(return_logprobs=True, auto_switch_to_flash=False, **cache)
    out = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=options, progress_bar=False
    )
    failed = [result.error for result in out.values() if result.error is not None]
    if failed or len(out) != len(prompts) * config.num_return_sequences:
        raise SystemExit(f"continuous batching gave {len(out)} completions, and {failed[:1]}")
    return [result.generated_tokens for result in out.values()]


def measure(case: Case, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each system; the first round is not timed."""
    found: dict[str, list[tuple[float, int]]] = defaultdict(list)
    samplers = systems(case, device)
    for repeat in range(repeats + 1):
        for name, sample in samplers.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            tokens = sum(map(len, sample()))
            if repeat:
                found[name].append((time.perf_counter() - began, tokens))
    rates = {name: [tokens / seconds for seconds, tokens in runs] for name, runs in found.items()}
    return [
        {
            "case": case.name,
            "system": name,
            "tokens_per_second": statistics.median(rates[name]),
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "mean_tokens": statistics.fmean(tokens for _, tokens in runs) / (case.prompts * case.samples),
            "rewarm_is_faster_by": statistics.median(
                ours / other for ours, other in zip(rates["rewarm"], rates[name], strict=True)
            ),
        }
        for name, runs in found.items()
    ]


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Draw the rates of each case."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, system in enumerate(dict.fromkeys(row["system"] for row in rows)):
        rates = [row["tokens_per_second"] for row in rows if row["system"] == system]
        axes.bar([place + 0.27 * number for place in range(len(names))], rates, 0.25, label=system)
    axes.set_xticks([place + 0.27 for place in range(len(names))], names)
    axes.set(yscale="log", ylabel="sampled tokens per second")
    axes.legend()
    return figure


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="for JSON and PNG")
    parser.add_argument("--repeats", type=int, default=3, help="of each system, in turns")
    parser.add_argument("--quick", action="store_true", help="one small case, to see that it works")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = QUICK if args.quick else GPU if device.type == "cuda" else CPU
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    rows = [row for case in cases for row in measure(case, 1 if args.quick else args.repeats, device)]
    settings = {"quick": args.quick, "repeats": args.repeats, "cases": [asdict(case) for case in cases]}
    settings |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
    settings |= {"threads": torch.get_num_threads()}
    write("generation", args.output, settings, rows, plot(rows))


if __name__ == "__main__":
    main()
