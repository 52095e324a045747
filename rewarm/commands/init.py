"""`rewarm init`: the folder of a model to start from."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rewarm.checkpoints.placing import check_free, put_in_place
from rewarm.checks import one_of
from rewarm.lightning_modules.policy import build_model
from rewarm.text.formats import Rows

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def init(
    *,
    output: str,
    model: str | None = None,
    config: str | None = None,
    tokenizer: Literal["characters", "bpe"] = "bpe",
    vocab_size: int = 4096,
    text: Sequence[str] = (),
    column: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Make the folder of a model to start from: random weights, or a link to one at hand.

    Args:
        output: Hugging Face folder to write; must not be there yet.
        model: Folder of a model at hand, to which `output` becomes a link; config and text are then not
            needed.
        config: YAML file with the fields of a transformers config, `model_type` among them; `vocab_size` and
            special tokens are filled in.
        tokenizer: Kind of tokenizer to train.
        vocab_size: Most tokens of a bpe tokenizer, >= 259.
        text: Files to train the tokenizer on, in any format that the data modules read.
        column: Text columns of those files; without any, all text.
        seed: Seed of the random weights.

    Raises:
        ValueError: If the folder is there, or an argument is missing or out of range.
    """
    check_free(output)
    if model:
        if not (Path(model) / "config.json").is_file():
            raise ValueError(f"model {model}: no such Hugging Face folder (it has no config.json)")
        with put_in_place(output) as link:
            link.symlink_to(Path(model).resolve(), target_is_directory=True)
        return
    if config is None or not text:
        raise ValueError("give either --model, or --config and --text")
    if not Path(config).is_file():
        raise ValueError(f"config {config}: no such file")
    one_of(("characters", "bpe"), tokenizer=tokenizer)
    lines = list(_texts(text, column))
    loaded = character_tokenizer(lines) if tokenizer == "characters" else bpe_tokenizer(lines, vocab_size)
    fields = yaml.safe_load(Path(config).read_text())
    special = {"bos_token_id": None, "eos_token_id": loaded.eos_token_id, "pad_token_id": loaded.pad_token_id}
    torch.manual_seed(seed)
    built = build_model({**fields, **special, "vocab_size": len(loaded)})
    with put_in_place(output) as folder:
        built.save_pretrained(folder)
        loaded.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in built.parameters())
    print(json.dumps({"parameters": count, "vocab_size": len(loaded)}))  # noqa: T201


def character_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose tokens are the characters of some texts.

    Args:
        texts: Any text; characters outside become `<unk>`.

    Example:
        >>> tokenizer = character_tokenizer(["12+="])
        >>> tokenizer.tokenize("1+2=")
        ['1', '+', '2', '=']
    """
    characters = sorted({character for text in texts for character in text})
    vocabulary = {token: number for number, token in enumerate([PAD, EOS, UNKNOWN, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _wrapped(backend)


def bpe_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer; digits are tokens of their own, so that numbers can be worked with.

    Args:
        texts: Training text.
        vocab_size: Most tokens, >= 259 (256 bytes and the special tokens).

    Raises:
        ValueError: If vocab_size is too small.

    Example:
        >>> tokenizer = bpe_tokenizer(["the sum of the sums"] * 4, 300)
        >>> tokenizer.decode(tokenizer("the sum 12")["input_ids"])
        'the sum 12'
    """
    if vocab_size < 259:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be at least 259: 256 bytes and the special tokens"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    return _wrapped(backend)


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def _texts(files: Sequence[str], columns: Sequence[str]) -> Iterator[str]:
    for name in files:
        rows = Rows(name)
        if missing := set(columns) - set(rows.columns):
            raise ValueError(f"{name}: no column {sorted(missing)} among {', '.join(rows.columns)}")
        for row in rows:
            for column, value in row.items():
                if isinstance(value, str) and (not columns or column in columns):
                    yield value
