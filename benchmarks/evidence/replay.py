"""Replay of 0 to 50 % old text while a model learns a new language, against training anew on both.

Run: python -m benchmarks.evidence.replay [--data FOLDER]

FOLDER has `train.en.gz`, `train.de.gz`, `val.en.gz` and `val.de.gz` of Multi30k, a sentence a line: English
first, then German. Without it two made-up languages that share nothing but their letters are drawn. As in
arXiv:2403.08763: the first run ends its cosine at a tenth of the peak; the optimizer is reset, the learning
rate re-warmed to the same peak; replayed rows replace new ones, and only rows that the first run has seen are
replayed. Training anew on the union takes as many steps as both runs together.
"""

import gzip
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.evidence.common import (
    Source,
    TinyModel,
    adamw,
    arguments,
    differences,
    evaluate,
    interval,
    lrs_of,
    progress,
    shown,
    train,
    write,
)
from rewarm.commands.init import bpe_tokenizer, character_tokenizer
from rewarm.datamodules.corpora import CorpusData
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.schedules.published import cosine, rewarmed

PEAK, BATCH, LENGTH = 3e-3, 16, 64
FRACTIONS = (0.0, 0.01, 0.05, 0.25, 0.5)


def texts_of(data: Path | None, seed: int, steps: int) -> dict[str, list[str]]:
    """Lines of text by language and split."""
    if data is not None:
        found = {}
        for split, language in itertools.product(("train", "val"), ("en", "de")):
            with gzip.open(data / f"{split}.{language}.gz", "rt", encoding="utf-8") as file:
                found[f"{split} {'old' if language == 'en' else 'new'}"] = file.read().splitlines()
        return found
    found = {}
    for offset, language in ((1000, "old"), (2000, "new")):
        source = Source(offset + seed, vocab_size=64)
        for split, count, draw in (("train", steps * BATCH * LENGTH // 256 + 1, 2), ("val", 64, 1)):
            tokens = source.sample(count, 256, seed=draw)
            found[f"{split} {language}"] = ["".join(chr(0x30 + n) for n in line) for line in tokens.tolist()]
    return found


def batches(data: CorpusData) -> Iterator[Tensor]:
    """Tokens (B, LENGTH + 1) of full rows, pass after pass."""
    loader = data.train_dataloader()
    for batch in itertools.chain.from_iterable(loader for _ in itertools.count()):
        if not (batch["targets"] == IGNORE_INDEX).any():
            yield torch.cat([batch["input_ids"], batch["targets"][:, -1:]], dim=1)


def one_seed(data: Path | None, seed: int, steps: int, folder: Path) -> dict[str, dict[str, float]]:
    """Losses on both languages after each way."""
    texts, paths = texts_of(data, seed, steps), {}
    for name, lines in texts.items():
        paths[name] = str(folder / f"{name} {seed}.txt")
        Path(paths[name]).write_text("\n".join(lines))
    every = [line for name in ("train old", "train new") for line in texts[name]]
    tokenizer = character_tokenizer(every) if data is None else bpe_tokenizer(every, 512)
    tokenizer.save_pretrained(folder / "tokenizer")

    def corpus(train: dict[str, str], **options: Any) -> CorpusData:
        made = CorpusData(
            train,
            str(folder / "tokenizer"),
            max_length=LENGTH,
            batch_size=BATCH,
            attend_across_documents=True,
            seed=seed,
            **options,
        )
        made.setup()
        return made

    held_out = {
        name: torch.cat(list(itertools.islice(batches(corpus({name: paths[f"val {name}"]})), 12)))
        for name in ("old", "new")
    }

    def losses(model: TinyModel) -> dict[str, float]:
        return {name: evaluate(model, tokens) for name, tokens in held_out.items()}

    def new_model() -> TinyModel:
        torch.manual_seed(seed)
        return TinyModel(len(tokenizer), context=LENGTH)

    old = corpus({"old": paths["train old"]})
    first = new_model()
    train(first, adamw(first), batches(old), lrs_of(cosine(), steps, PEAK))
    torch.save({"CorpusData": old.state_dict()}, folder / "first.ckpt")
    found = {"old only": losses(first)}
    for fraction in FRACTIONS:
        replay = {
            "replay": {"old": paths["train old"]},
            "replay_fraction": fraction,
            "seen": str(folder / "first.ckpt"),
        }
        new = corpus({"new": paths["train new"]}, **(replay if fraction else {}))
        model = new_model()
        model.load_state_dict(first.state_dict())
        train(model, adamw(model), batches(new), lrs_of(rewarmed(), steps, PEAK))
        found[f"replay {fraction:.0%}"] = losses(model)
    both = corpus({"old": paths["train old"], "new": paths["train new"]}, weights={"old": 1.0, "new": 1.0})
    model = new_model()
    train(model, adamw(model), batches(both), lrs_of(cosine(), 2 * steps, PEAK))
    return found | {"union, anew": losses(model)}


def plot(results: list[dict[str, dict[str, float]]]) -> Figure:
    """Loss on each language by share of replay."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for color, name in (("C0", "old"), ("C1", "new")):
        ways = {way: interval([result[way][name] for result in results]) for way in results[0]}
        bars = [ways[f"replay {fraction:.0%}"] for fraction in FRACTIONS]
        means, halves = zip(*bars, strict=True)
        axes.errorbar(range(len(bars)), means, halves, color=color, marker="o", capsize=3, label=name)
        axes.axhline(ways["union, anew"][0], color=color, linestyle="--", label=f"{name}, union anew")
    axes.set_xticks(range(len(FRACTIONS)), [f"{fraction:.0%}" for fraction in FRACTIONS])
    axes.set_xlabel("replay")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend()
    return figure


def main() -> None:
    """Run, print and write."""
    parser = arguments(__doc__.splitlines()[0], seeds=3)
    parser.add_argument("--data", type=Path, help="folder of Multi30k; without it text is made up")
    args = parser.parse_args()
    if args.data is not None and not (args.data / "train.de.gz").is_file():
        raise SystemExit(f"--data {args.data}: no train.de.gz there")
    steps = 12 if args.quick else 600
    cache = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as name:
        datasets.config.HF_DATASETS_CACHE = Path(name) / "cache"
        try:
            results = [
                one_seed(args.data, seed, steps, Path(name))
                for seed in progress(range(args.seeds), "seeds, old text first, then new")
            ]
        finally:
            datasets.config.HF_DATASETS_CACHE = cache
    rows: list[dict[str, Any]] = []
    for way in results[0]:
        old, new = ([result[way][domain] for result in results] for domain in ("old", "new"))
        none = [[result["replay 0%"][domain] for result in results] for domain in ("old", "new")]
        rows.append(
            {
                "way": way,
                "old": shown(old),
                "new": shown(new),
                "old, to replay 0 %": differences(old, none[0]),
                "new, to replay 0 %": differences(new, none[1]),
                "old by seed": old,
                "new by seed": new,
            }
        )
    settings = {
        "text": "made up" if args.data is None else args.data.name,
        "seeds": args.seeds,
        "quick": args.quick,
        "steps of each run": steps,
        "peak": PEAK,
        "rows per step": BATCH,
        "tokens per row": LENGTH,
    }
    write(
        f"replay{'' if args.data is None else '_' + args.data.name}",
        args.output,
        settings,
        rows,
        plot(results),
    )


if __name__ == "__main__":
    main()
