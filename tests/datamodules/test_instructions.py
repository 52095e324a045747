"""Instruction data from file to batch: which rows, in which order, with which targets."""

import itertools
from collections import Counter

import pytest
import torch

import rewarm
from rewarm.curriculum.gates import Band
from rewarm.curriculum.pacing import LinearPacing
from rewarm.datamodules.instructions import InstructionData
from rewarm.datamodules.tokenising import truncated
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


def test_rows_without_padding_hold_the_whole_batch(instructions):
    data = instructions(packing="padding_free", batch_size=3)
    first, second = data.train_dataloader()
    assert first["input_ids"].shape == (1, sum(data._examples["train"][n].positions for n in first["ids"]))
    assert (first["sequence_ids"] >= 0).all()
    seen = {example: (decode(i), decode(t)) for example, i, t in sequences_of([first, second])}
    assert seen == {
        n: (row["prompt"] + row["completion"], row["completion"] + "</s>") for n, row in enumerate(ROWS)
    }
    for number in range(3):
        positions = first["position_ids"][first["sequence_ids"] == number].tolist()
        assert positions == list(range(len(positions)))


def test_rows_of_similar_length_share_a_batch(instructions):
    lengths = [5, 20, 6, 21, 7, 22, 8, 23]
    rows = [{"prompt": "1", "completion": "x" * length, "level": n} for n, length in enumerate(lengths)]
    data = instructions(rows, score="level", order="ascending", length_bucket=2, batch_size=4)
    seen = [sorted(batch["ids"]) for batch in data.train_dataloader()]
    assert sorted(seen) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_how_full_packed_rows_are_is_logged(instructions, caplog):
    with caplog.at_level("INFO"):
        data = instructions(packing=True, max_length=20)
        data.train_dataloader()
    # Rows of 4 + 2, 6 + 6, 6 + 14 and 2 + 4 tokens, the last of each never an input.
    assert "4 examples fill 3 rows by 0.667" in caplog.text


LEVELS = [
    {"prompt": f"{n}", "completion": "x", "subject": "ab"[n % 2], "level": n // 4, "stage": "yx"[n < 3]}
    for n in range(8)
]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (rewarm.Interleaved("subject", "level"), [0, 1, 2, 3, 4, 5, 6, 7]),
        (rewarm.Blocked("subject", "level"), [0, 2, 4, 6, 1, 3, 5, 7]),
        (rewarm.Folded("level", folds=4), [0, 4, 1, 5, 2, 6, 3, 7]),
        (rewarm.Folded("level", folds=4, descending=True), [4, 0, 5, 1, 6, 2, 7, 3]),
        (rewarm.Staged(["y", "x"]), [3, 4, 5, 6, 7, 0, 1, 2]),
        (rewarm.EasyToHard(["level", "prompt_tokens"]), [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_orders_by_columns(instructions, order, expected):
    data = instructions(LEVELS, order=order)
    assert [n for batch in data.train_dataloader() for n in batch["ids"]] == expected


def test_an_order_by_columns_is_paced_and_shuffled_in_windows(instructions):
    data = instructions(LEVELS, order=rewarm.Staged(["y", "x"]), window=5, batch_size=1)
    drawn = [n for batch in data.train_dataloader() for n in batch["ids"]]
    assert (set(drawn[:5]), set(drawn[5:])) == ({3, 4, 5, 6, 7}, {0, 1, 2})
    pacing = rewarm.OnePassPacing([5], [0.625, 1.0])
    data = instructions(LEVELS, order=rewarm.Staged(["y", "x"]), pacing=pacing, batch_size=1)
    drawn = [n for batch in data.train_dataloader() for n in batch["ids"]]
    assert (set(drawn[:5]), set(drawn[5:])) == ({3, 4, 5, 6, 7}, {0, 1, 2})


def test_a_gate_on_known_scores_chooses_the_rows_to_train_on(instructions, caplog):
    data = instructions(LEVELS, score="level", keep=rewarm.Band(1, 1), order="descending")
    rows = [decode(inputs)[0] for _, inputs, _ in sequences_of(data.train_dataloader())]
    assert rows == ["4", "5", "6", "7"]
    assert "rows.jsonl: 4 of 8 rows kept by level" in caplog.text
    share = rewarm.TopShare(0.5, floor=0.5)
    data = instructions(LEVELS, score="level", keep=share, group="stage")
    rows = {decode(inputs)[0] for _, inputs, _ in sequences_of(data.train_dataloader())}
    assert rows == {
        "0",
        "4",
        "5",
        "6",
    }  # one of three of stage x, two of five of y, the next best
    with pytest.raises(ValueError, match=r"rows.jsonl: keep admits none of 8 rows by their level"):
        instructions(LEVELS, score="level", keep=rewarm.Band(7, 8))


def test_live_gates_know_the_groups(instructions):
    data = instructions(LEVELS, score="level", order="ascending", group="subject")
    data.curriculum.gate = rewarm.TopShare(0.5, floor=0.5)
    data.curriculum.observe(range(8), [0.0, 10.0, 1.0, 11.0, 2.0, 12.0, 3.0, 13.0])
    drawn = data.curriculum.propose(4, step=0)
    assert drawn == [4, 5, 6, 7]


def test_a_missing_label_is_named(instructions):
    with pytest.raises(ValueError, match=r"rows.jsonl, line 9, column 'subject': must be a label"):
        instructions([*LEVELS, {"prompt": "1", "completion": "2", "level": 1}], order=rewarm.Blocked())


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
    data = instructions(max_length=18, overlong="keep_start")
    cut = next(inputs for example, inputs, _ in sequences_of(data.train_dataloader()) if example == 2)
    assert decode(cut) == "1+2+3=1+2=3\n3+3=6\n6"[:18]
    assert "rows.jsonl: 1 of 4 rows too long, truncated" in caplog.text


def test_the_start_is_cut_but_for_bos(instructions):
    data = instructions(max_length=10, overlong="keep_end")
    cut = next(inputs for example, inputs, _ in sequences_of(data.train_dataloader()) if example == 2)
    assert decode(cut) == "1+2+3=1+2=3\n3+3=6\n6"[-10:]
    data.tokenizer.bos_token = "1"
    whole = data.encoder.pair("1+2+3=", "1+2=3")
    (kept,) = truncated((whole,), 10, "keep_end", data.tokenizer.bos_token_id)
    assert decode(kept.tokens) == "12+3=1+2=3</s>"


def test_pieces_and_weights_of_rows_and_turns_reach_the_batch(instructions):
    rows = [
        {"segments": [{"text": "ab", "learn": False}, {"text": "cd", "learn": True}]},
        {"segments": [{"text": "a", "learn": 0}, {"text": "b", "learn": 0.5}]},
    ]
    (batch,) = instructions(rows).train_dataloader()
    for number, example in enumerate(batch["ids"]):
        where = (batch["sequence_ids"] == number) & (batch["targets"] != IGNORE_INDEX)
        assert decode(batch["targets"][where]) == ["cd</s>", "b</s>"][example]
        assert batch["weights"][where].tolist() == [[1.0, 1.0, 1.0], [0.5, 0.5]][example]
    user, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"messages": [user, said, user, said], "weight": weight} for weight in (2.0, 0.0, 1.0)]
    data = instructions(rows, tiny.CHAT_TEMPLATE, turns="last")
    (batch,) = data.train_dataloader()
    assert sorted(batch["weights"][batch["targets"] != IGNORE_INDEX].tolist()) == [1.0, 1.0, 2.0, 2.0]
    assert data.left_out[data.train] == {"of weight 0, dropped": 1}


def test_rows_are_rewritten_before_they_are_read(instructions):
    rows = [{"prompt": "1+1=", "completion": "2", "prediction": "3"}]
    data = instructions(rows, transform=rewarm.RTuning(question="?"))
    ((_, inputs, targets),) = sequences_of(data.train_dataloader())
    assert decode(inputs) == "1+1=2? <unk> am unsure."
    assert decode(targets) == "2 <unk> am unsure.</s>"
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: column 'prediction': must be text"):
        instructions([*rows, {"prompt": "1", "completion": "2"}], transform=rewarm.RTuning("?"))


def test_a_repeated_sentence_fills_its_row_and_points_at_the_time_before(instructions):
    data = instructions([{"prompt": "1=", "completion": "abc", "repeat": True}], max_length=10)
    (batch,) = data.train_dataloader()
    assert decode(batch["input_ids"][0]) == "1=abcabcab"
    assert decode(batch["targets"][0]) == "abcabcabc"
    assert batch["repeats"][0].tolist() == [0, 0, 0, 0, 3, 3, 3, 3, 3, 3]
    assert batch["weights"][0, 1:].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert batch["counts"]["tokens"] == 6


def test_a_models_own_tokens_are_fed_in_and_the_targets_stay(instructions):
    rows = [{"prompt": "1=", "completion": "abc", "generated": [9, 9, 9, 1]}]
    (batch,) = instructions(rows, mix_probability=1.0).train_dataloader()
    assert batch["input_ids"][0].tolist()[2:] == [9, 9, 9]
    assert decode(batch["input_ids"][0][:2]) == "1="
    assert decode(batch["targets"][0]) == "abc</s>"
    rows = [{"prompt": "1=", "completion": "abcdefgh" * 5, "generated": [9] * 41}] * 20
    loader = instructions(rows, mix_probability=0.25, batch_size=20).train_dataloader()
    (batch,) = loader
    assert 0.2 < (batch["input_ids"][:, 2:] == 9).float().mean() < 0.3
    assert torch.equal(next(iter(loader))["input_ids"].sort(0).values, batch["input_ids"].sort(0).values)
    with pytest.raises(ValueError, match=r"line 1, column 'generated': must have numbers for each of the 4"):
        instructions([{"prompt": "1=", "completion": "abc", "generated": [9]}], mix_probability=0.5)


def test_a_teachers_tokens_stand_at_the_learnt_positions(instructions):
    teacher = {"teacher_ids": [[4, 5], [6, 7]], "teacher_logprobs": [[-0.5, -1.5], [-0.25, -2.0]]}
    rows = [{"prompt": "1=", "completion": "a", **teacher}, {"prompt": "1+1=", "completion": "b", **teacher}]
    (batch,) = instructions(rows).train_dataloader()
    learnt = batch["targets"] != IGNORE_INDEX
    assert batch["teacher_ids"][learnt].tolist() == [[4, 5], [6, 7]] * 2
    assert batch["teacher_logprobs"][learnt].tolist() == teacher["teacher_logprobs"] * 2
    assert (batch["teacher_logprobs"][~learnt] == -float("inf")).all()
    rows[1]["teacher_ids"] = [[4], [6]]
    with pytest.raises(ValueError, match=r"line 2, column 'teacher_ids': must have as many numbers each"):
        instructions(rows)


def test_tasks_are_numbered_and_their_targets_counted(instructions):
    rows = [{"prompt": "1=", "completion": "ab"[: 1 + n % 2], "kind": "xyy"[n]} for n in range(3)]
    (batch,) = instructions(rows, task="kind", batch_size=3).train_dataloader()
    assert batch["counts"] == {"tokens": 7, "sequences": 3, "tokens of task x": 2, "tokens of task y": 5}
    for number, example in enumerate(batch["ids"]):
        assert set(batch["tasks"][batch["sequence_ids"] == number].tolist()) == {int("xyy"[example] == "y")}


def test_a_row_whose_completion_is_cut_off_is_left_out_with_a_count(instructions, caplog):
    data = instructions(max_length=5, overlong="keep_start")
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
        (
            {"prompt": "1+1=", "completion": "2", "weight": -1.0},
            "line 5: weight is -1.0; it must be",
        ),
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
        (
            {"score": "level", "window": 2, "order": "ascending", "pacing": LinearPacing(5)},
            "window is 2, but",
        ),
        ({"keep": rewarm.TopShare(0.5)}, "keep chooses examples by their scores: set score"),
        ({"score": "level", "order": "ascending", "group": "depth"}, "group is 'depth'; known are"),
        ({"order": rewarm.Blocked("depth")}, "a column of order is 'depth'; known are"),
        ({"packing": "tight"}, "packing is 'tight'; it must be one of False, True, 'padding_free'"),
        ({"score": "level"}, "scores are given, but order 'shuffled' ignores them"),
        ({"order": "ascending"}, "order 'ascending' needs scores"),
        ({"pacing": LinearPacing(5)}, "set order to 'ascending' or 'descending'"),
        ({"overlong": "cut"}, "overlong is 'cut'; it must be one of 'error', 'drop', 'keep_start'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"mix_probability": 1.5}, "mix_probability is 1.5"),
        ({"turns": "first"}, "turns is 'first'; it must be one of 'all', 'last'"),
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
