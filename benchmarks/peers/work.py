"""What is measured: models with random weights and generated rows, in a folder that all systems read."""

import json
import math
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rewarm.commands.init import bpe_tokenizer
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
LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "vocab_size": 128256,
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
QWEN3_17B = QWEN3_06B | {"hidden_size": 2048, "intermediate_size": 6144}


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
        lr: Learning rate, constant.
        group: Completions per prompt, of grpo.
        max_new_tokens: Of grpo.
        ours: Further options of our module.
        trl: Further options of TRL.
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
    ours: dict[str, Any] = field(default_factory=dict)
    trl: dict[str, Any] = field(default_factory=dict)


def rows_at_a_time(rows: int, of: int) -> dict[str, int]:
    """TRL's options for optimizer steps that go over their rows in parts."""
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": of // rows}


# TRL has what was quickest for it, of all, half, a quarter and one of the rows at a time, and with and
# without `chunked_nll` and `padding_free`, which differ little. It puts packed rows that share a batch into
# one, with a mask of its length squared; what that costs, `sft-packed` shows, with all rows at once.
LONG: dict[str, Any] = {"max_length": 1024, "batch_size": 4, "steps": 6, "trl": rows_at_a_time(2, of=4)}
PACKED: dict[str, Any] = {"packing": True, "lr": 1e-5, "max_length": 4096, "trl": rows_at_a_time(1, of=8)}
COMPILED: dict[str, Any] = {"ours": {"compile": True}, "trl": {"torch_compile": True}}
CPU = [
    Work("sft", "sft", TINY, trl=rows_at_a_time(4, of=8)),
    Work("sft-packed", "sft", TINY, packing=True, steps=6),
    Work("sft-packed-row-by-row", "sft", TINY, packing=True, steps=6, trl=rows_at_a_time(1, of=8)),
    Work("sft-short", "sft", TINY, prompt_words=(5, 15), completion_words=(5, 15), batch_size=32),
    Work("sft-long", "sft", TINY, (150, 300), (250, 500), **LONG),
    Work("pretraining", "pretraining", TINY, packing=True, steps=6),
    # LitGPT compiles its model, here and above.
    Work("pretraining-compiled", "pretraining", TINY, packing=True, steps=6, **COMPILED),
    Work("dpo", "dpo", TINY, lr=1e-4, trl=rows_at_a_time(4, of=8)),
    Work("grpo", "grpo", TINY, prompt_words=(10, 30), batch_size=64, steps=4, lr=1e-5),
]
GPU = [
    Work("sft-packed-0.6b", "sft", QWEN3_06B, **PACKED),
    Work("sft-packed-1b", "sft", LLAMA_1B, **PACKED),
    Work("sft-packed-1.7b", "sft", QWEN3_17B, **PACKED),
    Work("sft-0.6b", "sft", QWEN3_06B, lr=1e-5, max_length=1024, batch_size=64),
    Work("sft-long-0.6b", "sft", QWEN3_06B, (400, 800), (400, 800), lr=1e-5, max_length=8192),
    Work("pretraining-1b", "pretraining", LLAMA_1B, packing=True, lr=1e-5, max_length=4096),
    Work("dpo-0.6b", "dpo", QWEN3_06B, lr=1e-6, max_length=1024, batch_size=32),
    Work("dpo-1.7b", "dpo", QWEN3_17B, lr=1e-6, max_length=1024, batch_size=16),
    Work("grpo-0.6b", "grpo", QWEN3_06B, batch_size=256, steps=4, lr=1e-6, max_new_tokens=256),
]


def quick(work: Work) -> Work:
    """Return the same work with a model of the same kind and little else."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
    }
    few: dict[str, Any] = {"prompt_words": (3, 6), "completion_words": (3, 6), "max_length": 128, "steps": 2}
    few |= {"batch_size": min(work.batch_size, 8), "group": 2, "max_new_tokens": 8, "lr": 1e-3}
    return replace(work, model=work.model | small, **few)


def write(work: Work, folder: Path) -> tuple[Path, float]:
    """Write the model, its tokenizer and the rows.

    Returns:
        The file that says so to the workers, and to how many tokens a token attends, before masking.
    """
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
    least = (sum(work.prompt_words) + sum(work.completion_words)) / 2
    count = per_step * (work.steps + 2) * (math.ceil(1.2 * work.max_length / least) if work.packing else 1)
    rows: list[dict[str, Any]] = []
    lengths: list[int] = []
    for number in range(count):
        prompt = text(work.prompt_words) + "\n"
        completion, other = text(work.completion_words), text(work.completion_words)
        fields: dict[str, dict[str, Any]] = {
            "pretraining": {"text": prompt + completion},
            "dpo": {"prompt": prompt, "chosen": completion, "rejected": other},
            "grpo": {"prompt": prompt},
            "sft": {"prompt": prompt, "completion": completion},
        }
        rows.append(fields[work.method] | {"number": number})
        lengths.append(len(tokenizer(prompt + completion)["input_ids"]))
    attended = sum(length**2 for length in lengths) / sum(lengths)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = folder / "job.json"
    job.write_text(json.dumps(asdict(work) | {"folder": str(folder)}))
    return job, work.max_length if work.method == "pretraining" else attended
