"""Predicted against measured: peak memory and time of real fits, each in a process of its own.

Run: python -m benchmarks.cost_model --output FOLDER; on a GPU with --cuda. Predictions are those of
`rewarm plan memory`, made before anything runs. Memory on the CPU is the peak of the resident set less what
was resident before the model was built (Linux), with an allocator that gives memory back at once; on CUDA it
is `torch.cuda.max_memory_allocated`. Time is CPU time of one thread (on CUDA wall time), the median over
steps, of another process with the usual allocator. Its prediction has one number from a measurement: the
rates of `--measure`, for each model and precision its own, are scaled by what the first case took.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoConfig, AutoModelForCausalLM

from rewarm.commands.plan_memory import work_of
from rewarm.costs.cost_rates import measured_for
from rewarm.costs.cost_step import Cost, work_cost
from rewarm.costs.cost_work import Work
from rewarm.lightning_modules.policy import Policy

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
WIDE = SMALL | {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
QWEN = SMALL | {"model_type": "qwen3", "head_dim": 64, "num_hidden_layers": 3}
CPT, SFT, DPO, GRPO = "ContinualPretraining", "CurriculumSFT", "DPO", "GRPO"
AVERAGING = {"class_path": "rewarm.CheckpointAveraging", "init_args": {"k": 3, "every_n_steps": 1}}


def case(
    method: str,
    length: int,
    batch: int,
    model: dict[str, Any] = SMALL,
    vocab: int = 4096,
    data: dict[str, Any] | None = None,
    module: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What one fit is to be."""
    return {
        "method": method,
        "length": length,
        "batch": batch,
        "model": model | {"vocab_size": vocab},
        "data": data or {},
        "module": module or {},
        "trainer": trainer or {},
    }


CHECKPOINTING = {"gradient_checkpointing": True}
CASES = {
    "sft 8x512": case(SFT, 512, 8),
    "sft 4x256": case(SFT, 256, 4),
    "sft 2x2048": case(SFT, 2048, 2),
    "sft packed 4x1024": case(SFT, 1024, 4, data={"packing": True}),
    "sft 8x512 checkpointing": case(SFT, 512, 8, module=CHECKPOINTING),
    "sft 4x512 vocabulary 32k": case(SFT, 512, 4, vocab=32_000),
    "sft 8x512 sgd": case(SFT, 512, 8, WIDE, module={"optimizer": "SGD"}),
    "sft 4x512 accumulated, averaged": case(
        SFT, 512, 4, WIDE, trainer={"accumulate_grad_batches": 2, "callbacks": [AVERAGING]}
    ),
    "sft 4x512 bf16-mixed": case(SFT, 512, 4, trainer={"precision": "bf16-mixed"}),
    "cpt 8x512 wide": case(CPT, 512, 8, WIDE),
    "cpt 4x1024 qwen3": case(CPT, 1024, 4, QWEN),
    "dpo 4x512 cached": case(DPO, 512, 4),
    "dpo 4x512 frozen": case(DPO, 512, 4, WIDE, module={"reference": "frozen"}),
    "grpo 4x8, 64+64": case(GRPO, 64, 4, data={"max_new_tokens": 64}),
    "grpo 8x8, 128+64, reference": case(GRPO, 128, 8, data={"max_new_tokens": 64}, module={"kl": 0.1}),
}
QUICK = ("sft 8x512", "sft 4x256")


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Any that differs within a group."""
    return [float(len(text) % 2) for text in completions]


def write_case(folder: Path, made: dict[str, Any], steps: int, cuda: bool) -> Path:
    """Write tokenizer, data and config of a fit; its rows are as long as they may be."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocab, length, batch, method = made["model"]["vocab_size"], made["length"], made["batch"], made["method"]
    words = {"<pad>": 0, "</s>": 1} | {f"w{n}": n for n in range(2, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "tokenizer")
    packing = made["data"].get("packing")
    size = length // 4 - 2 if packing else length + 8

    def text(seed: int, count: int) -> str:
        return " ".join(f"w{2 + (seed * 7919 + n * 104_729) % (vocab - 2)}" for n in range(count))

    many = (steps + 2) * batch * (4 if packing else 1) * made["trainer"].get("accumulate_grad_batches", 1)
    rows: list[dict[str, str]] = []
    for n in range(many):
        if method == GRPO:
            rows.append({"prompt": text(n, length if n % 2 else length - 3), "answer": "0"})
        elif method == DPO:
            rows.append({"prompt": text(n, 1), "chosen": text(n + 1, size), "rejected": text(n + 2, size)})
        elif method == SFT:
            rows.append({"prompt": text(n, 1), "completion": text(n + 1, size)})
        else:
            rows.append({"text": text(n, 2 * length // 3)})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data: dict[str, Any] = {"train": str(path), "tokenizer": str(folder / "tokenizer")}
    if method == GRPO:
        data |= {"reward": "benchmarks.cost_model.reward", "prompts_per_rollout": batch}
    else:
        data |= {"max_length": length, "batch_size": batch}
    if method == CPT:
        data["train"] = {"words": str(path)}
    elif method != GRPO:
        data["overlong"] = "keep_start"
    optimizer: dict[str, Any] = {"class_path": f"torch.optim.{made['module'].get('optimizer', 'AdamW')}"}
    optimizer["init_args"] = {"lr": 1e-5} | (
        {} if optimizer["class_path"].endswith("SGD") else {"fused": True}
    )
    kind = {CPT: "CorpusData", SFT: "InstructionData", DPO: "PreferenceData", GRPO: "PromptData"}[method]
    config = {
        "model": {
            "class_path": f"rewarm.{method}",
            "init_args": {"model": made["model"], **made["module"], "optimizer": optimizer},
        },
        "data": {"class_path": f"rewarm.{kind}", "init_args": data | made["data"]},
        "trainer": {
            "accelerator": "gpu" if cuda else "cpu",
            "devices": 1,
            "max_steps": steps,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **made["trainer"],
        },
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


class _Meter(Callback):
    """Peak memory since the model was built, and the time of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.before = 0
        self._last = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        # What kernels and threads take once.
        config = AutoConfig.for_model(
            **SMALL | {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 512}
        )
        policy = Policy(AutoModelForCausalLM.from_config(config), "torch")
        ids, positions = torch.zeros(2, 64, dtype=torch.long), torch.arange(64).expand(2, -1)
        optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
        for width in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", width, enabled=width != torch.float32):
                policy(ids, positions, ids).sum().backward()
            optimizer.step()
        del policy, optimizer
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.before = _status("VmRSS")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = self._now(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if len(self.seconds) < trainer.global_step:
            now = self._now(trainer)
            self.seconds.append(now - self._last)
            self._last = now

    def _now(self, trainer: Trainer) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.before == 0 else _status("VmHWM") - self.before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measure(file: str) -> None:
    """Fit a config and print what it took."""
    from rewarm.commands.fit import config_parser

    torch.set_num_threads(1)
    parser: Any = config_parser()
    made = getattr(parser, "instantiate", parser.instantiate_classes)(parser.parse_path(file))
    meter = _Meter()
    trainer = made.trainer if isinstance(made.trainer, Trainer) else Trainer(**made.trainer)
    trainer.callbacks.append(meter)  # type: ignore[attr-defined]
    trainer.fit(made.model, datamodule=made.data)
    print(json.dumps({"bytes": meter.peak(), "seconds": statistics.median(meter.seconds[1:])}))


def run(file: Path, thrifty: bool) -> dict[str, float]:
    """Measure in another process; a thrifty allocator returns every block that is freed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if thrifty:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "benchmarks.cost_model", "--measure", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def predict(file: Path, made: dict[str, Any]) -> tuple[Work, Cost]:
    """Predict what a fit takes."""
    grpo = made["method"] == GRPO
    work = work_of(str(file), prompt_length=made["length"] if grpo else None)
    return work, work_cost(work)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot predicted against measured, memory and time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5))
    for axis, kind, unit, scale in ((axes[0], "bytes", "MiB", 2**20), (axes[1], "seconds", "s", 1)):
        for method in (CPT, SFT, DPO, GRPO):
            mine = [row for row in rows if row["method"] == method]
            axis.scatter(
                [row[f"measured_{kind}"] / scale for row in mine],
                [row[f"predicted_{kind}"] / scale for row in mine],
                label=method,
            )
        ends = [f(row[f"measured_{kind}"] / scale for row in rows) for f in (min, max)]
        for factor, style in ((1.0, "-"), (1.15, ":"), (0.85, ":")):
            axis.plot(ends, [factor * end for end in ends], style, color="grey", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=f"measured, {unit}", ylabel=f"predicted, {unit}")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter("{x:g}")
        axis.set_title("peak memory" if kind == "bytes" else "time of a step")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the fits, cost_model.json and cost_model.png")
    parser.add_argument("--quick", action="store_true", help="two cases, a minute")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each fit")
    parser.add_argument("--cuda", action="store_true", help="on the GPU")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    if options.output is None:
        parser.error("--output is needed")
    torch.set_num_threads(1)
    cases = {name: made for name, made in CASES.items() if name in QUICK or not options.quick}
    files = {
        name: write_case(options.output / f"{number:02}", made, options.steps, options.cuda)
        for number, (name, made) in enumerate(cases.items())
    }
    predicted = {name: predict(files[name], made) for name, made in cases.items()}
    clock = time.perf_counter if options.cuda else time.process_time
    rates = dict(zip(predicted, measured_for((work for work, _ in predicted.values()), clock), strict=True))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {versions}; rates {next(iter(rates.values())).source}", flush=True)
    rows: list[dict[str, Any]] = []
    slower = 0.0
    print(f"{'':34}{'memory, MiB':>26}{'time of a step, s':>26}")
    print(f"{'':34}{'predicted measured ratio':>26}{'predicted measured ratio':>26}")
    for name, (_, cost) in predicted.items():
        memory = run(files[name], thrifty=True)["bytes"]
        taken = run(files[name], thrifty=False)["seconds"]
        expected = rates[name].step_seconds(cost)
        slower = slower or taken / expected
        rows.append(
            {
                "case": name,
                "rates": vars(rates[name]),
                "method": cases[name]["method"],
                "predicted_bytes": cost.total_bytes,
                "measured_bytes": memory,
                "parts": cost.parts,
                "predicted_seconds": slower * expected,
                "uncalibrated_seconds": expected,
                "measured_seconds": taken,
            }
        )
        print(
            f"{name:34}{cost.total_bytes / 2**20:11.0f}{memory / 2**20:9.0f}{cost.total_bytes / memory:6.2f}"
            f"{slower * expected:11.2f}{taken:9.2f}{slower * expected / taken:6.2f}",
            flush=True,
        )
        made = {"versions": versions, "scaled_by": slower, "cases": rows}
        (options.output / "cost_model.json").write_text(json.dumps(made, indent=1) + "\n")
    for kind in ("bytes", "seconds"):
        off = [abs(row[f"predicted_{kind}"] / row[f"measured_{kind}"] - 1) for row in rows]
        within, worst = sum(one <= 0.15 for one in off), max(off)
        print(
            f"{kind}: {within} of {len(off)} within 15 %, worst {worst:.0%}, mean {sum(off) / len(off):.0%}"
        )
    draw(rows, options.output / "cost_model.png")


if __name__ == "__main__":
    main()
