"""Which scores order generated sums as their true difficulty does.

Run: python -m benchmarks.evidence.scorers

A small Llama is trained on the sums of `rewarm.sums` (worked steps, levels in turn) and kept at several
points. All scores of `rewarm score` are made for new sums, those that look at a model with the last of these
models. True difficulty is told in two ways: by the level that a sum was drawn from (the number of terms, and
the largest), and by how often models fail it that have nothing to do with the scores (trained from another
seed, many samples). A score that says which example is easy counts negative.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.evidence.common import adamw, arguments, interval, progress, shown, write
from benchmarks.evidence.item_response import spearman
from rewarm.commands.score import score
from rewarm.sums import problems

STEPS, BATCH, PEAK, SCORED, KEPT = 1500, 32, 3e-3, 300, (0.25, 0.5, 0.75, 1.0)
CHARACTERS = "0123456789+-=#"

# Name of each score, with what it is made by; True where high scores are said to be easy.
SCORES: dict[str, tuple[dict[str, Any], bool]] = {
    "length": ({"by": "length"}, False),
    "length of the prompt": ({"by": "length", "part": "prompt"}, False),
    "word rarity": ({"by": "rarity"}, False),
    "compression": ({"by": "compression"}, False),
    "loss": ({"by": "loss"}, False),
    "perplexity ratio": ({"by": "perplexity_ratio"}, False),
    "ratio to the first model": ({"by": "perplexity_ratio", "other": "first"}, True),
    "pass rate, 8 samples": ({"by": "pass_rate", "samples": 8}, True),
    "IRT difficulty": ({"by": "irt_difficulty"}, False),
    "angle concentration": ({"by": "angle"}, True),
    "prototype distance": ({"by": "prototype_distance", "prototypes": 20}, False),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {"<pad>": 0, "</s>": 1} | {character: n for n, character in enumerate(CHARACTERS, 2)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def batches(seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, T); targets of prompts and padding are -100."""
    rows = problems(steps * BATCH, seed, held=False)
    for start in range(0, len(rows), BATCH):
        prompts = [row["prompt"] for row in rows[start : start + BATCH]]
        texts = [f"{row['prompt']}{row['steps']}#{row['answer']}" for row in rows[start : start + BATCH]]
        width = max(map(len, texts)) + 1
        tokens = torch.zeros(len(texts), width, dtype=torch.long)
        learnt = torch.zeros(len(texts), width, dtype=torch.bool)
        for place, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            tokens[place, : len(text) + 1] = torch.tensor([2 + CHARACTERS.index(c) for c in text] + [1])
            learnt[place, len(prompt) : len(text) + 1] = True
        yield tokens[:, :-1], torch.where(learnt, tokens, -100)[:, 1:]


def trained(seed: int, steps: int, folder: Path) -> list[str]:
    """Train a model; the folders of what it was along the way."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2 + len(CHARACTERS), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=96, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer, at, folders = adamw(model), {round(steps * share) for share in KEPT}, []
    for group in optimizer.param_groups:
        group["lr"] = PEAK
    for step, (inputs, targets) in enumerate(batches(seed, steps), 1):
        loss = F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in at:
            folders.append(str(folder / f"{seed}-{step}"))
            model.save_pretrained(folders[-1])
            tokenizer().save_pretrained(folders[-1])
    return folders


def scored(seed: int, steps: int, count: int, folder: Path) -> tuple[dict[str, dict[str, float]], float]:
    """Rank correlation of each score with both difficulties, and the pass rate of the last model."""
    data, table = folder / "sums.jsonl", str(folder / "scores.parquet")
    rows = problems(count, 9000 + seed, held=True)
    for row in rows:
        row["completion"] = f"{row['steps']}#{row['answer']}"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    crowd, judges = trained(seed, steps, folder), trained(seed + 500, steps, folder)
    sampling: dict[str, Any] = {"by": "pass_rate", "reward": "rewarm.sums.right", "max_new_tokens": 30}
    made: dict[str, list[float]] = {}

    def make(name: str, **options: Any) -> None:
        with redirect_stdout(StringIO()):
            made[name] = score(str(data), output=table, name=name, **options).scores[name]

    for judge in judges:
        make(Path(judge).name, model=judge, samples=16, **sampling)
    for name, (options, _) in SCORES.items():
        by = options["by"]
        if by == "irt_difficulty":
            answers = []
            for model in crowd:
                answers.append(f"{model}.parquet")
                with redirect_stdout(StringIO()):
                    score(str(data), output=answers[-1], model=model, samples=8, seed=1, **sampling)
            make(name, answers=answers, **options)
        elif by in ("length", "rarity"):
            make(name, tokenizer=crowd[-1], **options)
        elif by == "compression":
            make(name, **options)
        elif by == "pass_rate":
            make(name, model=crowd[-1], **{**sampling, **options})
        else:
            other = {"other": crowd[0]} if "other" in options else {}
            make(name, model=crowd[-1], **{**options, **other})
    levels = torch.tensor([float(row["difficulty"]) for row in rows])
    failed = 1 - torch.tensor([made[Path(judge).name] for judge in judges]).mean(0)
    found = {}
    for name, (_, easy) in SCORES.items():
        values = torch.tensor(made[name]) * (-1 if easy else 1)
        found[name] = {"level": spearman(values, levels), "failed": spearman(values, failed)}
    found["level"] = {"level": 1.0, "failed": spearman(levels, failed)}
    return found, sum(made["pass rate, 8 samples"]) / len(rows)


def main() -> None:
    """Run and write."""
    args = arguments("which scores order sums as their difficulty does", seeds=3).parse_args()
    steps, count = (8, 24) if args.quick else (STEPS, SCORED)
    runs, rates = [], []
    for seed in progress(range(args.seeds), "seeds"):
        with tempfile.TemporaryDirectory() as folder:
            found, rate = scored(seed, steps, count, Path(folder))
        runs.append(found)
        rates.append(rate)
    rows: list[dict[str, Any]] = []
    for name in runs[0]:
        by_level, by_failed = ([run[name][of] for run in runs] for of in ("level", "failed"))
        rows.append(
            {
                "score": name,
                "Spearman with the level": shown(by_level),
                "with how often others fail": shown(by_failed),
                "level": by_level,
                "failed": by_failed,
            }
        )
    settings = {
        "steps": steps,
        "batch": BATCH,
        "peak": PEAK,
        "scored": count,
        "models of the crowd": [f"{share:.0%} of the steps" for share in KEPT],
        "pass rate of the last model": shown(rates),
        "seeds": args.seeds,
        "quick": args.quick,
    }
    write("scorers", args.output, settings, rows, picture(rows))


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Rank correlation with both difficulties."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for offset, (key, label) in enumerate((("level", "level"), ("failed", "how often others fail"))):
        for place, row in enumerate(rows):
            mean, half = interval(row[key])
            y = -place - 0.2 * offset
            named = label if place == 0 else None
            axes.errorbar(mean, y, xerr=half, fmt="o", color=f"C{offset}", markersize=4, label=named)
    axes.set_yticks([-place for place in range(len(rows))], [row["score"] for row in rows])
    axes.axvline(0, color="grey", lw=0.8)
    axes.set(xlabel="Spearman with the true difficulty")
    axes.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
