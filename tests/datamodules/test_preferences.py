"""Preference pairs from file to batch."""

import pytest

import rewarm
from rewarm.curriculum.pacing import LinearPacing
from rewarm.datamodules.preferences import PreferenceData, count_pairs
from rewarm.functional.logprob import IGNORE_INDEX
from tests import tiny

TOKENIZER = tiny.build_tokenizer()
USER, YES, NO = (
    {"role": r, "content": c} for r, c in (("user", "1+1=?"), ("assistant", "2"), ("assistant", "11"))
)
ROWS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "11", "margin": 0.5},
    {"prompt": "2+2+2=", "chosen": "4+2=6", "rejected": "222", "margin": 2},
    {"prompt": "3=", "chosen": "3", "rejected": "three", "margin": 1},
]


@pytest.fixture
def preferences(tmp_path):
    """Makes PreferenceData of rows."""

    def make(rows=ROWS, template=None, **options):
        data = PreferenceData(
            tiny.write_jsonl(tmp_path / "rows.jsonl", rows),
            tiny.save_tokenizer(tmp_path / f"tokenizer{hash(template)}", template),
            **{"max_length": 64, "batch_size": 2} | options,
        )
        data.setup()
        return data

    return make


def decode(tokens):
    return TOKENIZER.decode([token for token in tokens if token >= 0])


def pairs_of(batches):
    """Of every pair: its example, and input and learnt text of chosen and rejected."""
    for batch in batches:
        rows = []
        for place in range(len(batch["ids"])):
            inputs = batch["input_ids"][place][batch["sequence_ids"][place] >= 0]
            targets = batch["targets"][place]
            rows.append((decode(inputs.tolist()), decode(targets[targets != IGNORE_INDEX].tolist())))
            assert set(batch["sequence_ids"][place].tolist()) <= {place, -1}
        for place in range(0, len(rows), 2):
            assert batch["ids"][place] == batch["ids"][place + 1]
            yield batch["ids"][place], *rows[place : place + 2]


def test_each_pair_is_two_rows_chosen_first_that_learn_their_completions(preferences):
    seen = {example: rows for example, *rows in pairs_of(preferences().train_dataloader())}
    assert sorted(seen) == [0, 1, 2]
    for example, ((chosen, learnt_chosen), (rejected, learnt_rejected)) in seen.items():
        row = ROWS[example]
        assert (chosen, rejected) == (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"])
        assert (learnt_chosen, learnt_rejected) == (row["chosen"] + "</s>", row["rejected"] + "</s>")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": "1+1=?", "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
    ],
)
def test_messages_with_or_without_a_prompt_give_the_same_pair(preferences, row):
    (pair,) = pairs_of(preferences([row], tiny.CHAT_TEMPLATE).train_dataloader())
    assert pair == (0, ("u:1+1=?a:2", "2</s>"), ("u:1+1=?a:11", "11</s>"))


def test_text_without_a_prompt_is_cut_behind_the_last_word_they_share(preferences):
    row = {"chosen": "Q: 1+1=? A: two of it", "rejected": "Q: 1+1=? A: twelve"}
    (pair,) = pairs_of(preferences([row]).train_dataloader())
    assert pair[1][1] == "two of it</s>"
    assert pair[2][1] == "twelve</s>"


def test_tools_and_keywords_of_a_row_reach_the_template(preferences):
    template = "{{ tools[0]['name'] }}{% if brief %}#{% endif %}" + tiny.CHAT_TEMPLATE
    row = {"prompt": [USER], "chosen": [YES], "rejected": [NO], "tools": [{"name": "add"}]}
    row["chat_template_kwargs"] = {"brief": True}
    (pair,) = pairs_of(preferences([row], template).train_dataloader())
    assert pair[1][0] == "add#u:1+1=?a:2"
    assert pair[2][0] == "add#u:1+1=?a:11"


def test_a_batch_counts_its_pairs_and_the_tokens_of_the_chosen(preferences):
    data = preferences(score="margin", order="ascending")
    first, second = data.train_dataloader()
    # "2" and "3", "11" and "three", each with EOS
    assert first["counts"] == {"tokens": 2 + 3 + 2 + 6, "sequences": 4, "pairs": 2, "chosen_tokens": 4}
    assert second["counts"] == {"tokens": 6 + 4, "sequences": 2, "pairs": 1, "chosen_tokens": 6}
    assert count_pairs([]) == {"pairs": 0, "chosen_tokens": 0}


def test_pairs_come_in_the_order_of_their_score(preferences):
    for order, expected in (("ascending", [0, 2, 1]), ("descending", [1, 2, 0])):
        data = preferences(score="margin", order=order)
        assert [example for example, *_ in pairs_of(data.train_dataloader())] == expected
    paced = preferences(score="margin", order="ascending", pacing=LinearPacing(3, start=0.3), batch_size=1)
    assert next(iter(paced.train_dataloader()))["ids"] == [0, 0]


def test_validation_and_scoring_show_every_pair_once_in_order(preferences, tmp_path):
    data = preferences(val=tiny.write_jsonl(tmp_path / "val.jsonl", ROWS[:1]))
    assert [batch["ids"] for batch in data.val_dataloader()] == [[0, 0]]
    assert [batch["ids"] for batch in data.scoring_dataloader()] == [[0, 0, 1, 1], [2, 2]]
    assert [batch["ids"] for batch in data.scoring_dataloader("val")] == [[0, 0]]
    assert data.scoring_dataloader("test") is None
    assert preferences().val_dataloader() == []


def test_a_pair_goes_when_either_row_is_too_long_and_is_counted(preferences, caplog):
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: 11 positions, but max_length is 8"):
        preferences(max_length=8)
    data = preferences(max_length=6, overlong="drop")
    assert [example.id for example in data._examples["train"]] == [0]
    assert "rows.jsonl: 2 of 3 rows too long, dropped" in caplog.text


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "1", "chosen": "2", "rejected": "2"}, "line 1, column 'rejected': is the same as chosen"),
        ({"prompt": "1", "chosen": "", "rejected": "2"}, "line 1: the completion is empty"),
        ({"prompt": "1", "chosen": "2", "rejected": None}, "line 1, column 'rejected': is missing"),
        ({"prompt": "1", "chosen": "2"}, "no column 'rejected' among prompt, chosen"),
        ({"chosen": "yes", "rejected": "no"}, "line 1, column 'chosen': .* must share their first words"),
        (
            {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
            "line 1: .* the tokenizer has no chat_template",
        ),
    ],
)
def test_a_wrong_pair_is_named(preferences, row, named):
    with pytest.raises(ValueError, match=r"rows\.jsonl(, |: )" + named):
        preferences([row])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"score": "depth", "order": "ascending"},
            "score is 'depth'; known are prompt_tokens, chosen_tokens, rejected_tokens and",
        ),
        (
            {"score": "chosen", "order": "ascending"},
            "line 2, column 'chosen': must be a number, is '4\\+2=6'",
        ),
        ({"score": "margin"}, "scores are given, but order 'shuffled' ignores them"),
        ({"order": "descending"}, "order 'descending' needs scores"),
        ({"overlong": "cut"}, "overlong is 'cut'; it must be one of 'error', 'drop', 'keep_start'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(preferences, options, named):
    with pytest.raises(ValueError, match=named):
        preferences(**options)


def test_both_sides_lose_the_same_start_of_their_prompt_or_the_pair_goes(preferences):
    rows = [
        {"prompt": "abcdefgh=", "chosen": "1", "rejected": "1234"},
        {"prompt": "=", "chosen": "1", "rejected": "1" * 30},
    ]
    data = preferences(rows, max_length=10, overlong="keep_end")
    (pair,) = data.examples()
    texts = [TOKENIZER.decode(sequence.tokens) for sequence in pair.sequences]
    assert texts == ["defgh=1</s>", "defgh=1234</s>"]
    assert data.left_out[data.train] == {"too long, truncated": 1, "too long, dropped": 1}


def test_both_sides_keep_the_same_start(preferences):
    rows = [{"prompt": "abcdefgh=", "chosen": "1", "rejected": "123456"}]
    data = preferences(rows, max_length=11, overlong="keep_start")
    texts = [TOKENIZER.decode(sequence.tokens) for sequence in data.examples()[0].sequences]
    assert texts == ["abcdefgh=1</s>", "abcdefgh=123"]


def test_of_many_responses_the_best_and_the_worst_make_the_pair_and_ties_are_counted(preferences, caplog):
    rows = [
        {"prompt": "1+1=", "responses": ["3", "2", "4"], "rewards": [0.5, 1.0, 0.0]},
        {"prompt": "2+2=", "responses": ["4", "four"], "rewards": [1.0, 1.0]},
    ]
    data = preferences(rows)
    (pair,) = [example for batch in [data.scoring_dataloader()] for example in batch._data.examples]
    assert [decode(sequence.tokens[sequence.learn]) for sequence in pair.sequences] == ["2</s>", "4</s>"]
    assert "1 of 2 rows without a preference, dropped" in caplog.text


def test_a_step_continues_its_prefix_and_does_not_end_the_answer(preferences):
    row = {"prompt": "1+1+1=", "prefix": "2+1", "chosen": "=3", "rejected": "=4"}
    (pair,) = preferences([row]).scoring_dataloader()._data.examples
    chosen, rejected = pair.sequences
    assert decode(chosen.tokens) == "1+1+1=2+1=3"
    assert decode(chosen.tokens[chosen.learn]) == "=3"
    shared = ~chosen.learn
    assert (chosen.tokens[shared] == rejected.tokens[~rejected.learn]).all()


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "p", "responses": ["a"], "rewards": [1.0, 0.0]}, "column 'responses': needs"),
        ({"prompt": "p", "responses": ["a", "b"], "rewards": ["x", "y"]}, "column 'rewards': must be finite"),
        ({"prompt": "p", "responses": [1, 2], "rewards": [0.0, 1.0]}, "column 'responses': must be texts"),
    ],
)
def test_wrong_responses_are_named(preferences, row, named):
    with pytest.raises(ValueError, match=f"line 1, {named}"):
        preferences([row])


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_pairs_of_another_run_are_refused(preferences, column):
    state = preferences().state_dict()
    preferences().load_state_dict(state)
    changed = [{**row, column: row[column] + "c"} for row in ROWS]
    with pytest.raises(ValueError, match=r"rows\.jsonl \(train\): .* with 3 examples .* there are 3 \("):
        preferences(changed).load_state_dict(state)


def test_margins_of_another_run_are_refused_where_they_order_the_pairs(preferences):
    sort = {"score": "margin", "order": "ascending"}
    changed = [{**row, "margin": row["margin"] + 1} for row in ROWS]
    preferences(changed).load_state_dict(preferences().state_dict())
    with pytest.raises(ValueError, match="the checkpoint was made with 3 examples"):
        preferences(changed, **sort).load_state_dict(preferences(**sort).state_dict())


def test_numeric_columns_come_with_their_pairs_into_the_loss(tmp_path):
    rows = [
        {"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": "no", "margin": n / 4, "gap": -n}
        for n in range(6)
    ]
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    tokenizer = tiny.save_tokenizer(tmp_path / "tokenizer")
    data = rewarm.PreferenceData(path, tokenizer, batch_size=4, columns=["gap", "margin"])
    data.setup()
    for batch in data.train_dataloader():
        assert batch["column_names"] == ("gap", "margin")
        expected = [[-float(number), number / 4] for number in batch["ids"][::2]]
        assert batch["columns"].tolist() == expected
    plain = rewarm.PreferenceData(path, tokenizer, batch_size=4)
    plain.setup()
    assert plain.fingerprint() != data.fingerprint()
    assert "columns" not in next(iter(plain.train_dataloader()))


def test_a_column_that_is_no_number_is_named(tmp_path):
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3", "margin": "wide"}]
    data = rewarm.PreferenceData(
        tiny.write_jsonl(tmp_path / "pairs.jsonl", rows),
        tiny.save_tokenizer(tmp_path / "tokenizer"),
        columns=["margin"],
    )
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 1, column 'margin': must be a number"):
        data.setup()
