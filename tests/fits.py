"""Small fits of the four methods on the CPU."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

import rewarm
from rewarm.datamodules.loader import Collate, Example, collate_rows
from rewarm.datamodules.preferences import count_pairs
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.text.encoding import Tokens
from tests import tiny


def adamw(lr: float = 1e-2) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, fused=True)


def sgd(lr: float = 1e-2) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def trainer(**options: Any) -> Trainer:
    """A quiet Trainer on one CPU that logs every step and writes nothing."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**quiet | options)


@dataclass(frozen=True)
class Files:
    """A tokenizer and data for every method in one folder."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tiny.save_tokenizer(self.folder / "tokenizer")
        rows = tiny.sums(48)
        # Completions of very different lengths, so that a mean per micro-batch would be far off.
        ragged = [
            {**row, "completion": row["completion"] + "x" * (11 * (number % 4))}
            for number, row in enumerate(rows)
        ]
        tiny.write_jsonl(self.folder / "sft.jsonl", ragged)
        tiny.write_jsonl(self.folder / "prompts.jsonl", rows)
        tiny.write_jsonl(
            self.folder / "pairs.jsonl",
            [
                {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{row['answer'] + 1} no"}
                for row in ragged
            ],
        )
        (self.folder / "new.txt").write_text(
            "".join(f"{row['prompt']}{row['completion']}\n" for row in ragged)
        )
        (self.folder / "old.txt").write_text("".join(f"abc {row['prompt']} cab\n" for row in rows))

    def __getattr__(self, name: str) -> str:
        kinds = {
            "tokenizer": "",
            "sft": ".jsonl",
            "prompts": ".jsonl",
            "pairs": ".jsonl",
            "new": ".txt",
            "old": ".txt",
        }
        return str(self.folder / (name + kinds[name]))


def odd_length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that an untrained model gets about every other time."""
    return [float(len(text) % 2) for text in completions]


def corpus(files: Files, **options: Any) -> LightningDataModule:
    return rewarm.CorpusData(
        {"new": files.new}, files.tokenizer, **{"max_length": 24, "batch_size": 2} | options
    )


def instructions(files: Files, **options: Any) -> LightningDataModule:
    return rewarm.InstructionData(files.sft, files.tokenizer, **{"max_length": 48, "batch_size": 2} | options)


def preferences(files: Files, **options: Any) -> LightningDataModule:
    return rewarm.PreferenceData(
        files.pairs, files.tokenizer, **{"max_length": 48, "batch_size": 2} | options
    )


def prompts(files: Files, **options: Any) -> LightningDataModule:
    defaults = {
        "reward": odd_length,
        "max_new_tokens": 8,
        "prompts_per_rollout": 4,
        "completions_per_prompt": 4,
        "minibatches": 2,
    }
    return rewarm.PromptData(files.prompts, files.tokenizer, **defaults | options)


@dataclass(frozen=True)
class Method:
    """How to make a module and its data."""

    module: Callable[..., LightningModule]
    data: Callable[..., LightningDataModule]


METHODS = {
    "ContinualPretraining": Method(rewarm.ContinualPretraining, corpus),
    "CurriculumSFT": Method(rewarm.CurriculumSFT, instructions),
    "DPO": Method(rewarm.DPO, preferences),
    "GRPO": Method(rewarm.GRPO, prompts),
}


class Record(Callback):
    """Keeps what every optimizer step used and left: gradients, logged metrics, weights."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.metrics: list[dict[str, float]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.gradients.append(gradients(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.metrics.append({name: float(value) for name, value in trainer.logged_metrics.items()})
            self.weights.append(weights(pl_module))


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of any element, relative to the largest element of all."""
    assert one.keys() == other.keys()
    assert one
    scale = max(float(value.abs().max()) for value in other.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / scale


# --- the same examples in batches of any size -----------------------------------------------------------


def sequences(count: int, seed: int = 0, longest: int = 24) -> list[Tokens]:
    """Ragged sequences of random tokens, each with a prompt of 1 to 4 tokens."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        length = rng.randrange(6, longest)
        tokens = torch.tensor([rng.randrange(3, 64) for _ in range(length)])
        made.append(Tokens(tokens, torch.arange(length) >= rng.randrange(1, 5)))
    return made


def text_batch(chosen: list[Tokens], numbers: list[int]) -> dict[str, Any]:
    """What `InstructionData` gives."""
    examples = [Example(number, (sequence,)) for number, sequence in zip(numbers, chosen, strict=True)]
    return Collate(0, packed=False)([[example] for example in examples])


def pair_batch(chosen: list[tuple[Tokens, Tokens]], numbers: list[int]) -> dict[str, Any]:
    """What `PreferenceData` gives."""
    examples = [Example(number, pair) for number, pair in zip(numbers, chosen, strict=True)]
    return Collate(0, packed=False, count=count_pairs)([[example] for example in examples])


@dataclass(frozen=True)
class Sampled:
    """A completion with its group's rewards."""

    sequence: Tokens
    logprobs: torch.Tensor
    rewards: list[float]
    place: int


def sampled(groups: int, size: int = 4, seed: int = 0) -> list[Sampled]:
    """Completions as if from another policy, with log-probabilities around those of an untrained model."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(groups):
        rewards = torch.rand(size, generator=generator).round(decimals=2).tolist()
        for place, sequence in enumerate(sequences(size, seed=1000 * seed + number)):
            logprobs = -4.16 + 0.3 * torch.randn(int(sequence.learn.sum()), generator=generator)
            made.append(Sampled(sequence, logprobs, rewards, place))
    return made


def rollout_batch(chosen: list[Sampled], numbers: list[int], temperature: float = 1.0) -> dict[str, Any]:
    """What `PromptData` gives."""
    batch = collate_rows([[one.sequence] for one in chosen], 0, restart=False)
    sampler = torch.zeros(batch["targets"].shape)
    for row, one in enumerate(chosen):
        sampler[row][batch["targets"][row] != IGNORE_INDEX] = one.logprobs
    return batch | {
        "ids": numbers,
        "sampler_logprobs": sampler,
        "group_rewards": torch.tensor([one.rewards for one in chosen]),
        "group_places": torch.tensor([one.place for one in chosen]),
        "temperature": temperature,
    }


def cut(
    items: list[Any], size: int, make: Callable[[list[Any], list[int]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Batches of some items, the last one perhaps smaller."""
    numbers = list(range(len(items)))
    return [make(items[start : start + size], numbers[start : start + size]) for start in numbers[::size]]
