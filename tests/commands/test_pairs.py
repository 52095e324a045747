import json

import pytest

from rewarm.commands.pairs import pairs
from tests import tiny


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def given(tmp_path, rows):
    return tiny.write_jsonl(tmp_path / "responses.jsonl", rows)


def test_pairs_from_given_answers_prefer_the_higher_reward(tmp_path):
    path = given(
        tmp_path,
        [
            {"prompt": "1+1=", "responses": ["2", "3", "4"], "rewards": [1.0, 0.0, 0.0], "level": 1},
            {"prompt": "2+2=", "responses": ["4", "four"], "rewards": [1.0, 1.0], "level": 2},
        ],
    )
    pairs(prompts=path, output=str(tmp_path / "out.jsonl"), pairs_per_prompt=5)
    made = rows_of(tmp_path / "out.jsonl")
    assert {(p["prompt"], p["chosen"], p["rejected"]) for p in made} == {
        ("1+1=", "2", "3"),
        ("1+1=", "2", "4"),
    }
    assert all(p["margin"] == 1.0 and p["level"] == 1 and "responses" not in p for p in made)


def test_most_pairs_of_a_prompt_have_the_widest_gap(tmp_path):
    rows = [{"prompt": "p", "responses": ["a", "b", "c"], "rewards": [1.0, 0.6, 0.0]}]
    pairs(prompts=given(tmp_path, rows), output=str(tmp_path / "out.jsonl"), min_gap=0.1)
    assert [(p["chosen"], p["rejected"]) for p in rows_of(tmp_path / "out.jsonl")] == [("a", "c")]


def test_the_chosen_answer_can_come_from_a_column(tmp_path):
    rows = [{"prompt": "p", "responses": ["wrong"], "rewards": [0.0], "solution": "from a stronger model"}]
    pairs(prompts=given(tmp_path, rows), output=str(tmp_path / "out.jsonl"), chosen="solution")
    (pair,) = rows_of(tmp_path / "out.jsonl")
    assert (pair["chosen"], pair["rejected"]) == ("from a stronger model", "wrong")


def test_sampled_pairs_are_verified(tmp_path):
    import torch

    from rewarm.lightning_modules.policy import build_model

    torch.manual_seed(0)
    folder = tmp_path / "model"
    build_model(tiny.LLAMA).save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in tiny.sums(6)])
    pairs(
        prompts=prompts,
        output=str(tmp_path / "out.jsonl"),
        model=str(folder),
        reward="tests.commands.test_pairs.even_length",
        max_new_tokens=5,
        samples=6,
    )
    made = rows_of(tmp_path / "out.jsonl")
    assert made
    for pair in made:
        assert len(pair["chosen"]) % 2 == 0
        assert len(pair["rejected"]) % 2 == 1


def even_length(prompts, completions, **columns):
    return [float(len(text) % 2 == 0) for text in completions]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        pairs(prompts="nowhere.jsonl", output=str(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "p", "responses": ["a"], "rewards": [1.0, 0.0]}], {}, "line 1, column 'responses'"),
        ([{"prompt": "p", "responses": ["a", "b"], "rewards": [1.0, 0.9]}], {}, "none of 1 prompts"),
        (
            [{"prompt": "p", "responses": ["a"], "rewards": [0.0]}],
            {"chosen": "best"},
            "no text in column 'best'",
        ),
        ([{"prompt": "p"}], {}, "give --model and --reward"),
        ([{"prompt": "p"}], {"model": "m", "reward": "no.such"}, "cannot be imported"),
        ([{"prompt": "p"}], {"min_gap": 0.0}, "min_gap is 0.0"),
        ([{"prompt": "p"}], {"samples": 0}, "samples is 0"),
    ],
)
def test_wrong_input_is_named(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        pairs(prompts=given(tmp_path, rows), output=str(tmp_path / "out.jsonl"), **options)
    assert not (tmp_path / "out.jsonl").exists()
