"""Instruction data from file to batch: which rows, in which order, with which targets."""

import itertools
from collections import Counter

import pytest

from rewarm.datamodules.instructions import InstructionData
from rewarm.functional.curriculum import Band, LinearPacing
from rewarm.functional.logprob import IGNORE_INDEX
from tests import tiny

TOKENIZER = tiny.build_tokenizer()
ROWS = [
    {"prompt": "1+1=", "completion": "2", "level": 2.5},
    {"prompt": "10+10=", "completion": "10\n20", "level": 1},
    {"prompt": "1+2+3=", "completion": "1+2=3\n3+3=6\n6", "level": 3},
    {"prompt": "7=", "completion": "777", "level": 0},
]


@pytest.fixture
def instructions(tmp_path):
    """Makes InstructionData of rows."""

    def make(rows=ROWS, template=None, **options):
        data = InstructionData(
            tiny.write_jsonl(tmp_path / "rows.jsonl", rows),
            tiny.save_tokenizer(tmp_path / f"tokenizer{hash(template)}", template),
            **{"max_length": 64, "batch_size": 2} | options,
        )
        data.setup()
        return data

    return make


def decode(tokens):
    return TOKENIZER.decode([token for token in tokens if token >= 0])


def sequences_of(batches):
    """Of every sequence: its example, its inputs, its targets."""
    for batch in batches:
        for number, example in enumerate(batch["ids"]):
            where = batch["sequence_ids"] == number
            targets = batch["targets"][where]
            yield example, batch["input_ids"][where].tolist(), targets[targets != IGNORE_INDEX].tolist()


@pytest.mark.parametrize("packing", [False, True])
def test_every_example_is_there_once_and_learns_its_completion_and_eos(instructions, packing):
    data = instructions(packing=packing)
    seen = list(itertools.islice(sequences_of(data.train_dataloader()), 4))
    assert sorted(example for example, _, _ in seen) == [0, 1, 2, 3]
    for example, inputs, targets in seen:
        row = ROWS[example]
        assert decode(inputs) == row["prompt"] + row["completion"]
        assert decode(targets) == row["completion"] + "</s>"


def test_packed_rows_are_as_long_as_a_row_may_be_and_restart_positions(instructions):
    data = instructions(packing=True, max_length=20, batch_size=1)
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape == (1, 20)
        for number in range(len(batch["ids"])):
            positions = batch["position_ids"][batch["sequence_ids"] == number].tolist()
            assert positions == list(range(len(positions)))


@pytest.mark.parametrize(
    ("score", "values"),
    [
        ("level", [2.5, 1, 3, 0]),
        ("completion_tokens", [2, 6, 14, 4]),
        ("prompt_tokens", [4, 6, 6, 2]),
        ("completion_lines", [1, 2, 3, 1]),
    ],
)
def test_the_order_is_that_of_the_score(instructions, score, values):
    for order, sign in (("ascending", 1), ("descending", -1)):
        data = instructions(score=score, order=order)
        drawn = [example for batch in data.train_dataloader() for example in batch["ids"]]
        assert drawn == sorted(range(4), key=lambda n: sign * values[n])


def test_a_score_in_a_table_is_text_and_sorts_as_a_number(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,level\na,007,10\nb,NA,9\nc,x,-1e1\n")
    data = InstructionData(str(path), tiny.save_tokenizer(tmp_path / "t"), score="level", order="ascending")
    data.setup()
    seen = [(example, decode(targets)) for example, _, targets in sequences_of(data.train_dataloader())]
    assert seen == [(2, "x</s>"), (1, "NA</s>".replace("N", "<unk>")), (0, "007</s>")]


def test_pacing_counts_steps_of_the_trainer_and_shows_easy_examples_first(instructions):
    rows = [{"prompt": "1", "completion": "x", "level": n} for n in range(20)]
    data = instructions(rows, score="level", order="ascending", pacing=LinearPacing(10, start=0.1))
    batches = list(data.train_dataloader())
    assert set(batches[0]["ids"]) == {0, 1}
    assert all(max(batch["ids"]) < 2 + 1.8 * step + 1 for step, batch in enumerate(batches))


def test_without_a_trainer_a_window_is_one_batch(instructions):
    for batch in instructions().train_dataloader():
        assert batch["window"] == batch["counts"]


def test_documents_learn_everything_and_messages_the_assistant(instructions):
    data = instructions([{"text": "all of it"}])
    ((_, inputs, targets),) = sequences_of(data.train_dataloader())
    assert (decode(inputs), decode(targets)) == ("all of it", "ll of it</s>")
    messages = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]
    for rows in ([{"messages": messages}], [{"prompt": messages[:1], "completion": messages[1:]}]):
        data = instructions(rows, tiny.CHAT_TEMPLATE)
        ((_, inputs, targets),) = sequences_of(data.train_dataloader())
        assert (decode(inputs), decode(targets)) == ("u:1+1=?a:2", "2</s>")


def test_tools_and_keywords_of_a_row_reach_the_template(instructions):
    template = "{{ tools[0]['name'] }}{% if brief %}#{% endif %}" + tiny.CHAT_TEMPLATE
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": messages, "tools": [{"name": "add"}], "chat_template_kwargs": {"brief": True}}
    ((_, inputs, _),) = sequences_of(instructions([row], template).train_dataloader())
    assert decode(inputs) == "add#u:aa:b"


def test_validation_and_scoring_show_every_example_once_in_order(instructions, tmp_path):
    val = tiny.write_jsonl(tmp_path / "val.jsonl", ROWS[:3])
    data = instructions(val=val, packing=True, score="level", order="descending")
    assert [batch["ids"] for batch in data.val_dataloader()] == [[0, 1], [2]]
    assert [batch["ids"] for batch in data.scoring_dataloader()] == [[0, 1], [2, 3]]
    assert [batch["ids"] for batch in data.scoring_dataloader("val")] == [[0, 1], [2]]
    assert data.scoring_dataloader("test") is None
    assert instructions().val_dataloader() == []


# --- what is left out is counted ----------------------------------------------------------------------------


def test_a_row_that_is_too_long_stops_is_dropped_or_is_cut_as_asked(instructions, caplog):
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: 19 positions, but max_length is 18"):
        instructions(max_length=18)
    data = instructions(max_length=18, overlong="drop")
    assert len(data._examples["train"]) == 3
    assert "rows.jsonl: 1 of 4 rows too long, dropped" in caplog.text
    data = instructions(max_length=18, overlong="truncate")
    cut = next(inputs for example, inputs, _ in sequences_of(data.train_dataloader()) if example == 2)
    assert decode(cut) == "1+2+3=1+2=3\n3+3=6\n6"[:18]
    assert "rows.jsonl: 1 of 4 rows too long, truncated" in caplog.text


def test_a_row_whose_completion_is_cut_off_is_left_out_with_a_count(instructions, caplog):
    data = instructions(max_length=5, overlong="truncate")
    assert len(data._examples["train"]) == 2
    assert "rows.jsonl: 2 of 4 rows without a target, dropped" in caplog.text
    assert "rows.jsonl: 2 of 4 rows too long, truncated" in caplog.text


def test_scores_stay_with_their_rows_when_others_are_left_out(instructions):
    data = instructions(max_length=12, overlong="drop", score="level", order="ascending")
    drawn = [decode(inputs) for _, inputs, _ in sequences_of(data.train_dataloader())]
    assert drawn == ["7=777", "10+10=10\n20", "1+1=2"]


def test_nothing_left_to_train_on_is_an_error(instructions, caplog):
    with pytest.raises(ValueError, match=r"rows\.jsonl: no row is left to train on .*'too long, dropped': 4"):
        instructions(max_length=2, overlong="drop")
    assert "rows.jsonl: 4 of 4 rows too long, dropped" in caplog.text


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "1+1=", "completion": ""}, "line 5: the completion is empty"),
        ({"prompt": "1+1=", "completion": None}, "line 5, column 'completion': must be text, is missing"),
    ],
)
def test_a_wrong_row_is_named(instructions, row, named):
    with pytest.raises(ValueError, match=r"rows\.jsonl, " + named):
        instructions([*ROWS, row])


def test_messages_that_the_template_or_the_task_has_no_use_for_are_named(instructions):
    user = {"role": "user", "content": "hello"}
    with pytest.raises(
        ValueError, match=r"rows\.jsonl, line 1: no message of role 'assistant' says anything"
    ):
        instructions([{"messages": [user]}], tiny.CHAT_TEMPLATE)
    with pytest.raises(
        ValueError, match=r"rows\.jsonl, line 1: the data are messages, but the tokenizer has no"
    ):
        instructions([{"messages": [user, {"role": "assistant", "content": "x"}]}])
    strict = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}" + tiny.CHAT_TEMPLATE
    )
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: the chat template refuses the messages: no"):
        instructions([{"messages": [{"role": "assistant", "content": "x"}]}], strict)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"score": "depth", "order": "ascending"},
            "score is 'depth'; known are completion_tokens, prompt_tokens",
        ),
        ({"score": "prompt", "order": "ascending"}, "line 1, column 'prompt': must be a number, is '1\\+1='"),
        ({"score": "level"}, "scores are given, but order 'shuffled' ignores them"),
        ({"order": "ascending"}, "order 'ascending' needs scores"),
        ({"pacing": LinearPacing(5)}, "set order to 'ascending' or 'descending'"),
        ({"overlong": "cut"}, "overlong is 'cut'; known are 'error', 'drop', 'truncate'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(instructions, options, named):
    with pytest.raises(ValueError, match=named):
        instructions(**options)


def test_a_gate_needs_batches_made_one_by_one(instructions):
    data = instructions(num_workers=1)
    data.curriculum.gate = Band(0.0, 1.0)
    with pytest.raises(ValueError, match="num_workers is 1; a gate on live scores needs 0"):
        data.train_dataloader()


def test_every_row_counts_once_over_several_epochs_of_shuffling(instructions):
    rows = tiny.sums(17)
    data = instructions([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    loader = data.train_dataloader()
    assert Counter(n for _ in range(3) for batch in loader for n in batch["ids"]) == Counter(
        list(range(17)) * 3
    )


def test_answers_labelled_as_not_wanted_are_not_learnt(instructions, caplog):
    rows = [
        {"prompt": "1+1=", "completion": "2", "label": True},
        {"prompt": "1+1=", "completion": "3", "label": False},
    ]
    data = instructions(rows)
    assert len(data.scoring_dataloader()._data) == 1
    assert "1 of 2 rows labelled as not wanted, dropped" in caplog.text
