"""Prompts with completions, and conversations."""

from typing import Literal

from rewarm.datamodules.base import LanguageData, Overlong, check_overlong
from rewarm.datamodules.loader import Collate, Example, WindowLoader
from rewarm.functional.curriculum import Pacing
from rewarm.functional.packing import Packer
from rewarm.rollouts.encoding import Sequence
from rewarm.rollouts.formats import Row, Rows, as_conversation, number_of, template_arguments

_MEASURES = ("completion_tokens", "prompt_tokens", "completion_lines")


class InstructionData(LanguageData):
    """Instruction data in a curriculum's order; only completions (or the assistant's turns) are learnt.

    Args:
        train: Training file, list of files, saved data set or Hub id; formats in
            `rewarm.rollouts.formats.as_conversation`.
        tokenizer: Hugging Face folder or id of a tokenizer; messages need its chat template.
        max_length: Most positions per row, >= 1.
        batch_size: Rows per batch and rank, >= 1.
        val: Validation data, in the same formats.
        score: What the order sorts by: a numeric column, or `completion_tokens`, `prompt_tokens` or
            `completion_lines`.
        order: `shuffled`, `ascending` or `descending` by score.
        pacing: Visible share of the order as a function of the optimizer step, such as `rewarm.RootPacing`.
        packing: Put several examples in a row of `max_length`, kept apart by block-diagonal attention.
        open_bins: How many rows packing keeps open: an example moves by at most so many rows from its place.
        overlong: What becomes of rows longer than `max_length`: `error`, `drop` or `truncate` (the end is
            cut).
        num_workers: Processes that collate, >= 0.
        seed: Of the order.

    Attributes:
        curriculum: Order, pacing, gate and live scores of the training examples; there after `setup`.
    """

    def __init__(
        self,
        train: str | list[str],
        tokenizer: str,
        max_length: int = 1024,
        batch_size: int = 8,
        val: str | list[str] | None = None,
        score: str | None = None,
        order: Literal["shuffled", "ascending", "descending"] = "shuffled",
        pacing: Pacing | None = None,
        packing: bool = False,
        open_bins: int = 16,
        overlong: Overlong = "error",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, max_length, num_workers, seed)
        self.train, self.val = train, val
        self.score, self.order, self.pacing = score, order, pacing
        self.packing, self.open_bins, self.overlong = packing, open_bins, check_overlong(overlong)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise."""
        self._set_up_splits(self._read, self.train, self.val, self.score, self.order, self.pacing)

    def train_dataloader(self) -> WindowLoader:
        """Batches in the curriculum's order."""
        assert self.curriculum is not None
        packer = Packer(self.max_length, self.open_bins) if self.packing else None
        sampler = self._curriculum_sampler(self.curriculum, self._examples["train"], packer=packer)
        return self._train_loader(self._examples["train"], sampler, self._collate(self.packing))

    def _collate(self, packed: bool = False) -> Collate:
        return Collate(self.tokenizer.pad_token_id, packed=packed, pad_to=self.max_length if packed else None)

    def _read(self, path: str | list[str], score: str | None) -> tuple[list[Example], list[float] | None]:
        rows = Rows(path)
        if score is not None and score not in (*rows.columns, *_MEASURES):
            raise ValueError(
                f"{path}: score is {score!r}; known are {', '.join(_MEASURES)}"
                f" and the columns {', '.join(rows.columns)}"
            )
        columns: dict[int, Row] = {}

        def encode(number: int, row: Row) -> tuple[Sequence, ...] | str:
            columns[number] = row
            if "completion" in rows.columns and row.get("label") is False:
                return "labelled as not wanted"
            template = template_arguments(rows, number, row)
            conversation = as_conversation(rows, number, row)
            if isinstance(conversation, list):
                return (self.encoder.conversation(conversation, **template),)
            prompt, completion = conversation
            if prompt == "":
                return (self.encoder.document(str(completion)),)
            return (self.encoder.pair(prompt, completion, **template),)

        examples, numbers = self._tokenise(rows, encode, self.overlong)
        if score is None:
            return examples, None
        kept = zip(examples, numbers, strict=True)
        return examples, [
            self._score(rows, number, columns[number], example, score) for example, number in kept
        ]

    def _score(self, rows: Rows, number: int, row: Row, example: Example, score: str) -> float:
        tokens, learn = example.sequences[0]
        if score == "completion_tokens":
            return float(learn.sum())
        if score == "prompt_tokens":
            return float((~learn).sum())
        if score == "completion_lines":
            return float(
                str(self.tokenizer.decode(tokens[learn], skip_special_tokens=True)).strip().count("\n") + 1
            )
        return number_of(rows, number, row, score)
