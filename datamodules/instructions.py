"""Prompts with completions, and conversations."""

import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from rewarm.curriculum.gates import Gate
from rewarm.curriculum.ordering import Order
from rewarm.curriculum.pacing import Pacing
from rewarm.curriculum.packing import Packer
from rewarm.datamodules.base import Column, LanguageData, Overlong, check_overlong
from rewarm.datamodules.loader import Collate, Example, WindowLoader
from rewarm.datamodules.score_table import check_used, join_scores
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

_MEASURES = ("completion_tokens", "prompt_tokens", "completion_lines")


class InstructionData(LanguageData):
    """Instruction data in a curriculum's order; only completions (or the assistant's turns) are learnt.

    Args:
        train: Training file, list of files, saved data set or Hub id; formats in
            `rewarm.text.formats.as_conversation`, or `segments` of text, each with whether it is learnt.
        tokenizer: Hugging Face folder or id of a tokenizer; messages need its chat template.
        max_length: Most positions per row, >= 1.
        batch_size: Rows per batch and rank, >= 1.
        val: Validation data, in the same formats.
        score: What the order sorts by: a numeric column, or `completion_tokens`, `prompt_tokens` or
            `completion_lines`.
        scores: Table of further columns that `rewarm score` made for the training data.
        order: `shuffled`, `ascending` or `descending` by score. Or an order by columns, such as
            `rewarm.Interleaved`, `rewarm.Blocked`, `rewarm.Folded` or `rewarm.Staged`.
        window: In each pass, shuffle each stretch of so many examples of the order, >= 1.
        pacing: What is visible of the order as a function of the optimizer step, such as `rewarm.RootPacing`.
        keep: A gate on the scores that chooses the examples to train on at all, such as `rewarm.TopShare`.
        group: Column with the group of each example, for gates that look at them.
        packing: Put several examples in a row of `max_length`, kept apart by block-diagonal attention. Or
            `padding_free`: all examples of a batch in one row, as long as they are.
        open_bins: How many rows packing keeps open: an example moves by fewer rows than that from its place.
        length_window: Without packing, global batches over which rows of similar length are put together,
            >= 1; these batches come in random order.
        turns: Of a conversation, learn `all` turns of the assistant, or its `last`. A message may have a
            `weight`, and so may a row: 0 for not learnt, else a factor of its loss.
        transform: Rewrites each row before it is read, such as `rewarm.RTuning`.
        task: Column with the task of each example, which `rewarm.MultiTask` weighs.
        mix_probability: Of each learnt token to be fed in as the model's own, which the column `generated`
            has as token ids for each learnt token; targets stay the data's.
        overlong: What becomes of rows longer than `max_length`: `error`, `drop`, `keep_start`
            (the end is cut) or `keep_end` (the start is cut, but for a BOS token).
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
        scores: str | None = None,
        order: Literal["shuffled", "ascending", "descending"] | Order = "shuffled",
        window: int = 1,
        pacing: Pacing | None = None,
        keep: Gate | None = None,
        group: str | None = None,
        packing: bool | Literal["padding_free"] = False,
        open_bins: int = 16,
        length_window: int = 1,
        turns: Literal["all", "last"] = "all",
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        task: str | None = None,
        mix_probability: float = 0.0,
        overlong: Overlong = "error",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, max_length, num_workers, seed)
        self.train, self.val = train, val
        self.score, self.order, self.window, self.pacing = score, order, window, pacing
        self.scores, self.keep, self.group = check_used(scores, score, order), keep, group
        if packing not in (False, True, "padding_free"):
            raise ValueError(f"packing is {packing!r}; known are False, True, 'padding_free'")
        self.packing, self.open_bins, self.length_window = packing, open_bins, length_window
        if turns not in ("all", "last"):
            raise ValueError(f"turns is {turns!r}; known are 'all', 'last'")
        if not 0.0 <= mix_probability <= 1.0:
            raise ValueError(f"mix_probability is {mix_probability}; it must be in [0, 1]")
        self.turns, self.overlong = turns, check_overlong(overlong)
        self.transform, self.task, self.mix_probability = transform, task, mix_probability
        self._tasks: list[str] = []

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise."""
        self._set_up_splits(
            self._read,
            self.train,
            self.val,
            score=self.score,
            order=self.order,
            window=self.window,
            pacing=self.pacing,
            keep=self.keep,
            group=self.group,
        )

    def train_dataloader(self) -> WindowLoader:
        """Batches in the curriculum's order."""
        assert self.curriculum is not None
        examples = self._examples["train"]
        packer = Packer(self.max_length, self.open_bins) if self.packing is True else None
        sampler = self._curriculum_sampler(
            self.curriculum, examples, packer=packer, length_window=self.length_window, seed=self.seed
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

    def _read(self, path: str | list[str], wanted: set[str]) -> tuple[list[Example], Column]:
        rows = Rows(path)
        if self.scores is not None and path is self.train:
            join_scores(rows, self.scores, wanted)
        for name in sorted(wanted - {*rows.columns, *_MEASURES}):
            what = "score" if name == self.score else "group" if name == self.group else "a column of order"
            raise ValueError(
                f"{path}: {what} is {name!r}; known are {', '.join(_MEASURES)}"
                f" and the columns {', '.join(rows.columns)}"
            )
        values: dict[int, Row] = {}
        tasks: dict[int, str] = {}

        def encode(number: int, row: Row) -> tuple[Tokens, ...] | str:
            values[number] = {name: row[name] for name in wanted if name in row}
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

        examples, numbers = self._tokenise(rows, encode, self.overlong)
        if self.task is not None:
            examples = self._with_tasks(examples, [tasks[number] for number in numbers])

        def column(name: str, holds_numbers: bool) -> list[Any]:
            kept = zip(examples, numbers, strict=True)
            if not holds_numbers:
                return [label_of(rows, number, values[number], name) for _, number in kept]
            return [self._score(rows, number, values[number], example, name) for example, number in kept]

        return examples, column

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

    def _score(self, rows: Rows, number: int, row: Row, example: Example, score: str) -> float:
        tokens, learn, _ = example.sequences[0]
        if score == "completion_tokens":
            return float(learn.sum())
        if score == "prompt_tokens":
            return float((~learn).sum())
        if score == "completion_lines":
            return float(
                str(self.tokenizer.decode(tokens[learn], skip_special_tokens=True)).strip().count("\n") + 1
            )
        return number_of(rows, number, row, score)


def _times(sequence: Tokens, weight: float) -> Tokens:
    """Multiply what each token of a sequence weighs."""
    if weight == 1.0:
        return sequence
    weights = sequence.extra.get("weights", torch.ones(sequence.positions))
    return sequence._replace(extra={**sequence.extra, "weights": weight * weights})
