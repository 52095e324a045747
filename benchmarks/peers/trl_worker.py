"""Does a job with TRL, in an environment with TRL and without rewarm: python trl_worker.py JOB."""

import importlib.util
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

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.clock.mark("optimizer")
        self.clock.end_step()


def watched(kind: type, clock: Clock) -> type:
    """The same trainer, which feeds a clock."""

    class Watched(kind):
        def get_batch_samples(self, *args: Any, **options: Any) -> Any:
            clock.mark("rest")
            batches, count = super().get_batch_samples(*args, **options)
            clock.mark("data")
            if "input_ids" in batches[0]:
                clock.count(*map(sum, zip(*map(counts, batches), strict=True)))
            clock.losses.append(0.0)
            return batches, count

        def _generate_and_score_completions(self, *args: Any, **options: Any) -> Any:
            clock.mark("rest")
            batch = super()._generate_and_score_completions(*args, **options)
            clock.mark("generation")
            ids, masks = (
                [batch[f"{part}_{kind}"] for part in ("prompt", "completion")] for kind in ("ids", "mask")
            )
            targets = masks[1].sum()
            clock.count(sum(part.numel() for part in ids), masks[0].sum() + targets, targets)
            return batch

        def training_step(self, *args: Any, **options: Any) -> Any:
            loss = super().training_step(*args, **options)
            clock.losses[-1] = clock.losses[-1] + loss
            clock.mark("fwd+bwd")
            return loss

    return Watched


def counts(batch: Any) -> tuple[Any, Any, Any]:
    """Positions, tokens and targets of a batch."""
    ids, labels = batch["input_ids"], batch.get("labels", batch.get("shift_labels"))
    mask = batch.get("attention_mask")
    tokens = ids.numel() if mask is None else mask.sum()
    if labels is None:
        return ids.numel(), tokens, batch["completion_mask"][:, 1:].sum()
    return ids.numel(), tokens, (labels[:, 1:] != -100).sum()


def uneven(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [len(completion) % 7 / 6.0 for completion in completions]


def trainer(job: dict[str, Any], clock: Clock) -> Any:
    """TRL's trainer for a job."""
    folder = job["folder"]
    options = dict(job["trl"])
    attention = {"attn_implementation": options.pop("attention")} if "attention" in options else {}
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32, **attention)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    rows = load_dataset("json", data_files=f"{folder}/rows.jsonl", split="train").remove_columns("number")
    common = {
        "output_dir": f"{folder}/trl",
        "per_device_train_batch_size": job["batch_size"],
        "max_steps": job["steps"] + 2,
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": CUDA,
        "use_cpu": not CUDA,
        "use_liger_kernel": CUDA and importlib.util.find_spec("liger_kernel") is not None,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,  # it waits for the GPU
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
    parts = {"model": model, "processing_class": tokenizer, "train_dataset": rows}
    in_order = {"train_sampling_strategy": "sequential", "max_length": job["max_length"]}
    if job["method"] == "dpo":
        kind: type = DPOTrainer
        config: Any = DPOConfig(
            **common | in_order | {"beta": 0.1, "precompute_ref_log_probs": True} | options
        )
    elif job["method"] == "grpo":
        sampling = {
            "num_generations": job["group"],
            "max_completion_length": job["max_new_tokens"],
            "beta": 0.0,
        }
        kind, config = GRPOTrainer, GRPOConfig(**common | sampling | options)
        parts["reward_funcs"] = uneven
    else:
        strategy = "wrapped" if job["method"] == "pretraining" else "bfd"
        sft = {"packing": job["packing"], "packing_strategy": strategy, "loss_type": "chunked_nll"}
        kind, config = SFTTrainer, SFTConfig(**common | in_order | sft | options)
    return watched(kind, clock)(args=config, callbacks=[Watch(clock)], **parts)


def main() -> None:
    """Do the job and print what came out as JSON."""
    with open(sys.argv[1]) as file:
        job = json.load(file)
    set_seed(0)
    clock = Clock(BEGAN)
    trainer(job, clock).train()
    print(json.dumps(clock.result()))


if __name__ == "__main__":
    main()
