"""Does a job with LitGPT, in an environment with LitGPT and without rewarm: python litgpt_worker.py JOB.

Runs `litgpt.finetune.full.setup` and `litgpt.pretrain.setup` themselves. What is put into them makes them do
what the others do: rows in their order, a constant learning rate, no checkpoint at the end; in fine-tuning a
head that shares its weight with the embedding, and gradients whose norm is clipped. LitGPT does not pack
instruction data, and has neither preference nor reinforcement learning.
"""

import contextlib
import json
import sys
import time

BEGAN = time.perf_counter()

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import litgpt.finetune.full  # noqa: E402
import litgpt.pretrain  # noqa: E402
import torch  # noqa: E402
from litgpt import GPT, Config  # noqa: E402
from litgpt.args import EvalArgs, TrainArgs  # noqa: E402
from litgpt.data import JSON, DataModule  # noqa: E402
from litgpt.prompts import Default  # noqa: E402
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama, copy_weights_qwen_3  # noqa: E402
from litgpt.utils import chunked_cross_entropy, save_config  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.optim.optimizer import (  # noqa: E402
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.data import DataLoader  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from clock import Clock  # noqa: E402

CUDA = torch.cuda.is_available()


class Tied(GPT):
    """Its head shares its weight with the embedding, as in `litgpt.pretrain` with `tie_embeddings`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.lm_head.weight = self.transformer.wte.weight


class Instructions(JSON):
    """In the order of the rows; feeds a clock."""

    clock: Clock

    def train_dataloader(self) -> DataLoader:
        """Return a loader that doesn't shuffle."""
        collate = super().train_dataloader().collate_fn

        def counted(samples: list[dict[str, Any]]) -> Any:
            self.clock.mark("rest")
            batch = collate(samples)
            tokens = sum(len(sample["input_ids"]) for sample in samples)
            targets = (batch["labels"][:, 1:] != -100).sum()
            self.clock.count(batch["input_ids"].numel(), tokens, targets)
            self.clock.mark("data")
            return batch

        return DataLoader(self.train_dataset, self.batch_size, collate_fn=counted)


class Corpus(DataModule):
    """Documents one after the other, cut into rows; feeds a clock."""

    def __init__(self, path: Path, length: int, clock: Clock) -> None:
        super().__init__()
        self.path, self.length, self.clock = path, length, clock

    def connect(self, tokenizer: Any = None, batch_size: int = 1, **_: Any) -> None:
        """Take what only the trainer knows."""
        self.reader, self.batch_size = tokenizer, batch_size

    def train_dataloader(self) -> DataLoader:
        """Return a loader of rows of one token more than the model sees."""
        with self.path.open() as file:
            texts = [json.loads(line)["text"] for line in file]
        tokens = torch.cat([self.reader.encode(text, eos=True) for text in texts])
        rows: Any = list(tokens.unfold(0, self.length + 1, self.length))

        def counted(batch: list[torch.Tensor]) -> torch.Tensor:
            self.clock.mark("rest")
            made = torch.stack(batch)
            self.clock.count(*[len(batch) * self.length] * 3)
            self.clock.mark("data")
            return made

        return DataLoader(rows, self.batch_size, collate_fn=counted, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Return nothing to speak of."""
        row: Any = [torch.zeros(self.length + 1, dtype=torch.long)]
        return DataLoader(row)


def convert(job: dict[str, Any]) -> tuple[Config, Path]:
    """Write the model as LitGPT wants it; return its config and its folder."""
    folder, fields = Path(job["folder"]) / "model", job["model"]
    qwen = fields["model_type"] == "qwen3"
    config = Config(
        name="bench",
        block_size=fields["max_position_embeddings"],
        vocab_size=fields["vocab_size"],
        padded_vocab_size=fields["vocab_size"],
        n_layer=fields["num_hidden_layers"],
        n_head=fields["num_attention_heads"],
        n_embd=fields["hidden_size"],
        n_query_groups=fields["num_key_value_heads"],
        head_size=fields.get("head_dim"),
        intermediate_size=fields["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-6,
        mlp_class_name="LLaMAMLP",
        norm_qk=qwen,
    )
    weights: dict[str, torch.Tensor] = {}
    copy = copy_weights_qwen_3 if qwen else copy_weights_hf_llama
    copy(config, {}, weights, load_file(folder / "model.safetensors"))
    torch.save(weights, folder / "lit_model.pth")
    save_config(config, folder)
    return config, folder


def watch(clock: Clock, module: Any, clip: bool) -> None:
    """Have a clock fed by a module's loss and by the optimizer, and gradients clipped."""

    def loss_of(*args: Any, **options: Any) -> torch.Tensor:
        loss = chunked_cross_entropy(*args, **options)
        if loss.requires_grad and loss.device.type != "meta":
            clock.losses.append(loss.detach())
        return loss

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        clock.mark("fwd+bwd")
        if clip:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)

    def after(*_: Any) -> None:
        clock.mark("optimizer")
        clock.end_step()

    module.chunked_cross_entropy = loss_of
    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def main() -> None:
    """Do the job and print what came out as JSON."""
    with open(sys.argv[1]) as file:
        job = json.load(file)
    clock = Clock(BEGAN)
    config, folder = convert(job)
    rows, length, steps = Path(job["folder"]) / "rows.jsonl", job["max_length"], job["steps"] + 2
    common = {
        "out_dir": Path(job["folder"]) / "litgpt",
        "precision": "bf16-mixed" if CUDA else "32-true",
        "devices": 1,
        "optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": job["lr"], "weight_decay": 0.0, "fused": True},
        },
        "logger_name": "csv",
        "seed": 0,
    }
    batch = {
        "global_batch_size": job["batch_size"],
        "micro_batch_size": job["batch_size"],
        "log_interval": 10,
    }
    batch |= {"save_interval": None, "lr_warmup_steps": 0, "max_seq_length": length}
    check = EvalArgs(interval=10**9, max_iters=1, final_validation=False)
    with contextlib.redirect_stdout(sys.stderr):
        if job["method"] == "pretraining":
            watch(clock, litgpt.pretrain, clip=False)
            litgpt.pretrain.save_checkpoint = lambda *_: None
            tokens = {"max_tokens": steps * job["batch_size"] * length, "min_lr": job["lr"], "max_norm": 1.0}
            litgpt.pretrain.setup(
                "bench",
                config,
                initial_checkpoint_dir=folder,
                tokenizer_dir=folder,
                data=Corpus(rows, length, clock),
                train=TrainArgs(**batch, **tokens, tie_embeddings=True),
                eval=check,
                **common,
            )
        else:
            data = Path(job["folder"]) / "json"
            data.mkdir(exist_ok=True)
            pairs = [json.loads(line) for line in rows.open()]
            pairs = [{"instruction": pair["prompt"], "output": pair["completion"]} for pair in pairs]
            (data / "train.json").write_text(json.dumps(pairs))
            (data / "val.json").write_text(json.dumps(pairs[:1]))
            instructions = Instructions(data, mask_prompt=True, prompt_style=Default(), num_workers=0)
            instructions.clock = clock
            module = litgpt.finetune.full
            module.save_hyperparameters = lambda *_: None
            module.GPT = Tied
            module.get_lr_scheduler = lambda optimizer, **_: torch.optim.lr_scheduler.ConstantLR(
                optimizer, 1.0
            )
            watch(clock, module, clip=True)
            check.max_new_tokens = 1
            module.setup(
                folder,
                data=instructions,
                train=TrainArgs(**batch, epochs=2, max_steps=steps),
                eval=check,
                **common,
            )
    print(json.dumps(clock.result()))


if __name__ == "__main__":
    main()
