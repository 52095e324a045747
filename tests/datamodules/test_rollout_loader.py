"""Rollouts from a sampler that only pretends: what is asked for, admitted, cut into batches and saved."""

import copy
import itertools
import json
import math
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.gates import Band, TopShare
from rewarm.curriculum.live_scores import Ability, RunningScore
from rewarm.curriculum.pacing import StagedPacing
from rewarm.curriculum.pacing_windows import GaussianWindow
from rewarm.datamodules.loader import WindowLoader
from rewarm.datamodules.rollout_loader import RolloutLoader
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.rollouts.engine import Completion
from rewarm.rollouts.ranks import Place
from rewarm.rollouts.sampling import Group, Prompts

N, Q, G = 12, 4, 2
PROMPTS = Prompts(
    [str(n) for n in range(N)], [[10 + n] * (1 + n % 3) for n in range(N)], {"answer": list(range(N))}
)


class Sampler:
    """Gives prompt n completions that say where they come from; remembers what it was asked."""

    def __init__(self, rewards=lambda number: [0.0, 1.0]):
        self.rewards, self.asked = rewards, []

    def __call__(self, numbers, seeds):
        self.asked.append((list(numbers), list(seeds)))
        return [self.group(number, seed) for number, seed in zip(numbers, seeds, strict=True)]

    def groups(self, asked):
        return {number: self.group(number, seed) for number, seed in zip(*asked, strict=True)}

    def group(self, number, seed):
        rng = random.Random(f"{number}/{seed}")
        completions = []
        for place in range(G):
            tokens = [
                1000 + 10 * number + place,
                *(rng.randrange(40, 99) for _ in range(rng.randrange(0, 6))),
            ]
            logprobs = [-rng.random() for _ in tokens]
            completions.append(Completion(tokens, logprobs, finished=rng.random() < 0.5))
        return Group(number, completions, ["x"] * G, list(self.rewards(number)))


def loader(sampler=None, curriculum=None, **options):
    defaults = {
        "prompts_per_rollout": Q,
        "completions_per_prompt": G,
        "batches_per_step": 1,
        "temperature": 0.7,
        "pad_token_id": 0,
    }
    return RolloutLoader(
        PROMPTS, curriculum or Curriculum(N, seed=1), sampler or Sampler(), **defaults | options
    )


def trained(batch):
    """The (prompt, place) of every completion of a batch, told by its own first token."""
    found = []
    for targets, number, place in zip(
        batch["targets"], batch["ids"], batch["group_places"].tolist(), strict=True
    ):
        mark = int(targets[targets != IGNORE_INDEX][0]) - 1000
        assert divmod(mark, 10) == (number, place)
        found.append((number, place))
    return found


def take(iterable, count):
    return list(itertools.islice(iter(iterable), count))


def forever(rollouts):
    return itertools.chain.from_iterable(rollouts for _ in range(99))


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        elif name != "documents":  # which the positions tell
            assert value == other[name], name


# --- a batch ------------------------------------------------------------------------------------------------


def test_a_batch_holds_the_prompt_as_given_and_learns_the_completion():
    sampler = Sampler()
    (batch,) = take(loader(sampler), 1)
    (asked,) = sampler.asked
    groups = sampler.groups(asked)
    assert Counter(batch["ids"]) == Counter([*groups] * G)
    for row, number in enumerate(batch["ids"]):
        completion = groups[number].completions[batch["group_places"][row]]
        prompt, answer = PROMPTS.tokens[number], completion.tokens
        length = len(prompt) + len(answer) - 1
        assert batch["input_ids"][row, :length].tolist() == (prompt + answer)[:-1]
        assert batch["targets"][row].tolist() == (
            [IGNORE_INDEX] * (len(prompt) - 1)
            + answer
            + [IGNORE_INDEX] * (batch["targets"].shape[1] - length)
        )
        assert batch["position_ids"][row].tolist() == list(range(batch["targets"].shape[1]))
        # The sampler's log-probability of a token stands where that token is the target.
        learnt = batch["targets"][row] != IGNORE_INDEX
        assert batch["sampler_logprobs"][row][learnt].tolist() == pytest.approx(completion.logprobs, abs=1e-6)
        assert not batch["sampler_logprobs"][row][~learnt].any()
        assert batch["group_rewards"][row].tolist() == groups[number].rewards
    assert batch["temperature"] == 0.7
    assert batch["counts"] == {
        "tokens": sum(len(c.tokens) for group in groups.values() for c in group.completions),
        "sequences": Q * G,
        "trained_tokens": int((batch["targets"] != IGNORE_INDEX).sum()),
    }


@pytest.mark.parametrize(
    ("minibatches", "passes", "per_step"), [(1, 1, 1), (2, 1, 1), (1, 1, 4), (2, 3, 2), (4, 2, 2)]
)
def test_the_batches_of_a_pass_are_the_rollout_cut_up(minibatches, passes, per_step):
    sampler = Sampler()
    rollouts = loader(sampler, minibatches=minibatches, passes=passes, batches_per_step=per_step)
    assert rollouts.batches_per_rollout == minibatches * passes * per_step
    batches = take(rollouts, rollouts.batches_per_rollout)
    (asked,) = sampler.asked
    whole = Counter(itertools.product(asked[0], range(G)))
    longest = {
        number: len(PROMPTS.tokens[number]) + max(len(c.tokens) for c in group.completions)
        for number, group in sampler.groups(asked).items()
    }
    turns = [
        batches[start : start + minibatches * per_step]
        for start in range(0, len(batches), minibatches * per_step)
    ]
    assert len(turns) == passes
    for turn in turns:
        assert Counter(pair for batch in turn for pair in trained(batch)) == whole
        assert {len(batch["ids"]) for batch in turn} == {Q * G // (minibatches * per_step)}
        for step in range(0, len(turn), per_step):
            numbers = [number for batch in turn[step : step + per_step] for number in batch["ids"]]
            groups = [number for number, _ in itertools.groupby(numbers)]
            assert len(groups) == len(set(groups))  # together, as they share their prompt
            lengths = [longest[number] for number in groups]
            assert lengths == sorted(lengths)  # micro-batches of similar length pad the least


def some_equal(number):
    return [1.0, 1.0] if number % 3 else [0.0, 1.0]


@pytest.mark.parametrize("rewards", [some_equal, lambda number: [0.5, 0.5]])
@pytest.mark.parametrize(
    ("minibatches", "per_step", "world_size"), [(1, 1, 1), (2, 1, 2), (1, 4, 1), (2, 2, 2)]
)
def test_groups_of_equal_rewards_are_counted_and_not_computed(
    rewards, minibatches, per_step, world_size, monkeypatch
):
    def batches(rank, **options):
        rollouts = loader(
            Sampler(rewards), minibatches=minibatches, place=Place(rank, world_size, None), **options
        )
        return take(rollouts, rollouts.batches_per_rollout)

    ranks = on_ranks(
        world_size, lambda rank: batches(rank, batches_per_step=per_step, skip_equal=True), monkeypatch
    )
    everything = on_ranks(world_size, lambda rank: batches(rank, batches_per_step=per_step), monkeypatch)
    for step in range(minibatches):
        part = slice(step * per_step, (step + 1) * per_step)
        some, everyone = (
            [batch for rank in all_ranks for batch in rank[part]] for all_ranks in (ranks, everything)
        )
        for name in ("tokens", "sequences"):
            assert sum(batch["counts"][name] for batch in some) == sum(b["counts"][name] for b in everyone)
        pairs = [pair for batch in some if batch["ids"] for pair in trained(batch)]
        assert Counter(pairs) == Counter(
            pair for batch in everyone for pair in trained(batch) if len(set(rewards(pair[0]))) > 1
        )
        sizes = [len(batch["ids"]) for batch in some]
        assert max(sizes) - min(sizes) <= 1
        learnt = sum(int((batch["targets"] != IGNORE_INDEX).sum()) for batch in some)
        assert sum(batch["counts"]["trained_tokens"] for batch in some) == learnt


def test_passes_cut_a_rollout_differently():
    rollouts = loader(minibatches=4, passes=2)
    batches = [frozenset(trained(batch)) for batch in take(rollouts, 8)]
    assert set(batches[:4]) != set(batches[4:])


def test_an_epoch_asks_for_every_prompt_once():
    sampler = Sampler()
    rollouts = loader(sampler, minibatches=2)
    assert len(rollouts) == 3 * 2
    for _ in range(2):
        assert len(list(rollouts)) == len(rollouts)
    asked = [number for numbers, _ in sampler.asked for number in numbers]
    assert sorted(asked[:N]) == sorted(asked[N:]) == list(range(N))
    seeds = [seed for _, several in sampler.asked for seed in several]
    assert len(set(seeds)) == len(seeds)


def test_nothing_is_sampled_before_the_first_batch_of_its_rollout_is_asked_for():
    sampler = Sampler()
    rollouts = iter(loader(sampler, minibatches=2))
    for taken in range(1, 7):
        next(rollouts)
        assert len(sampler.asked) == math.ceil(taken / 2)


# --- the gate -----------------------------------------------------------------------------------------------


def by_number(number):
    """Even prompts are half solved, every fourth of the odd ones always, the others never."""
    return [0.0, 1.0] if number % 2 == 0 else [1.0, 1.0] if number % 4 == 1 else [0.0, 0.0]


def gated(sampler, **options):
    return loader(sampler, Curriculum(N, gate=Band(0.25, 0.75), seed=1), **options)


def test_a_rollout_is_refilled_until_it_is_full_of_admitted_groups():
    sampler = Sampler(by_number)
    rollouts = gated(sampler)
    (batch,) = take(rollouts, 1)
    assert all(number % 2 == 0 for number in batch["ids"])
    assert len(batch["ids"]) == Q * G
    missing = Q
    for numbers, _ in sampler.asked:
        assert len(numbers) == missing  # no more than what is missing
        missing -= sum(number % 2 == 0 for number in numbers)
    assert missing == 0
    sampled = [number for numbers, _ in sampler.asked for number in numbers]
    metrics = batch["rollout_metrics"]
    assert metrics["reward"] == pytest.approx(sum(sum(by_number(n)) / 2 for n in sampled) / len(sampled))
    assert metrics["admitted_frac"] == Q / len(sampled)
    assert metrics["zero_std_frac"] == pytest.approx(sum(n % 2 for n in sampled) / len(sampled))
    assert (metrics["filler_frac"], metrics["rounds"]) == (0.0, len(sampler.asked))


def test_refused_prompts_are_passed_over_once():
    sampler = Sampler(by_number)
    rollouts = gated(sampler)
    take(forever(rollouts), 3)
    asked = [number for numbers, _ in sampler.asked for number in numbers]
    first, rest = asked[:N], asked[N:]
    assert sorted(first) == list(range(N))
    # Even prompts are asked for again, odd ones not in the second pass.
    assert all(number % 2 == 0 for number in rest[: N // 2])
    assert rollouts.curriculum.num_refused > 0


def test_after_the_last_round_the_groups_that_vary_most_fill_the_rollout():
    def rewards(number):
        return [0.0, 0.1 + 0.01 * number] if number % 2 else [0.0, 0.0]

    sampler = Sampler(rewards)
    (batch,) = take(gated(sampler, max_rounds=3), 1)
    sampled = [number for numbers, _ in sampler.asked for number in numbers]
    assert [len(numbers) for numbers, _ in sampler.asked] == [Q] * 3
    assert set(batch["ids"]) == set(sorted(sampled, key=lambda n: -rewards(n)[1])[:Q])
    assert batch["rollout_metrics"]["filler_frac"] == 1.0
    assert batch["rollout_metrics"]["admitted_frac"] == 0.0
    assert batch["rollout_metrics"]["rounds"] == 3.0


def test_a_gate_on_live_scores_does_not_see_the_groups_own_means():
    """A prompt that was mostly solved is kept after one group without a solution: (0.7 + 0) / 2 is inside."""
    curriculum = Curriculum(N, gate=Band(0.25, 0.75), live=RunningScore(0.5), seed=1)
    curriculum.observe(range(N), [0.7] * N)
    (batch,) = take(loader(Sampler(lambda number: [0.0, 0.0]), curriculum), 1)
    assert batch["rollout_metrics"]["admitted_frac"] == 1.0
    # Of the last value alone nothing is admitted.
    last = Curriculum(N, gate=Band(0.25, 0.75), seed=1)
    last.observe(range(N), [0.7] * N)
    (batch,) = take(loader(Sampler(lambda number: [0.0, 0.0]), last, max_rounds=2), 1)
    assert batch["rollout_metrics"]["admitted_frac"] == 0.0


def test_a_gate_that_looks_at_all_prompts_refuses_no_group_again():
    """The highest third of what is known is chosen once, when a pass begins."""
    sampler = Sampler(lambda number: [number / N, number / N])
    rollouts = loader(sampler, Curriculum(N, gate=TopShare(1 / 3), seed=1))
    batches = take(forever(rollouts), 6)
    assert [len(numbers) for numbers, _ in sampler.asked] == [Q] * 6
    assert {batch["rollout_metrics"]["rounds"] for batch in batches} == {1.0}
    assert {batch["rollout_metrics"]["filler_frac"] for batch in batches} == {0.0}
    # The first pass knows nothing, and so takes all; the second begins with the highest four.
    asked = [number for numbers, _ in sampler.asked for number in numbers]
    assert sorted(asked[:N]) == list(range(N))
    assert set(asked[N : N + 4]) == {8, 9, 10, 11}


def test_an_ability_decides_by_difficulty_and_not_by_the_groups_reward():
    difficulties = [-3.0 + number / 2 for number in range(N)]  # 0 at number 6
    live = Ability(correct=Band(low=0.5), start=0.0)
    curriculum = Curriculum(N, scores=difficulties, order="ascending", gate=Band(high=0.0), live=live)
    sampler = Sampler(lambda number: [1.0, 1.0])
    (batch,) = take(loader(sampler, curriculum), 1)
    # Their mean of 1 is above 0, as their difficulty is not.
    assert [numbers for numbers, _ in sampler.asked] == [[0, 1, 2, 3]]
    assert batch["rollout_metrics"]["admitted_frac"] == 1.0


def test_a_gate_on_groups_looks_at_the_means_of_the_round_alone():
    sampler = Sampler(by_number)
    curriculum = Curriculum(N, seed=1)
    rollouts = loader(sampler, curriculum, group_gate=Band(0.25, 0.75))
    batches = take(forever(rollouts), 3)
    assert all(number % 2 == 0 for batch in batches for number in batch["ids"])
    # Prompts are not passed over for it: every pass asks for all of them.
    asked = [number for numbers, _ in sampler.asked for number in numbers]
    assert sorted(asked[:N]) == list(range(N))
    assert len(asked) > N
    assert curriculum.num_refused == 0
    assert batches[0]["rollout_metrics"]["admitted_frac"] < 1.0


def test_a_gate_on_groups_may_choose_the_best_of_each_round_and_of_each_kind():
    sampler = Sampler(lambda number: [number / N, number / N])
    curriculum = Curriculum(N, order=range(N), groups=["low"] * 2 + ["high"] * (N - 2))
    gate = TopShare(0.5, floor=0.5)
    take(loader(sampler, curriculum, group_gate=gate, max_rounds=2), 1)
    # Of 0, 1 (low) and 2, 3 (high), 1 and 3 are the best of each.
    assert [numbers for numbers, _ in sampler.asked] == [[0, 1, 2, 3], [4, 5]]
    one_kind = Sampler(lambda number: [number / N, number / N])
    (batch,) = take(loader(one_kind, Curriculum(N, order=range(N)), group_gate=TopShare(0.5)), 1)
    # Half of four, half of two, and half of one is none until the rounds are over.
    assert [numbers for numbers, _ in one_kind.asked] == [[0, 1, 2, 3], [4, 5], *([n] for n in range(6, 12))]
    assert set(batch["ids"]) == {2, 3, 5, 0}
    assert batch["rollout_metrics"]["filler_frac"] == 0.25


def test_a_prompt_that_comes_twice_in_a_round_is_judged_by_each_of_its_groups():
    rewards = iter([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    curriculum = Curriculum(1, gate=Band(0.25, 0.75))
    (batch,) = take(
        loader(Sampler(lambda number: next(rewards)), curriculum, prompts_per_rollout=2, max_rounds=2), 1
    )
    # Of the two of the first round the second is let in, and then one more of the second round.
    assert batch["group_rewards"].tolist() == [[0.0, 1.0]] * 4
    assert batch["rollout_metrics"]["admitted_frac"] == 2 / 3


def test_completions_that_were_cut_are_counted():
    sampler = Sampler()
    (batch,) = take(loader(sampler), 1)
    groups = sampler.groups(sampler.asked[0])
    finished = [c.finished for group in groups.values() for c in group.completions]
    assert batch["rollout_metrics"]["cut_frac"] == pytest.approx(finished.count(False) / len(finished))


def test_pacing_counts_the_optimizer_steps_of_a_rollout():
    pacing = StagedPacing([6], [0.25, 1.0])  # a rollout is 2 minibatches x 3 passes
    curriculum = Curriculum(N, scores=range(N), order="ascending", pacing=pacing, seed=0)
    sampler = Sampler()
    take(loader(sampler, curriculum, minibatches=2, passes=3), 12)
    assert set(sampler.asked[0][0]) <= {0, 1, 2}
    assert max(sampler.asked[1][0]) > 2


# --- resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_state_saved_after_any_batch_gives_the_rest_without_sampling_a_rollout_again(cut):
    def make(sampler):
        return gated(sampler, minibatches=2, passes=2, batches_per_step=1)

    sampler = Sampler(by_number)
    whole = take(forever(make(sampler)), 14)
    before, after = Sampler(by_number), Sampler(by_number)
    first = make(before)
    take(forever(first), cut)
    second = make(after)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch, expected in zip(take(forever(second), 14 - cut), whole[cut:], strict=True):
        same(batch, expected)
    assert before.asked + after.asked == sampler.asked


def test_a_state_is_plain_values_and_holds_groups_only_inside_a_rollout():
    rollouts = loader(minibatches=2)
    batches = iter(rollouts)
    next(batches)
    inside = rollouts.state_dict()
    second = next(batches)
    assert len(inside["groups"]) == Q
    assert rollouts.state_dict()["groups"] == []

    again = loader(minibatches=2)
    again.load_state_dict(json.loads(json.dumps(inside)))
    same(next(iter(again)), second)


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_windows_of_a_rollout_resume_too(cut):
    def make():
        return WindowLoader(loader(minibatches=2, batches_per_step=2), 2)

    whole = take(forever(make()), 8)
    first, second = make(), make()
    take(forever(first), cut)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch, expected in zip(take(forever(second), 8 - cut), whole[cut:], strict=True):
        same(batch, expected)
    for start in (0, 2):
        step = whole[start : start + 2]
        assert all(batch["window"]["tokens"] == sum(b["counts"]["tokens"] for b in step) for batch in step)


# --- ranks --------------------------------------------------------------------------------------------------


def on_ranks(world_size, act, monkeypatch):
    """Let every rank act in a thread of its own, with a gathering of objects between them."""
    barrier, place = threading.Barrier(world_size), threading.local()
    gathered = [None] * world_size

    def gather(parts, mine, group=None):
        gathered[place.rank] = mine
        barrier.wait(timeout=20)
        parts[:] = copy.deepcopy(gathered)
        barrier.wait(timeout=20)

    def run(rank):
        place.rank = rank
        return act(rank)

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(run, range(world_size)))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("per_step", [1, 2])
def test_ranks_sample_other_prompts_and_train_on_other_parts_of_a_rollout(world_size, per_step, monkeypatch):
    samplers = [Sampler(by_number) for _ in range(world_size)]

    def act(rank):
        rollouts = gated(samplers[rank], batches_per_step=per_step, place=Place(rank, world_size, None))
        return take(rollouts, per_step)

    batches = on_ranks(world_size, act, monkeypatch)
    rounds = [[numbers for numbers, _ in sampler.asked] for sampler in samplers]
    for asked in itertools.zip_longest(*rounds, fillvalue=[]):
        counts = [len(numbers) for numbers in asked]
        assert max(counts) - min(counts) <= 1
        assert len(set().union(*asked)) == sum(counts)
    # What is sampled does not depend on the number of ranks.
    alone = Sampler(by_number)
    take(gated(alone, batches_per_step=per_step * world_size), per_step * world_size)
    everyone = [list(zip(*asked, strict=True)) for asked in alone.asked]
    for number, together in enumerate(everyone):
        shares = [s.asked[number] for s in samplers if number < len(s.asked)]
        assert sorted(together) == sorted(pair for share in shares for pair in zip(*share, strict=True))
    # Together they train on a full rollout of admitted groups, each completion once.
    pairs = Counter(pair for rank in batches for batch in rank for pair in trained(batch))
    assert len(pairs) == pairs.total() == Q * G
    assert all(number % 2 == 0 for number, _ in pairs)
    assert {len(batch["ids"]) for rank in batches for batch in rank} == {Q * G // per_step // world_size}
    assert len({str(batch["rollout_metrics"]) for rank in batches for batch in rank}) == 1


def test_ranks_have_one_state_and_one_alone_goes_on_with_what_two_have_begun(monkeypatch):
    def act(rank):
        rollouts = gated(Sampler(by_number), minibatches=2, place=Place(rank, 2, None))
        batches = iter(rollouts)
        next(batches)
        state = rollouts.state_dict()
        return state, trained(next(batches))

    (state, first), (other, second) = on_ranks(2, act, monkeypatch)
    assert state == other
    sampler = Sampler(by_number)
    alone = gated(sampler, minibatches=2)
    alone.load_state_dict(state)
    assert Counter(trained(next(iter(alone)))) == Counter(first + second)
    assert sampler.asked == []


def test_a_window_that_moves_is_in_one_place_on_all_ranks(monkeypatch):
    def moving(sampler, **options):
        window = GaussianWindow(sigma=1.0, gain=2.0, largest_move=3.0)
        angles = [(N - number) / N for number in range(N)]
        curriculum = Curriculum(N, scores=angles, order="descending", draw=window, seed=1)
        return loader(sampler, curriculum, **options)

    samplers = [Sampler(by_number) for _ in range(2)]

    def act(rank):
        rollouts = moving(samplers[rank], place=Place(rank, 2, None))
        take(forever(rollouts), 5)
        return rollouts.curriculum.state_dict()

    states = on_ranks(2, act, monkeypatch)
    alone = Sampler(by_number)
    rollouts = moving(alone, batches_per_step=2)
    take(forever(rollouts), 2 * 5)
    assert states[0] == states[1] == rollouts.curriculum.state_dict()
    assert states[0]["centre"]["rank"] > 0.0
    for (together, _), (first, _), (second, _) in zip(
        alone.asked, samplers[0].asked, samplers[1].asked, strict=True
    ):
        assert together == [number for pair in zip(first, second, strict=True) for number in pair]


@pytest.mark.parametrize(
    "options",
    [
        {"minibatches": 3},
        {"batches_per_step": 5},
        {"place": Place(0, 3, None)},
        {"minibatches": 4, "place": Place(0, 4, None)},
    ],
)
def test_a_rollout_that_does_not_divide_is_named(options):
    with pytest.raises(ValueError, match="a rollout has 4 x 2 completions"):
        loader(**options)
