"""One curriculum for all data modules: the same arguments, with the same outcome."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import rewarm
from rewarm.datamodules.arrangement import Arrangement
from rewarm.datamodules.score_table import ScoreTable, example_id
from rewarm.text.formats import Rows
from tests import tiny

SHARED = ("score", "score_table", "order", "window", "pacing", "keep", "group", "transform")
#         0    1    2    3    4    5
LEVELS = [2.0, 0.0, 5.0, 1.0, 4.0, 3.0]
STAGES = ["b", "a", "b", "a", "c", "a"]


def nothing(prompts, completions, **columns):
    return [0.0] * len(prompts)


@dataclass(frozen=True)
class Kind:
    """A data module and the further columns that its rows have."""

    make: Callable[..., Any]
    columns: dict[str, str]


KINDS = {
    "instructions": Kind(rewarm.InstructionData, {"completion": "12"}),
    "pairs": Kind(rewarm.PreferenceData, {"chosen": "12", "rejected": "3"}),
    "prompts": Kind(
        lambda *args, **options: rewarm.PromptData(*args, reward=nothing, **options), {"answer": "12"}
    ),
}


@pytest.fixture(params=KINDS)
def made(request, tmp_path):
    """Makes the data of rows with levels and stages, in each kind of data module."""
    kind = KINDS[request.param]

    def make(**options):
        rows = [
            {"prompt": f"{number}+1=", "level": level, "stage": stage} | kind.columns
            for number, (level, stage) in enumerate(zip(LEVELS, STAGES, strict=True))
        ]
        path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
        data = kind.make(path, tiny.save_tokenizer(tmp_path / "tokenizer"), **options)
        data.setup("fit")
        return data

    return make


def test_every_data_module_takes_the_same_arguments_by_their_names():
    for name in ("InstructionData", "PreferenceData", "PromptData"):
        parameters = inspect.signature(getattr(rewarm, name)).parameters
        assert set(SHARED) <= set(parameters), name
        by_place = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert by_place == ["train", "tokenizer"]
    shared = [
        {n: str(inspect.signature(getattr(rewarm, m)).parameters[n]) for n in SHARED}
        for m in ("InstructionData", "PreferenceData", "PromptData")
    ]
    assert shared[0] == shared[1] == shared[2]


@pytest.mark.parametrize("name", ["InstructionData", "PreferenceData", "PromptData"])
def test_the_table_and_the_score_in_it_are_not_mixed_up(name):
    with pytest.raises(TypeError, match=rf"{name} has no argument 'scores' any more; write score_table="):
        getattr(rewarm, name)("rows.jsonl", "tokenizer", scores="table.parquet")


def test_bucket_is_the_word_for_lengths():
    with pytest.raises(TypeError, match="no argument 'length_window' any more; write length_bucket="):
        rewarm.InstructionData("rows.jsonl", "tokenizer", length_window=2)


def test_a_sorted_order_goes_through_the_scores(made):
    assert made(score="level", order="ascending").curriculum.propose(6, 0) == [1, 3, 0, 5, 4, 2]


def test_an_order_by_columns_needs_no_score(made):
    assert made(order=rewarm.Staged(["c", "a", "b"])).curriculum.propose(6, 0) == [4, 1, 3, 5, 0, 2]
    # The levels of a, then those of b, then those of c.
    by_block = rewarm.Blocked(subject="stage", level="level")
    assert made(order=by_block).curriculum.propose(6, 0) == [0, 2, 1, 3, 5, 4]


def test_a_window_shuffles_stretches_of_the_order(made):
    data = made(score="level", order="ascending", window=3)
    passes = [data.curriculum.propose(6, 0) for _ in range(8)]
    for drawn in passes:
        assert set(drawn[:3]) == {1, 3, 0}
        assert set(drawn[3:]) == {5, 4, 2}
    assert len({tuple(drawn) for drawn in passes}) > 1


def test_keep_leaves_out_by_score_and_numbers_what_is_left(made, caplog):
    data = made(score="level", keep=rewarm.Band(1.0, 4.0))  # rows 0, 3, 4 and 5
    assert data.curriculum.num_examples == 4
    assert "4 of 6 rows kept by level" in caplog.text
    texts = (
        data._prompts["train"].texts
        if isinstance(data, rewarm.PromptData)
        else [
            data.tokenizer.decode(e.sequences[0].tokens[~e.sequences[0].learn])
            for e in data.examples("train")
        ]
    )
    assert texts == ["0+1=", "3+1=", "4+1=", "5+1="]
    kept_and_sorted = made(score="level", keep=rewarm.Band(1.0, 4.0), order="descending")
    assert kept_and_sorted.curriculum.propose(4, 0) == [2, 3, 0, 1]


def test_a_floor_holds_for_each_group(made):
    # Of the highest half (2, 4, 5), a has only 5; a floor of a third of three lets its best in first.
    gate = rewarm.TopShare(0.5, floor=1 / 3)
    data = made(score="level", keep=gate, group="stage")
    assert data.curriculum.num_examples == 3
    assert data.curriculum.groups_of([0, 1, 2]) == ["b", "c", "a"]


def test_a_pacing_shows_the_first_share_of_an_order_by_columns(made):
    data = made(order=rewarm.Staged(["c", "a", "b"]), pacing=rewarm.OnePassPacing([2], [1 / 6, 1.0]))
    assert data.curriculum.propose(3, 0) == [4, 4, 4]
    assert set(data.curriculum.propose(5, 2)) == {0, 1, 2, 3, 5}


def test_a_transform_rewrites_the_rows_but_not_their_scores(made):
    def doubled(row):
        return {**row, "prompt": row["prompt"] * 2, "level": 0.0}

    data = made(score="level", order="ascending", transform=doubled)
    assert data.curriculum.propose(6, 0) == [1, 3, 0, 5, 4, 2]
    if isinstance(data, rewarm.PromptData):
        assert data._prompts["train"].texts[:2] == ["0+1=0+1=", "1+1=1+1="]
        assert data._prompts["train"].columns["level"] == [0.0] * 6
    else:
        first = data.examples("train")[0].sequences[0]
        assert data.tokenizer.decode(first.tokens[~first.learn]) == "0+1=0+1="


def test_a_table_joins_and_a_row_without_its_score_is_named(made, tmp_path):
    path = made().train
    ids = [example_id(row) for row in Rows(path)]
    table = str(tmp_path / "scores.parquet")
    ScoreTable(path, ids, {"loss": [3.0, 1.0, 2.0, 0.0, 5.0, 4.0]}, {}).write(table)
    data = made(score="loss", score_table=table, order="descending")
    assert data.curriculum.propose(6, 0) == [4, 5, 0, 2, 1, 3]
    ScoreTable(path, ids, {"loss": [3.0, None, 2.0, 0.0, 5.0, 4.0]}, {}).write(table)
    with pytest.raises(ValueError, match="line 2, column 'loss': must be a number, is missing"):
        made(score="loss", score_table=table, order="descending")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"score": "depth", "order": "ascending"}, "score is 'depth'; known are .*prompt_tokens"),
        ({"score": "level", "order": "ascending", "group": "depth"}, "group is 'depth'; known are"),
        ({"order": rewarm.Blocked("depth")}, "a column of order is 'depth'; known are"),
        ({"group": "prompt_tokens"}, "group is 'prompt_tokens'; known are"),
        ({"keep": rewarm.TopShare(0.5)}, "keep chooses examples by their scores: set score"),
        ({"score": "level", "keep": rewarm.Band(9.0, 10.0)}, "keep admits none of 6 rows by their level"),
        ({"score_table": "s.parquet"}, "score_table is 's.parquet', but nothing reads it"),
        ({"score": "level"}, "scores are given, but order 'shuffled' ignores them"),
        ({"order": "ascending"}, "order 'ascending' needs scores"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(made, options, named):
    with pytest.raises(ValueError, match=named):
        made(**options)


def test_a_column_with_the_name_of_a_measure_is_not_guessed_about(tmp_path):
    rows = [{"prompt": "1=", "prompt_tokens": 5}]
    data = rewarm.PromptData(
        tiny.write_jsonl(tmp_path / "rows.jsonl", rows),
        tiny.save_tokenizer(tmp_path / "tokenizer"),
        reward=nothing,
        score="prompt_tokens",
        order="ascending",
    )
    with pytest.raises(ValueError, match="'prompt_tokens' is both a column and what is measured"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("score", "drawn"),
    [("prompt_tokens", [1, 0, 2]), ("chosen_tokens", [2, 0, 1]), ("rejected_tokens", [0, 1, 2])],
)
def test_pairs_are_sorted_by_the_tokens_of_their_parts(tmp_path, score, drawn):
    rows = [
        {"prompt": "12=", "chosen": "12", "rejected": "1"},
        {"prompt": "1=", "chosen": "123", "rejected": "12"},
        {"prompt": "1234=", "chosen": "1", "rejected": "1234"},
    ]
    data = rewarm.PreferenceData(
        tiny.write_jsonl(tmp_path / "rows.jsonl", rows),
        tiny.save_tokenizer(tmp_path / "tokenizer"),
        score=score,
        order="ascending",
    )
    data.setup("fit")
    assert data.curriculum.propose(3, 0) == drawn


def test_prompts_are_sorted_by_their_tokens(tmp_path):
    rows = [{"prompt": "12="}, {"prompt": "1="}, {"prompt": "1234="}]
    data = rewarm.PromptData(
        tiny.write_jsonl(tmp_path / "rows.jsonl", rows),
        tiny.save_tokenizer(tmp_path / "tokenizer"),
        reward=nothing,
        score="prompt_tokens",
        order="descending",
    )
    data.setup("fit")
    assert data.curriculum.propose(3, 0) == [2, 0, 1]


def test_scores_and_orders_of_another_run_are_refused_where_they_arrange_the_data(made):
    sort = {"score": "level", "order": "ascending"}
    state = made(**sort).state_dict()
    made(**sort).load_state_dict(state)
    by_stage = made(order=rewarm.Staged(["a", "b", "c"])).state_dict()
    with pytest.raises(ValueError, match="the checkpoint was made with 6 examples"):
        made(order=rewarm.Staged(["c", "b", "a"])).load_state_dict(by_stage)
    with pytest.raises(ValueError, match="the checkpoint was made with 6 examples"):
        made(score="level", keep=rewarm.Band(1.0, 4.0)).load_state_dict(made().state_dict())


def test_what_is_needed_is_told_by_the_arguments():
    order = rewarm.Blocked(subject="topic", level="grade")
    arrangement = Arrangement(score="loss", order=order, group="source")
    assert arrangement.numbers == {"loss", "grade"}
    assert arrangement.labels == {"topic", "source"}
