"""The loader of reinforcement learning: it samples its batches from the current weights."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch

from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.gates import Gate, admitted
from rewarm.datamodules.loader import Batch, collate_rows
from rewarm.rollouts.engine import Completion
from rewarm.rollouts.ranks import ALONE, Place, gather_in_turn
from rewarm.rollouts.sampling import Group, Prompts
from rewarm.text.encoding import Tokens

SampleGroups = Callable[[Sequence[int], Sequence[int]], list[Group]]
"""Numbers of prompts and a seed for each -> their groups."""


class RolloutLoader:
    """Samples groups for a curriculum's prompts, admits them until a rollout is full, yields it in batches.

    The loader has a length: Lightning reads one batch ahead from loaders without one, and would sample from
    weights one update old. All ranks propose the same prompts, each samples its share, and all see all groups
    before any is admitted.

    Args:
        prompts: Prompts to sample from.
        curriculum: Curriculum that proposes prompts, observes the mean reward of each prompt's group, and
            admits the prompt by its live score.
        sample: Function that samples and scores groups with the current weights.
        prompts_per_rollout: Q, the number of groups per rollout over all ranks, >= 1.
        completions_per_prompt: G, the number of completions per group, >= 2.
        batches_per_step: Number of micro-batches per optimizer step, >= 1.
        temperature: Temperature at which `sample` samples; training divides the logits by it too.
        pad_token_id: Id of the token that fills rows up.
        minibatches: Number of optimizer steps in which a rollout is used once, >= 1.
        passes: Number of times that a rollout is used, >= 1.
        group_gate: Gate that admits groups by their mean rewards, whatever the live scores of their prompts
            are; None admits all. The candidates that it compares are the groups of one round.
        max_rounds: Largest number of times to ask for prompts while a gate refuses groups, >= 1. After these
            the rollout is filled with the refused groups whose rewards vary the most, and
            `rollout/filler_frac` tells their share.
        skip_equal: Whether to leave completions out of the batches if all rewards of their group are equal,
            since their advantage is 0. The `counts` still include them, except `trained_tokens`. A batch may
            be empty.
        place: This process's place among those that sample.
        seed: Seed of the sampling and of how a rollout is cut into minibatches.

    Raises:
        ValueError: If the completions of a rollout don't divide into minibatches, micro-batches and ranks.

    Example:
        >>> def sample(numbers, seeds):  # in place of a model and its rewards
        ...     completions = [Completion([7, 8], [-0.1, -0.2], finished=True)] * 2
        ...     return [Group(number, completions, ["no", "yes"], [0.0, 1.0]) for number in numbers]
        >>> prompts = Prompts(["1+1=", "1+2="], [[5], [6]], {})
        >>> sizes = {"prompts_per_rollout": 1, "completions_per_prompt": 2, "batches_per_step": 1}
        >>> loader = RolloutLoader(prompts, Curriculum(2), sample, temperature=1.0, pad_token_id=0, **sizes)
        >>> len(loader), next(iter(loader))["group_rewards"].tolist()
        (2, [[0.0, 1.0], [0.0, 1.0]])
    """

    def __init__(
        self,
        prompts: Prompts,
        curriculum: Curriculum,
        sample: SampleGroups,
        *,
        prompts_per_rollout: int,
        completions_per_prompt: int,
        batches_per_step: int,
        temperature: float,
        pad_token_id: int,
        minibatches: int = 1,
        passes: int = 1,
        group_gate: Gate | None = None,
        max_rounds: int = 8,
        skip_equal: bool = False,
        place: Place = ALONE,
        seed: int = 0,
    ) -> None:
        sequences, parts = (
            prompts_per_rollout * completions_per_prompt,
            minibatches * batches_per_step * place.size,
        )
        if sequences % parts:
            raise ValueError(
                f"a rollout has {prompts_per_rollout} x {completions_per_prompt} completions, to divide into"
                f" {minibatches} minibatches x {batches_per_step} batches per step x {place.size} ranks"
            )
        self.prompts, self.curriculum, self.sample = prompts, curriculum, sample
        self.prompts_per_rollout, self.completions_per_prompt = prompts_per_rollout, completions_per_prompt
        self.batches_per_step, self.minibatches, self.passes = batches_per_step, minibatches, passes
        self.temperature, self.pad_token_id, self.max_rounds = temperature, pad_token_id, max_rounds
        self.skip_equal, self.group_gate = skip_equal, group_gate
        self.place, self.seed = place, seed
        self._groups: list[Group] = []
        self._metrics: dict[str, float] = {}
        self._rollouts = 0
        self._used = 0  # batches taken from the rollout
        self._epoch_batches = 0
        self.recut: int | None = None
        """How many batches of the epoch are done, if the restored state was of other batches."""

    @property
    def batches_per_rollout(self) -> int:
        """The number of batches that a rollout yields on each rank."""
        return self.minibatches * self.passes * self.batches_per_step

    def __len__(self) -> int:
        """Return the number of batches in one pass over the prompts, if every group is admitted."""
        return math.ceil(len(self.prompts) / self.prompts_per_rollout) * self.batches_per_rollout

    def __iter__(self) -> Iterator[Batch]:
        """Yield an epoch, or what a restored state left of it."""
        if self._epoch_batches >= len(self):
            self._epoch_batches = 0
        while self._epoch_batches < len(self):
            if not self._groups or self._used == self.batches_per_rollout:
                self._groups, self._metrics = self._roll_out()
                self._rollouts += 1
                self._used = 0
            batch = self._batch(self._used)
            self._used += 1
            self._epoch_batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position and, inside a rollout, the rollout: the weights it came from are gone.

        Positions are in optimizer steps, which other numbers of ranks cut into other batches.
        """
        unfinished = self._used < self.batches_per_rollout
        return {
            "curriculum": self.curriculum.state_dict(),
            "groups": [asdict(group) for group in self._groups] if unfinished else [],
            "metrics": dict(self._metrics),
            "rollouts": self._rollouts,
            "used_steps": self._used // self.batches_per_step,
            "epoch_steps": self._epoch_batches // self.batches_per_step,
            "batches_per_step": self.batches_per_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.curriculum.load_state_dict(state["curriculum"])
        self._groups = [
            Group(**{**group, "completions": [Completion(**c) for c in group["completions"]]})
            for group in state["groups"]
        ]
        self._metrics, self._rollouts = dict(state["metrics"]), state["rollouts"]
        self._used = state["used_steps"] * self.batches_per_step
        self._epoch_batches = state["epoch_steps"] * self.batches_per_step
        self.recut = None if state["batches_per_step"] == self.batches_per_step else self._epoch_batches

    def _roll_out(self) -> tuple[list[Group], dict[str, float]]:
        chosen: list[Group] = []
        refused: list[Group] = []
        rounds = 0
        while len(chosen) < self.prompts_per_rollout and rounds < self.max_rounds:
            wanted = self.prompts_per_rollout - len(chosen)
            numbers = self.curriculum.propose(wanted, step=self._rollouts * self.minibatches * self.passes)
            groups = self._sample_on_all_ranks(numbers, rounds)
            for group, is_in in zip(groups, self._admit(groups), strict=True):
                (chosen if is_in else refused).append(group)
            rounds += 1
        sampled = chosen + refused
        filler = self.prompts_per_rollout - len(chosen)
        refused.sort(key=lambda group: -_variance(group.rewards))
        metrics = {
            "reward": fmean(group.mean for group in sampled),
            "zero_std_frac": fmean(_equal(group.rewards) for group in sampled),
            "admitted_frac": len(chosen) / len(sampled),
            "filler_frac": filler / self.prompts_per_rollout,
            "rounds": float(rounds),
            "cut_frac": fmean(not c.finished for group in sampled for c in group.completions),
        }
        return chosen + refused[:filler], metrics

    def _admit(self, groups: list[Group]) -> list[bool]:
        fits = []
        for group in groups:
            # One by one: a prompt that comes twice is judged by what was observed up to each group.
            self.curriculum.observe([group.prompt], [group.mean])
            fits += self.curriculum.admit([group.prompt])
        if self.group_gate is not None:
            labels = self.curriculum.groups_of([group.prompt for group in groups])
            by_group = admitted(self.group_gate, [group.mean for group in groups], labels)
            fits = [one and other for one, other in zip(fits, by_group, strict=True)]
        return fits

    def _sample_on_all_ranks(self, numbers: list[int], rounds: int) -> list[Group]:
        # By place, not by rank: another number of ranks samples the same.
        seeds = [
            random.Random(f"{self.seed}/{self._rollouts}/{rounds}/{number}").getrandbits(62)
            for number in range(len(numbers))
        ]
        share = slice(self.place.rank, None, self.place.size)
        return gather_in_turn(self.sample(numbers[share], seeds[share]), self.place)

    def _batch(self, used: int) -> Batch:
        """Cut the rollout into optimizer steps by chance, and each step into micro-batches."""
        groups, samples = self._groups, self.completions_per_prompt
        sequences = [(number, place) for number in range(len(groups)) for place in range(samples)]
        step, part = divmod(used, self.batches_per_step)
        turn, minibatch = divmod(step, self.minibatches)
        random.Random(f"{self.seed}/{self._rollouts}/{turn}").shuffle(sequences)
        size = len(sequences) // self.minibatches
        chosen = sequences[minibatch * size : (minibatch + 1) * size]
        skipped = [pair for pair in chosen if self.skip_equal and _equal(groups[pair[0]].rewards)]
        # Together, so that a micro-batch computes their prompt once, and beside groups of similar length.
        chosen = sorted(set(chosen).difference(skipped), key=lambda pair: (self._length(pair[0]), *pair))
        share, shares = part * self.place.size + self.place.rank, self.batches_per_step * self.place.size
        first, last = (len(chosen) * bound // shares for bound in (share, share + 1))
        batch = self._collate(chosen[first:last])
        counts = batch["counts"]
        counts["trained_tokens"] = counts["tokens"]
        for number, place in skipped[share::shares]:
            counts["tokens"] += len(groups[number].completions[place].tokens)
            counts["sequences"] += 1
        return batch

    def _length(self, number: int) -> int:
        group = self._groups[number]
        return len(self.prompts.tokens[group.prompt]) + max(len(c.tokens) for c in group.completions)

    def _collate(self, chosen: list[tuple[int, int]]) -> Batch:
        """Make a batch of completions, given by the number of their group and their place in it."""
        groups = [self._groups[number] for number, _ in chosen]
        places = [place for _, place in chosen]
        rows = []
        for group, place in zip(groups, places, strict=True):
            prompt, completion = self.prompts.tokens[group.prompt], group.completions[place].tokens
            learn = [False] * len(prompt) + [True] * len(completion)
            rows.append([Tokens(torch.tensor(prompt + completion), torch.tensor(learn))])
        batch = collate_rows(rows, self.pad_token_id, restart=False)
        sampler = torch.zeros(batch["targets"].shape)
        for row, (group, place) in enumerate(zip(groups, places, strict=True)):
            start, logprobs = len(self.prompts.tokens[group.prompt]) - 1, group.completions[place].logprobs
            sampler[row, start : start + len(logprobs)] = torch.tensor(logprobs)
        # An empty batch has padding, which looks up an advantage, too.
        rewards = [group.rewards for group in groups] or [[0.0] * self.completions_per_prompt]
        return batch | {
            "ids": [group.prompt for group in groups],
            "sampler_logprobs": sampler,
            "group_rewards": torch.tensor(rewards, dtype=torch.float32),
            "group_places": torch.tensor(places or [0]),
            "temperature": self.temperature,
            "rollout_metrics": self._metrics,
        }


def _equal(rewards: list[float]) -> bool:
    return len(set(rewards)) == 1


def _variance(rewards: list[float]) -> float:
    mean = fmean(rewards)
    return fmean((reward - mean) ** 2 for reward in rewards)
