"""Prompts sampled from the model that a trainer holds."""

import datetime
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from transformers import AutoConfig, AutoModelForCausalLM

import rewarm
from rewarm.curriculum.pacing import LinearPacing
from rewarm.datamodules.prompts import PromptData, ValidationRollouts, _prompt_bytes
from rewarm.functional.logprob import IGNORE_INDEX
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
        ({"completions_per_prompt": 1}, "completions_per_prompt is 1; a group needs at least 2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"prompts_per_rollout": 0}, "prompts_per_rollout is 0; it must be at least 1"),
        ({"val_samples": 0}, "val_samples is 0"),
        ({"minibatches": 0}, "minibatches is 0"),
        ({"passes": 0}, "passes is 0"),
        ({"max_rounds": 0}, "max_rounds is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"score": "depth", "order": "ascending"}, r"rows\.jsonl: no column 'depth' among answer, level"),
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
