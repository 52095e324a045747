"""Pairs of a chosen and a rejected completion."""

from typing import Literal

from rewarm.curriculum.pacing import Pacing
from rewarm.datamodules.base import Column, LanguageData, Overlong, check_overlong
from rewarm.datamodules.loader import Collate, Example, WindowLoader
from rewarm.datamodules.score_table import check_used, join_scores
from rewarm.text.encoding import Tokens
from rewarm.text.formats import Row, Rows, as_pair, number_of, template_arguments


class PreferenceData(LanguageData):
    """Preference pairs in a curriculum's order. Each pair is two rows of a batch: chosen, then rejected.

    Args:
        train: Training file, list of files, saved data set or Hub id with `prompt`, `chosen` and `rejected`
            (text or messages); with `chosen` and `rejected` that share their beginning; with `responses` and
            `rewards`, of which the best and the worst count; with a `prefix` of steps that both continue.
        tokenizer: Hugging Face folder or id of a tokenizer; messages need its chat template.
        max_length: Most positions per row, >= 1.
        batch_size: Pairs per batch and rank, >= 1.
        val: Validation data, in the same formats.
        score: Numeric column that the order sorts by, such as a margin.
        scores: Table of further columns that `rewarm score` made for the training data.
        order: `shuffled`, `ascending` or `descending` by score.
        pacing: Visible share of the order as a function of the optimizer step.
        overlong: What becomes of pairs with a row longer than `max_length`: `error`, `drop`, `keep_start`
            (the end is cut) or `keep_end` (the start is cut, but for a BOS token).
        num_workers: Processes that collate, >= 0.
        seed: Of the order.

    Attributes:
        curriculum: Order, pacing, gate and live scores of the training pairs; there after `setup`.
    """

    def __init__(
        self,
        train: str | list[str],
        tokenizer: str,
        max_length: int = 1024,
        batch_size: int = 8,
        val: str | list[str] | None = None,
        score: str | None = None,
        scores: str | None = None,
        order: Literal["shuffled", "ascending", "descending"] = "shuffled",
        pacing: Pacing | None = None,
        overlong: Overlong = "error",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, max_length, num_workers, seed)
        self.train, self.val, self.scores = train, val, check_used(scores, score, order)
        self.score, self.order, self.pacing, self.overlong = score, order, pacing, check_overlong(overlong)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise."""
        self._set_up_splits(
            self._read, self.train, self.val, score=self.score, order=self.order, pacing=self.pacing
        )

    def train_dataloader(self) -> WindowLoader:
        """Batches in the curriculum's order."""
        assert self.curriculum is not None
        sampler = self._curriculum_sampler(self.curriculum, self._examples["train"])
        return self._train_loader(self._examples["train"], sampler, self._collate())

    def _collate(self) -> Collate:
        return Collate(self.tokenizer.pad_token_id, packed=False, count=count_pairs)

    def _read(self, path: str | list[str], wanted: set[str]) -> tuple[list[Example], Column]:
        rows = Rows(path)
        if self.scores is not None and path is self.train:
            join_scores(rows, self.scores, wanted)
        scores: dict[int, dict[str, float]] = {}

        def encode(number: int, row: Row) -> tuple[Tokens, ...] | str:
            pair = as_pair(rows, number, row)
            if pair is None:
                return "without a preference"
            prompt, chosen, rejected = pair
            if chosen == rejected:
                raise rows.bad(number, "rejected", "is the same as chosen, so there is nothing to prefer")
            scores[number] = {name: number_of(rows, number, row, name) for name in wanted}
            template = template_arguments(rows, number, row)
            ends = "prefix" not in rows.columns  # a step is not the end of an answer
            return tuple(
                self.encoder.pair(prompt, side, ends=ends, **template) for side in (chosen, rejected)
            )

        examples, numbers = self._tokenise(rows, encode, self.overlong)
        return examples, lambda name, _: [scores[number][name] for number in numbers]


def count_pairs(examples: list[Example]) -> dict[str, int]:
    """Return what the preference losses divide by: the pairs, and the tokens of the chosen completions."""
    chosen = sum(int(example.sequences[0].learn[1:].sum()) for example in examples)
    return {"pairs": len(examples), "chosen_tokens": chosen}
