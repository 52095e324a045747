"""Optimizer steps of CurriculumSFT against a bare PyTorch loop with dense logits, in turns.

Same model, rows, tokens and seed; run: make bench. It checks that both have the same losses, then prints the
ratio of the times of each repeat.
"""

import argparse
import json
import logging
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback, Trainer, seed_everything

import rewarm
from rewarm.initial_model import bpe_tokenizer
from rewarm.lightning_modules.policy import build_model

MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "vocab_size": 4096,
}


class Clock(Callback):
    """Notes loss and time of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Stop it."""
        self.losses.append(float(outputs["loss"].detach()))
        self.times.append(time.perf_counter() - self._began)


def rows(count: int) -> list[dict[str, str]]:
    """Prompts of about 60 words with answers of about 90."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnop") for _ in range(rng.randint(2, 7))) for _ in range(800)]
    return [
        {
            "prompt": " ".join(rng.choices(words, k=60)) + "\n",
            "completion": " ".join(rng.choices(words, k=90)),
        }
        for _ in range(count)
    ]


def ours(data: rewarm.InstructionData, steps: int) -> Clock:
    """Train with Lightning."""
    seed_everything(0, verbose=False)
    clock = Clock()
    module = rewarm.CurriculumSFT(MODEL, lambda p: torch.optim.AdamW(p, lr=1e-3))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(max_steps=steps, accelerator="cpu", callbacks=[clock], **quiet).fit(module, datamodule=data)
    return clock


def bare(batches: list[dict[str, Any]]) -> Clock:
    """Train with a loop over the same batches, and all logits."""
    seed_everything(0, verbose=False)
    clock = Clock()
    model = build_model(MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in batches:
        clock.on_train_batch_start()
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.on_train_batch_end(None, None, {"loss": loss})  # type: ignore[arg-type]
    return clock


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(8 * args.steps)))
        tokenizer = Path(folder) / "tokenizer"
        bpe_tokenizer([row["prompt"] + row["completion"] for row in rows(200)], 4096).save_pretrained(
            tokenizer
        )
        ratios = []
        for _ in range(args.repeats):
            data = rewarm.InstructionData(str(path), str(tokenizer), max_length=1024, batch_size=8)
            mine = ours(data, args.steps)
            other = rewarm.InstructionData(str(path), str(tokenizer), max_length=1024, batch_size=8)
            other.setup()
            batches = list(other.train_dataloader())
            theirs = bare(batches)
            for a, b in zip(mine.losses, theirs.losses, strict=True):
                if abs(a - b) > 1e-4 * abs(b):
                    raise SystemExit(f"the losses differ: {a} and {b}")
            # The first step warms caches up.
            ratios.append(statistics.median(theirs.times[1:]) / statistics.median(mine.times[1:]))
    tokens = sum(b["input_ids"].numel() for b in batches)
    targets = sum(b["counts"]["tokens"] for b in batches)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}")
    share = 100 * targets / tokens
    print(f"{len(batches)} steps of {tokens // len(batches)} tokens, {share:.0f} % targets; equal losses")
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"bare loop's step time / ours: {shown} (median {statistics.median(ratios):.2f})")


if __name__ == "__main__":
    main()
