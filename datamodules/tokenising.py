"""From rows to tokenised examples: cut to length, and counted where they are left out."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rich.progress import track

from rewarm.datamodules.loader import Example
from rewarm.text.encoding import Encoder, Tokens
from rewarm.text.formats import Row, Rows

log = logging.getLogger(__name__)

Overlong = Literal["error", "drop", "keep_start", "keep_end"]

Encode = Callable[[int, Row], tuple[Tokens, ...] | str]
"""The number of a row and the row -> the sequences of its example, or why there is none."""


@dataclass(frozen=True)
class Tokenised:
    """The examples of a data set.

    Attributes:
        examples: Examples that are left, numbered from 0.
        numbers: Number of the row that each example was.
        left_out: Number of rows that were dropped or truncated, by the reason.

    Example:
        >>> tokens, learn = torch.tensor([5, 6, 7]), torch.tensor([False, True, True])
        >>> made = Tokenised([Example(0, (Tokens(tokens, learn),))], [4], Counter({"too long, dropped": 4}))
        >>> made.numbers, made.left_out.total()
        ([4], 4)
    """

    examples: list[Example]
    numbers: list[int]
    left_out: Counter[str]


def tokenise(
    rows: Rows, encode: Encode, *, encoder: Encoder, max_length: int, overlong: Overlong
) -> Tokenised:
    r"""Encode every row, and log what was left out.

    Args:
        rows: The data set.
        encode: Function that makes the sequences of an example, or says why there is none.
        encoder: Encoder that `encode` tokenises with; it knows the BOS token, and counts tokens across
            prompt and completion.
        max_length: Largest number of positions of a sequence, >= 1.
        overlong: Fate of longer sequences: `error`, `drop`, `keep_start` or `keep_end`.

    Returns:
        The examples, and what was left out.

    Raises:
        ValueError: If a row is wrong, a row is too long where that is an error, or no row is left.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from types import SimpleNamespace
        >>> path = Path(tempfile.mkdtemp(), "rows.jsonl")
        >>> _ = path.write_text('{"size": 3}\n{"size": 9}\n')
        >>> encoder = SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=None), straddled=0)
        >>> def ones(number, row):
        ...     tokens = torch.ones(row["size"], dtype=torch.long)
        ...     return (Tokens(tokens, tokens.bool()),)
        >>> made = tokenise(Rows(path), ones, encoder=encoder, max_length=4, overlong="drop")
        >>> made.numbers, dict(made.left_out)
        ([0], {'too long, dropped': 1})
    """
    examples: list[Example] = []
    numbers: list[int] = []
    left_out: Counter[str] = Counter()
    for number, row in enumerate(
        track(rows, f"tokenising {rows.path}", total=len(rows), disable=len(rows) < 5000, transient=True)
    ):
        try:
            sequences = encode(number, row)
        except ValueError as error:
            if str(error).startswith(rows.where(number)) or str(rows.path) in str(error):
                raise
            raise ValueError(f"{rows.where(number)}: {error}") from error
        if isinstance(sequences, str):
            left_out[f"{sequences}, dropped"] += 1
            continue
        longest = max(sequence.positions for sequence in sequences)
        if longest > max_length:
            if overlong == "error":
                raise ValueError(
                    f"{rows.where(number)}: {longest} positions, but max_length is {max_length}:"
                    " raise it, or set overlong to 'drop', 'keep_start' or 'keep_end'"
                )
            bos = encoder.tokenizer.bos_token_id
            cut = () if overlong == "drop" else truncated(sequences, max_length, overlong, bos)
            left_out["too long, truncated" if cut else "too long, dropped"] += 1
            if not cut:
                continue
            sequences = cut
        if not all(bool(sequence.learn[1:].any()) for sequence in sequences):
            left_out["without a target, dropped"] += 1
            continue
        examples.append(Example(len(examples), sequences))
        numbers.append(number)
    for reason, count in left_out.items():
        log.warning("%s: %d of %d rows %s", rows.path, count, len(rows), reason)
    if encoder.straddled:
        log.warning(
            "%s: %d sequences have a token across prompt and completion", rows.path, encoder.straddled
        )
        encoder.straddled = 0
    if not examples:
        raise ValueError(f"{rows.path}: no row is left to train on ({dict(left_out)})")
    return Tokenised(examples, numbers, left_out)


def truncated(
    sequences: tuple[Tokens, ...], max_length: int, overlong: Overlong, bos_token_id: int | None
) -> tuple[Tokens, ...]:
    """Cut sequences that share a prompt so that they still share one.

    Args:
        sequences: Sequences of one example, of which the longest has more than `max_length` positions.
        max_length: Largest number of positions of a sequence, >= 1.
        overlong: `keep_start` cuts the end of each; `keep_end` cuts equally many tokens from the start of
            each, except a BOS token.
        bos_token_id: Id of the token that a start keeps; None if there is none.

    Returns:
        The sequences; none if they have too little in common to cut.

    Example:
        >>> tokens = torch.tensor([5, 6, 7, 8, 9])
        >>> sequence = Tokens(tokens, tokens > 6)
        >>> [cut.tokens.tolist() for cut in truncated((sequence,), 3, "keep_start", None)]
        [[5, 6, 7, 8]]
        >>> [cut.tokens.tolist() for cut in truncated((sequence,), 3, "keep_end", None)]
        [[6, 7, 8, 9]]
    """
    if overlong == "keep_start":
        return tuple(sequence.without_end(max_length) for sequence in sequences)
    after = int(bos_token_id is not None and all(int(s.tokens[0]) == bos_token_id for s in sequences))
    count = max(sequence.positions for sequence in sequences) - max_length
    if len(sequences) > 1 and count + after > min(_shared(sequences), *map(_prompt, sequences)):
        return ()
    return tuple(sequence.without_start(count, after) for sequence in sequences)


def _shared(sequences: tuple[Tokens, ...]) -> int:
    """How many first tokens all have in common."""
    shortest = min(len(sequence.tokens) for sequence in sequences)
    first = sequences[0].tokens[:shortest]
    differ = [(sequence.tokens[:shortest] != first).nonzero() for sequence in sequences]
    return min([int(places[0]) for places in differ if len(places)] + [shortest])


def _prompt(sequence: Tokens) -> int:
    """How many first tokens are not learnt."""
    learnt = sequence.learn.nonzero()
    return int(learnt[0]) if len(learnt) else len(sequence.learn)
