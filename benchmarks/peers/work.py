"""What is measured: models with random weights and generated rows, in a folder that all systems read."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rewarm.initial_model import bpe_tokenizer
from rewarm.lightning_modules.policy import build_model

TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Work:
    """One task that each system does.

    Attributes:
        name: Short and unique.
        method: `sft`, `pretraining`, `dpo` or `grpo`.
        model: Fields of a transformers config.
        prompt_words: Range of the number of words of a prompt.
        completion_words: Range of the number of words of a completion, long and short rows alike.
        packing: Whether rows share sequences.
        max_length: Most tokens per sequence.
        batch_size: Sequences per optimizer step (of grpo: completions).
        steps: Optimizer steps that are timed, after two that are not.
        lr: 0 where the systems put other rows together: their mean losses over all rows are then equal.
        group: Completions per prompt, of grpo.
        max_new_tokens: Of grpo.
    """

    name: str
    method: str
    model: dict[str, Any]
    prompt_words: tuple[int, int] = (20, 60)
    completion_words: tuple[int, int] = (20, 120)
    packing: bool = False
    max_length: int = 512
    batch_size: int = 8
    steps: int = 12
    lr: float = 1e-3
    group: int = 8
    max_new_tokens: int = 64


CPU = [
    Work("sft", "sft", TINY),
    Work("sft-packed", "sft", TINY, packing=True, lr=0.0),
    Work("sft-short", "sft", TINY, prompt_words=(5, 15), completion_words=(5, 15), batch_size=32),
    Work("pretraining", "pretraining", TINY, packing=True, lr=0.0),
    Work("dpo", "dpo", TINY, lr=1e-4),
    Work("grpo", "grpo", TINY, prompt_words=(10, 30), batch_size=64, steps=4, lr=1e-5),
]
GPU = [
    Work("sft-packed", "sft", QWEN3_06B, packing=True, lr=0.0, max_length=4096, batch_size=8),
    Work("sft", "sft", QWEN3_06B, lr=1e-5, max_length=1024, batch_size=64),
    Work("pretraining", "pretraining", QWEN3_06B, packing=True, lr=0.0, max_length=4096, batch_size=8),
    Work("dpo", "dpo", QWEN3_06B, lr=1e-6, max_length=1024, batch_size=32),
    Work("grpo", "grpo", QWEN3_06B, batch_size=256, steps=4, lr=1e-6, max_new_tokens=256),
]


def write(work: Work, folder: Path) -> Path:
    """Write the model, its tokenizer and the rows; return the file that says so to the workers."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnop") for _ in range(rng.randint(2, 7))) for _ in range(800)]

    def text(count: tuple[int, int]) -> str:
        return " ".join(rng.choices(words, k=rng.randint(*count)))

    folder.mkdir(parents=True)
    tokenizer = bpe_tokenizer([text((80, 80)) for _ in range(300)], min(work.model["vocab_size"], 4096))
    special = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    build_model(work.model | special).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    per_step = work.batch_size // work.group if work.method == "grpo" else work.batch_size
    # A packed row holds several; no system may run out of rows before it has done its steps.
    count = per_step * (work.steps + 2) * (8 if work.packing else 1)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        prompt, completion = text(work.prompt_words) + "\n", text(work.completion_words)
        if work.method == "pretraining":
            rows.append({"text": prompt + completion})
        elif work.method == "dpo":
            rows.append({"prompt": prompt, "chosen": completion, "rejected": text(work.completion_words)})
        elif work.method == "grpo":
            rows.append({"prompt": prompt})
        else:
            rows.append({"prompt": prompt, "completion": completion})
        rows[-1]["number"] = number
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = folder / "job.json"
    job.write_text(json.dumps(asdict(work) | {"folder": str(folder), "rows": count}))
    return job
