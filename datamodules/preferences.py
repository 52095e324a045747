"""Pairs of a chosen and a rejected completion."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from rewarm.checks import one_of, replaced
from rewarm.curriculum.gates import Gate
from rewarm.curriculum.ordering import Order
from rewarm.curriculum.pacing import Pacing
from rewarm.datamodules.arrangement import Arrangement, Measures
from rewarm.datamodules.base import LanguageData
from rewarm.datamodules.loader import Collate, Example, WindowLoader
from rewarm.datamodules.tokenising import Overlong, Tokenised, tokenise
from rewarm.text.encoding import Tokens
from rewarm.text.formats import Row, Rows, as_pair, number_of, template_arguments

_MEASURES: Measures[Example] = {
    "prompt_tokens": lambda pair: float((~pair.sequences[0].learn).sum()),
    "chosen_tokens": lambda pair: float(pair.sequences[0].learn.sum()),
    "rejected_tokens": lambda pair: float(pair.sequences[1].learn.sum()),
}


class PreferenceData(LanguageData):
    """Preference pairs in a curriculum's order. Each pair is two rows of a batch: chosen, then rejected.

    Args:
        train: Training file, list of files, saved data set or Hub id. Its rows have `prompt`, `chosen` and
            `rejected` (text or messages); or `chosen` and `rejected` that share their beginning; or
            `responses` and `rewards`, of which the best and the worst response are taken. A `prefix` holds
            the steps that both continue.
        tokenizer: Hugging Face folder or id of a tokenizer; messages need its chat template.
        max_length: Largest number of positions per row, >= 1.
        batch_size: Number of pairs per batch and rank, >= 1.
        val: Validation data, in the same formats.
        score: Name of what the order sorts by: a numeric column, such as a margin, or `prompt_tokens`,
            `chosen_tokens` or `rejected_tokens`.
        score_table: Table of further columns that `rewarm score` made for the training data.
        order: `shuffled`, `ascending` or `descending` by score. Or an order by columns, such as
            `rewarm.Interleaved`, `rewarm.Blocked`, `rewarm.Folded` or `rewarm.Staged`.
        window: Number of pairs of the order that are shuffled among themselves in each pass, >= 1.
        pacing: Share of the order that is visible at each optimizer step, such as `rewarm.RootPacing`.
        keep: Gate on the scores that chooses the pairs to train on at all, such as `rewarm.TopShare`.
        group: Column with the group of each pair, for gates that look at groups.
        transform: Function that rewrites each row before it is read.
        columns: Names of columns of numbers that the loss reads of each pair, such as a margin.
        overlong: Fate of pairs with a row longer than `max_length`: `error`, `drop`, `keep_start`
            (the end is cut) or `keep_end` (the start is cut, but for a BOS token).
        num_workers: Number of processes that collate, >= 0.
        seed: Seed of the order.

    Attributes:
        curriculum: Order, pacing, gate and live scores of the training pairs; it is there after `setup`.

    Raises:
        ValueError: If an argument is out of its range, or arguments contradict each other.

    Example:
        >>> data = PreferenceData("pairs.jsonl", "models/sft", score="margin", order="descending")
        >>> data.arrangement.numbers
        {'margin'}
    """

    @replaced(scores="score_table= (the table; score= names the column in it)")
    def __init__(
        self,
        train: str | list[str],
        tokenizer: str,
        *,
        max_length: int = 1024,
        batch_size: int = 8,
        val: str | list[str] | None = None,
        score: str | None = None,
        score_table: str | None = None,
        order: Literal["shuffled", "ascending", "descending"] | Order = "shuffled",
        window: int = 1,
        pacing: Pacing | None = None,
        keep: Gate | None = None,
        group: str | None = None,
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        columns: Sequence[str] = (),
        overlong: Overlong = "error",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, max_length, num_workers, seed)
        one_of(get_args(Overlong), overlong=overlong)
        self.arrangement = Arrangement(score, score_table, order, window, pacing, keep, group)
        self.train, self.val, self.transform, self.overlong = train, val, transform, overlong
        self.columns = tuple(columns)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the data."""
        self._set_up_examples(self.train, self.val, self.arrangement, self._tokenised, _MEASURES)

    def train_dataloader(self) -> WindowLoader:
        """Return a loader of batches in the curriculum's order."""
        assert self.curriculum is not None
        sampler = self._curriculum_sampler(self.curriculum, self._examples["train"])
        return self._train_loader(self._examples["train"], sampler, self._collate())

    def _collate(self) -> Collate:
        return Collate(self.tokenizer.pad_token_id, packed=False, count=count_pairs, columns=self.columns)

    def _tokenised(self, rows: Rows) -> Tokenised:
        columns: dict[int, tuple[float, ...]] = {}

        def encode(number: int, row: Row) -> tuple[Tokens, ...] | str:
            row = row if self.transform is None else self.transform(row)
            pair = as_pair(rows, number, row)
            if pair is None:
                return "without a preference"
            prompt, chosen, rejected = pair
            if chosen == rejected:
                raise rows.bad(number, "rejected", "is the same as chosen, so there is nothing to prefer")
            columns[number] = tuple(number_of(rows, number, row, name) for name in self.columns)
            template = template_arguments(rows, number, row)
            ends = "prefix" not in rows.columns  # a step is not the end of an answer
            return tuple(
                self.encoder.pair(prompt, side, ends=ends, **template) for side in (chosen, rejected)
            )

        made = tokenise(
            rows, encode, encoder=self.encoder, max_length=self.max_length, overlong=self.overlong
        )
        pairs = zip(made.examples, made.numbers, strict=True)
        return replace(made, examples=[replace(pair, columns=columns[number]) for pair, number in pairs])


def count_pairs(examples: list[Example]) -> dict[str, int]:
    """Count what the losses on pairs divide by: the pairs, and the targets of the chosen completions.

    Args:
        examples: Pairs, each an example with its chosen and its rejected sequence.

    Example:
        >>> tokens = torch.tensor([5, 6, 7])
        >>> chosen, rejected = Tokens(tokens, tokens > 5), Tokens(tokens, tokens > 6)
        >>> count_pairs([Example(0, (chosen, rejected))])
        {'pairs': 1, 'chosen_tokens': 2}
    """
    chosen = sum(int(example.sequences[0].learn[1:].sum()) for example in examples)
    return {"pairs": len(examples), "chosen_tokens": chosen}
