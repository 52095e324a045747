"""`rewarm average`: one Hugging Face folder from several models, with one weight in memory at a time."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from rewarm.checkpoints.placing import put_in_place
from rewarm.checkpoints.weights import (
    DTYPES,
    CheckpointWeights,
    empty_model,
    load_tokenizer,
    open_weights,
    read_config,
    room,
    tied_names,
)
from rewarm.checks import in_range, one_of
from rewarm.functional.averaging import (
    ema_weights,
    greedy_soup,
    mean_weights,
    merge,
)
from rewarm.schedules.decay_weights import shape_weights
from rewarm.scoring.scorer import read_scorer

# Of the files that are written, each of which is put together in memory.
_SHARD_BYTES = 2**30
_RECORD = "average.json"
# What a Hugging Face folder holds beside its weights, without the model card, which is another model's.
_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
# Fields in which the configs of like models may differ: they are not part of the function.
_FREE_FIELDS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "initializer_range",
    "max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "transformers_version",
    "use_cache",
}


def write_average(
    checkpoints: Sequence[str],
    output: str,
    weights: Sequence[float] | None = None,
    *,
    base: str | None = None,
    share: float | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
) -> None:
    """Write the weighted mean of saved models as a Hugging Face folder.

    Each weight is read from one checkpoint after the other, averaged in float32 and written: however many
    checkpoints there are, memory holds a gigabyte of the result and a few copies of the largest weight.
    Config, tokenizer and chat template are the first checkpoint's; `average.json` says what went in. Where
    transformers stores a model under other names than it trains it (mixtures of experts), checkpoints and
    folders do not mix: `rewarm export` the checkpoints first.

    Args:
        checkpoints: `.ckpt` files or folders of rewarm modules, or Hugging Face folders, oldest first.
        output: Folder to write; must not be there yet.
        weights: One per checkpoint, 0 or more, summing to 1, see `merge_weights`; None is the plain mean.
        base: A model that the mean is pulled back to, such as the one that training started from.
        share: How much of the result is the mean, in [0, 1]; the rest is `base`, without which there is none.
        dtype: `float32` or `bfloat16`; None keeps that of the checkpoints, which must agree.
        tokenizer: Tokenizer to put beside it, in place of the first checkpoint's.

    Raises:
        ValueError: If the output is there, an argument is out of range, a checkpoint is damaged or holds a
            weight that is not finite, or the models differ in more than the values of their weights.

    Source: arXiv:2203.05482 (soups), arXiv:2109.01903 (interpolation with the base).
    """
    with put_in_place(output) as folder:
        models = _open_alike(checkpoints, base, dtype)
        chosen = mean_weights(len(checkpoints)) if weights is None else list(weights)
        if len(chosen) != len(checkpoints):
            raise ValueError(f"weights is {chosen}, for {len(checkpoints)} checkpoints")
        _write(folder, models, _with_base(chosen, base, share), dtype, tokenizer)


def write_greedy_average(
    checkpoints: Sequence[str],
    output: str,
    score: Callable[[Path], float],
    *,
    base: str | None = None,
    share: float | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
) -> list[str]:
    """Write the plain mean of those checkpoints that raise a validation score together.

    The best one is taken first; then each, in the order of its own score, if the mean with it scores no
    worse. What is scored is a folder beside the output, one at a time.

    Args:
        checkpoints: As in `write_average`, in any order.
        output: As in `write_average`.
        score: Scores a Hugging Face folder on held-out data; higher is better. Called 2 K - 1 times.
        base: As in `write_average`; the interpolation is what is scored.
        share: As in `write_average`.
        dtype: As in `write_average`.
        tokenizer: As in `write_average`.

    Returns:
        The checkpoints that were taken, best first.

    Raises:
        ValueError: As in `write_average`, or if a score is not finite.

    Source: arXiv:2203.05482, recipe 1.
    """

    def mean_of(indices: list[int]) -> list[float]:
        weights = [1.0 / len(indices) if index in indices else 0.0 for index in range(len(checkpoints))]
        return _with_base(weights, base, share)

    with put_in_place(output) as folder:
        models = _open_alike(checkpoints, base, dtype)

        def score_mean(indices: list[int]) -> float:
            _write(folder, models, mean_of(indices), dtype, tokenizer)
            result = score(folder)
            shutil.rmtree(folder)
            names = ", ".join(checkpoints[index] for index in indices)
            print(f"{result:g}  {names}", flush=True)  # noqa: T201
            return result

        taken = greedy_soup([score_mean([index]) for index in range(len(checkpoints))], score_mean)
        _write(folder, models, mean_of(taken), dtype, tokenizer)
    return [checkpoints[index] for index in taken]


def merge_weights(
    k: int,
    *,
    ema: float | None = None,
    debias: bool = False,
    decay: str | None = None,
    end: float | None = None,
) -> list[float]:
    """Return the weights of k checkpoints, oldest first: those of the plain mean unless something is given.

    Args:
        k: Number of checkpoints K, >= 1.
        ema: Weight of the newest in an exponential moving average, in (0, 1].
        debias: Let that average not lean on the oldest checkpoint.
        decay: Shape of the learning-rate decay that the mean stands for, see `rewarm.schedules.phases`. The
            checkpoints are evenly spaced over it.
        end: Factor of the learning rate where that decay ends, in [0, 1]; None is 0.

    Raises:
        ValueError: If an argument is out of range or has no effect.

    Example:
        >>> merge_weights(4)
        [0.25, 0.25, 0.25, 0.25]
        >>> merge_weights(3, ema=0.5, debias=True)
        [0.14285714285714285, 0.2857142857142857, 0.5714285714285714]
    """
    if ema is not None and decay is not None:
        raise ValueError(f"ema is {ema} and decay {decay!r}; give one of them")
    if debias and ema is None:
        raise ValueError("debias is for ema, which is not given")
    if end is not None and decay is None:
        raise ValueError(f"end is {end}, but there is no decay to end there")
    if ema is not None:
        return ema_weights(ema, k, debias=debias)
    if decay is not None:
        return shape_weights(decay, k, end=end or 0.0)
    return mean_weights(k)


def average(
    checkpoints: Sequence[str],
    *,
    output: str,
    weights: Sequence[float] | None = None,
    ema: float | None = None,
    debias: bool = False,
    decay: str | None = None,
    end: float | None = None,
    greedy: str | None = None,
    base: str | None = None,
    share: float | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    tokenizer: str | None = None,
) -> None:
    """Average checkpoints of one model, or fine-tunes of it, into a folder.

    Without --weights, --ema, --decay or --greedy it is their plain mean. The folder's `average.json` says
    what went in with which weight.

    Args:
        checkpoints: `.ckpt` files or folders of shards, or Hugging Face folders; where the order matters,
            oldest first.
        output: Hugging Face folder to write; must not be there yet.
        weights: Weight of each checkpoint, 0 or more, summing to 1.
        ema: Weight of the newest in an exponential moving average, in (0, 1].
        debias: Let the moving average not lean on the oldest checkpoint.
        decay: Shape of the learning-rate decay that the mean stands for, such as linear, sqrt or cosine; the
            checkpoints are evenly spaced over it.
        end: Factor of the learning rate where that decay ends, in [0, 1]; without it, 0.
        greedy: Score by which only checkpoints that raise it are taken: a shell command with {} for the
            folder, whose last line of output is the score (higher is better), or the dotted name of a Python
            function.
        base: Model to interpolate with, such as the one that training started from.
        share: How much of the result is the average, in [0, 1]; the rest is the base.
        dtype: Kind of the weights that are written; without it, that of the checkpoints.
        tokenizer: Tokenizer to put beside it, a folder or id; without it, the first checkpoint's.

    Raises:
        ValueError: If two ways to weigh the checkpoints are given, or as in `write_average`.
    """
    ways = {"weights": weights, "ema": ema, "decay": decay, "greedy": greedy}
    given = [f"--{name}" for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them")
    shares = merge_weights(len(checkpoints), ema=ema, debias=debias, decay=decay, end=end)
    options: dict[str, Any] = {"base": base, "share": share, "dtype": dtype, "tokenizer": tokenizer}
    if greedy is not None:
        write_greedy_average(checkpoints, output, read_scorer(greedy), **options)
    else:
        write_average(checkpoints, output, shares if weights is None else weights, **options)
    for row in json.loads((Path(output) / _RECORD).read_text()):
        print(f"{row['weight']:.4f}  {row['checkpoint']}")  # noqa: T201
    print(f"wrote {output}")  # noqa: T201


def _with_base(weights: list[float], base: str | None, share: float | None) -> list[float]:
    if (base is None) != (share is None):
        raise ValueError(f"base is {base!r} and share {share}: they go together")
    if share is None:
        return weights
    in_range("[0, 1]", share=share)
    return [*(share * weight for weight in weights), 1.0 - share]


# --- models that may be averaged ------------------------------------------------------------------------


def _open_alike(checkpoints: Sequence[str], base: str | None, dtype: str | None) -> list[CheckpointWeights]:
    """Open the checkpoints and the base, and check that only the values of their weights differ."""
    if not checkpoints:
        raise ValueError("checkpoints is empty; there must be at least 1")
    if dtype is not None:
        one_of(DTYPES, dtype=dtype)
    paths = [*checkpoints] if base is None else [*checkpoints, base]
    opened = [open_weights(Path(path)) for path in paths]
    config = _fixed_fields(opened[0])
    if "quantization_config" in config:
        raise ValueError(f"{opened[0].path}: a quantised model cannot be averaged")
    groups = tied_names(empty_model(opened[0].made_with))
    first, *others = models = [_tied_once(one, groups) for one in opened]
    for other in others:
        _check_alike(first, other, config, any_dtype=dtype is not None)
    return models


def _fixed_fields(model: CheckpointWeights) -> dict[str, Any]:
    fields = read_config(model.made_with).to_dict()
    return {
        name: value
        for name, value in fields.items()
        if name not in _FREE_FIELDS and not name.endswith(("_token_id", "dropout", "_pdrop"))
    }


def _tied_once(model: CheckpointWeights, groups: list[list[str]]) -> CheckpointWeights:
    """Give tied weights one name, whichever of them were saved, and check what is read."""
    names = {group[0]: [name for name in group if name in model.like] for group in groups}
    names = {own: saved for own, saved in names.items() if saved}
    known = {name for saved in names.values() for name in saved}
    names |= {name: [name] for name in model.like if name not in known}

    def read(own: str) -> Tensor:
        tensor = model.read(names[own][0])
        for name in names[own][1:]:
            if not torch.equal(model.read(name), tensor):
                raise ValueError(
                    f"{model.path}: {own} and {name} are one weight, but were saved with two values"
                )
        if tensor.is_floating_point() and tensor.numel():
            ends = torch.stack(tensor.aminmax())  # without a copy of the weight
            if not ends.isfinite().all():
                raise ValueError(f"{model.path}: {own} has values that are not finite")
        return tensor

    return replace(model, like={own: model.like[saved[0]] for own, saved in names.items()}, read=read)


def _check_alike(
    first: CheckpointWeights, other: CheckpointWeights, config: dict[str, Any], any_dtype: bool
) -> None:
    unlike = f"{first.path} and {other.path} are not alike"
    others = _fixed_fields(other)
    for name in sorted(config.keys() | others.keys()):
        if config.get(name) != others.get(name):
            raise ValueError(
                f"{unlike}: {name} is {config.get(name)} in one, {others.get(name)} in the other"
            )
    if missing := first.like.keys() ^ other.like.keys():
        raise ValueError(f"{unlike}: only one has {min(missing)}")
    for name, like in first.like.items():
        theirs = other.like[name]
        if like.shape != theirs.shape:
            raise ValueError(f"{unlike}: {name} has shapes {tuple(like.shape)} and {tuple(theirs.shape)}")
        if like.dtype != theirs.dtype and not (
            any_dtype and like.is_floating_point() and theirs.is_floating_point()
        ):
            raise ValueError(f"{unlike}: {name} is {like.dtype} and {theirs.dtype}; set dtype")


# --- writing --------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    models: list[CheckpointWeights],
    weights: list[float],
    dtype: str | None,
    tokenizer: str | None,
) -> None:
    like = {
        name: torch.empty_like(tensor, dtype=DTYPES[dtype] if dtype and tensor.is_floating_point() else None)
        for name, tensor in models[0].like.items()
    }
    files = split_torch_state_dict_into_shards(like, max_shard_size=_SHARD_BYTES)
    folder.mkdir()
    written = next(tensor.dtype for tensor in like.values() if tensor.is_floating_point())
    _write_rest(folder, models[0], str(written).removeprefix("torch."), tokenizer)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("averaging", total=len(like))
        for file, names in files.filename_to_tensors.items():
            tensors = {}
            for name in names:
                tensors[name] = _mean(name, models, weights, like[name].dtype)
                progress.advance(task)
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    record = [
        {"checkpoint": str(model.path), "weight": weight}
        for model, weight in zip(models, weights, strict=True)
    ]
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _mean(name: str, models: list[CheckpointWeights], weights: list[float], dtype: torch.dtype) -> Tensor:
    if not models[0].like[name].is_floating_point():
        first, *others = models
        tensor = first.read(name)
        for other in others:
            if not torch.equal(other.read(name), tensor):
                raise ValueError(
                    f"{first.path} and {other.path} differ in {name}, whole numbers that have no mean"
                )
        return tensor
    mean = room(models[0].like[name].shape, torch.float32)
    used = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight != 0.0]
    merge(([model.read(name)] for model, _ in used), [weight for _, weight in used], out=[mean])
    return mean if dtype == torch.float32 else room(mean.shape, dtype).copy_(mean)


def _write_rest(folder: Path, first: CheckpointWeights, dtype: str, tokenizer: str | None) -> None:
    """Put config, generation config, tokenizer and chat template beside the weights."""
    if (first.path / "config.json").is_file():
        for path in first.path.iterdir():
            is_tokenizers = path.name not in ("config.json", "generation_config.json")
            if (
                path.suffix not in _SUFFIXES
                or path.name.endswith(".index.json")
                or (tokenizer and is_tokenizers)
            ):
                continue
            shutil.copy(path, folder)
        if (templates := first.path / "additional_chat_templates").is_dir() and not tokenizer:
            shutil.copytree(templates, folder / templates.name)
        fields = json.loads((first.path / "config.json").read_text())
        fields.pop("torch_dtype", None)  # the older name
        (folder / "config.json").write_text(json.dumps(fields | {"dtype": dtype}, indent=2) + "\n")
        source = tokenizer
    else:
        model = empty_model(first.made_with)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = dtype
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        source = tokenizer or first.made_with["tokenizer"]
    if (loaded := load_tokenizer(source)) is not None:
        loaded.save_pretrained(folder)
