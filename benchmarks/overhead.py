"""What starting costs, and what Lightning and our callbacks add to each step of a model too small to hide it.

Run: python -m benchmarks.overhead --output FOLDER. Start-up: processes that import, show help, or train one
step of the demo's model on 500 rows, in turns; their CPU seconds, and what each package's own modules take of
the imports of `rewarm fit` (python -X importtime). Steps: a Llama of one layer and width 16, 4 short
rows; CPU microseconds per optimizer step of a bare loop, of Lightning with a plain module, with
`CurriculumSFT`, with each callback alone, and with all of them; in turns.
"""

import argparse
import itertools
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

import rewarm
from benchmarks.evidence.common import write
from rewarm.commands.init import character_tokenizer
from rewarm.functional.gradients import clip_gradients_
from rewarm.lightning_modules.policy import Policy, build_model
from rewarm.sums import solutions

ROOT = Path(__file__).parents[1]
SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
UNTIMED = 20

# What `rewarm fit` imports, without it.
IMPORTS = """
import datasets, torch
from lightning.pytorch.cli import LightningCLI
from transformers import AutoModelForCausalLM, AutoTokenizer
from torch.utils.tensorboard import SummaryWriter
"""
BARE = (
    IMPORTS
    + """
import sys
folder, rows = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
rows = datasets.load_dataset("json", data_files=rows, split="train")
batch = tokenizer([row["prompt"] + row["completion"] for row in rows], padding=True, return_tensors="pt")
ids = batch.input_ids[:96]
optimizer = torch.optim.AdamW(model.parameters())
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
SummaryWriter(folder)
"""
)


# --- start-up -----------------------------------------------------------------------------------------------


def process_seconds(command: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of a process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def commands(folder: Path) -> dict[str, list[str]]:
    """The processes by name; writes what they read."""
    rows = solutions(500, 0)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = [sys.executable, "-m", "rewarm"]
    model, data = str(folder / "model"), str(folder / "rows.jsonl")
    config = str(ROOT / "configs/tiny/sums_model.yaml")
    made = ["--output", model, "--config", config, "--tokenizer", "characters", "--text", data]
    process_seconds([*program, "init", *made])
    settings = {
        "model.init_args.model": model,
        "data.init_args.train": data,
        "data.init_args.tokenizer": model,
        "trainer.max_steps": "1",
        "trainer.default_root_dir": str(folder / "logs"),
        "trainer.enable_progress_bar": "false",
    }
    fit = ["fit", "--config", str(ROOT / "configs/tiny/curriculum_sft.yaml")]
    fit += [f"--{name}={value}" for name, value in settings.items()]

    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    return {
        "import rewarm": python("import rewarm"),
        "rewarm --help": [*program, "--help"],
        "import torch": python("import torch"),
        "import lightning.pytorch": python("import lightning.pytorch"),
        "all that rewarm fit imports of others": python(IMPORTS),
        "bare script to the first step": [*python(BARE), model, data],
        "rewarm fit to the first step": [*program, *fit],
    }


def import_seconds() -> dict[str, float]:
    """Own seconds of each package's modules among the imports of a fit, the largest first."""
    names = "import rewarm, rewarm.commands.fit, datasets, torch.utils.tensorboard\n"
    code = names + "[getattr(rewarm, n) for n in ('CurriculumSFT', 'InstructionData', 'LRSchedule')]"
    command = [sys.executable, "-X", "importtime", "-c", code]
    lines = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stderr.splitlines()
    seconds: defaultdict[str, float] = defaultdict(float)
    for line in lines:
        own, _, name = line.removeprefix("import time:").split("|")
        if own.strip().isdigit():
            seconds[name.strip().split(".")[0]] += int(own) / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def start_up(repeats: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each process."""
    known = commands(folder)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in known}
    for _, (name, command) in itertools.product(range(repeats), known.items()):
        found[name].append(process_seconds(command))
    return [
        {
            "part": "start-up",
            "what": name,
            "CPU seconds": statistics.median(cpu for cpu, _ in its),
            "wall seconds": statistics.median(wall for _, wall in its),
            "all": [cpu for cpu, _ in its],
        }
        for name, its in found.items()
    ]


# --- steps --------------------------------------------------------------------------------------------------


class Clock(Callback):
    """CPU seconds from one optimizer step to the last."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note the time."""
        if trainer.global_step == UNTIMED:
            self.began = time.process_time()
        elif trainer.global_step == trainer.max_steps:
            self.seconds = time.process_time() - self.began


class Plain(LightningModule):
    """The least that Lightning needs to do the same."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.policy = Policy(build_model(model))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss."""
        return loss_of(self.policy, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the same optimizer."""
        return adamw(self.parameters())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of all."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def loss_of(policy: Policy, batch: dict[str, Any]) -> Tensor:
    """Mean over the targets."""
    logprobs = policy(
        batch["input_ids"], batch["position_ids"], batch["targets"], documents=batch["documents"]
    )
    return -logprobs.sum() / batch["counts"]["tokens"]


def loop(model: dict[str, Any], batches: list[dict[str, Any]]) -> float:
    """CPU seconds per step of a bare loop."""
    torch.manual_seed(0)
    policy = Policy(build_model(model))
    optimizer, parameters = adamw(policy.parameters()), list(policy.parameters())
    for number, batch in enumerate(batches, 1):
        loss_of(policy, batch).backward()
        clip_gradients_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number == UNTIMED:
            began = time.process_time()
    return (time.process_time() - began) / (len(batches) - UNTIMED)


def fit(
    module: LightningModule, steps: int, callbacks: list[Callback], data: Any, logger: Any = False
) -> float:
    """CPU seconds per step of a fit."""
    clock = Clock()
    # A list would be taken for several loaders.
    options: dict[str, Any] = {"datamodule": data}
    if isinstance(data, list):
        options = {"train_dataloaders": rewarm.WindowLoader(data, 1)}
    Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=[*callbacks, clock],
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=logger,
        enable_checkpointing=any(isinstance(c, rewarm.Checkpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, **options)
    return clock.seconds / (steps - UNTIMED)


def systems(steps: int, folder: Path) -> dict[str, Callable[[], float]]:
    """What is timed, by name; each gives CPU seconds per step."""
    rows = solutions(400, 0)
    path = folder / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = character_tokenizer([row["prompt"] + row["completion"] for row in rows])
    tokenizer.save_pretrained(folder / "tokenizer")
    model = SMALL | {"vocab_size": len(tokenizer)}

    def data() -> Any:
        return rewarm.InstructionData(str(path), str(folder / "tokenizer"), max_length=64, batch_size=4)

    read = data()
    read.prepare_data()
    read.setup("fit")
    some = list(itertools.islice(read.train_dataloader(), 50))
    batches = list(itertools.islice(itertools.cycle(some), steps))

    def ours(*callbacks: Callback, given: Any = None, logger: Any = False) -> float:
        module = rewarm.CurriculumSFT(model, adamw)
        return fit(module, steps, list(callbacks), batches if given is None else given, logger)

    def usual() -> list[Callback]:
        return [make() for make in callbacks.values()]

    callbacks: dict[str, Callable[[], Callback]] = {
        "LRSchedule": lambda: rewarm.LRSchedule(rewarm.wsd(warmup=0.1, decay=0.2)),
        "Throughput": rewarm.Throughput,
        "ExactResume": rewarm.ExactResume,
        "Preemption": rewarm.Preemption,
        "Checkpoint": lambda: rewarm.Checkpoint(str(folder / "checkpoints"), every_n_train_steps=10**6),
        "CheckpointAveraging": lambda: rewarm.CheckpointAveraging(every_n_steps=20),
    }
    known: dict[str, Callable[[], float]] = {
        "bare loop": lambda: loop(model, batches),
        "Lightning, plain module": lambda: fit(Plain(model), steps, [], batches),
        "CurriculumSFT, no callbacks": ours,
    }
    for name, make in callbacks.items():
        known[f"with {name}"] = lambda make=make: ours(make())  # type: ignore[misc]
    known["with TensorBoard"] = lambda: ours(logger=TensorBoardLogger(str(folder), "alone"))
    known["with all of these"] = lambda: ours(*usual(), logger=TensorBoardLogger(str(folder), "all"))
    known["and InstructionData, DifficultyFilter"] = lambda: ours(
        *usual(),
        rewarm.DifficultyFilter(0.0, 100.0),
        given=data(),
        logger=TensorBoardLogger(str(folder), "data"),
    )
    return known


def per_step(steps: int, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each system."""
    known = systems(steps, folder)
    found: dict[str, list[float]] = {name: [] for name in known}
    for _, (name, system) in itertools.product(range(repeats), known.items()):
        found[name].append(1e6 * system())
    middle = {name: statistics.median(its) for name, its in found.items()}
    first, base = middle["bare loop"], middle["CurriculumSFT, no callbacks"]
    return [
        {
            "part": "step",
            "what": name,
            "CPU us": round(middle[name]),
            "more than the loop": round(middle[name] - first),
            "more than without callbacks": round(middle[name] - base) if name.startswith("with") else "",
            "all": its,
        }
        for name, its in found.items()
    ]


# --- both ---------------------------------------------------------------------------------------------------


def picture(starts: list[dict[str, Any]], steps: list[dict[str, Any]], imports: dict[str, float]) -> Figure:
    """Bars."""
    figure = Figure(figsize=(12.0, 4.0), layout="constrained")
    shown = [
        ([row["what"] for row in starts], [row["CPU seconds"] for row in starts], "CPU seconds to start"),
        (list(imports)[:10], list(imports.values())[:10], "own seconds of imported packages"),
        ([row["what"] for row in steps], [row["CPU us"] for row in steps], "CPU microseconds per step"),
    ]
    for axes, (names, values, title) in zip(figure.subplots(1, 3), shown, strict=True):
        axes.barh(names, values)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
    return figure


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="for JSON and PNG")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each fit")
    parser.add_argument("--repeats", type=int, default=5, help="of everything, in turns")
    parser.add_argument("--quick", action="store_true", help="once and few steps, to see that it works")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    repeats, count = (1, UNTIMED + 10) if args.quick else (args.repeats, args.steps)
    with tempfile.TemporaryDirectory() as name:
        steps = per_step(count, repeats, Path(name))
        starts = start_up(repeats, Path(name))
    imports = import_seconds()
    settings = {"steps": count, "repeats": repeats, "quick": args.quick, "import seconds": imports}
    figure = picture(starts, steps, imports)
    write("overhead_start", args.output, settings, starts, figure)
    print("own seconds of imports:", ", ".join(f"{n} {s:.2f}" for n, s in list(imports.items())[:8]))
    write("overhead_step", args.output, settings, steps, figure)


if __name__ == "__main__":
    main()
