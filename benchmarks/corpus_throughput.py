"""What CorpusData feeds against what the demo's model eats, and its memory as the corpus grows.

Writes corpora of one tenth of the size and of the size (JSON lines, Zipf words), and measures in a process
each: the first start, which tokenises; a second start; rows drawn at random; a resume in the middle.

    python -m benchmarks.corpus_throughput [--gigabytes 5] [--output FILE]
"""

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rewarm
from rewarm.commands.init import bpe_tokenizer, character_tokenizer

ROOT = Path(__file__).parents[1]


def vocabulary(rng: random.Random) -> list[str]:
    """Made-up words, the frequent ones first."""
    return ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(20_000)]


def save_tokenizer(kind: str, path: Path, folder: Path) -> None:
    """A BPE of 4096 tokens trained on the first documents, or one token for each word."""
    if kind == "bpe":
        with path.open() as lines:
            texts = [json.loads(line)["text"] for line in itertools.islice(lines, 200)]
        bpe_tokenizer(texts, 4096).save_pretrained(folder)
        return
    words = dict.fromkeys(["<pad>", "</s>", "<unk>", *vocabulary(random.Random(0))])
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def write_corpus(path: Path, size: int) -> None:
    """Documents of 20 to 1000 words, as JSON lines, until there are so many bytes."""
    rng = random.Random(0)
    words = vocabulary(rng)
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))
    with path.open("w") as file:
        while file.tell() < size:
            # Text is drawn once for a block of documents, which begin and end at other words of it.
            text = rng.choices(words, cum_weights=weights, k=20_000)
            for _ in range(200):
                begin = rng.randrange(19_000)
                line = " ".join(text[begin : begin + rng.randint(20, 1000)])
                file.write(json.dumps({"text": line, "id": rng.random()}) + "\n")


def data_of(folder: Path, path: Path, length: int, batch_size: int, workers: int = 0) -> rewarm.CorpusData:
    """The data module on one file; rows of the demo's length are of characters, as there."""
    tokenizer = str(folder / ("characters" if length == 64 else "tokenizer"))
    return rewarm.CorpusData(
        {"new": str(path)}, tokenizer, max_length=length, batch_size=batch_size, num_workers=workers
    )


def first_start(folder: Path, path: Path) -> dict[str, float]:
    """Tokenise."""
    began, cpu = time.perf_counter(), time.process_time()
    data = data_of(folder, path, 1024, 8)
    data.setup()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    (rows,) = data._rows.values()
    tokens = rows.store.num_tokens
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens/s": tokens / seconds,
        "tokens/CPU s": tokens / cpu,
        "MB/CPU s": path.stat().st_size / cpu / 1e6,
    }


def later_start(folder: Path, path: Path) -> dict[str, float]:
    """Open what is there, up to the first batch."""
    began = time.perf_counter()
    data = data_of(folder, path, 1024, 8)
    data.setup()
    next(iter(data.train_dataloader()))
    return {"seconds": time.perf_counter() - began}


def draw(
    folder: Path, path: Path, length: int, batch_size: int, workers: int, seconds: float
) -> dict[str, float]:
    """Batches from all over the corpus for some seconds."""
    data = data_of(folder, path, length, batch_size, workers)
    data.setup()
    tokens, batches, loader = 0, 0, data.train_dataloader()
    stream = itertools.chain.from_iterable(loader for _ in itertools.count())
    next(stream)
    began, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < began + seconds:
        tokens, batches = tokens + int(next(stream)["counts"]["tokens"]), batches + 1
    found = {
        "tokens/s": tokens / (time.perf_counter() - began),
        "tokens/CPU s": tokens / (time.process_time() - cpu),
        "batches": batches,
    }
    data.teardown("fit")
    return found


def resume(folder: Path, path: Path) -> dict[str, float]:
    """Go on from a state in the middle of the epoch, up to the first batch."""
    data = data_of(folder, path, 1024, 8)
    data.setup()
    loader = data.train_dataloader()
    next(iter(loader))
    state = data.state_dict()
    sampler = state["loader"]["loader"]
    rows = 8 * (len(loader) // 2)
    sampler["drawn"] = {"new": rows}
    sampler["epoch_rows"], sampler["epoch_batches"] = rows, rows // 8
    began = time.perf_counter()
    again = data_of(folder, path, 1024, 8)
    again.setup()
    again.load_state_dict(state)
    next(iter(again.train_dataloader()))
    return {"seconds": time.perf_counter() - began, "state bytes": len(pickle.dumps(state))}


class _Clock(Callback):
    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.tokens = warm_up, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if trainer.global_step == self.warm_up:
            self.began, self.cpu_began = time.perf_counter(), time.process_time()
        elif trainer.global_step > self.warm_up:
            self.tokens += batch["counts"]["tokens"]
            self.seconds, self.cpu = time.perf_counter() - self.began, time.process_time() - self.cpu_began


def demo(folder: Path, path: Path, steps: int) -> dict[str, float]:
    """Train the demo's model on batches of the demo's shape."""
    config = yaml.safe_load((ROOT / "configs/tiny/sums_model.yaml").read_text())
    data = data_of(folder, path, 64, 40)
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    module = rewarm.ContinualPretraining(
        {**config, **special, "vocab_size": len(data.tokenizer)}, lambda p: torch.optim.AdamW(p, lr=3e-3)
    )
    clock = _Clock(5)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_steps=steps + 5, accelerator="cpu", callbacks=[clock], **quiet).fit(module, datamodule=data)
    return {"tokens/s": clock.tokens / clock.seconds, "tokens/CPU s": clock.tokens / clock.cpu}


def _child(queue: Any, work: Any, args: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    queue.put(work(*args) | {"peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def alone(work: Any, *args: Any) -> dict[str, float]:
    """Run a measurement in a process of its own, and add its peak memory."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, work, args))
    process.start()
    result: dict[str, float] = queue.get()
    process.join()
    return result


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.02, help="size of the larger corpus")
    parser.add_argument("--tokenizer", choices=["bpe", "words"], default="bpe", help="words is the faster")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long rows are drawn")
    parser.add_argument("--steps", type=int, default=40, help="steps of the demo's model")
    parser.add_argument("--folder", help="where the corpora lie meanwhile; needs twice their size")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}

    def note(name: str, work: Any, *given: Any) -> None:
        results[name] = alone(work, *given)
        cells = [
            f"{value:,.4g} {unit}" if value < 1e4 else f"{value:,.0f} {unit}"
            for unit, value in results[name].items()
        ]
        print(f"{name}: {', '.join(cells)}", flush=True)

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # of the processes below
        for label, share in (("a tenth", 0.1), ("all", 1.0)):
            path = folder / f"{share}.jsonl"
            write_corpus(path, int(args.gigabytes * share * 1e9))
            if share == 0.1:
                save_tokenizer(args.tokenizer, path, folder / "tokenizer")
                # For the demo's model.
                small = folder / "small.jsonl"
                write_corpus(small, 2_000_000)
                character_tokenizer([small.read_text()]).save_pretrained(folder / "characters")
            note(f"{label}, first start", first_start, folder, path)
            note(f"{label}, later start", later_start, folder, path)
            note(f"{label}, rows of 1024", draw, folder, path, 1024, 8, 0, args.seconds)
            note(f"{label}, resumed in the middle", resume, folder, path)
        note("rows of 64, as in the demo", draw, folder, small, 64, 40, 0, args.seconds)
        note("rows of 1024, 1 worker", draw, folder, path, 1024, 8, 1, args.seconds)
        note("the demo's model", demo, folder, small, args.steps)
    eaten = results["the demo's model"]["tokens/CPU s"]
    for what in ("all, first start", "rows of 64, as in the demo", "all, rows of 1024"):
        times = results[what]["tokens/CPU s"] / eaten
        print(f"{what}: {times:.0f} times what the demo's model eats, of a core each")
    if args.output is not None:
        about = {
            "gigabytes": args.gigabytes,
            "tokenizer": args.tokenizer,
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        args.output.write_text(json.dumps({"settings": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
