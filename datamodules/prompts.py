"""Prompts with verifiable answers, for reinforcement learning."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.pacing import Pacing
from rewarm.datamodules.base import LanguageData
from rewarm.datamodules.loader import Batch, WindowLoader
from rewarm.datamodules.rollout_loader import RolloutLoader
from rewarm.datamodules.score_table import check_used, join_scores
from rewarm.rollouts.engine import Completion, TransformersEngine
from rewarm.rollouts.rewards import Reward
from rewarm.rollouts.sampling import Group, Prompts, read_prompts, sample_groups
from rewarm.rollouts.sharded import call_unsharded
from rewarm.text.formats import PROMPT_COLUMNS, Rows, number_of


class PromptData(LanguageData):
    """Samples completions of prompts from the model in training, scores them, and yields them as batches.

    Args:
        train: Prompts: a file, list of files, saved data set or Hub id with `prompt`, `messages` or
            `question`; other columns go to the reward functions by name.
        tokenizer: Hugging Face folder or id of a tokenizer; messages need its chat template.
        reward: One or several reward functions `(prompts, completions, **columns) -> list of numbers`;
            several are added up.
        max_new_tokens: Most tokens per completion, >= 1.
        prompts_per_rollout: Q, groups per rollout over all ranks, >= 1.
        completions_per_prompt: G, completions per prompt, >= 2.
        val: Validation prompts.
        val_samples: Completions per validation prompt, >= 1.
        temperature: Of the sampling, > 0; training divides the logits by it too.
        top_p: Probability mass sampled from, in (0, 1]. Below 1 the sampler's distribution is not the
            policy's.
        top_k: Number of most probable tokens sampled from, 0 for all. The same holds.
        score: Numeric column that the order sorts by.
        scores: Table of further columns that `rewarm score` made for the training prompts.
        order: `shuffled`, `ascending` or `descending` by score.
        pacing: Visible share of the order as a function of the optimizer step.
        minibatches: Optimizer steps in which a rollout is used once, >= 1.
        passes: How often a rollout is used, >= 1.
        max_rounds: How often to refill a rollout while a gate refuses groups, >= 1.
        batch_size: Validation prompts per batch and rank, >= 1.
        seed: Of the order and of the sampling.

    Attributes:
        curriculum: Order, pacing, gate and live pass rates of the prompts; there after `setup`.
    """

    def __init__(
        self,
        train: str | list[str],
        tokenizer: str,
        reward: Reward | list[Reward],
        max_new_tokens: int = 256,
        prompts_per_rollout: int = 32,
        completions_per_prompt: int = 8,
        val: str | list[str] | None = None,
        val_samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        score: str | None = None,
        scores: str | None = None,
        order: Literal["shuffled", "ascending", "descending"] = "shuffled",
        pacing: Pacing | None = None,
        minibatches: int = 1,
        passes: int = 1,
        max_rounds: int = 8,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if completions_per_prompt < 2:
            raise ValueError(f"completions_per_prompt is {completions_per_prompt}; a group needs at least 2")
        for name, value in {
            "max_new_tokens": max_new_tokens,
            "prompts_per_rollout": prompts_per_rollout,
            "val_samples": val_samples,
            "minibatches": minibatches,
            "passes": passes,
            "max_rounds": max_rounds,
        }.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not temperature > 0.0:
            raise ValueError(f"temperature is {temperature}; it must be above 0, or all samples are the same")
        super().__init__(tokenizer, batch_size, max_length=max_new_tokens, seed=seed)
        self.train, self.val, self.reward, self.val_samples = train, val, reward, val_samples
        self.score, self.order, self.pacing = score, order, pacing
        self.scores = check_used(scores, score, order)
        self.prompts_per_rollout, self.completions_per_prompt = prompts_per_rollout, completions_per_prompt
        self.minibatches, self.passes, self.max_rounds = minibatches, passes, max_rounds
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self._prompts: dict[str, Prompts] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the prompts."""
        if self._prompts:
            return
        for split, path in (("train", self.train), ("val", self.val)):
            if path is not None:
                self._prompts[split] = read_prompts(path, self.encoder)
        prompts = self._prompts["train"]
        scores = None
        if self.score is not None or self.scores is not None:
            rows, wanted = Rows(self.train), [] if self.score is None else [self.score]
            if self.scores is not None:
                join_scores(rows, self.scores, wanted)
            known = [name for name in rows.columns if name not in PROMPT_COLUMNS]
            for name in wanted:
                if name not in known:
                    raise ValueError(f"{self.train}: no column {name!r} among {', '.join(known)}")
                scores = [number_of(rows, number, row, name) for number, row in enumerate(rows)]
        self.curriculum = Curriculum(
            len(prompts), scores=scores, order=self.order, pacing=self.pacing, seed=self.seed
        )
        self._remember("train", self.train, len(prompts), _prompt_bytes(prompts))

    def train_dataloader(self) -> WindowLoader:
        """Rollouts of the current weights."""
        assert self.curriculum is not None
        prompts, module = self._prompts["train"], getattr(self.trainer, "lightning_module", None)
        loader = RolloutLoader(
            prompts,
            self.curriculum,
            lambda numbers, seeds: self._sample("train", numbers, self.completions_per_prompt, seeds),
            prompts_per_rollout=self.prompts_per_rollout,
            completions_per_prompt=self.completions_per_prompt,
            batches_per_step=self._accumulate(),
            temperature=self.temperature,
            pad_token_id=self.tokenizer.pad_token_id,
            minibatches=self.minibatches,
            passes=self.passes,
            max_rounds=self.max_rounds,
            # A module of another make may need completions without an advantage.
            skip_equal=not getattr(module, "learns_from_equal_rewards", True),
            place=self.place,
            seed=self.seed,
        )
        self._check_context(self.train, prompts)
        return self._with_windows(loader)

    def val_dataloader(self) -> "ValidationRollouts | list[Any]":
        """Scored completions of the validation prompts, sampled when asked for."""
        if self.val is None:
            return []
        self._check_context(self.val, self._prompts["val"])
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
        )
        policy: Any = self.trainer.lightning_module.policy
        return engine.generate(policy.model, prompts, num_samples, seed)

    def _check_context(self, path: str | list[str], prompts: Prompts) -> None:
        policy = getattr(getattr(self.trainer, "lightning_module", None), "policy", None)
        context = getattr(policy and policy.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(range(len(prompts)), key=lambda number: len(prompts.tokens[number]))
        needed = len(prompts.tokens[longest]) + self.max_new_tokens
        if context is not None and needed > context:
            raise ValueError(
                f"{Rows(path).where(longest)}: the prompt and {self.max_new_tokens} new tokens take {needed}"
                f" positions, the model has {context}: lower max_new_tokens or drop the prompt"
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
        data: Whose validation prompts, engine and reward to use.
    """

    def __init__(self, data: PromptData) -> None:
        self._data = data

    def __len__(self) -> int:
        """Return the number of batches, the same on every rank."""
        data = self._data
        return -(-len(data._prompts["val"]) // (data.batch_size * data.world_size))

    def __iter__(self) -> Iterator[Batch]:
        """Sample, with the same seed for a prompt every time: changes are the model's."""
        data = self._data
        everyone = range(len(data._prompts["val"]))
        size = data.batch_size * data.world_size
        for start in everyone[::size]:
            mine = everyone[start : start + size][data.rank :: data.world_size]
            groups = data._sample("val", mine, data.val_samples, [data.seed + number for number in mine])
            yield {"rewards": torch.tensor([reward for group in groups for reward in group.rewards])}
