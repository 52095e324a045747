"""Prompts, and the scored groups of completions sampled from them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rewarm.rollouts.engine import Completion, TransformersEngine
from rewarm.rollouts.rewards import Reward, score
from rewarm.text.encoding import Encoder, load_tokenizer
from rewarm.text.formats import PROMPT_COLUMNS, Row, Rows, as_prompt, template_arguments

Generate = Callable[[Sequence[Sequence[int]], int, int | Sequence[int]], list[list[Completion]]]
"""Prompts as tokens, samples per prompt, seed (or one per prompt) -> the completions of each prompt."""


@dataclass(frozen=True)
class Prompts:
    """Prompts with what their rewards need.

    Attributes:
        texts: Texts as reward functions are given them; messages are shown as what was said last.
        tokens: Tokens as the engine is given them, the start of the answer included.
        columns: Every other column of the data, by name.

    Example:
        >>> prompts = Prompts(["1+1=", "2+2="], [[5, 6], [7, 6]], {"answer": ["2", "4"]})
        >>> prompts.take([1]).columns
        {'answer': ['4']}
    """

    texts: list[str]
    tokens: list[list[int]]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.texts)

    def take(self, numbers: Sequence[int]) -> "Prompts":
        """Return some of the prompts, in this order."""
        return Prompts(
            [self.texts[number] for number in numbers],
            [self.tokens[number] for number in numbers],
            {name: [values[number] for number in numbers] for name, values in self.columns.items()},
        )


@dataclass
class Group:
    """The completions of one prompt.

    Attributes:
        prompt: Number of the prompt.
        completions: Completions as they were sampled.
        texts: Completions decoded, without special tokens.
        rewards: One reward per completion.

    Example:
        >>> Group(0, [], ["2", "3"], [1.0, 0.0]).mean
        0.5
    """

    prompt: int
    completions: list[Completion]
    texts: list[str]
    rewards: list[float]

    @property
    def mean(self) -> float:
        """The mean reward, which is the pass rate where rewards are 0 or 1."""
        return fmean(self.rewards)


def read_prompts(
    path: str | list[str],
    encoder: Encoder,
    limit: int | None = None,
    transform: Callable[[Row], Row] | None = None,
) -> Prompts:
    """Read and tokenise prompts.

    Args:
        path: File, list of files, saved data set or Hub id with `prompt`, `messages` or `question`.
        encoder: Tokenises them.
        limit: Take the first so many rows; None takes all.
        transform: Rewrites each row before it is read; columns that it adds go to the reward functions too.

    Raises:
        ValueError: Names file, line and column of a bad row.
    """
    rows = Rows(path)
    prompts, columns = Prompts([], [], {}), dict.fromkeys(rows.columns)
    read: list[Row] = []
    for number, row in enumerate(itertools.islice(rows, limit)):
        try:
            row = row if transform is None else transform(row)
            prompt = as_prompt(rows, number, row)
            tokens = encoder.prompt(prompt, **template_arguments(rows, number, row))
        except ValueError as error:
            if str(error).startswith(rows.where(number)) or str(rows.path) in str(error):
                raise
            raise ValueError(f"{rows.where(number)}: {error}") from error
        if not tokens:
            raise ValueError(f"{rows.where(number)}: the prompt is empty")
        prompts.texts.append(prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")))
        prompts.tokens.append(tokens)
        columns |= dict.fromkeys(row)
        read.append(row)
    for name in columns:
        if name not in PROMPT_COLUMNS:
            prompts.columns[name] = [row.get(name) for row in read]
    return prompts


def sample_groups(
    prompts: Prompts,
    numbers: Sequence[int],
    num_samples: int,
    seed: int | Sequence[int],
    *,
    generate: Generate,
    reward: Reward | Sequence[Reward],
    tokenizer: PreTrainedTokenizerBase,
    reward_weights: Sequence[float] | None = None,
) -> list[Group]:
    """Sample completions of some prompts and score them.

    Args:
        prompts: All prompts.
        numbers: Which of them; empty gives no groups.
        num_samples: Completions per prompt, >= 1.
        seed: Seed of the sampling; one for all or one per number.
        generate: Samples, see `rewarm.rollouts.engine.TransformersEngine.generate`.
        reward: One or several reward functions; several are added up.
        tokenizer: Decodes.
        reward_weights: Factor of each reward function; None weighs each by 1.

    Returns:
        One group per number, in order.

    Raises:
        RewardError: If a reward raises or is no finite number; shows the sample.
    """
    if not numbers:
        return []
    sampled = generate([prompts.tokens[number] for number in numbers], num_samples, seed)
    texts = tokenizer.batch_decode([c.tokens for group in sampled for c in group], skip_special_tokens=True)
    repeated = [number for number in numbers for _ in range(num_samples)]
    columns = {name: [values[number] for number in repeated] for name, values in prompts.columns.items()}
    rewards = score(reward, [prompts.texts[number] for number in repeated], texts, columns, reward_weights)
    return [
        Group(
            number,
            completions,
            texts[place * num_samples : (place + 1) * num_samples],
            rewards[place * num_samples : (place + 1) * num_samples],
        )
        for place, (number, completions) in enumerate(zip(numbers, sampled, strict=True))
    ]


def sample_from(
    model: PreTrainedModel,
    encoder: Encoder,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    max_tokens_in_flight: int | None = None,
) -> Generate:
    """Return a function that samples from a model.

    Args:
        model: Any transformers decoder.
        encoder: Knows the EOS and padding tokens.
        max_new_tokens: Most tokens per completion, >= 1.
        temperature: >= 0; 0 is greedy.
        top_p: Probability mass sampled from, in (0, 1].
        max_tokens_in_flight: Most positions of the cache that are held at once; None for no limit.
    """
    engine = TransformersEngine(
        max_new_tokens,
        eos_token_id=encoder.tokenizer.eos_token_id,
        pad_token_id=encoder.tokenizer.pad_token_id,
        temperature=temperature,
        top_p=top_p,
        max_tokens_in_flight=max_tokens_in_flight,
    )
    return lambda prompts, num_samples, seed: engine.generate(model, prompts, num_samples, seed)


def encoder_for(tokenizer: str | None, datamodule: Any) -> Encoder:
    """Return the encoder of a tokenizer folder or id, or else the data module's.

    Raises:
        ValueError: If there is neither.
    """
    if tokenizer is not None:
        return Encoder(load_tokenizer(tokenizer))
    if (loaded := getattr(datamodule, "tokenizer", None)) is None:
        raise ValueError("no tokenizer: the data module has none, so give `tokenizer`")
    return Encoder(loaded)
