"""What the evidence scripts share: a tiny model, text with a known law, training, intervals, and writing."""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from rewarm.schedules.phases import Schedule

# Sequences per batch and targets per sequence, of all runs on the text of `Source`.
BATCH, TOKENS = 16, 32

_BEGAN = time.perf_counter()

# Student's t at 97.5 %, for 1 to 10 degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def arguments(what: str, seeds: int) -> argparse.ArgumentParser:
    """Options that all scripts have: --seeds, --quick, --output."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--seeds", type=int, default=seeds, help="runs, each with data and weights of its own"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/evidence/results"), help="folder for JSON and PNG"
    )
    return parser


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t); the latter is nan for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    freedom = len(values) - 1
    t = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.5 / freedom
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Mean and interval as text."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} +- {half:.{digits}f}"


def write(
    name: str, folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]], figure: Figure
) -> None:
    """Print the rows as a table, and write NAME.json and NAME.png.

    Args:
        name: Stem of the files.
        folder: Where to write; made if it is not there.
        settings: All that the rows depend on.
        rows: The results; all have the same keys. Lists are left out of the printed table.
        figure: The plot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - _BEGAN),
        "cpu_seconds": round(time.process_time()),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "lightning", "transformers")},
        },
        "settings": settings,
        "rows": rows,
    }
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    figure.savefig(folder / f"{name}.png", dpi=120, metadata={"Software": None})
    columns = [key for key, value in rows[0].items() if not isinstance(value, list)]
    cells = [columns, *([_cell(row[key]) for key in columns] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class TinyModel(torch.nn.Module):
    """Decoder of about 0.1M parameters, pre-norm, with learned positions."""

    def __init__(
        self, vocab_size: int, width: int = 64, layers: int = 2, heads: int = 4, context: int = 64
    ) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocab_size, width)
        self.places = torch.nn.Embedding(context, width)
        self.layers = torch.nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, vocab_size, bias=False)
        for weight in (self.embed.weight, self.places.weight, self.head.weight):
            torch.nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        x = self.embed(tokens) + self.places.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class _Layer(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def loss_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss in nats of tokens (B, T)."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokens: Tensor, batch_size: int = 256) -> float:
    """Mean loss on held-out tokens (B, T), in nats."""
    return statistics.fmean(float(loss_of(model, part)) for part in tokens.split(batch_size))


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The optimizer of all scripts; its LR is set before every step."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    lrs: Sequence[float],
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train on token batches (B, T), one per LR; `after_step` gets the steps done. Returns the losses."""
    losses = []
    for step, (lr, tokens) in enumerate(zip(lrs, batches, strict=False), start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if after_step is not None:
            after_step(step)
    if len(losses) < len(lrs):
        raise ValueError(f"batches has {len(losses)} entries; there must be {len(lrs)}, one per LR")
    return losses


class Source:
    """Text whose next token depends on the two before, with frequencies like those of words (Zipf).

    Args:
        seed: Of the law; another seed is another language over the same tokens.
        vocab_size: V.
        like: A source that this one resembles.
        likeness: How much, in [0, 1]: the correlation of their log-probabilities; 1 is the same law.
    """

    def __init__(
        self, seed: int, vocab_size: int = 96, like: "Source | None" = None, likeness: float = 0.0
    ) -> None:
        rng = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, vocab_size, generator=rng)

        common = -torch.log(1.0 + torch.randperm(vocab_size, generator=rng))
        first, second = noise(vocab_size, 1), noise(vocab_size)
        self.scores = common + first + 1.5 * second + 0.7 * noise(vocab_size, vocab_size)
        if like is not None:
            self.scores = likeness * like.scores + math.sqrt(1 - likeness**2) * self.scores
        self.law = self.scores.softmax(-1)

    def sample(self, sequences: int, tokens: int, seed: int) -> Tensor:
        """Draw sequences (B, T), the same for the same seed."""
        rng = torch.Generator().manual_seed(seed)
        drawn = list(torch.randint(len(self.law), (2, sequences), generator=rng))
        for _ in range(tokens - 2):
            drawn.append(torch.multinomial(self.law[drawn[-2], drawn[-1]], 1, generator=rng).squeeze(1))
        return torch.stack(drawn, dim=1)

    def batches(self, count: int, seed: int) -> Sequence[Tensor]:
        """Fresh batches, `count` of them, each of BATCH * TOKENS targets."""
        return self.sample(count * BATCH, TOKENS + 1, seed).split(BATCH)

    def entropy(self, tokens: Tensor) -> float:
        """Mean loss in nats that a model which knows the law has on tokens (B, T) but their first two."""
        chances = self.law[tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]]
        return -float(chances.log().mean())


class HeldOut:
    """Held-out text of a source, and the loss on it in nats above its entropy."""

    def __init__(self, source: Source, sequences: int = 256) -> None:
        self.tokens = source.sample(sequences, TOKENS + 1, seed=1)
        self.entropy = source.entropy(self.tokens)

    def loss(self, model: torch.nn.Module) -> float:
        """Loss above the entropy."""
        return evaluate(model, self.tokens) - self.entropy


def new_run(seed: int) -> tuple[TinyModel, torch.optim.AdamW]:
    """Random weights for the text of `Source`, and their optimizer."""
    torch.manual_seed(seed)
    model = TinyModel(96, context=TOKENS)
    return model, adamw(model)


def lrs_of(schedule: Schedule, steps: int, peak: float) -> list[float]:
    """LR of each step."""
    return [peak * schedule(n, steps) for n in range(1, steps + 1)]


def differences(values: Sequence[float], base: Sequence[float]) -> str:
    """Mean of the differences to another way, seed by seed, with its interval, as text."""
    mean, half = interval([value - other for value, other in zip(values, base, strict=True)])
    return f"{mean:+.3f}" if math.isnan(half) else f"{mean:+.3f} +- {half:.3f}"


def progress(works: Sequence[Any], what: str) -> Iterable[Any]:
    """The same things, with a bar on stderr."""
    from rich.console import Console
    from rich.progress import track

    return track(works, description=what, console=Console(stderr=True))
