"""Shows what training would see of a data set: what is learnt, how long rows are, what is left out."""

import random
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewarm.checks import at_least
from rewarm.datamodules.instructions import InstructionData
from rewarm.datamodules.loader import Example
from rewarm.datamodules.preferences import PreferenceData
from rewarm.datamodules.tokenising import Overlong
from rewarm.text.encoding import Encoder, Tokens
from rewarm.text.formats import Rows

_BARS = 10
_BAR_WIDTH = 40


def preview(
    data: str | list[str],
    *,
    tokenizer: str,
    max_length: int = 1024,
    overlong: Overlong = "keep_start",
    samples: int = 3,
    seed: int = 0,
    console: Console | None = None,
) -> None:
    """Show what training would learn of a data set, and what it would leave out.

    What is printed are samples with what is learnt in colour, counts of what is left out, and lengths.

    Args:
        data: File, files, folder or Hub id of instruction or preference data.
        tokenizer: Hugging Face folder or id of a tokenizer.
        max_length: Most positions per row, >= 1.
        overlong: What becomes of longer rows.
        samples: How many examples to print, >= 0.
        seed: Seed of the choice of these examples.
        console: Where to print; standard output if None.

    Raises:
        ValueError: If the data or the tokenizer cannot be read, or samples is below 0.
    """
    at_least(0, samples=samples)
    console = console or Console()
    rows = Rows(data)
    pairs = "responses" in rows.columns or {"chosen", "rejected"} <= {*rows.columns}
    kind = PreferenceData if pairs else InstructionData
    read = kind(data, tokenizer, max_length=max_length, overlong=overlong)
    read.setup("fit")
    examples = read.examples()
    names = ("chosen", "rejected") if pairs else ("",)
    chosen = sorted(random.Random(seed).sample(range(len(examples)), min(samples, len(examples))))
    for number in chosen:
        for name, sequence in zip(names, examples[number].sequences, strict=True):
            console.rule(f"example {number} {name}".strip(), align="left")
            console.print(marked(sequence, read.encoder))
    console.rule("rows", align="left")
    console.print(_counts(len(rows), examples, read.left_out[str(rows.path)]))
    console.rule("lengths", align="left")
    lengths = [sequence.positions for example in examples for sequence in example.sequences]
    console.print(Text(histogram(lengths, max_length)))


def marked(sequence: Tokens, encoder: Encoder) -> Text:
    """Return the text of a sequence: learnt tokens are green, those of a weight below 1 yellow, others dim.

    Args:
        sequence: Tokens, what is learnt, and perhaps weights.
        encoder: Encoder of the tokens.
    """
    text, tokens = Text(), sequence.tokens.tolist()
    weights = sequence.extra.get("weights")
    styles = [
        "dim"
        if not place or not learnt
        else "green"
        if weights is None or float(weights[place - 1]) >= 1.0
        else "yellow"
        for place, learnt in enumerate(sequence.learn.tolist())
    ]
    begin = 0
    for end in range(1, len(tokens) + 1):
        # Several tokens may make one character, so stretches of one colour are decoded together.
        if end == len(tokens) or styles[end] != styles[begin]:
            piece = encoder.tokenizer.decode(tokens[begin:end], clean_up_tokenization_spaces=False)
            text.append(str(piece), styles[begin])
            begin = end
    return text


def _counts(num_rows: int, examples: Sequence[Example], left_out: dict[str, int]) -> Table:
    table = Table(show_header=False, box=None)
    learnt = sum(int(s.learn[1:].sum()) for example in examples for s in example.sequences)
    positions = sum(example.positions for example in examples)
    counted = {"read": num_rows, "too long, dropped": 0, "too long, truncated": 0}
    counted |= {"without a target, dropped": 0} | left_out | {"trained on": len(examples)}
    for name, count in counted.items():
        table.add_row(name, f"{count:,}")
    table.add_row("tokens learnt", f"{learnt:,} of {positions:,} ({learnt / positions:.1%})")
    return table


def histogram(lengths: Sequence[int], max_length: int) -> str:
    """Return bars for how many lengths lie in each stretch of equal size, with median and mean.

    Args:
        lengths: At least one, each in [1, max_length].
        max_length: End of the last stretch, unless the longest is below half of it.

    Example:
        >>> print(histogram([1, 2, 2, 20], 20).splitlines()[0])
             1-2     3 ########################################
    """
    longest = max(lengths)
    size = -(-(longest if 2 * longest < max_length else max_length) // _BARS)
    counts = [0] * (-(-longest // size))
    for length in lengths:
        counts[(length - 1) // size] += 1
    lines = [
        f"{f'{number * size + 1}-{(number + 1) * size}':>8} {count:>5}"
        f" {'#' * -(-_BAR_WIDTH * count // max(counts))}".rstrip()
        for number, count in enumerate(counts)
    ]
    ordered = sorted(lengths)
    mean = sum(lengths) / len(lengths)
    return "\n".join([*lines, f"median {ordered[len(ordered) // 2]}, mean {mean:.1f}, longest {longest}"])
