"""Score tables: ids, reading, writing, and joining them to the data they are of."""

import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import rewarm
from rewarm.datamodules.score_table import ScoreTable, data_fingerprint, example_id, join_scores
from rewarm.text.formats import Rows
from tests import fits, tiny


def ids_of(path):
    return [example_id(row) for row in Rows(path)]


def scored(path, table, scores, name="hardness"):
    ids = list(dict.fromkeys(ids_of(path)))
    ScoreTable(str(path), ids, {name: scores}, {name: {"by": "column"}}).write(table)
    return str(table)


ROWS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n), "level": n} for n in range(12)]


def test_an_id_depends_on_the_content_alone(tmp_path):
    lines = tiny.write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"prompt": "?", "completion": "x"}])
    swapped = [dict(reversed(row.items())) for row in ROWS]
    other = tiny.write_jsonl(tmp_path / "b.jsonl", [{"prompt": "?", "completion": "x"}, *swapped[::-1]])
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "c.parquet")
    assert ids_of(lines) == ids_of(other)[::-1]
    assert ids_of(str(tmp_path / "c.parquet")) == ids_of(lines)[:-1]
    assert len({*ids_of(lines)}) == 13


def test_a_changed_cell_changes_the_id_and_the_fingerprint():
    ids = [example_id(row) for row in ROWS]
    assert example_id({**ROWS[0], "completion": "1"}) not in ids
    assert example_id({**ROWS[0], "more": 1}) not in ids
    assert data_fingerprint(ids) == data_fingerprint(ids[::-1] + ids[:3])
    assert data_fingerprint(ids) != data_fingerprint(ids[:-1])


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = ScoreTable("data.jsonl", ["a", "b"], {"s": [1.5, None]}, {"s": {"by": "loss", "model": "m"}})
    table.write(tmp_path / "folder" / "s.parquet")
    assert ScoreTable.read(tmp_path / "folder" / "s.parquet") == table
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["s.parquet"]


def test_scores_find_their_rows_in_any_order_and_repetition(tmp_path):
    table = scored(
        tiny.write_jsonl(tmp_path / "a.jsonl", ROWS), tmp_path / "s.parquet", [n / 2 for n in range(12)]
    )
    mixed = [*ROWS, *ROWS[:5]]
    random.Random(0).shuffle(mixed)
    rows = Rows(tiny.write_jsonl(tmp_path / "b.jsonl", mixed))
    join_scores(rows, table)
    assert [row["hardness"] for row in rows] == [row["level"] / 2 for row in mixed]


def test_other_data_are_refused_with_both_fingerprints_and_a_row(tmp_path):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    table = scored(path, tmp_path / "s.parquet", [0.0] * 12)
    changed = tiny.write_jsonl(tmp_path / "b.jsonl", [*ROWS[:3], {**ROWS[3], "completion": "7"}, *ROWS[4:]])
    with pytest.raises(ValueError, match="1 rows have no score, such as .*b.jsonl, line 4") as error:
        join_scores(Rows(changed), table)
    for of in (path, changed):
        assert data_fingerprint(ids_of(of))[:8] in str(error.value)
    fewer = tiny.write_jsonl(tmp_path / "c.jsonl", ROWS[:5])
    with pytest.raises(ValueError, match=r"12 examples, .* \(5, .*: 0 rows have no score;"):
        join_scores(Rows(fewer), table)


def test_a_name_in_both_is_refused_only_if_it_is_wanted(tmp_path):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    table = scored(path, tmp_path / "s.parquet", [7.0] * 12, name="level")
    with pytest.raises(ValueError, match="'level' is a column of"):
        join_scores(Rows(path), table, ["level"])
    rows = Rows(path)
    join_scores(rows, table)
    assert [row["level"] for row in rows] == list(range(12))


def test_what_is_no_table_or_damaged_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such score table"):
        ScoreTable.read(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        ScoreTable.read(tmp_path / "text.parquet")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="is no score table"):
        ScoreTable.read(tmp_path / "rows.parquet")
    ScoreTable("d", ["a", "b"], {"s": [1.0, 2.0]}).write(tmp_path / "s.parquet")
    whole = pyarrow.parquet.read_table(tmp_path / "s.parquet")
    pyarrow.parquet.write_table(whole.slice(0, 1), tmp_path / "s.parquet")
    with pytest.raises(ValueError, match="are not those that the scores were made for"):
        ScoreTable.read(tmp_path / "s.parquet")


# --- the data modules ---------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    return fits.Files(tmp_path / "files")


@pytest.mark.parametrize(
    ("make", "path", "column"),
    [
        (fits.instructions, "sft", "prompt"),
        (fits.preferences, "pairs", "prompt"),
        (fits.prompts, "prompts", "prompt"),
    ],
)
def test_every_data_module_sorts_by_a_joined_score(files, tmp_path, make, path, column):
    source = getattr(files, path)
    ids = list(dict.fromkeys(ids_of(source)))
    values = random.Random(1).sample(range(100), len(ids))
    table, hardness = scored(source, tmp_path / "s.parquet", values), dict(zip(ids, values, strict=True))
    data = make(files, score="hardness", score_table=table, order="descending")
    data.setup()
    drawn = data.curriculum.propose(len(ids_of(source)), step=0)
    found = [hardness[ids_of(source)[number]] for number in drawn]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_a_row_without_a_score_is_named_when_it_is_sorted_by(files, tmp_path):
    ids = list(dict.fromkeys(ids_of(files.sft)))
    table = scored(files.sft, tmp_path / "s.parquet", [0.0, None, *[1.0] * (len(ids) - 2)])
    data = fits.instructions(files, score="hardness", score_table=table, order="ascending")
    with pytest.raises(
        ValueError, match=r"sft.jsonl, line 2, column 'hardness': must be a number, is missing"
    ):
        data.setup()


@pytest.mark.parametrize("make", [fits.instructions, fits.preferences, fits.prompts])
def test_a_table_that_nothing_reads_is_refused(files, make):
    with pytest.raises(ValueError, match="nothing reads it"):
        make(files, score_table="s.parquet")


def test_an_unknown_score_is_told_the_tables_columns(files, tmp_path):
    ids = list(dict.fromkeys(ids_of(files.sft)))
    table = scored(files.sft, tmp_path / "s.parquet", [0.0] * len(ids))
    data = fits.instructions(files, score="hard", score_table=table, order="ascending")
    with pytest.raises(ValueError, match="score is 'hard'; known are .*hardness"):
        data.setup()


def test_the_validation_data_need_no_scores(files, tmp_path):
    ids = list(dict.fromkeys(ids_of(files.sft)))
    table = scored(files.sft, tmp_path / "s.parquet", [float(n) for n in range(len(ids))])
    val = tiny.write_jsonl(tmp_path / "val.jsonl", ROWS)
    data = rewarm.InstructionData(
        files.sft,
        files.tokenizer,
        val=val,
        score="hardness",
        score_table=table,
        order="ascending",
        max_length=48,
    )
    data.setup()
    assert len(data._examples["val"]) == 12
