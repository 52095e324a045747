"""Prompts as read from files, and groups as put together from a sampler and rewards."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rewarm.rollouts.engine import Completion
from rewarm.rollouts.rewards import RewardError, exact_number
from rewarm.rollouts.sampling import Group, encoder_for, read_prompts, sample_from, sample_groups
from rewarm.text.encoding import Encoder
from tests import tiny

USER, ASSISTANT = {"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}
ENCODER = Encoder(tiny.build_tokenizer(tiny.CHAT_TEMPLATE))


def ids(text):
    return ENCODER.tokenizer(text)["input_ids"]


def read(tmp_path, rows, **options):
    return read_prompts(tiny.write_jsonl(tmp_path / "rows.jsonl", rows), ENCODER, **options)


def completion(text, finished=True):
    tokens = ids(text) + [1] * finished
    return Completion(tokens, [-0.5] * len(tokens), finished)


def answers(*texts):
    """A sampler that gives sample `n` of every prompt the n-th text."""
    return lambda prompts, num_samples, seed: [[completion(t) for t in texts[:num_samples]] for _ in prompts]


# --- prompts ----------------------------------------------------------------------------------------------


def test_a_text_prompt_keeps_its_text_its_tokens_and_the_other_columns(tmp_path):
    prompts = read(
        tmp_path, [{"prompt": "1+1=", "answer": 2, "level": "a"}, {"prompt": "2+2=", "answer": None}]
    )
    assert len(prompts) == 2
    assert prompts.texts == ["1+1=", "2+2="]
    assert prompts.tokens == [ids("1+1="), ids("2+2=")]
    assert prompts.columns == {"answer": [2, None], "level": ["a", None]}


def test_a_message_prompt_ends_where_the_answer_begins_and_shows_what_was_said_last(tmp_path):
    prompts = read(tmp_path, [{"prompt": [{"role": "system", "content": "brief"}, USER], "answer": "2"}])
    assert prompts.texts == ["1+1=?"]
    assert ENCODER.tokenizer.decode(prompts.tokens[0]) == "s:briefu:1+1=?a:"


def test_tools_and_template_keywords_are_part_of_the_prompt(tmp_path):
    encoder = Encoder(tiny.build_tokenizer("{% if brief %}brief {% endif %}{{ tools[0]['name'] }}"))
    row = {"messages": [USER], "tools": [{"name": "add"}], "chat_template_kwargs": {"brief": True}}
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    assert encoder.tokenizer.decode(read_prompts(path, encoder).tokens[0]) == "brief add"


def test_a_limit_takes_the_first_rows_and_reads_no_further(tmp_path):
    rows = [{"prompt": "1+1="}, {"prompt": "2+2="}, {"prompt": None}]
    assert read(tmp_path, rows, limit=2).texts == ["1+1=", "2+2="]
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3, column 'prompt': must be text, is missing"):
        read(tmp_path, rows)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"prompt": "1"}, {"prompt": ""}], r"rows\.jsonl, line 2: the prompt is empty"),
        ([{"text": "1"}], r"rows\.jsonl: no prompt among the columns text"),
        ([{"messages": [USER, ASSISTANT]}], "line 1, column 'messages': the last message is the assistant's"),
    ],
)
def test_a_wrong_prompt_is_named(rows, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        read(tmp_path, rows)


# --- groups -----------------------------------------------------------------------------------------------


def test_groups_come_in_the_order_asked_for_with_their_own_rewards(tmp_path):
    prompts = read(tmp_path, [{"prompt": f"{n}+1=", "answer": n + 1} for n in range(4)])
    asked = []

    def generate(tokens, num_samples, seed):
        asked.append((tokens, num_samples, seed))
        return answers("3", "4", "x")(tokens, num_samples, seed)

    groups = sample_groups(
        prompts, [3, 0, 2], 3, seed=7, generate=generate, reward=exact_number, tokenizer=ENCODER.tokenizer
    )
    assert asked == [([prompts.tokens[n] for n in (3, 0, 2)], 3, 7)]
    assert [group.prompt for group in groups] == [3, 0, 2]
    assert [group.texts for group in groups] == [["3", "4", "x"]] * 3
    assert [group.rewards for group in groups] == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert groups[0].mean == pytest.approx(1 / 3)
    assert groups[0].completions == [completion("3"), completion("4"), completion("x")]


def test_rewards_see_each_completion_with_its_prompt_and_columns_and_add_up(tmp_path):
    prompts = read(tmp_path, [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}])
    seen = []

    def record(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, columns["n"], strict=True))
        return [1.0] * len(prompts)

    def half(prompts, completions, **columns):
        return [0.5] * len(prompts)

    groups = sample_groups(
        prompts,
        [0, 1],
        2,
        seed=0,
        generate=answers("x", "y"),
        reward=[record, half],
        tokenizer=ENCODER.tokenizer,
    )
    assert seen == [("a", "x", 1), ("a", "y", 1), ("b", "x", 2), ("b", "y", 2)]
    assert [group.rewards for group in groups] == [[1.5, 1.5], [1.5, 1.5]]


def test_no_numbers_give_no_groups_and_ask_nobody(tmp_path):
    prompts = read(tmp_path, [{"prompt": "a"}])
    assert sample_groups(prompts, [], 2, 0, generate=None, reward=None, tokenizer=None) == []


def test_a_nan_reward_stops_with_the_sample_shown(tmp_path):
    prompts = read(tmp_path, [{"prompt": "1+1=", "answer": 2}])

    def broken(prompts, completions, **columns):
        return [float("nan")] * len(prompts)

    with pytest.raises(RewardError, match=r"reward broken failed on row 0 \(prompt '1\+1=', completion 'x'"):
        sample_groups(prompts, [0], 1, 0, generate=answers("x"), reward=broken, tokenizer=ENCODER.tokenizer)


def test_the_mean_of_a_group_is_its_pass_rate():
    assert Group(0, [], [], [1.0, 0.0, 0.0, 1.0]).mean == 0.5


# --- a model as sampler -------------------------------------------------------------------------------------


def test_a_model_samples_what_its_logits_say():
    torch.manual_seed(0)
    config = AutoConfig.for_model(**tiny.LLAMA | {"initializer_range": 0.5})
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = ids("1+1=")
    [[greedy], _] = sample_from(model, ENCODER, 3, temperature=0.0)([prompt, ids("2")], 1, 0)
    tokens = list(prompt)
    for token in greedy.tokens:
        assert token == int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(token)
    generate = sample_from(model, ENCODER, 4, temperature=1.0)
    assert generate([prompt], 8, 0) == generate([prompt], 8, 0) != generate([prompt], 8, 1)
    for sampled in generate([prompt], 8, 0)[0]:
        assert len(sampled.tokens) <= 4
        assert sampled.finished == (sampled.tokens[-1] == ENCODER.tokenizer.eos_token_id)


def test_the_encoder_is_that_of_the_folder_or_else_of_the_data(tmp_path):
    folder = tiny.save_tokenizer(tmp_path / "t")
    data = SimpleNamespace(tokenizer=ENCODER.tokenizer)
    assert encoder_for(None, data).tokenizer is ENCODER.tokenizer
    assert encoder_for(folder, data).tokenizer.name_or_path == folder
    with pytest.raises(ValueError, match="no tokenizer: the data module has none, so give `tokenizer`"):
        encoder_for(None, SimpleNamespace())
