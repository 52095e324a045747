"""The language-model head's log-probabilities and their gradients: time and memory of each way to get them.

Run: python -m benchmarks.head --output FOLDER. On a machine with CUDA it measures bfloat16 there, else
float32 on one CPU core. Values and gradients are compared with float64 before any time is taken. Memory
counts what is allocated beyond the inputs, at its peak; the floor is the gradients of the hidden states and
of the head (added up in float32) and one chunk of float32 logits. Prints which way is the quickest at each
shape and, on CUDA, what `_LIGER_LOGITS` of functional/logprob.py should be.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from benchmarks.evidence.common import write
from rewarm.functional import logprob
from rewarm.functional.logprob import token_logprobs

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = ("dense", "torch", "liger")
# Of these the first rows are compared with float64.
_COMPARED = 512


def checkpointed_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Dense chunks of 512 tokens that autograd computes again: what one writes by hand."""

    def chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")

    parts = zip(hidden.split(512), targets.split(512), strict=True)
    return torch.cat([checkpoint(chunk, h, weight, t, use_reentrant=False) for h, t in parts])


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The one of torch 2.13, with the chunks of its default options."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def heads(device: str) -> dict[str, Head]:
    """The ways by name: our backends, and those of others."""

    def ours(backend: Any) -> Head:
        return lambda hidden, weight, targets: token_logprobs(hidden, weight, targets, backend=backend)

    known: dict[str, Head] = {name: ours(name) for name in OURS if name != "liger" or device == "cuda"}
    known["checkpointed chunks"] = checkpointed_chunks
    if hasattr(F, "linear_cross_entropy"):
        known["F.linear_cross_entropy"] = linear_cross_entropy
    return known


def inputs(tokens: int, width: int, vocab: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets and an upstream gradient of order 1 for each token."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(device, dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator).to(device)
    return hidden, weight, targets, torch.rand(tokens, generator=generator).to(device)


def run(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> list[Tensor]:
    """Values and both gradients."""
    values = head(hidden, weight, targets)
    return [values.detach(), *torch.autograd.grad(values, (hidden, weight), upstream.to(values.dtype))]


def errors(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> list[float]:
    """Distance of values and gradients from those in float64, relative to their norm; a few rows suffice."""
    hidden = hidden[:_COMPARED].detach().requires_grad_()
    rest = targets[:_COMPARED], upstream[:_COMPARED]
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    truth = run(heads("cpu")["dense"], exact_hidden, exact_weight, *rest)
    found = run(head, hidden, weight, *rest)
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)]


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """Most bytes that the work has allocated at any moment."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        kept = work()
    del kept
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def floor_bytes(tokens: int, width: int, vocab: int, device: str) -> int:
    """Both gradients and one chunk of logits."""
    on_cuda = device == "cuda"
    chunk = logprob._ACCELERATOR_CHUNK_BYTES if on_cuda else logprob._CPU_CHUNK_BYTES[1]
    return (2 if on_cuda else 4) * tokens * width + 4 * vocab * width + min(chunk, 4 * tokens * vocab)


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Time of the work: of the device, or of one CPU core."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(shape: tuple[int, int, int], repeats: int, device: str) -> list[dict[str, Any]]:
    """A row for each way at one shape (tokens, width, vocabulary); they take turns."""
    tensors, known = inputs(*shape, device), heads(device)
    found = {name: errors(head, *tensors) for name, head in known.items()}
    for name, its in found.items():
        # In bfloat16 dense is the measure: others round at other places, and may not be much worse.
        if any(x > max(1.2 * y, 1e-5) for x, y in zip(its, found["dense"], strict=True)):
            raise ValueError(f"{name} at {shape} is {its} from float64, dense is {found['dense']}")
    peaks, times = {}, {name: [math.nan] for name in known}
    for name, head in list(known.items()):
        try:
            peaks[name] = peak_bytes(lambda head=head: run(head, *tensors), device)  # type: ignore[misc]
        except torch.OutOfMemoryError:
            peaks[name] = 0
            del known[name]
    for repeat in range(repeats):
        for name, head in known.items():
            times[name][repeat:] = [seconds_of(lambda head=head: run(head, *tensors), device)]  # type: ignore[misc]
    floor = floor_bytes(*shape, device)
    return [
        {
            "tokens": shape[0],
            "width": shape[1],
            "vocabulary": shape[2],
            "way": name,
            "ms": 1e3 * statistics.median(its),
            "times dense": statistics.median(its) / statistics.median(times["dense"]),
            "peak MiB": peaks[name] / 2**20,
            "times the floor": peaks[name] / floor,
            "error": max(found[name]),
            "all ms": [1e3 * value for value in its],
        }
        for name, its in times.items()
    ]


def quickest(rows: list[dict[str, Any]], names: tuple[str, ...] = OURS) -> dict[tuple[int, int], str]:
    """The quickest of some ways at each (tokens, vocabulary)."""
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["tokens"], row["vocabulary"])
        if row["way"] in names and not math.isnan(row["ms"]):
            best[key] = min(best.get(key, row), row, key=lambda row: row["ms"])
    return {key: row["way"] for key, row in best.items()}


def crossover(rows: list[dict[str, Any]]) -> int | None:
    """Fewest logits from which on Liger beats "torch" at every shape; None if it does not at the largest."""
    found = None
    by_size = sorted(quickest(rows, ("torch", "liger")).items(), key=lambda item: math.prod(item[0]))
    for shape, way in reversed(by_size):
        if way != "liger":
            break
        found = math.prod(shape)
    return found


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Time and memory against tokens, a column for each vocabulary."""
    vocabularies = sorted({row["vocabulary"] for row in rows})
    figure = Figure(figsize=(3.6 * len(vocabularies), 5.6), layout="constrained")
    axes = figure.subplots(2, len(vocabularies), sharex=True, squeeze=False)
    for column, vocab in enumerate(vocabularies):
        here = [row for row in rows if row["vocabulary"] == vocab]
        for name in dict.fromkeys(row["way"] for row in here):
            mine = [row for row in here if row["way"] == name]
            x = [row["tokens"] for row in mine]
            axes[0, column].plot(x, [row["times dense"] for row in mine], "o-", label=name)
            axes[1, column].plot(x, [row["times the floor"] for row in mine], "o-")
        axes[0, column].set(title=f"vocabulary {vocab}", xscale="log")
        axes[1, column].set(xlabel="tokens", yscale="log")
        axes[1, column].axhline(1.3, color="grey", lw=0.8, ls="--")
    axes[0, 0].set_ylabel("time / dense")
    axes[1, 0].set_ylabel("peak memory / floor")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="for JSON and PNG")
    parser.add_argument("--repeats", type=int, default=5, help="of each way, in turns")
    parser.add_argument("--quick", action="store_true", help="one small shape, to see that it works")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, width, vocabularies = [1024, 2048, 8192], 256, [4096, 32_000]
    if device == "cuda":
        tokens, width, vocabularies = [2048, 8192, 32_768], 2048, [32_000, 128_256, 151_936]
    if args.quick:
        tokens, width, vocabularies = [256], 32, [2000]
    repeats = 1 if args.quick else args.repeats
    rows = [
        row
        for vocab in vocabularies
        for count in tokens
        for row in measure((count, width, vocab), repeats, device)
    ]
    where = torch.cuda.get_device_name() if device == "cuda" else "one CPU core"
    settings = {"device": where, "repeats": repeats, "quick": args.quick}
    write("head", args.output, settings, rows, picture(rows))
    for (count, vocab), name in quickest(rows).items():
        print(f"{count} tokens, vocabulary {vocab}: of our backends {name!r} is the quickest")
    if device == "cuda":
        found = crossover(rows)
        what = "beyond all that was tried" if found is None else f"{found} (2^{math.log2(found):.1f})"
        print(f"_LIGER_LOGITS in functional/logprob.py should be {what}")


if __name__ == "__main__":
    main()
