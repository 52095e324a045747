"""Short fits through the command line, whose losses, logs and weights are recorded to the last digit.

Each case is a config of `configs/tiny` with some keys set. `golden/curves.json` holds what they gave when
they were recorded. When an argument gets another name, only `CASES` changes. When a value is to change, look
at the difference, then: `OMP_NUM_THREADS=1 python -m tests.house.curves NAME...` (without names: all cases).
"""

import hashlib
import json
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from tests import tiny

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
CURVES = Path(__file__).parent / "golden" / "curves.json"

# --- the cases ------------------------------------------------------------------------------------------

MODEL, DATA, TRAINER = "model.init_args", "data.init_args", "trainer"
SFT = {
    f"{DATA}.train": "$folder/sft.jsonl",
    f"{DATA}.batch_size": 6,
    f"{TRAINER}.max_steps": 10,
    f"{TRAINER}.callbacks": [],
}
PAIRS = {
    f"{DATA}.train": "$folder/pairs.jsonl",
    f"{DATA}.batch_size": 6,
    f"{TRAINER}.max_steps": 10,
    f"{TRAINER}.callbacks": [],
    f"{MODEL}.optimizer.init_args.lr": 2.0e-3,
}
PROMPTS = {
    f"{DATA}.train": "$folder/prompts.jsonl",
    f"{DATA}.reward": f"{__package__}.curves.odd_length",
    f"{DATA}.max_new_tokens": 8,
    f"{DATA}.prompts_per_rollout": 4,
    f"{DATA}.completions_per_prompt": 4,
    f"{TRAINER}.max_steps": 8,
    f"{TRAINER}.callbacks": [],
    f"{MODEL}.optimizer.init_args.lr": 2.0e-3,
}
# A rollout is used twice, so that ratios leave 1 and are clipped.
REUSED = PROMPTS | {f"{DATA}.minibatches": 2, f"{DATA}.passes": 2}
CORPUS = {
    f"{DATA}.train": {"new": "$folder/new.txt"},
    f"{DATA}.val": {"new": "$folder/new.txt", "old": "$folder/old.txt"},
    f"{DATA}.max_length": 24,
    f"{DATA}.batch_size": 4,
    f"{TRAINER}.max_steps": 24,  # the schedule warms up over 20
    f"{TRAINER}.val_check_interval": 12,
}


def loss(name: str, **arguments: Any) -> dict[str, Any]:
    return {f"{MODEL}.loss": {"class_path": f"rewarm.{name}", "init_args": arguments}}


SIGMOID = {"class_path": "rewarm.Sigmoid", "init_args": {"beta": 0.03}}


def callbacks(**named: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{TRAINER}.callbacks": [
            {"class_path": f"rewarm.{name}", "init_args": arguments} for name, arguments in named.items()
        ]
    }


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # the shipped configs with their callbacks, on less data
    "continual_pretraining": ("continual_pretraining", CORPUS),
    "curriculum_sft": (
        "curriculum_sft",
        {f"{DATA}.train": "$folder/sft.jsonl", f"{DATA}.batch_size": 8, f"{TRAINER}.max_steps": 40},
    ),
    "dpo": (
        "dpo",
        {f"{DATA}.train": "$folder/pairs.jsonl", f"{DATA}.batch_size": 8, f"{TRAINER}.max_steps": 12},
    ),
    "grpo": ("grpo", {key: value for key, value in PROMPTS.items() if key != f"{TRAINER}.callbacks"}),
    # continual pretraining
    "replay, accumulated, two sources": (
        "continual_pretraining",
        CORPUS
        | {
            f"{DATA}.train": {"new": "$folder/new.txt", "third": "$folder/third.txt"},
            f"{DATA}.replay": {"old": "$folder/old.txt"},
            f"{DATA}.replay_fraction": 0.25,
            f"{DATA}.weights": {"new": 0.75, "third": 0.25},
            f"{TRAINER}.accumulate_grad_batches": 3,
            f"{TRAINER}.max_steps": 9,
            f"{TRAINER}.val_check_interval": 9,
            f"{TRAINER}.callbacks": [],
        },
    ),
    # supervised fine-tuning
    "DFT": ("curriculum_sft", SFT | loss("DFT", power=0.7)),
    "EntropySFT": ("curriculum_sft", SFT | loss("EntropySFT", token_ratio=0.7)),
    "LabelSmoothing": ("curriculum_sft", SFT | loss("LabelSmoothing", smoothing=0.1)),
    "ZLoss on DFT": (
        "curriculum_sft",
        SFT | loss("ZLoss", coefficient=0.01, loss={"class_path": "rewarm.DFT"}),
    ),
    "DITTO": ("curriculum_sft", SFT | {f"{DATA}.train": "$folder/repeats.jsonl"} | loss("DITTO")),
    "MultiTask": (
        "curriculum_sft",
        SFT | {f"{DATA}.task": "task"} | loss("MultiTask", weights={"easy": 0.25, "hard": 0.75}),
    ),
    "Distillation": (
        "curriculum_sft",
        SFT | {f"{DATA}.train": "$folder/teacher.jsonl"} | loss("Distillation", at_temperature=2.0),
    ),
    "packing": ("curriculum_sft", SFT | {f"{DATA}.packing": True, f"{DATA}.batch_size": 2}),
    "padding-free": ("curriculum_sft", SFT | {f"{DATA}.packing": "padding_free"}),
    "two epochs of ragged windows, with validation": (
        "curriculum_sft",
        SFT
        | {
            f"{DATA}.val": "$folder/val.jsonl",
            f"{DATA}.batch_size": 5,
            f"{TRAINER}.accumulate_grad_batches": 4,
            f"{TRAINER}.max_steps": -1,
            f"{TRAINER}.max_epochs": 2,
            f"{TRAINER}.check_val_every_n_epoch": 1,
        },
    ),
    "weights, and a step left out": ("curriculum_sft", SFT | {f"{DATA}.train": "$folder/weighted.jsonl"}),
    "a step left out of an optimizer that is not fused, clipped by value": (
        "curriculum_sft",
        SFT
        | {
            f"{DATA}.train": "$folder/weighted.jsonl",
            f"{MODEL}.optimizer": {
                "class_path": "torch.optim.SGD",
                "init_args": {"lr": 0.05, "momentum": 0.9},
            },
            f"{TRAINER}.gradient_clip_val": 0.1,
            f"{TRAINER}.gradient_clip_algorithm": "value",
        },
    ),
    "pacing, groups and a gate": (
        "curriculum_sft",
        SFT
        | {
            f"{DATA}.group": "task",
            f"{DATA}.pacing": {
                "class_path": "rewarm.LinearPacing",
                "init_args": {"total_steps": 8, "start": 0.4},
            },
            f"{TRAINER}.max_steps": 20,
        }
        | callbacks(
            LRSchedule={"schedule": {"class_path": "rewarm.linear", "init_args": {"warmup": 4}}},
            DifficultyFilter={"low": 2.0, "high": 3.6},
            CheckpointAveraging={"mode": "ema", "decay": 0.8},
        ),
    ),
    # preferences
    "sigmoid with smoothing, accumulated, with validation": (
        "dpo",
        PAIRS
        | {
            **loss("Sigmoid", beta=0.5, label_smoothing=0.1),
            f"{DATA}.val": "$folder/val_pairs.jsonl",
            f"{TRAINER}.accumulate_grad_batches": 3,
            f"{TRAINER}.val_check_interval": 6,
            f"{TRAINER}.check_val_every_n_epoch": None,
        },
    ),
    "frozen reference, with likelihood and validation": (
        "dpo",
        PAIRS
        | {
            f"{MODEL}.reference": "frozen",
            **loss("Sum", losses=[SIGMOID, {"class_path": "rewarm.ChosenNLL"}], weights=[1.0, 0.5]),
            f"{DATA}.val": "$folder/val_pairs.jsonl",
            f"{TRAINER}.check_val_every_n_epoch": 1,
        },
    ),
    "nca_pair": (
        "dpo",
        PAIRS
        | loss(
            "Sum",
            losses=[
                {"class_path": "rewarm.NCA", "init_args": {"beta": 0.1}},
                {"class_path": "rewarm.ChosenNLL"},
            ],
            weights=[1.0, 1.0],
        ),
    ),
    # reinforcement learning
    "clipped ratios, with validation": (
        "grpo",
        REUSED
        | {
            **loss("Clipped", low=0.02, high=0.05),
            f"{DATA}.val": "$folder/prompts.jsonl",
            f"{TRAINER}.val_check_interval": 4,
            f"{TRAINER}.check_val_every_n_epoch": None,
        },
    ),
    "no deviation, mean of a constant": (
        "grpo",
        REUSED
        | {
            f"{MODEL}.advantage": {
                "class_path": "rewarm.GroupAdvantage",
                "init_args": {"scale_by_std": False},
            },
            f"{MODEL}.weights": {"class_path": "rewarm.PerConstant", "init_args": {"tokens": 8}},
        },
    ),
    "mean of sequences, with KL": (
        "grpo",
        REUSED | {f"{MODEL}.weights": {"class_path": "rewarm.PerSequence"}, f"{MODEL}.kl": 0.1},
    ),
    "mean of tokens, with KL, accumulated": (
        "grpo",
        PROMPTS | {f"{MODEL}.kl": 0.04, f"{TRAINER}.accumulate_grad_batches": 2, f"{DATA}.temperature": 0.8},
    ),
}


def odd_length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that an untrained model gets about every other time."""
    return [float(len(text) % 2) for text in completions]


# --- their data -----------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Write a model, its tokenizer and the data of all cases."""
    tiny.save_tokenizer(folder / "model")
    torch.manual_seed(0)
    options = {name: value for name, value in tiny.LLAMA.items() if name != "model_type"}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).save_pretrained(folder / "model")

    rng = random.Random(0)
    # Completions of very different lengths, so that a mean per micro-batch would be far off.
    rows = [
        {**row, "completion": row["completion"] + "x" * (7 * (number % 4)), "task": _task(row)}
        for number, row in enumerate(tiny.sums(48))
    ]
    weights = [(number % 3) / 2 for number in range(len(rows))]
    weights[17] = 3e38  # a loss beyond float32
    teacher = [
        row
        | {
            "teacher_ids": [
                [rng.randrange(3, 64) for _ in range(3)] for _ in range(len(row["completion"]) + 1)
            ],
            "teacher_logprobs": [[-1.0, -1.5, -2.5]] * (len(row["completion"]) + 1),
        }
        for row in rows
    ]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{row['answer'] + 1} no"}
        for row in rows
    ]
    tables = {
        "sft": rows,
        "val": rows[:14],
        "weighted": [row | {"weight": weight} for row, weight in zip(rows, weights, strict=True)],
        "repeats": [row | {"repeat": number % 2 == 0} for number, row in enumerate(rows)],
        "teacher": teacher,
        "pairs": pairs,
        "val_pairs": pairs[:10],
        "prompts": tiny.sums(24, seed=1),
    }
    for name, table in tables.items():
        tiny.write_jsonl(folder / f"{name}.jsonl", table)
    (folder / "new.txt").write_text("".join(f"{row['prompt']}{row['completion']}\n" for row in rows))
    (folder / "old.txt").write_text("".join(f"abc {row['prompt']} cab\n" for row in rows))
    (folder / "third.txt").write_text("".join(f"what is {row['prompt']}?\n" for row in rows))


def _task(row: dict[str, Any]) -> str:
    return "easy" if row["difficulty"] < 6 else "hard"


# --- running and recording ------------------------------------------------------------------------------


class Recorder(Logger):
    """Keeps every logged scalar of every step, and writes them to a file as they end.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self.scalars: list[list[Any]] = []
        self.weights: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "curves"

    @property
    def version(self) -> str:
        return "0"

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.scalars += [[step, name, float(value).hex()] for name, value in sorted(metrics.items())]

    def log_hyperparams(self, params: Any, *args: Any, **options: Any) -> None:
        """Nothing: settings are not results."""

    def finalize(self, status: str) -> None:
        self.path.write_text(json.dumps({"scalars": self.scalars, "weights": self.weights}))


class FinalWeights(Callback):
    """Gives the recorder a digest of the weights, and their norm."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        digest, squares = hashlib.sha256(), 0.0
        for name, parameter in sorted(pl_module.policy.named_parameters()):
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
            squares += float(parameter.detach().double().square().sum())
        trainer.logger.weights = {"sha256": digest.hexdigest(), "norm": (squares**0.5).hex()}


def run(name: str, folder: Path) -> dict[str, Any]:
    """Fit a case; return its scalars as `[step, name, hexadecimal float]`, and the digest of its weights."""
    from rewarm.cli import main

    source, changes = CASES[name]
    shared = {
        f"{MODEL}.model": "$folder/model",
        f"{DATA}.tokenizer": "$folder/model",
        f"{TRAINER}.log_every_n_steps": 1,
        f"{TRAINER}.enable_checkpointing": False,
        f"{TRAINER}.enable_progress_bar": False,
        f"{TRAINER}.enable_model_summary": False,
        f"{TRAINER}.default_root_dir": "$folder",
        f"{TRAINER}.logger": {
            "class_path": f"{__package__}.curves.Recorder",
            "init_args": {"path": "$folder/curve.json"},
        },
    }
    config = yaml.safe_load((CONFIGS / f"{source}.yaml").read_text())
    for key, value in (shared | changes).items():
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    config["trainer"]["callbacks"] = [
        *config["trainer"]["callbacks"],
        {"class_path": f"{__package__}.curves.FinalWeights"},
    ]
    path = folder / "case.yaml"
    path.write_text(yaml.safe_dump(config).replace("$folder", str(folder)))
    main(["fit", "--config", str(path)])
    curve: dict[str, Any] = json.loads((folder / "curve.json").read_text())
    return curve


def machine() -> dict[str, str]:
    """What decides the last digit: the versions, the processor, the threads."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "torch": version("torch"),
        "transformers": version("transformers"),
        "processor": f"{names[0]}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
    }


if __name__ == "__main__":
    # As in the test, which knows the classes of this file by the same name.
    from tests.house import curves

    record = json.loads(CURVES.read_text()) if CURVES.exists() else {"curves": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        for name in sys.argv[1:] or CASES:
            record["curves"][name] = curves.run(name, Path(folder))
    lines = [f"{json.dumps(name)}: {json.dumps(curve)}" for name, curve in record["curves"].items()]
    CURVES.write_text(
        '{"machine": ' + json.dumps(machine()) + ',\n "curves": {\n' + ",\n".join(lines) + "\n}}\n"
    )
