"""Prompts with verifiable answers, for reinforcement learning."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from rewarm.checks import above, at_least, replaced
from rewarm.curriculum.gates import Gate
from rewarm.curriculum.ordering import Order
from rewarm.curriculum.pacing import Pacing
from rewarm.curriculum.pacing_windows import GaussianWindow
from rewarm.datamodules.arrangement import Arrangement, Measures
from rewarm.datamodules.base import LanguageData
from rewarm.datamodules.loader import Batch, WindowLoader
from rewarm.datamodules.rollout_loader import RolloutLoader
from rewarm.rollouts.engine import Completion, TransformersEngine
from rewarm.rollouts.rewards import Reward
from rewarm.rollouts.sampling import Group, Prompts, read_prompts, sample_groups
from rewarm.rollouts.sharded import call_unsharded
from rewarm.text.formats import Rows

_MEASURES: Measures[list[int]] = {"prompt_tokens": lambda tokens: float(len(tokens))}


class PromptData(LanguageData):
    """Samples completions of prompts from the model in training, scores them, and yields them as batches.

    Args:
        train: Training prompts: a file, list of files, saved data set or Hub id with `prompt`, `messages` or
            `question`; other columns go to the reward functions by name.
        tokenizer: Hugging Face folder or id of a tokenizer; messages need its chat template.
        reward: One or several reward functions `(prompts, completions, **columns) -> list of numbers`;
            several are added up.
        reward_weights: Factor of each reward function, in their order; None weighs each by 1.
        max_new_tokens: Largest number of tokens per completion, >= 1.
        prompts_per_rollout: Q, the number of groups per rollout over all ranks, >= 1.
        completions_per_prompt: G, the number of completions per prompt, >= 2.
        val: Validation prompts, in the same formats.
        val_samples: Number of completions per validation prompt, >= 1.
        temperature: Temperature of the sampling, > 0; training divides the logits by it too.
        top_p: Probability mass that is sampled from, in (0, 1]. Below 1 the sampler's distribution is not the
            policy's.
        top_k: Number of most probable tokens that are sampled from, 0 for all. Above 0 the sampler's
            distribution is not the policy's.
        max_tokens_in_flight: Largest number of positions of the cache (completions times the longest length)
            that are sampled at once, >= 1; None samples all at once.
        score: Name of what the order sorts by: a numeric column, or `prompt_tokens`.
        score_table: Table of further columns that `rewarm score` made for the training prompts.
        order: `shuffled`, `ascending` or `descending` by score. Or an order by columns, such as
            `rewarm.Interleaved`, `rewarm.Blocked`, `rewarm.Folded` or `rewarm.Staged`.
        window: Number of prompts of the order that are shuffled among themselves in each pass, >= 1.
        pacing: Share of the order that is visible at each optimizer step, such as `rewarm.RootPacing`.
        draw: Window from which each rollout's prompts are drawn, in place of passes over the order, such as
            `rewarm.GaussianWindow`. The window moves by the mean reward of a rollout (in [0, 1]) and the mean
            score of its prompts.
        keep: Gate on the scores that chooses the prompts to train on at all, such as `rewarm.TopShare`.
        group: Column with the group of each prompt, for gates that look at groups.
        group_gate: Gate on the mean rewards of a round's groups, such as `rewarm.Band`; groups that it
            refuses are replaced. `rewarm.DifficultyFilter` puts a gate on the prompts' live scores.
        transform: Function that rewrites each row before it is read; columns that it adds go to the reward
            functions too.
        minibatches: Number of optimizer steps in which a rollout is used once, >= 1.
        passes: Number of times that a rollout is used, >= 1.
        max_rounds: Largest number of times to ask for prompts while a gate refuses groups, >= 1.
        batch_size: Number of validation prompts per batch and rank, >= 1.
        seed: Seed of the order and of the sampling.

    Attributes:
        curriculum: Order, pacing, gate and live pass rates of the prompts; it is there after `setup`.

    Raises:
        ValueError: If an argument is out of its range, or `reward_weights` lacks a number for a reward.

    Example:
        >>> def is_four(prompts, completions, **columns):
        ...     return [float(completion.strip() == "4") for completion in completions]
        >>> data = PromptData("prompts.jsonl", "models/sft", reward=is_four, prompts_per_rollout=8)
        >>> data.prompts_per_rollout * data.completions_per_prompt  # completions of a rollout
        64
        >>> PromptData("prompts.jsonl", "models/sft", reward=is_four, reward_weights=[0.5, 0.5])
        Traceback (most recent call last):
            ...
        ValueError: reward_weights is [0.5, 0.5]; it must have 1 numbers, one for each reward
    """

    @replaced(scores="score_table= (the table; score= names the column in it)")
    def __init__(
        self,
        train: str | list[str],
        tokenizer: str,
        *,
        reward: Reward | list[Reward],
        reward_weights: list[float] | None = None,
        max_new_tokens: int = 256,
        prompts_per_rollout: int = 32,
        completions_per_prompt: int = 8,
        val: str | list[str] | None = None,
        val_samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_tokens_in_flight: int | None = None,
        score: str | None = None,
        score_table: str | None = None,
        order: Literal["shuffled", "ascending", "descending"] | Order = "shuffled",
        window: int = 1,
        pacing: Pacing | None = None,
        draw: GaussianWindow | None = None,
        keep: Gate | None = None,
        group: str | None = None,
        group_gate: Gate | None = None,
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        minibatches: int = 1,
        passes: int = 1,
        max_rounds: int = 8,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        at_least(2, completions_per_prompt=completions_per_prompt)
        at_least(1, max_new_tokens=max_new_tokens, prompts_per_rollout=prompts_per_rollout)
        at_least(1, val_samples=val_samples, minibatches=minibatches, passes=passes, max_rounds=max_rounds)
        above(0, temperature=temperature)
        if max_tokens_in_flight is not None:
            at_least(1, max_tokens_in_flight=max_tokens_in_flight)
        num_rewards = len(reward) if isinstance(reward, list) else 1
        if reward_weights is not None and len(reward_weights) != num_rewards:
            raise ValueError(
                f"reward_weights is {reward_weights}; it must have {num_rewards} numbers, one for each reward"
            )
        super().__init__(tokenizer, batch_size, max_length=max_new_tokens, seed=seed)
        self.arrangement = Arrangement(score, score_table, order, window, pacing, keep, group, draw)
        self.train, self.val, self.val_samples, self.transform = train, val, val_samples, transform
        self.reward, self.reward_weights, self.group_gate = reward, reward_weights, group_gate
        self.prompts_per_rollout, self.completions_per_prompt = prompts_per_rollout, completions_per_prompt
        self.minibatches, self.passes, self.max_rounds = minibatches, passes, max_rounds
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.max_tokens_in_flight = max_tokens_in_flight
        self._prompts: dict[str, Prompts] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the prompts."""
        if self._prompts:
            return
        rows = self.arrangement.rows(self.train, _MEASURES)
        read = read_prompts(self.train, self.encoder, transform=self.transform)
        arranged = self.arrangement.arrange(rows, read.tokens, range(len(read)), _MEASURES, self.seed)
        self._kept, self.curriculum = arranged.kept, arranged.curriculum
        prompts = self._prompts["train"] = read.take(arranged.kept)
        content = itertools.chain(_prompt_bytes(prompts), arranged.content)
        self._fingerprints.add("train", self.train, len(prompts), content)
        if self.val is not None:
            self._prompts["val"] = read_prompts(self.val, self.encoder, transform=self.transform)

    def train_dataloader(self) -> WindowLoader:
        """Return a loader of rollouts of the current weights."""
        assert self.curriculum is not None
        prompts, module = self._prompts["train"], getattr(self.trainer, "lightning_module", None)
        loader = RolloutLoader(
            prompts,
            self.curriculum,
            lambda numbers, seeds: self._sample("train", numbers, self.completions_per_prompt, seeds),
            prompts_per_rollout=self.prompts_per_rollout,
            completions_per_prompt=self.completions_per_prompt,
            batches_per_step=self._position.accumulate(),
            temperature=self.temperature,
            pad_token_id=self.tokenizer.pad_token_id,
            minibatches=self.minibatches,
            passes=self.passes,
            group_gate=self.group_gate,
            max_rounds=self.max_rounds,
            # A module of another make may need completions without an advantage.
            skip_equal=not getattr(module, "learns_from_equal_rewards", True),
            place=self.place,
            seed=self.seed,
        )
        self._check_context(self.train, prompts, self._kept)
        return self._position.windows(loader)

    def val_dataloader(self) -> "ValidationRollouts | list[Any]":
        """Return a loader of the rewards of validation completions, which it samples when it is asked."""
        if self.val is None:
            return []
        prompts = self._prompts["val"]
        self._check_context(self.val, prompts, range(len(prompts)))
        return ValidationRollouts(self)

    def _rows_per_step(self) -> int:
        return self.prompts_per_rollout * self.completions_per_prompt // self.minibatches

    def _sample(
        self, split: str, numbers: Sequence[int], num_samples: int, seeds: Sequence[int]
    ) -> list[Group]:
        assert self.trainer is not None
        policy: Any = self.trainer.lightning_module.policy
        with self.trainer.precision_plugin.forward_context():
            # Also on a rank without prompts: gathering shards takes all of them.
            return call_unsharded(
                self.trainer,
                policy.model,
                lambda: sample_groups(
                    self._prompts[split],
                    numbers,
                    num_samples,
                    seeds,
                    generate=self._generate,
                    reward=self.reward,
                    tokenizer=self.tokenizer,
                    reward_weights=self.reward_weights,
                ),
            )

    def _generate(
        self, prompts: Sequence[Sequence[int]], num_samples: int, seed: int | Sequence[int]
    ) -> list[list[Completion]]:
        assert self.trainer is not None
        engine = TransformersEngine(
            self.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens_in_flight=self.max_tokens_in_flight,
        )
        policy: Any = self.trainer.lightning_module.policy
        return engine.generate(policy.model, prompts, num_samples, seed)

    def _check_context(self, path: str | list[str], prompts: Prompts, rows: Sequence[int]) -> None:
        policy = getattr(getattr(self.trainer, "lightning_module", None), "policy", None)
        context = getattr(policy and policy.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(range(len(prompts)), key=lambda number: len(prompts.tokens[number]))
        needed = len(prompts.tokens[longest]) + self.max_new_tokens
        if context is not None and needed > context:
            raise ValueError(
                f"{Rows(path).where(rows[longest])}: the prompt and {self.max_new_tokens} new tokens take"
                f" {needed} positions, the model has {context}: lower max_new_tokens or drop the prompt"
            )


def _prompt_bytes(prompts: Prompts) -> Iterator[bytes]:
    """Yield what sampling and rewards see of the prompts."""
    for number, text in enumerate(prompts.texts):
        columns = {name: values[number] for name, values in prompts.columns.items()}
        row = [text, prompts.tokens[number], columns]
        yield json.dumps(row, sort_keys=True, default=_text_of).encode()


def _text_of(value: Any) -> str:
    # The text of an object without one of its own has its address, which every run has another of.
    return type(value).__name__ if type(value).__str__ is object.__str__ else str(value)


class ValidationRollouts:
    """Yields the rewards of completions sampled for the validation prompts.

    Args:
        data: The data module whose validation prompts, engine and reward are used.

    Example:
        >>> data = PromptData("prompts.jsonl", "models/sft", reward=lambda **columns: [], batch_size=2)
        >>> data._prompts["val"] = Prompts(["1+1=", "1+2=", "1+3="], [[5], [5], [5]], {})
        >>> len(ValidationRollouts(data))
        2
    """

    def __init__(self, data: PromptData) -> None:
        self._data = data

    def __len__(self) -> int:
        """Return the number of batches, the same on every rank."""
        data = self._data
        return -(-len(data._prompts["val"]) // (data.batch_size * data.world_size))

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rewards. A prompt has the same seed every time, so that changes are the model's."""
        data = self._data
        everyone = range(len(data._prompts["val"]))
        size = data.batch_size * data.world_size
        for start in everyone[::size]:
            mine = everyone[start : start + size][data.rank :: data.world_size]
            groups = data._sample("val", mine, data.val_samples, [data.seed + number for number in mine])
            yield {"rewards": torch.tensor([reward for group in groups for reward in group.rewards])}
