"""Whether step time stays flat and memory does not grow over 2,000 optimizer steps with the usual callbacks.

Run: python -m benchmarks.long_run --output FOLDER. The demo's model of 0.33M parameters is trained by SFT and
by GRPO through the Trainer with TensorBoard. The learning rate is 0: each step has the same work to do.
Step times are CPU seconds of the process and means over blocks of steps, with the slope of a straight line
through them and its 95 % interval (Student's t). Resident memory, live tensors and objects that Python's
garbage collector knows are counted between blocks. Linux only. The first tenth of the steps is not fitted.
"""

import argparse
import gc
import json
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

import rewarm
from benchmarks.evidence.common import write
from rewarm.commands.init import character_tokenizer
from rewarm.sums import problems, solutions

ROOT = Path(__file__).parents[1]
BLOCKS = 20


class Watch(Callback):
    """Notes the time of each step, and memory after each block of steps.

    Attributes:
        seconds: CPU seconds of each step but the first, from the end of one to that of the next.
        memory: Resident bytes, live tensors and objects after each block.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.seconds: list[float] = []
        self.memory: list[tuple[int, int, int]] = []
        self._step, self._ended = 0, math.nan

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note the time, and sometimes memory, which is not part of any step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self.seconds.append(time.process_time() - self._ended)
        if self._step % self.block == 0:
            self.memory.append(memory())
        self._ended = time.process_time()


def memory() -> tuple[int, int, int]:
    """Resident bytes of the process, live tensors, and objects that the garbage collector knows."""
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(isinstance(thing, torch.Tensor) for thing in objects)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), tensors, len(objects)


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and half the width of its 95 % interval."""
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    found = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    left = sum((b - mean_y - found * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    freedom = len(x) - 2
    return found, (1.96 + 2.5 / freedom) * math.sqrt(left / freedom / spread)


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Differs between the completions of an untrained model."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def parts(method: str, folder: Path) -> tuple[LightningModule, LightningDataModule, list[Callback]]:
    """Module, data, and the callbacks that only this method has."""
    made = {"sft": solutions(6000, 0), "grpo": problems(2000, 0, held=False)}
    rows = folder / f"{method}.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in made[method]))
    tokenizer = character_tokenizer([row["prompt"] + row["completion"] for row in made["sft"]])
    tokenizer.save_pretrained(folder / "tokenizer")
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    model = yaml.safe_load((ROOT / "configs/tiny/sums_model.yaml").read_text()) | special
    model["vocab_size"] = len(tokenizer)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.0)

    if method == "sft":
        data = rewarm.InstructionData(str(rows), str(folder / "tokenizer"), max_length=64, batch_size=16)
        return rewarm.CurriculumSFT(model, optimizer), data, []
    sampled = {"max_new_tokens": 12, "prompts_per_rollout": 8, "completions_per_prompt": 4, "minibatches": 2}
    prompts = rewarm.PromptData(str(rows), str(folder / "tokenizer"), reward=reward, **sampled)
    return rewarm.GRPO(model, optimizer), prompts, [rewarm.DifficultyFilter(0.125, 0.875)]


def measure(method: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train and fit the lines."""
    seed_everything(0, verbose=False)
    module, data, more = parts(method, folder)
    block = steps // BLOCKS
    watch = Watch(block)
    usual: list[Callback] = [
        rewarm.LRSchedule(rewarm.wsd(warmup=0.1, decay=0.2)),
        rewarm.CheckpointAveraging(mode="last_k", k=5, every_n_steps=20),
        rewarm.Throughput(),
        rewarm.ExactResume(),
        rewarm.Preemption(),
        rewarm.Checkpoint(str(folder / method / "checkpoints"), every_n_train_steps=max(1, steps // 10)),
    ]
    Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        callbacks=[*usual, *more, watch],
        logger=TensorBoardLogger(str(folder), method),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    ).fit(module, datamodule=data)
    return row(method, watch)


def row(method: str, watch: Watch) -> dict[str, Any]:
    """What a run shows."""
    block = watch.block
    cuts = range(0, len(watch.seconds), block)
    # The first step has no beginning.
    times = [1e3 * statistics.fmean(watch.seconds[max(cut, 1) : cut + block]) for cut in cuts]
    ends = [cut + block for cut in cuts]
    settled = BLOCKS // 10
    mib = [resident / 2**20 for resident, _, _ in watch.memory]
    per_step, half = slope(ends[settled:], times[settled:])
    growth, growth_half = slope(ends[settled:], mib[settled:])
    mean = statistics.fmean(times[settled:])
    tensors, objects = ([sample[place] for sample in watch.memory] for place in (1, 2))
    return {
        "method": method,
        "steps": ends[-1],
        "ms/step": mean,
        "% slower per 1000 steps": f"{1e5 * per_step / mean:+.2f} +- {1e5 * half / mean:.2f}",
        "MiB": f"{mib[settled]:.0f} to {mib[-1]:.0f}",
        "MiB more per 1000 steps": f"{1e3 * growth:+.2f} +- {1e3 * growth_half:.2f}",
        "tensors": f"{tensors[settled]} to {tensors[-1]}",
        "objects": f"{objects[settled]} to {objects[-1]}",
        "ends": ends,
        "times": times,
        "resident": mib,
        "all tensors": tensors,
        "all objects": objects,
    }


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Step time and memory over the run."""
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for found in rows:
        left.plot(found["ends"], found["times"], ".-", label=found["method"])
        right.plot(found["ends"], found["resident"], ".-", label=found["method"])
    left.set(xlabel="optimizer step", ylabel="CPU ms per step", ylim=(0, None))
    right.set(xlabel="optimizer step", ylabel="resident memory in MiB", ylim=(0, None))
    left.legend(frameon=False)
    return figure


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="for JSON and PNG")
    parser.add_argument("--steps", type=int, default=2000, help="of each method, a multiple of 20")
    parser.add_argument("--methods", nargs="+", choices=["sft", "grpo"], default=["sft", "grpo"])
    parser.add_argument("--quick", action="store_true", help="40 steps, to see that it works")
    args = parser.parse_args()
    steps = 40 if args.quick else args.steps
    if steps < BLOCKS or steps % BLOCKS:
        parser.error(f"--steps is {steps}; it must be a multiple of {BLOCKS}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        rows = [measure(method, steps, Path(name)) for method in args.methods]
    write("long_run", args.output, {"steps": steps, "quick": args.quick}, rows, picture(rows))


if __name__ == "__main__":
    main()
