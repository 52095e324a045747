"""Files that users have: what is written comes back in every format, and a wrong row is named."""

import csv
import json

import datasets
import pytest

from rewarm.text.formats import (
    Rows,
    as_conversation,
    as_pair,
    as_prompt,
    messages_of,
    number_of,
    segments_of,
    template_arguments,
    text_of,
)
from tests import tiny

USER, ASSISTANT = {"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}
TEXTS = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": 'a, "b"\tc\nd', "completion": "NA"},
    {"prompt": "gr\u00fc\u00df dich ", "completion": "007"},
]


def jsonl(folder, rows):
    return tiny.write_jsonl(folder / "rows.jsonl", rows)


def write(folder, kind, rows):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return jsonl(folder, rows)
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


# --- what is written comes back -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "folder"])
def test_every_kind_of_file_gives_back_the_rows_that_were_written(kind, tmp_path):
    rows = Rows(write(tmp_path, kind, TEXTS))
    assert list(rows) == TEXTS
    assert (len(rows), rows.columns) == (3, ["prompt", "completion"])


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_nested_rows_come_back_without_fields_that_only_other_rows_have(kind, tmp_path):
    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "sub", "arguments": {"b": 2}}]
    rows = [
        {"messages": [USER, {"role": "assistant", "tool_calls": calls}], "tools": None},
        {"messages": [USER, ASSISTANT], "tools": [{"name": "add", "parameters": {"b": {"type": "int"}}}]},
    ]
    assert list(Rows(write(tmp_path, kind, rows))) == [{"messages": rows[0]["messages"]}, rows[1]]


@pytest.mark.parametrize(
    ("sample_by", "texts"),
    [
        ("line", ["one", "two", "", "three"]),
        ("paragraph", ["one\ntwo", "three\n"]),
        ("document", ["one\ntwo\n\nthree\n"]),
    ],
)
def test_plain_text_is_cut_as_asked(sample_by, texts, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    assert [row["text"] for row in Rows(tmp_path / "a.txt", sample_by=sample_by)] == texts


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_several_files_follow_each_other(kind, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    parts = [write(tmp_path / name, kind, TEXTS[place : place + 2]) for place, name in enumerate("ab")]
    assert list(Rows(parts)) == TEXTS[:2] + TEXTS[1:]


def test_a_json_file_may_hold_json_lines(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [row["text"] for row in Rows(tmp_path / "a.json")] == ["one", "two"]


def test_a_saved_folder_of_splits_gives_the_split_asked_for(tmp_path):
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert list(Rows(tmp_path / "saved")) == [{"text": "train"}]
    assert list(Rows(tmp_path / "saved", split="test")) == [{"text": "test"}]
    with pytest.raises(ValueError, match="saved: no split 'val'; it has train, test"):
        Rows(tmp_path / "saved", split="val")


def test_a_folder_of_data_files_is_read_like_a_hub_id(tmp_path):
    jsonl(tmp_path, TEXTS)
    assert list(Rows(tmp_path)) == TEXTS


@pytest.mark.parametrize("name", ["owner/data", "owner/OpenHermes-2.5", "data"])
def test_what_looks_like_a_hub_id_is_asked_for_there(name, monkeypatch):
    asked = []
    hub = datasets.Dataset.from_list(TEXTS)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: asked.append((path, split)) or hub)
    assert list(Rows(name)) == TEXTS
    assert asked == [(name, "train")]


# --- conversations --------------------------------------------------------------------------------

CONVERSATIONS = {
    "text": ({"text": "all of it"}, ("", "all of it")),
    "text pair": ({"prompt": "1+1=", "completion": "2"}, ("1+1=", "2")),
    "message pair": ({"prompt": [USER], "completion": [ASSISTANT]}, ([USER], [ASSISTANT])),
    "messages": ({"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "1+1=?"}, {"from": "gpt", "value": "2"}]},
        [USER, ASSISTANT],
    ),
    "ShareGPT with system": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "1+1=?"}]},
        [{"role": "system", "content": "s"}, USER],
    ),
    "Alpaca": ({"instruction": "Add.", "input": "1+1", "output": "2"}, ("Add.\n1+1\n", "2")),
    "Alpaca without input": ({"instruction": "Add 1+1.", "input": "", "output": "2"}, ("Add 1+1.\n", "2")),
    "GSM8K": ({"question": "1+1?", "answer": "2 #### 2"}, ("1+1?\n", "2 #### 2")),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_training_format_is_brought_into_one_of_two_forms(name, tmp_path):
    written, expected = CONVERSATIONS[name]
    rows = Rows(jsonl(tmp_path, [written]))
    assert as_conversation(rows, 0, next(iter(rows))) == expected


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "folder"])
def test_tables_hold_training_text_and_the_word_na_is_not_nothing(kind, tmp_path):
    rows = Rows(write(tmp_path, kind, TEXTS))
    pairs = [as_conversation(rows, number, row) for number, row in enumerate(rows)]
    assert pairs == [(row["prompt"], row["completion"]) for row in TEXTS]


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"prompt": "1+1=", "answer": 2}, "1+1="),
        ({"prompt": [USER], "answer": 2}, [USER]),
        ({"messages": [USER], "answer": 2}, [USER]),
        ({"question": "1+1?", "answer": "#### 2"}, "1+1?\n"),
    ],
)
def test_every_prompt_format_gives_text_or_messages(written, expected, tmp_path):
    rows = Rows(jsonl(tmp_path, [written]))
    assert as_prompt(rows, 0, next(iter(rows))) == expected


def test_a_prompt_of_gsm8k_is_the_same_for_training_and_sampling(tmp_path):
    rows = Rows(jsonl(tmp_path, [{"question": "1+1?", "answer": "2"}]))
    row = next(iter(rows))
    assert as_conversation(rows, 0, row)[0] == as_prompt(rows, 0, row)


# --- pairs ----------------------------------------------------------------------------------------

NO, MORE = {"role": "assistant", "content": "3"}, {"role": "user", "content": "And 2+2?"}
PAIRS = {
    "text": ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, ("1+1=", "2", "3")),
    "messages": ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [NO]}, ([USER], [ASSISTANT], [NO])),
    "text prompt, messages": (
        {"prompt": "1+1=?", "chosen": [ASSISTANT], "rejected": [NO]},
        ([USER], [ASSISTANT], [NO]),
    ),
    "implicit messages": ({"chosen": [USER, ASSISTANT], "rejected": [USER, NO]}, ([USER], [ASSISTANT], [NO])),
    "implicit messages of several turns": (
        {"chosen": [USER, ASSISTANT, MORE, ASSISTANT], "rejected": [USER, ASSISTANT, MORE, NO]},
        ([USER, ASSISTANT, MORE], [ASSISTANT], [NO]),
    ),
    "implicit text": (
        {"chosen": "Human: 1+1?\n\nAssistant: two", "rejected": "Human: 1+1?\n\nAssistant: twelve"},
        ("Human: 1+1?\n\nAssistant: ", "two", "twelve"),
    ),
    "implicit text, one longer": ({"chosen": "Say no more", "rejected": "Say no"}, ("Say ", "no more", "no")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_format_gives_prompt_chosen_and_rejected(name, tmp_path):
    written, expected = PAIRS[name]
    rows = Rows(jsonl(tmp_path, [written]))
    assert as_pair(rows, 0, next(iter(rows))) == expected


# --- single columns -------------------------------------------------------------------------------


def test_a_number_may_be_text_in_a_table(tmp_path):
    rows = Rows(write(tmp_path, "csv", [{"a": "2.5", "b": "x"}, {"a": "-3", "b": "1e3"}]))
    assert [number_of(rows, n, row, "a") for n, row in enumerate(rows)] == [2.5, -3.0]


def test_template_arguments_are_tools_and_keywords(tmp_path):
    tools = [{"name": "add"}]
    rows = Rows(
        jsonl(tmp_path, [{"tools": tools, "chat_template_kwargs": {"thinking": False}, "x": 1}, {"x": 2}])
    )
    found = [template_arguments(rows, number, row) for number, row in enumerate(rows)]
    assert found == [{"tools": tools, "thinking": False}, {}]


# --- what is wrong is named: file, line, column ---------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("absent.jsonl", None, r"absent\.jsonl: no such file"),
        ("absent", None, r"absent: no such file or data set folder"),
        ("a.jsonl", "", r"a\.jsonl: the file is empty"),
        ("a.jsonl", "\n\n", r"a\.jsonl: the file is empty"),
        ("a.json", "[]", r"a\.json: "),
        ("a.txt", "", r"a\.txt: the file is empty"),
        ("a.csv", "", r"a\.csv: the file is empty"),
        ("a.csv", "prompt,completion\n", r"a\.csv: the data set is empty"),
        ("a.parquet", "PAR1", r"a\.parquet: cannot be read as parquet: "),
        ("a.jsonl", '{"a": "x"}\n\n{"a": \n', r"a\.jsonl, line 3, column 1: not JSON"),
        ("a.jsonl", '{"a": "x"}\n{"a": "y"]\n', r"a\.jsonl, line 2, column 10: not JSON"),
        ("a.jsonl", '{"a": "x"}\n["y"]\n', r"a\.jsonl, line 2: a row must be a JSON object, not list"),
        ("a.json", '[{"a": "x"},\n {"a": "y"]', r"a\.json, line 2, column 11: not JSON"),
        ("a.json", '{"a": "x"}\n{"a": oops}\n', r"a\.json"),
        ("a.csv", 'a,b\n"x\ny",1\n2,3,4\n', r"a\.csv, line 4: 3 cells, but the header names 2 columns"),
        ("a.csv", 'a,b\n1,2\n"open,3\n', r"a\.csv, line 3: cannot be read as csv"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv: the columns a, a repeat"),
        ("a.docx", "x", r"a\.docx: known kinds of files are \.jsonl, \.json, \.csv"),
    ],
)
def test_a_broken_file_is_named(name, content, named, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=named) as caught:
        Rows(path)
    assert "\n" not in str(caught.value)


def test_files_of_two_kinds_or_of_other_columns_are_refused(tmp_path):
    for name, text in {"a.csv": "a\n1\n", "b.csv": "b\n1\n", "c.txt": "x\n"}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="files of one data set must be of one kind"):
        Rows([str(tmp_path / "a.csv"), str(tmp_path / "c.txt")])
    with pytest.raises(ValueError, match=r"b\.csv: the columns b repeat, or differ from the files before"):
        Rows([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    with pytest.raises(ValueError, match="known kinds of files are"):
        Rows([str(tmp_path / "a.csv"), "owner/data"])


def test_an_unknown_hub_id_says_that_it_may_be_the_network():
    with pytest.raises(
        ValueError, match=r"owner/none-0\.1: no such file or folder, and not on the Hub or no network"
    ):
        Rows("owner/none-0.1")


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="the folder holds no data set that can be read"):
        Rows(tmp_path)


WRONG_TRAINING = {
    "no known column": (
        {"input": "x", "label": 1},
        r"rows\.jsonl: cannot train on the columns input, label; known are",
    ),
    "null prompt": ({"prompt": None, "completion": "2"}, "column 'prompt': must be text, is missing"),
    "null completion": ({"prompt": "1", "completion": None}, "column 'completion': must be text, is missing"),
    "number for text": ({"prompt": "1", "completion": 2}, "column 'completion': must be text, is int"),
    "text and messages": (
        {"prompt": [USER], "completion": "2"},
        "column 'completion': must be a list of messages",
    ),
    "messages and text": (
        {"prompt": "1", "completion": [ASSISTANT]},
        "column 'completion': must be text, is list",
    ),
    "messages as text": ({"messages": "hello"}, "column 'messages': must be a list of messages"),
    "no messages": ({"messages": []}, "column 'messages': must be a list of messages"),
    "null messages": ({"messages": None, "x": 1}, "column 'messages': must be a list of messages"),
    "a list of text": (
        {"messages": ["hello"]},
        "column 'messages': a message must have `role` and `content`",
    ),
    "no role": ({"messages": [{"content": "x"}]}, "column 'messages': a message must have `role`"),
    "null content": (
        {"messages": [{"role": "user", "content": None}]},
        "column 'messages': a message must have",
    ),
    "number as content": (
        {"messages": [{"role": "user", "content": 3}]},
        "column 'messages': a message must have",
    ),
    "unknown turn": (
        {"conversations": [{"from": "alien", "value": "x"}]},
        "column 'conversations': a turn needs `value` and `from` out of human, user, gpt, assistant, system",
    ),
    "no value": ({"conversations": [{"from": "gpt"}]}, "column 'conversations': a turn needs `value`"),
    "turns of text": ({"conversations": ["x"]}, "column 'conversations': a turn needs"),
    "null turns": ({"conversations": None, "x": 1}, "column 'conversations': must be a list of turns"),
    "Alpaca without output": (
        {"instruction": "x", "input": "y"},
        "column 'output': must be text, is missing",
    ),
    "null text": ({"text": None, "x": 1}, "column 'text': must be text, is missing"),
}


@pytest.mark.parametrize("name", WRONG_TRAINING)
def test_a_wrong_training_row_is_named(name, tmp_path):
    wrong, named = WRONG_TRAINING[name]
    # A blank line and a good row before it: what is named is the line of the file, not the number of the row.
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(wrong) + "\n")
    rows = Rows(path)
    where = "" if named.startswith("rows") else r"rows\.jsonl, line 2, "
    with pytest.raises(ValueError, match=where + named):
        as_conversation(rows, 0, next(iter(rows)))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (
            {"text": "x"},
            r"rows\.jsonl: no prompt among the columns text; known are prompt, messages, question",
        ),
        ({"prompt": None, "x": 1}, "line 1, column 'prompt': must be text, is missing"),
        ({"prompt": 7}, "line 1, column 'prompt': must be text, is int"),
        ({"messages": [USER, ASSISTANT]}, "line 1, column 'messages': the last message is the assistant's"),
        ({"prompt": [USER, ASSISTANT]}, "line 1, column 'prompt': the last message is the assistant's"),
        ({"question": None, "answer": "2"}, "line 1, column 'question': must be text, is missing"),
    ],
)
def test_a_wrong_prompt_is_named(wrong, named, tmp_path):
    rows = Rows(jsonl(tmp_path, [wrong]))
    with pytest.raises(ValueError, match=named):
        as_prompt(rows, 0, next(iter(rows)))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prompt": "1", "chosen": "2"}, r"rows\.jsonl: no column 'rejected' among prompt, chosen"),
        ({"prompt": "1", "chosen": None, "rejected": "3"}, "line 1, column 'chosen': is missing"),
        (
            {"prompt": [USER], "chosen": [ASSISTANT], "rejected": None},
            "line 1, column 'rejected': is missing",
        ),
        (
            {"prompt": None, "chosen": "2", "rejected": "3"},
            "line 1, column 'prompt': must be text, is missing",
        ),
        (
            {"prompt": "1", "chosen": [ASSISTANT], "rejected": "3"},
            "line 1, column 'rejected': must be a list",
        ),
        (
            {"prompt": "1", "chosen": "2", "rejected": [NO]},
            "line 1, column 'rejected': must be text, is list",
        ),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [MORE, NO]},
            "must share their first messages and then differ",
        ),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
            "must share their first messages and then",
        ),
        ({"chosen": [USER], "rejected": [USER, NO]}, "must share their first messages and then differ"),
        (
            {"chosen": "yes", "rejected": "yesterday"},
            "column 'chosen': .*must share their first words and then differ",
        ),
        (
            {"chosen": "all the same", "rejected": "all the same"},
            "must share their first words and then differ",
        ),
    ],
)
def test_a_wrong_pair_is_named(wrong, named, tmp_path):
    rows = Rows(jsonl(tmp_path, [wrong]))
    with pytest.raises(ValueError, match=named):
        as_pair(rows, 0, next(iter(rows)))


def test_a_column_that_changes_its_type_is_named_with_its_line(tmp_path):
    path = jsonl(tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 5}])

    def read():
        rows = Rows(path)  # older versions of datasets refuse the file, newer ones keep the number
        return [as_conversation(rows, number, row) for number, row in enumerate(rows)]

    with pytest.raises(
        ValueError, match=r"rows\.jsonl, line 2, column 'completion': (must be text, is )?int"
    ):
        read()


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_wrong_cell_is_named_with_the_line_where_its_row_begins(kind, tmp_path):
    rows = Rows(
        write(tmp_path, kind, [{"a": "two\nlines", "b": "1"}, {"a": "x", "b": "?"}, {"a": "", "b": "3"}])
    )
    with pytest.raises(ValueError, match=rf"rows\.{kind}, line 4, column 'b': must be a number, is '\?'"):
        number_of(rows, 1, list(rows)[1], "b")
    with pytest.raises(ValueError, match=rf"rows\.{kind}, line 5, column 'a': must be text, is missing"):
        text_of(rows, 2, list(rows)[2], "a")


def test_a_wrong_row_of_several_files_is_named_with_its_own_file(tmp_path):
    parts = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", [{"text": "x", "n": 1}] * 3) for n in "ab"]
    parts.append(tiny.write_jsonl(tmp_path / "c.jsonl", [{"text": "x", "n": 1}, {"text": None, "n": 1}]))
    rows = Rows(parts)
    assert rows.where(2).endswith("a.jsonl, line 3")
    assert rows.where(3).endswith("b.jsonl, line 1")
    with pytest.raises(ValueError, match=r"^[^\[]*c\.jsonl, line 2, column 'text'"):
        text_of(rows, 7, list(rows)[7], "text")


@pytest.mark.parametrize("kind", ["json", "parquet", "folder"])
def test_files_without_lines_name_the_row(kind, tmp_path):
    rows = Rows(write(tmp_path, kind, [{"text": "x"}, {"text": None}]))
    with pytest.raises(ValueError, match=r"rows\.\w+, row 1, column 'text': must be text, is missing"):
        text_of(rows, 1, list(rows)[1], "text")


@pytest.mark.parametrize("value", [None, True, "many", [1], {"a": 1}])
def test_what_is_no_number_is_named(value, tmp_path):
    rows = Rows(jsonl(tmp_path, [{"n": value, "x": 1}]))
    with pytest.raises(
        ValueError, match=r"line 1, column 'n': must be a number, is .*; the columns are n, x"
    ):
        number_of(rows, 0, next(iter(rows)), "n")


def test_template_keywords_must_be_an_object(tmp_path):
    rows = Rows(jsonl(tmp_path, [{"chat_template_kwargs": "thinking"}]))
    with pytest.raises(ValueError, match="line 1, column 'chat_template_kwargs': must be an object, is str"):
        template_arguments(rows, 0, next(iter(rows)))


def test_pieces_of_text_may_be_objects_or_lists(tmp_path):
    pieces = [{"text": "a", "learn": True}, {"text": "b", "learn": False}]
    rows = Rows(jsonl(tmp_path, [{"segments": pieces}]))
    assert segments_of(rows, 0, next(iter(rows))) == [("a", 1.0), ("b", 0.0)]


@pytest.mark.parametrize(
    "wrong", [[], "ab", [{"text": "a"}], [{"text": 1, "learn": True}], [{"text": "a", "learn": "yes"}]]
)
def test_a_wrong_piece_is_named(wrong, tmp_path):
    rows = Rows(jsonl(tmp_path, [{"segments": wrong}]))
    with pytest.raises(ValueError, match=r"line 1, column 'segments': "):
        segments_of(rows, 0, {"segments": wrong})


def test_a_message_may_call_tools_without_saying_anything(tmp_path):
    calls = [{"role": "assistant", "tool_calls": [{"name": "add"}]}]
    rows = Rows(jsonl(tmp_path, [{"messages": calls}]))
    assert messages_of(rows, 0, next(iter(rows)), "messages") == calls
