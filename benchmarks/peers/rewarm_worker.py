"""Does a job with rewarm: python -m benchmarks.peers.rewarm_worker JOB."""

import json
import logging
import sys
import time

BEGAN = time.perf_counter()

from typing import Any  # noqa: E402

import torch  # noqa: E402
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything  # noqa: E402
from lightning.pytorch.profilers import Profiler  # noqa: E402

import rewarm  # noqa: E402
from benchmarks.peers.clock import Clock  # noqa: E402


class Watch(Callback):
    """Feeds a clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the tokens."""
        tokens, targets = (batch["sequence_ids"] >= 0).sum(), (batch["targets"] != -100).sum()
        self.clock.count(batch["input_ids"].numel(), tokens, targets)
        self.clock.mark("rest")

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Note the time."""
        self.clock.mark("fwd+bwd")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Note the time and the loss."""
        self.clock.mark("optimizer")
        self.clock.losses.append(outputs["loss"].detach())
        self.clock.end_step()


class DataWait(Profiler):
    """Tells a clock when the trainer asks for a batch and when it has it."""

    def __init__(self, clock: Clock, phase: str) -> None:
        super().__init__()
        self.clock, self.phase = clock, phase

    def start(self, action_name: str) -> None:
        """Note the time."""
        if action_name.endswith("train_dataloader_next"):
            self.clock.mark("rest")

    def stop(self, action_name: str) -> None:
        """Note the time."""
        if action_name.endswith("train_dataloader_next"):
            self.clock.mark(self.phase)


def uneven(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [len(completion) % 7 / 6.0 for completion in completions]


def parts(job: dict[str, Any]) -> tuple[LightningModule, LightningDataModule]:
    """The module and the data of a job."""
    model, rows = f"{job['folder']}/model", f"{job['folder']}/rows.jsonl"

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=job["lr"], weight_decay=0.0, fused=True)

    options = job["ours"]
    shape: dict[str, Any] = {
        "tokenizer": model,
        "max_length": job["max_length"],
        "batch_size": job["batch_size"],
    }
    if job["packing"] and "flash" in options.get("attention", ""):
        # It keeps documents apart in a single row only.
        shape |= {"max_length": job["max_length"] * job["batch_size"], "batch_size": 1}
    if job["method"] == "pretraining":
        corpus = rewarm.CorpusData({"rows": rows}, shuffle=False, attend_across_documents=True, **shape)
        return rewarm.ContinualPretraining(model, optimizer, **options), corpus
    if job["method"] == "sft":
        # In the order of the rows, as the others.
        in_order = {"score": "number", "order": "ascending"}
        instructions = rewarm.InstructionData(rows, packing=job["packing"], **in_order, **shape)
        return rewarm.CurriculumSFT(model, optimizer, **options), instructions
    if job["method"] == "dpo":
        pairs = rewarm.PreferenceData(rows, score="number", order="ascending", **shape)
        return rewarm.DPO(model, optimizer, **options), pairs
    prompts = rewarm.PromptData(
        rows,
        model,
        reward=uneven,
        max_new_tokens=job["max_new_tokens"],
        prompts_per_rollout=job["batch_size"] // job["group"],
        completions_per_prompt=job["group"],
    )
    return rewarm.GRPO(model, optimizer, **options), prompts


def main() -> None:
    """Do the job and print what came out as JSON."""
    with open(sys.argv[1]) as file:
        job = json.load(file)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    module, data = parts(job)
    clock = Clock(BEGAN)
    Trainer(
        max_steps=job["steps"] + 2,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        callbacks=[Watch(clock)],
        profiler=DataWait(clock, "generation" if job["method"] == "grpo" else "data"),
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=data)
    print(json.dumps(clock.result()))


if __name__ == "__main__":
    main()
