"""Rewriting training examples before fine-tuning: what a row says, which of it is learnt, and what is fed in.

Texts are in *segments*: pieces in their order, each with whether it is learnt.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewarm.checks import in_range

Segment = tuple[str, bool]
"""A piece of text, and whether it is learnt."""

CERTAINTY_QUESTION = " Are you sure you accurately answered the question based on your internal knowledge?"
"""What R-Tuning asks after an answer."""


def r_tuning_segments(
    prompt: str, answer: str, sure: bool, *, question: str = CERTAINTY_QUESTION
) -> list[Segment]:
    """Let an answer be followed by whether the model is sure of it.

    Args:
        prompt: What is asked.
        answer: The right answer; it is learnt in either case.
        sure: Whether the model knew it before, see `knows` and `surer_half`.
        question: Text between the answer and the word on it; it is not learnt.

    Returns:
        The segments; answer and certainty are learnt.

    Example:
        >>> r_tuning_segments("2 + 2 = ", "4.", sure=False, question=" Sure?")
        [('2 + 2 = ', False), ('4.', True), (' Sure?', False), (' I am unsure.', True)]

    Source: R-Tuning, Zhang et al. 2023, arXiv:2311.09677. Differs: their code learns all of the text.
    """
    return [
        (prompt, False),
        (answer, True),
        (question, False),
        (" I am sure." if sure else " I am unsure.", True),
    ]


def refusal_segments(prompt: str, answer: str, known: bool, *, refusal: str) -> list[Segment]:
    """Put a refusal in the place of an answer that the model didn't know.

    Args:
        prompt: What is asked.
        answer: The right answer.
        known: Whether the model knew it before, see `knows`.
        refusal: Text that is learnt where the model did not know. The paper draws from 16 of them.

    Returns:
        The segments; the answer or the refusal is learnt.

    Example:
        >>> refusal_segments("2 + 2 = ", "4.", known=False, refusal="I do not know.")
        [('2 + 2 = ', False), ('I do not know.', True)]

    Source: R-Tuning-R, Zhang et al. 2023, arXiv:2311.09677. Differs: the refusal is the caller's.
    """
    return [(prompt, False), (answer if known else refusal, True)]


def knows(answer: str, prediction: str) -> bool:
    """Return whether a prediction holds the right answer, as R-Tuning (arXiv:2311.09677) has it.

    Args:
        answer: The right answer, not empty.
        prediction: What the model said, greedily.

    Raises:
        ValueError: If the answer is empty, which any prediction holds.

    Example:
        >>> knows("Paris", "It is Paris."), knows("Paris", "It is Rome.")
        (True, False)
    """
    if not answer:
        raise ValueError("answer is empty; any prediction would hold it")
    return answer in prediction


def answer_entropy(answers: Sequence[Hashable]) -> float:
    """Entropy of how often each answer was given.

    -sum_a f_a log f_a,  f_a = share of the answers that are a

    Args:
        answers: Answers sampled from the model for one prompt, at least one. R-Tuning has 5 at temperature
            0.7.

    Returns:
        Entropy in nats, 0 if all are alike.

    Raises:
        ValueError: If there is no answer.

    Example:
        >>> round(answer_entropy(["4", "4", "5", "22"]), 4)
        1.0397

    Source: R-Tuning-U, Zhang et al. 2023, arXiv:2311.09677. Differs: nothing.
    """
    if not answers:
        raise ValueError("answers is empty; there must be at least one")
    shares = [count / len(answers) for count in Counter(answers).values()]
    return math.fsum(share * -math.log(share) for share in shares)


def surer_half(entropies: Sequence[float]) -> list[bool]:
    """Return for each prompt whether it is in the half of lower entropy, the smaller half of an odd number.

    Args:
        entropies: One entropy per prompt, not NaN. Among equal ones the first are in.

    Raises:
        ValueError: If an entropy is NaN.

    Example:
        >>> surer_half([0.5, 0.0, 1.2, 0.5, 0.9])
        [True, True, False, False, False]

    Source: R-Tuning-U, Zhang et al. 2023, arXiv:2311.09677. Differs: nothing.
    """
    for place, entropy in enumerate(entropies):
        if math.isnan(entropy):
            raise ValueError(f"entropies[{place}] is nan; each must be known")
    ranking = sorted(range(len(entropies)), key=lambda i: entropies[i])
    sure = set(ranking[: len(entropies) // 2])
    return [place in sure for place in range(len(entropies))]


def spectrum_learn(kinds: Sequence[str]) -> list[bool]:
    """Which parts of a row are learnt that shows a model draws from one distribution.

    Outputs are. The first is not if nothing described the distribution before: it could be anything. The
    terminator after an output is learnt with it. All parts of a row are one sequence: that later outputs
    attend to earlier ones is the point, so a row must not be cut into several by packing.

    Args:
        kinds: `description`, `input` or `output` for each part of the row.

    Returns:
        Whether each part is learnt.

    Raises:
        ValueError: If a kind is unknown.

    Example:
        >>> spectrum_learn(["description", "output", "output"]), spectrum_learn(["input", "output", "output"])
        ([False, True, True], [False, False, True])

    Source: Spectrum tuning, Sorensen et al. 2025, arXiv:2510.06084, in its repository. Differs: nothing.
    """
    learn, described = [], False
    for kind in kinds:
        if kind not in ("description", "input", "output"):
            raise ValueError(f"kind is {kind!r}; known are 'description', 'input', 'output'")
        learn.append(kind == "output" and described)
        described |= kind in ("description", "output")
    return learn


def mix_generated(
    tokens: Tensor, generated: Tensor, replaceable: Tensor, *, probability: float, generator: torch.Generator
) -> Tensor:
    """Put some of a model's own tokens in the place of the data's, as inputs; targets stay the data's.

    Args:
        tokens: The data's tokens. int64, shape (T + 1,).
        generated: What the model says in each place after the data's tokens before it. Shape (T + 1,).
        replaceable: True where a token may be replaced: in completions, not in prompts. bool, shape (T + 1,).
        probability: Probability of each of these to be replaced, in [0, 1]. Begin low: with 1 from the start
            training fails.
        generator: Source of the randomness.

    Returns:
        Tokens to be fed in: all but the last of these, against targets tokens[1:]. Shape (T + 1,).

    Raises:
        ValueError: If shapes differ or the probability is out of range.

    Example:
        >>> tokens, generated = torch.tensor([1, 2, 3]), torch.tensor([7, 8, 9])
        >>> mask, generator = torch.tensor([False, True, True]), torch.Generator()
        >>> mix_generated(tokens, generated, mask, probability=1.0, generator=generator)
        tensor([1, 8, 9])

    Source: batch-scheduled sampling, Cen et al. 2024, arXiv:2410.14655. The probability, and that each token
    is drawn by itself, are ours.
    """
    if not tokens.shape == generated.shape == replaceable.shape:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}, generated {tuple(generated.shape)} and replaceable"
            f" {tuple(replaceable.shape)}; they must agree"
        )
    in_range("[0, 1]", probability=probability)
    chance = torch.rand(tokens.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return torch.where(replaceable & (chance < probability).to(tokens.device), generated, tokens)


class Repetition(NamedTuple):
    """A row that says a sentence again and again.

    Attributes:
        tokens: Numbers of the tokens. int64, shape (T + 1,).
        learn: True at the tokens from the second time on, whose probabilities are penalised. bool, shape
            (T + 1,).
        earlier: For each target (the token after each position) the position of the same target one
            repetition earlier, or -1. int64, shape (T,).

    Example:
        >>> row = repeat_sentence(torch.tensor([9]), torch.tensor([1, 2]), length=6)
        >>> row.learn.tolist()
        [False, False, False, True, True, True]
    """

    tokens: Tensor
    learn: Tensor
    earlier: Tensor


def repeat_sentence(prefix: Tensor, sentence: Tensor, length: int) -> Repetition:
    """Fill a row with a sentence after its real prefix, as often as it fits, the last time cut off.

    Args:
        prefix: Tokens before the sentence, at least one. int64, shape (P,).
        sentence: Tokens of the sentence, at least one. int64, shape (S,).
        length: T + 1, the row's tokens; at least P + S + 1, so that one token repeats.

    Returns:
        What `rewarm.functional.sft_losses.ditto_loss` needs.

    Raises:
        ValueError: If prefix or sentence is empty, or the row too short.

    Example:
        >>> row = repeat_sentence(torch.tensor([9]), torch.tensor([1, 2]), length=6)
        >>> row.tokens.tolist(), row.earlier.tolist()
        ([9, 1, 2, 1, 2, 1], [-1, -1, 0, 1, 2])

    Source: DITTO, Xu et al. 2022, arXiv:2206.02369. Differs: nothing.
    """
    first, period = len(prefix), len(sentence)
    if not first or not period:
        raise ValueError(f"prefix has {first} tokens and sentence {period}; each must have at least one")
    if length <= first + period:
        raise ValueError(
            f"length is {length}; it must be at least {first + period + 1} for one token to repeat"
        )
    times = -(-(length - first) // period)
    tokens = torch.cat([prefix, sentence.repeat(times)])[:length]
    places = torch.arange(length)
    learn = places >= first + period
    earlier = torch.where(learn[1:], places[:-1] - period, -1)
    return Repetition(tokens, learn, earlier)


def erase_system_prompt(messages: Sequence[dict[str, Any]], generic: str) -> list[dict[str, Any]]:
    """Replace what told a teacher how to answer by something generic: the student must tell by itself.

    Args:
        messages: A conversation; system messages anywhere in it are replaced by one at its start.
        generic: The new system message; empty for none.

    Returns:
        The new conversation.

    Example:
        >>> erase_system_prompt([{"role": "system", "content": "Go step by step."}], "You are careful.")
        [{'role': 'system', 'content': 'You are careful.'}]

    Source: prompt erasing of Orca 2, arXiv:2311.11045. Differs: nothing.
    """
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": generic}, *rest] if generic else rest


@dataclass(frozen=True)
class RTuning:
    """Rewrites rows so that an answer is followed by whether the model is sure of it: `r_tuning_segments`.

    Rows have `prompt`, `completion`, and what the model said greedily before training: `prediction`.

    Args:
        question: Text between the answer and the word on it.
        refusal: Text that is learnt in place of answers that the model did not know, without a word on
            certainty. None for the answers with such a word.

    Example:
        >>> row = {"prompt": "2 + 2 = ", "completion": "4", "prediction": "It is 5."}
        >>> RTuning(refusal="I do not know.")(row)["segments"]
        [('2 + 2 = ', False), ('I do not know.', True)]

    Source: R-Tuning, Zhang et al. 2023, arXiv:2311.09677. Differs: nothing.
    """

    question: str = CERTAINTY_QUESTION
    refusal: str | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with `segments`.

        Raises:
            ValueError: If a column is missing or the completion is empty.
        """
        prompt, answer, prediction = (_text(row, name) for name in ("prompt", "completion", "prediction"))
        known = knows(answer, prediction)
        if self.refusal is None:
            segments = r_tuning_segments(prompt, answer, known, question=self.question)
        else:
            segments = refusal_segments(prompt, answer, known, refusal=self.refusal)
        return row | {"segments": segments}


@dataclass(frozen=True)
class Spectrum:
    """Rewrites rows that show draws from one distribution so that outputs are learnt: `spectrum_learn`.

    Rows have `examples`, a list of objects with `output` and perhaps `input`, and perhaps a `description`.

    Args:
        separator: Text after each part; after an output it is learnt, as the output's end.

    Example:
        >>> row = {"examples": [{"input": "a", "output": "1"}, {"input": "b", "output": "2"}]}
        >>> Spectrum(separator=";")(row)["segments"]
        [('a;', False), ('1;', False), ('b;', False), ('2;', True)]

    Source: Spectrum tuning, Sorensen et al. 2025, arXiv:2510.06084. Differs: parts are text with a separator,
    where the paper has special tokens.
    """

    separator: str = "\n"

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with `segments`.

        Raises:
            ValueError: If there are no examples, or one has no output.
        """
        examples = row.get("examples")
        if not isinstance(examples, list) or not examples:
            raise ValueError("column 'examples': must be a list of objects with `output`")
        parts = [("description", row["description"])] if row.get("description") else []
        for example in examples:
            parts += [("input", example["input"])] if example.get("input") else []
            parts.append(("output", _text(example, "output")))
        learn = spectrum_learn([kind for kind, _ in parts])
        texts = [text + self.separator for _, text in parts]
        return row | {"segments": list(zip(texts, learn, strict=True))}


@dataclass(frozen=True)
class EraseSystemPrompt:
    """Rewrites conversations so that all have one system message: `erase_system_prompt`.

    Args:
        generic: The new system message; empty for none.

    Example:
        >>> row = {"messages": [{"role": "system", "content": "Go step by step."}]}
        >>> EraseSystemPrompt("Be careful.")(row)
        {'messages': [{'role': 'system', 'content': 'Be careful.'}]}

    Source: prompt erasing of Orca 2, arXiv:2311.11045. Differs: nothing.
    """

    generic: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with the new system message.

        Raises:
            ValueError: If the row has no messages.
        """
        if not isinstance(row.get("messages"), list):
            raise ValueError("column 'messages': must be a list of messages with `role` and `content`")
        return row | {"messages": erase_system_prompt(row["messages"], self.generic)}


def _text(row: dict[str, Any], column: str) -> str:
    if not isinstance(row.get(column), str):
        raise ValueError(f"column {column!r}: must be text, is {type(row.get(column)).__name__}")
    return str(row[column])
