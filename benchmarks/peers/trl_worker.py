"""Does a job with TRL, in an environment with TRL and without rewarm: python trl_worker.py JOB."""

import json
import sys
import time

BEGAN = time.perf_counter()

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed  # noqa: E402
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from clock import Clock  # noqa: E402

CUDA = torch.cuda.is_available()


class Watch(TrainerCallback):
    """Feeds a clock."""

    def __init__(self) -> None:
        self.clock = Clock(BEGAN)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.clock.end_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Note the loss."""
        if "loss" in logs:
            self.clock.losses.append(float(logs["loss"]))


def counted(kind: type, clock: Clock) -> type:
    """The same trainer, whose batches are counted."""

    class Counted(kind):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
            if "input_ids" in inputs:
                clock.tokens.append(inputs["input_ids"].numel())
            if "labels" in inputs:
                clock.targets.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return super().training_step(model, inputs, *args, **options)

    return Counted


def uneven(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [len(completion) % 7 / 6.0 for completion in completions]


def trainer(job: dict[str, Any], clock: Clock) -> Any:
    """TRL's trainer for a job."""
    folder = job["folder"]
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    rows = load_dataset("json", data_files=f"{folder}/rows.jsonl", split="train").remove_columns("number")
    common = {
        "output_dir": f"{folder}/trl",
        "per_device_train_batch_size": job["batch_size"],
        "max_steps": job["steps"] + 2,
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused" if CUDA else "adamw_torch",
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": CUDA,
        "use_cpu": not CUDA,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
    parts = {"model": model, "processing_class": tokenizer, "train_dataset": rows}
    in_order = {"train_sampling_strategy": "sequential", "max_length": job["max_length"]}
    if job["method"] == "dpo":
        cached = job.get("reference", "cached") == "cached"
        config = DPOConfig(**common, **in_order, beta=0.1, precompute_ref_log_probs=cached)
        return counted(DPOTrainer, clock)(args=config, **parts)
    if job["method"] == "grpo":
        config = GRPOConfig(
            **common,
            num_generations=job["group"],
            max_completion_length=job["max_new_tokens"],
            beta=0.0,
        )
        return counted(GRPOTrainer, clock)(args=config, reward_funcs=uneven, **parts)
    strategy = "wrapped" if job["method"] == "pretraining" else "bfd"
    packing = {"packing": job["packing"], "packing_strategy": strategy}
    config = SFTConfig(**common, **in_order, **packing, loss_type=job.get("trl_loss", "chunked_nll"))
    return counted(SFTTrainer, clock)(args=config, **parts)


def main() -> None:
    """Do the job and print what came out as JSON."""
    with open(sys.argv[1]) as file:
        job = json.load(file)
    set_seed(0)
    watch = Watch()
    made = trainer(job, watch.clock)
    made.add_callback(watch)
    made.train()
    print(json.dumps(watch.clock.result()))


if __name__ == "__main__":
    main()
