"""Prompts sampled from the model that a trainer holds."""

import datetime
import math
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from transformers import AutoConfig, AutoModelForCausalLM

import rewarm
from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.pacing import LinearPacing
from rewarm.datamodules.prompts import PromptData, ValidationRollouts, _prompt_bytes
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.rollouts.engine import TransformersEngine
from rewarm.rollouts.rewards import RewardError
from rewarm.rollouts.sampling import Prompts
from tests import fits, tiny

ROWS = [{"prompt": f"{n}+{n}=", "answer": 2 * n, "level": n % 5} for n in range(8)]


def says_prompt(prompts, completions, **columns):
    """A reward that shows what it was called with: the reference answer."""
    return [float(answer) for answer in columns["answer"]]


@pytest.fixture
def prompts(tmp_path):
    """Makes PromptData of rows."""

    def make(rows=ROWS, val=None, **options):
        defaults = {
            "reward": says_prompt,
            "max_new_tokens": 6,
            "prompts_per_rollout": 4,
            "completions_per_prompt": 2,
        }
        data = PromptData(
            tiny.write_jsonl(tmp_path / "rows.jsonl", rows),
            tiny.save_tokenizer(tmp_path / "tokenizer"),
            val=None if val is None else tiny.write_jsonl(tmp_path / "val.jsonl", val),
            **defaults | options,
        )
        data.setup()
        return data

    return make


def attach(data, seed=0, rank=0, world_size=1, accumulate=1):
    """Give data what they need of a Trainer, with a model in it; return the model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny.LLAMA | {"initializer_range": 0.3}))
    module = LightningModule()
    module.policy = torch.nn.Module()
    module.policy.model = model
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=accumulate,
        training=False,
        global_rank=rank,
        world_size=world_size,
        strategy=SimpleNamespace(model=None),
        lightning_module=module,
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
    )
    return model


# --- rollouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_logprobs_are_those_of_the_model_at_that_temperature(prompts, temperature):
    data = prompts(temperature=temperature)
    model = attach(data)
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
    logprobs = (logits / temperature).log_softmax(-1)
    learnt = batch["targets"] != IGNORE_INDEX
    expected = logprobs.gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(batch["sampler_logprobs"][learnt], expected[learnt], atol=1e-5)
    assert learnt.any(1).all()
    assert batch["temperature"] == temperature


def test_every_group_has_the_rewards_of_its_own_prompt(prompts):
    data = prompts()
    attach(data)
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    for batch in batches:
        for row, number in enumerate(batch["ids"]):
            assert batch["group_rewards"][row].tolist() == [2.0 * number] * 2
    assert Counter(number for batch in batches for number in batch["ids"]) == Counter(list(range(8)) * 2)


def test_rollouts_come_from_the_weights_of_the_moment(prompts):
    def tokens(change):
        data = prompts(seed=3)
        model = attach(data)
        batches = iter(data.train_dataloader())
        next(batches)
        if change:
            torch.manual_seed(9)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
        return next(batches)["sampler_logprobs"]

    still, again, changed = tokens(False), tokens(False), tokens(True)
    assert torch.equal(still, again)
    assert still.shape != changed.shape or not torch.allclose(still, changed)


def test_a_rollout_is_cut_into_the_micro_batches_of_the_trainer(prompts):
    data = prompts(minibatches=2)
    attach(data, accumulate=2)
    batches = list(data.train_dataloader())
    assert len(batches) == 2 * 2 * 2
    for start in range(0, 8, 2):
        step = batches[start : start + 2]
        for batch in step:
            assert len(batch["ids"]) == 2
            assert batch["window"] == {
                name: sum(part["counts"][name] for part in step)
                for name in ("tokens", "sequences", "trained_tokens")
            }


def test_prompts_come_in_the_order_of_their_score(prompts):
    data = prompts(score="level", order="descending")
    attach(data)
    first = next(iter(data.train_dataloader()))
    assert {ROWS[number]["level"] for number in first["ids"]} == {4, 3, 2}
    paced = prompts(score="level", order="ascending", pacing=LinearPacing(9, start=0.25))
    attach(paced)
    assert {ROWS[number]["level"] for number in next(iter(paced.train_dataloader()))["ids"]} == {0}


def test_a_real_fit_samples_trains_and_validates(prompts, tmp_path):
    data = prompts(val=ROWS[:3], reward=fits.odd_length, val_samples=2)
    module = rewarm.GRPO(tiny.LLAMA, optimizer=fits.adamw(1e-3))
    trainer = fits.trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    assert 0.0 <= float(trainer.callback_metrics["val/reward"]) <= 1.0


# --- validation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_scores_every_prompt_over_all_ranks(prompts, world_size):
    rewards = []
    for rank in range(world_size):
        data = prompts(val=ROWS[:7], val_samples=3, batch_size=2)
        attach(data, rank=rank, world_size=world_size)
        loader = data.val_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader) == -(-7 // (2 * world_size))
        rewards += [reward for batch in batches for reward in batch["rewards"].tolist()]
    assert Counter(rewards) == Counter([2.0 * n for n in range(7)] * 3)


def test_validation_samples_alike_until_the_model_changes(prompts):
    def lengths(prompts, completions, **columns):
        return [float(len(text)) for text in completions]

    data = prompts(val=ROWS, val_samples=4, reward=lengths)
    model = attach(data)
    loader = data.val_dataloader()
    assert isinstance(loader, ValidationRollouts)
    first, second = (torch.cat([batch["rewards"] for batch in loader]) for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        model.get_output_embeddings().weight[data.tokenizer.eos_token_id] += 1.0
    assert not torch.equal(first, torch.cat([batch["rewards"] for batch in loader]))


def test_without_validation_prompts_there_is_nothing_to_validate(prompts):
    assert prompts().val_dataloader() == []


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"completions_per_prompt": 1}, "completions_per_prompt is 1; it must be at least 2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"prompts_per_rollout": 0}, "prompts_per_rollout is 0; it must be at least 1"),
        ({"val_samples": 0}, "val_samples is 0"),
        ({"minibatches": 0}, "minibatches is 0"),
        ({"passes": 0}, "passes is 0"),
        ({"max_rounds": 0}, "max_rounds is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        (
            {"score": "depth", "order": "ascending"},
            r"rows\.jsonl: score is 'depth'; known are prompt_tokens and the columns prompt, answer, level",
        ),
        ({"score": "level"}, "scores are given, but order 'shuffled' ignores them"),
        ({"order": "ascending"}, "order 'ascending' needs scores"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(prompts, options, named):
    with pytest.raises(ValueError, match=named):
        prompts(**options)


def test_a_score_that_is_no_number_is_named(prompts):
    rows = [*ROWS, {"prompt": "1", "answer": 1, "level": None}]
    with pytest.raises(
        ValueError, match=r"rows\.jsonl, line 9, column 'level': must be a number, is missing"
    ):
        prompts(rows, score="level", order="ascending")


def test_a_prompt_that_is_too_long_for_the_model_is_named_before_anything_is_sampled(prompts):
    # The model has 128 positions.
    rows = [*ROWS, {"prompt": "9" * 123, "answer": 1, "level": 1}]
    data = prompts(rows)
    attach(data)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 9: .* take 129 positions, the model has 128"):
        data.train_dataloader()
    data = prompts(val=rows)
    attach(data)
    with pytest.raises(ValueError, match=r"val\.jsonl, line 9: .* take 129 positions, the model has 128"):
        data.val_dataloader()
    fitting = prompts([*ROWS, {"prompt": "9" * 122, "answer": 1, "level": 1}])
    attach(fitting)
    fitting.train_dataloader()


def test_a_rollout_that_does_not_divide_is_named(prompts):
    data = prompts(minibatches=3)
    attach(data)
    with pytest.raises(
        ValueError, match="a rollout has 4 x 2 completions, .* 3 minibatches x 1 batches per step x 1"
    ):
        data.train_dataloader()
    data = prompts()
    attach(data, rank=2, world_size=3)
    with pytest.raises(ValueError, match="x 3 ranks"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": ""}, r"rows\.jsonl, line 1: the prompt is empty"),
        ({"prompt": None, "answer": 1}, r"rows\.jsonl, line 1, column 'prompt': must be text, is missing"),
        ({"text": "1+1="}, r"rows\.jsonl: no prompt among the columns text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 1: .*the tokenizer has no chat_template"),
    ],
)
def test_a_wrong_prompt_is_named(prompts, row, named):
    with pytest.raises(ValueError, match=named):
        prompts([row])


def test_a_missing_reference_or_a_nan_reward_stops_with_the_sample_shown(prompts):
    data = prompts(
        [{**row, "answer": None} if row["level"] == 3 else row for row in ROWS], reward=rewarm.exact_number
    )
    attach(data)
    with pytest.raises(RewardError, match="column 'answer' is None"):
        list(data.train_dataloader())
    data = prompts(reward=lambda prompts, completions, **columns: [float("nan")] * len(prompts))
    attach(data)
    with pytest.raises(RewardError, match="it returned nan, must be a finite number"):
        list(data.train_dataloader())


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "now"),
    [
        (lambda rows: rows[:-1], 7),
        (lambda rows: rows[::-1], 8),
        (lambda rows: [{**row, "answer": row["answer"] + (n == 3)} for n, row in enumerate(rows)], 8),
        (lambda rows: [{**row, "prompt": row["prompt"] + "=" * (n == 3)} for n, row in enumerate(rows)], 8),
        (lambda rows: [{**row, "hint": "x"} for row in rows], 8),
    ],
    ids=["fewer", "another order", "another answer", "another prompt", "another column"],
)
def test_prompts_or_columns_of_another_run_are_refused(prompts, change, now):
    state = prompts().state_dict()
    prompts().load_state_dict(state)
    with pytest.raises(ValueError, match=rf"rows\.jsonl \(train\): .* with 8 examples .* there are {now} \("):
        prompts(change(ROWS)).load_state_dict(state)


def test_the_fingerprint_of_values_without_a_text_of_their_own_is_that_of_their_kind():
    class Picture:
        def __repr__(self):
            return f"<picture at {id(self)}>"

    def content(*values):
        return list(_prompt_bytes(Prompts(["1="], [[4]], {"value": list(values)})))

    assert content(Picture()) == content(Picture())
    day = datetime.date(2024, 5, 6)
    assert content(day) == content(datetime.date(2024, 5, 6)) != content(datetime.date(2024, 5, 7))


def test_the_rows_of_a_step_are_the_completions_of_a_minibatch(prompts):
    assert prompts(minibatches=2).state_dict()["rows_per_step"] == 4 * 2 // 2


# --- a window that moves by what a rollout found -----------------------------------------------------------


def angles(count):
    """Rows whose angle concentration falls with their number, but for the first and the last."""
    rows = [{"prompt": f"{n}+{n}=", "answer": n, "angle": (count - n) / count} for n in range(count)]
    return [rows[-1], *rows[1:-1], rows[0]]


class Drawn(Callback):
    """The prompts of each optimizer step, with the mean reward of their rollout."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append((sorted(set(batch["ids"])), batch["rollout_metrics"]["reward"]))


WINDOW = rewarm.GaussianWindow(sigma=1.5, gain=2.0, largest_move=4.0)


def windowed(prompts, steps, path=None, save=None, rows=20, **options):
    torch.manual_seed(0)
    order = {"score": "angle", "order": "descending", "draw": WINDOW}
    data = prompts(angles(rows), reward=fits.odd_length, **order | options)
    watch = Drawn()
    trainer = fits.trainer(max_steps=steps, max_epochs=-1, callbacks=[watch])
    trainer.fit(rewarm.GRPO(tiny.LLAMA, optimizer=fits.adamw(1e-3)), datamodule=data, ckpt_path=path)
    if save is not None:
        trainer.save_checkpoint(save)
    return data, watch.steps


def test_the_window_of_gain_rl_moves_with_the_rollouts(prompts, monkeypatch):
    """mu <- mu + clamp(n tanh(a (acc - b)) + n tanh(a angle), 0, largest), by the means of each rollout."""
    seen, observe = [], Curriculum.observe

    def watched(self, ids, scores):
        seen.extend(zip(ids, scores, strict=True))
        observe(self, ids, scores)

    monkeypatch.setattr(Curriculum, "observe", watched)
    data, _ = windowed(prompts, 7)
    angle = [row["angle"] for row in angles(20)]
    rollouts = [seen[start : start + 4] for start in range(0, len(seen), 4)]
    assert len(rollouts) == 7
    assert all(len({number for number, _ in rollout}) == 4 for rollout in rollouts)
    centre = 0.0
    for rollout in rollouts[:-1]:  # nothing is proposed after the last
        rate, mean = sum(reward for _, reward in rollout) / 4, sum(angle[number] for number, _ in rollout) / 4
        drive = 2 * math.tanh(2 * (rate - 0.5)) + 2 * math.tanh(2 * mean)
        centre = min(centre + min(max(drive, 0.0), 4.0), 19.0)
    assert centre > 3.0
    assert data.curriculum.state_dict()["centre"]["rank"] == pytest.approx(centre, rel=1e-12)
    ranks = sorted(range(20), key=lambda number: -angle[number])
    first, last = (sum(ranks.index(number) for number, _ in rollouts[place]) for place in (0, -1))
    assert first < last


@pytest.mark.parametrize("cut", [1, 4, 5])
def test_a_window_that_moves_resumes_exactly(prompts, tmp_path, cut):
    whole, steps = windowed(prompts, 8)
    _, first = windowed(prompts, cut, save=tmp_path / "saved.ckpt")
    resumed, rest = windowed(prompts, 8, path=tmp_path / "saved.ckpt")
    assert first + rest == steps
    assert resumed.curriculum.state_dict() == whole.curriculum.state_dict()


def test_a_window_inside_a_used_rollout_resumes_exactly(prompts, tmp_path):
    options = {"minibatches": 2, "passes": 2}
    whole, steps = windowed(prompts, 11, **options)
    _, first = windowed(prompts, 6, save=tmp_path / "saved.ckpt", **options)
    resumed, rest = windowed(prompts, 11, path=tmp_path / "saved.ckpt", **options)
    assert first + rest == steps
    assert resumed.curriculum.state_dict() == whole.curriculum.state_dict()


def test_rewards_beyond_a_pass_rate_do_not_move_a_window(prompts):
    data = prompts(
        angles(8),
        reward=lambda prompts, completions, **columns: [3.0] * len(prompts),
        score="angle",
        order="descending",
        draw=WINDOW,
    )
    attach(data)
    batches = iter(data.train_dataloader())
    next(batches)
    with pytest.raises(ValueError, match=r"pass_rate is 3.0"):
        next(batches)


# --- rewards and memory -------------------------------------------------------------------------------------


def test_several_rewards_are_added_up_with_their_weights(prompts):
    def one(prompts, completions, **columns):
        return [1.0] * len(prompts)

    def rewards(weights):
        data = prompts(reward=[says_prompt, one], reward_weights=weights, val=ROWS[:2])
        attach(data)
        batch = next(iter(data.train_dataloader()))
        found = dict(zip(batch["ids"], batch["group_rewards"].tolist(), strict=True))
        validated = next(iter(data.val_dataloader()))["rewards"].tolist()
        return found, validated

    for weights, expected in ((None, lambda n: 2 * n + 1), ([0.5, -2.0], lambda n: n - 2)):
        found, validated = rewards(weights)
        assert found == {number: [float(expected(number))] * 2 for number in found}
        assert validated == [float(expected(0)), float(expected(1))]


@pytest.mark.parametrize(
    ("reward", "weights"), [([says_prompt, says_prompt], [1.0]), (says_prompt, [1.0, 1.0])]
)
def test_weights_of_other_rewards_than_there_are_are_refused(prompts, reward, weights):
    with pytest.raises(ValueError, match="reward_weights is .* numbers, one for each reward"):
        prompts(reward=reward, reward_weights=weights)


def test_fewer_tokens_in_flight_give_the_same_completions(prompts, monkeypatch):
    def rollout(limit):
        sizes = []

        def decode(self, model, prompts, uniform):
            sizes.append(uniform.shape[0] * uniform.shape[1] * (max(map(len, prompts)) + uniform.shape[2]))
            return original(self, model, prompts, uniform)

        monkeypatch.setattr(TransformersEngine, "_decode", decode)
        data = prompts(max_tokens_in_flight=limit)
        attach(data)
        return next(iter(data.train_dataloader())), sizes

    original = TransformersEngine._decode
    whole, at_once = rollout(None)
    parts, sizes = rollout(40)
    assert len(at_once) == 1
    assert len(sizes) > 1
    assert max(sizes) <= 40 < at_once[0]
    assert torch.equal(whole["input_ids"], parts["input_ids"])
    with pytest.raises(ValueError, match="max_tokens_in_flight is 0; it must be at least 1"):
        prompts(max_tokens_in_flight=0)


def test_a_gate_on_groups_reaches_the_rollouts(prompts):
    data = prompts(group_gate=rewarm.Band(4.0, 12.0))
    attach(data)
    batch = next(iter(data.train_dataloader()))
    assert set(batch["ids"]) <= {2, 3, 4, 5, 6}
    assert batch["rollout_metrics"]["admitted_frac"] < 1.0


def test_columns_that_a_transform_adds_reach_the_rewards(prompts):
    def transform(row):
        return {"prompt": row["prompt"], "answer": row["answer"] + 100, "hint": "x"}

    data = prompts(transform=transform, val=ROWS[:1])
    assert set(data._prompts["train"].columns) == {"answer", "level", "hint"}
    assert data._prompts["train"].columns["level"] == [None] * 8
    attach(data)
    assert next(iter(data.val_dataloader()))["rewards"].tolist() == [100.0]


def test_a_prompt_that_was_kept_is_named_by_its_own_line(prompts):
    rows = [*ROWS, {"prompt": "9" * 123, "answer": 1, "level": 9}]
    data = prompts(rows, score="level", keep=rewarm.Band(low=4.0))
    attach(data)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 9: "):
        data.train_dataloader()
