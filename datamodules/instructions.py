"""Prompts with completions, and conversations."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch

from rewarm.checks import in_range, one_of, replaced
from rewarm.curriculum.gates import Gate
from rewarm.curriculum.ordering import Order
from rewarm.curriculum.pacing import Pacing
from rewarm.curriculum.packing import Packer
from rewarm.datamodules.arrangement import Arrangement, Measures
from rewarm.datamodules.base import LanguageData
from rewarm.datamodules.loader import Collate, Example, WindowLoader
from rewarm.datamodules.tokenising import Overlong, Tokenised, tokenise
from rewarm.objectives.token_losses import TASK_COUNT
from rewarm.text.encoding import Tokens, weight_of
from rewarm.text.formats import (
    Messages,
    Row,
    Rows,
    as_conversation,
    label_of,
    number_of,
    numbers_of,
    segments_of,
    template_arguments,
)
from rewarm.text.sft_transforms import mix_generated, repeat_sentence

log = logging.getLogger(__name__)


class InstructionData(LanguageData):
    """Instruction data in a curriculum's order; only completions (or the assistant's turns) are learnt.

    Args:
        train: Training file, list of files, saved data set or Hub id. Its rows have one of the formats of
            `rewarm.text.formats.as_conversation`, or `segments` of text, each with whether it is learnt.
        tokenizer: Hugging Face folder or id of a tokenizer; messages need its chat template.
        max_length: Largest number of positions per row, >= 1.
        batch_size: Number of rows per batch and rank, >= 1.
        val: Validation data, in the same formats.
        score: Name of what the order sorts by: a numeric column, or `completion_tokens`, `prompt_tokens` or
            `completion_lines`.
        score_table: Table of further columns that `rewarm score` made for the training data.
        order: `shuffled`, `ascending` or `descending` by score. Or an order by columns, such as
            `rewarm.Interleaved`, `rewarm.Blocked`, `rewarm.Folded` or `rewarm.Staged`.
        window: Number of examples of the order that are shuffled among themselves in each pass, >= 1.
        pacing: Share of the order that is visible at each optimizer step, such as `rewarm.RootPacing`.
        keep: Gate on the scores that chooses the examples to train on at all, such as `rewarm.TopShare`.
        group: Column with the group of each example, for gates that look at groups.
        packing: Whether to put several examples in a row of `max_length`, kept apart by block-diagonal
            attention; `padding_free` puts all examples of a batch in one row, as long as they are together.
        open_bins: Number of rows that packing keeps open, >= 1. An example moves by fewer rows than that from
            its place.
        length_bucket: Number of global batches over which rows of similar length are put together, >= 1.
            These batches come in random order. Above 1 only without packing.
        turns: Turns of the assistant that are learnt of a conversation, `all` or the `last`. A message may
            have a `weight`, and so may a row: 0 for not learnt, else a factor of its loss.
        transform: Function that rewrites each row before it is read, such as `rewarm.RTuning`.
        task: Column with the task of each example, which `rewarm.MultiTask` weighs.
        mix_probability: Probability, in [0, 1], with which the model reads its own token in place of a learnt
            one. The column `generated` has the model's token for each learnt token; targets stay the data's.
        overlong: Fate of rows longer than `max_length`: `error`, `drop`, `keep_start`
            (the end is cut) or `keep_end` (the start is cut, but for a BOS token).
        num_workers: Number of processes that collate, >= 0.
        seed: Seed of the order.

    Attributes:
        curriculum: Order, pacing, gate and live scores of the training examples; it is there after `setup`.

    Raises:
        ValueError: If an argument is out of its range, or arguments contradict each other.

    Example:
        >>> data = InstructionData("sums.jsonl", "models/base", score="completion_tokens", order="ascending")
        >>> data.arrangement.numbers
        {'completion_tokens'}
        >>> InstructionData("sums.jsonl", "models/base", turns="first")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: turns is 'first'; ...
    """

    @replaced(
        scores="score_table= (the table; score= names the column in it)", length_window="length_bucket="
    )
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
        packing: bool | Literal["padding_free"] = False,
        open_bins: int = 16,
        length_bucket: int = 1,
        turns: Literal["all", "last"] = "all",
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        task: str | None = None,
        mix_probability: float = 0.0,
        overlong: Overlong = "error",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, max_length, num_workers, seed)
        one_of((False, True, "padding_free"), packing=packing)
        one_of(("all", "last"), turns=turns)
        one_of(get_args(Overlong), overlong=overlong)
        in_range("[0, 1]", mix_probability=mix_probability)
        self.arrangement = Arrangement(score, score_table, order, window, pacing, keep, group)
        self.train, self.val, self.turns, self.overlong = train, val, turns, overlong
        self.packing, self.open_bins, self.length_bucket = packing, open_bins, length_bucket
        self.transform, self.task, self.mix_probability = transform, task, mix_probability
        self._tasks: list[str] = []

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the data."""
        measures: Measures[Example] = {
            "completion_tokens": lambda example: float(example.sequences[0].learn.sum()),
            "prompt_tokens": lambda example: float((~example.sequences[0].learn).sum()),
            "completion_lines": self._completion_lines,
        }
        self._set_up_examples(self.train, self.val, self.arrangement, self._tokenised, measures)

    def train_dataloader(self) -> WindowLoader:
        """Return a loader of batches in the curriculum's order."""
        assert self.curriculum is not None
        examples = self._examples["train"]
        packer = Packer(self.max_length, self.open_bins) if self.packing is True else None
        sampler = self._curriculum_sampler(
            self.curriculum, examples, packer=packer, length_bucket=self.length_bucket, seed=self.seed
        )
        if packer is not None:
            fill = sum(e.positions for e in examples) / (sampler.rows_per_epoch * self.max_length)
            log.info(
                "%s: %d examples fill %d rows by %.3f",
                self.train,
                len(examples),
                sampler.rows_per_epoch,
                fill,
            )
        return self._train_loader(examples, sampler, self._collate(self.packing))

    def _collate(self, packing: bool | str = False) -> Collate:
        return Collate(
            self.tokenizer.pad_token_id,
            packed=packing is True,
            pad_to=self.max_length if packing is True else None,
            joined=packing == "padding_free",
            count=self._count_tasks if self.task is not None else None,
        )

    def _tokenised(self, rows: Rows) -> Tokenised:
        tasks: dict[int, str] = {}

        def encode(number: int, row: Row) -> tuple[Tokens, ...] | str:
            if "completion" in rows.columns and row.get("label") is False:
                return "labelled as not wanted"
            row = row if self.transform is None else self.transform(row)
            sequence = self._stored(rows, number, row, self._encode(rows, number, row))
            if self.task is not None:
                tasks[number] = str(label_of(rows, number, row, self.task))
            if "weight" not in row:
                return (sequence,)
            weight = weight_of(number_of(rows, number, row, "weight"))
            return (_times(sequence, weight),) if weight else "of weight 0"

        found = tokenise(
            rows, encode, encoder=self.encoder, max_length=self.max_length, overlong=self.overlong
        )
        if self.task is None:
            return found
        return replace(
            found, examples=self._with_tasks(found.examples, [tasks[number] for number in found.numbers])
        )

    def _encode(self, rows: Rows, number: int, row: Row) -> Tokens:
        if "segments" in row:
            return self.encoder.segments(segments_of(rows, number, row))
        template = template_arguments(rows, number, row)
        conversation = as_conversation(rows, number, row)
        if isinstance(conversation, list):
            return self.encoder.conversation(conversation, turns=self.turns, **template)
        prompt, completion = conversation
        if row.get("repeat"):
            return self._repeated(prompt, completion)
        if prompt == "":
            return self.encoder.document(str(completion))
        return self.encoder.pair(prompt, completion, **template)

    def _repeated(self, prompt: str | Messages, completion: str | Messages) -> Tokens:
        if not isinstance(completion, str) or not completion:
            raise ValueError("a completion that is to be repeated must be text, and not empty")
        sentence = self.encoder.tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        prefix = torch.tensor(self.encoder.prompt(prompt))
        tokens, repeats, earlier = repeat_sentence(prefix, torch.tensor(sentence), self.max_length + 1)
        distances = torch.where(earlier >= 0, torch.arange(len(earlier)) - earlier, 0)
        # The first time tells what the second is measured against, and costs nothing itself.
        learn = torch.arange(len(tokens)) >= len(prefix)
        return Tokens(tokens, learn, {"repeats": distances, "weights": repeats[1:].float()})

    def _stored(self, rows: Rows, number: int, row: Row, sequence: Tokens) -> Tokens:
        """Add what a row holds for each learnt token: a teacher's likeliest tokens, the model's own token."""
        places, extra = sequence.learn[1:].nonzero().squeeze(1), dict(sequence.extra)
        if "teacher_ids" in rows.columns:
            ids, logprobs = (
                numbers_of(rows, number, row, name, len(places))
                for name in ("teacher_ids", "teacher_logprobs")
            )
            if ids.shape != logprobs.shape or ids.ndim != 2:
                raise rows.bad(number, "teacher_ids", "must have as many numbers each as teacher_logprobs")
            extra["teacher_ids"] = ids.new_zeros(sequence.positions, ids.shape[1]).long()
            extra["teacher_ids"][places] = ids.long()
            extra["teacher_logprobs"] = torch.full((sequence.positions, ids.shape[1]), -math.inf)
            extra["teacher_logprobs"][places] = logprobs.float()
        if self.mix_probability:
            generated = sequence.tokens.clone()
            generated[places + 1] = numbers_of(rows, number, row, "generated", len(places)).long()
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            fed = mix_generated(
                sequence.tokens,
                generated,
                sequence.learn,
                probability=self.mix_probability,
                generator=generator,
            )
            extra["inputs"] = fed[:-1]
        return sequence._replace(extra=extra)

    def _with_tasks(self, examples: list[Example], tasks: list[str]) -> list[Example]:
        self._tasks = self._tasks or sorted(set(tasks))
        for task in sorted(set(tasks) - set(self._tasks)):
            raise ValueError(f"the validation data have the task {task!r}; known are {self._tasks}")
        made = []
        for example, task in zip(examples, tasks, strict=True):
            (sequence,) = example.sequences
            number = torch.full((sequence.positions,), self._tasks.index(task))
            marked = sequence._replace(extra={**sequence.extra, "tasks": number})
            made.append(Example(example.id, (marked,)))
        return made

    def _count_tasks(self, examples: list[Example]) -> dict[str, int]:
        """Count the targets of each task, which its mean divides by."""
        counts = dict.fromkeys((TASK_COUNT + task for task in self._tasks), 0)
        for example in examples:
            (sequence,) = example.sequences
            task = self._tasks[int(sequence.extra["tasks"][0])]
            counts[TASK_COUNT + task] += int(sequence.learn[1:].sum())
        return counts

    def _completion_lines(self, example: Example) -> float:
        tokens, learn, _ = example.sequences[0]
        text = str(self.tokenizer.decode(tokens[learn], skip_special_tokens=True))
        return float(text.strip().count("\n") + 1)


def _times(sequence: Tokens, weight: float) -> Tokens:
    """Multiply what each token of a sequence weighs."""
    if weight == 1.0:
        return sequence
    weights = sequence.extra.get("weights", torch.ones(sequence.positions))
    return sequence._replace(extra={**sequence.extra, "weights": weight * weights})
