"""Does a job with rewarm: python -m benchmarks.peers.rewarm_worker JOB."""

import json
import logging
import sys
import time

BEGAN = time.perf_counter()

from typing import Any  # noqa: E402

import torch  # noqa: E402
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything  # noqa: E402

import rewarm  # noqa: E402
from benchmarks.peers.clock import Clock  # noqa: E402


class Watch(Callback):
    """Feeds a clock."""

    def __init__(self) -> None:
        self.clock = Clock(BEGAN)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        """Count the tokens."""
        self.clock.tokens.append(batch["input_ids"].numel())
        self.clock.targets.append(int((batch["targets"] != -100).sum()))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note the time and the loss."""
        self.clock.end_step()
        self.clock.losses.append(float(trainer.callback_metrics["train/loss"]))


def uneven(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [len(completion) % 7 / 6.0 for completion in completions]


def parts(job: dict[str, Any]) -> tuple[LightningModule, LightningDataModule]:
    """The module and the data of a job."""
    model, rows = f"{job['folder']}/model", f"{job['folder']}/rows.jsonl"

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=job["lr"], weight_decay=0.0, fused=torch.cuda.is_available())

    shape = {"tokenizer": model, "max_length": job["max_length"], "batch_size": job["batch_size"]}
    if job["method"] == "pretraining":
        data: LightningDataModule = rewarm.CorpusData({"rows": rows}, shuffle=False, **shape)
        return rewarm.ContinualPretraining(model, optimizer), data
    if job["method"] == "sft":
        # In the order of the rows, as the others.
        in_order = {"score": "number", "order": "ascending"}
        data = rewarm.InstructionData(rows, packing=job["packing"], **in_order, **shape)
        return rewarm.CurriculumSFT(model, optimizer), data
    if job["method"] == "dpo":
        data = rewarm.PreferenceData(rows, score="number", order="ascending", **shape)
        return rewarm.DPO(model, optimizer, reference=job.get("reference", "cached")), data
    data = rewarm.PromptData(
        rows,
        model,
        uneven,
        max_new_tokens=job["max_new_tokens"],
        prompts_per_rollout=job["batch_size"] // job["group"],
        completions_per_prompt=job["group"],
    )
    return rewarm.GRPO(model, optimizer), data


def main() -> None:
    """Do the job and print what came out as JSON."""
    with open(sys.argv[1]) as file:
        job = json.load(file)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    module, data = parts(job)
    watch = Watch()
    Trainer(
        max_steps=job["steps"] + 2,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        callbacks=[watch],
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=data)
    print(json.dumps(watch.clock.result()))


if __name__ == "__main__":
    main()
