"""The command `rewarm score`."""

import pytest
import torch

import rewarm.scoring.score_job
import rewarm.scoring.scored_data
from rewarm.cli import main
from rewarm.commands.score import score
from rewarm.datamodules.score_table import ScoreTable, example_id
from rewarm.lightning_modules.policy import build_model
from rewarm.text.formats import Rows
from tests import tiny

ROWS = [{"prompt": f"{n}+{n}=", "completion": "x" * (n + 1), "level": n} for n in range(9)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    build_model(tiny.LLAMA).save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path):
    """Runs the command on the rows; the table is `s.parquet`."""
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS)

    def call(*arguments, data=data):
        main(["score", data, "--output", str(tmp_path / "s.parquet"), *map(str, arguments)])
        return ScoreTable.read(tmp_path / "s.parquet")

    return call


def fails(capsys, run, *arguments, **options):
    """The one line that a mistake gets."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, **options)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rewarm: error:")]
    return line


def test_scores_are_added_to_one_table_with_how_they_were_made(run, model, capsys):
    run("--by", "length", "--tokenizer", model, "--part", "completion")
    run("--by", "column", "--column", "level", "--name", "hard")
    table = run("--by", "loss", "--model", model)
    assert table.ids == [example_id(row) for row in ROWS]
    assert table.scores["length"] == [n + 2.0 for n in range(9)]
    assert table.scores["hard"] == [float(n) for n in range(9)]
    assert all(3 < value < 6 for value in table.scores["loss"])
    assert table.made["loss"]["arguments"]["model"] == model
    assert table.made["loss"]["arguments"]["batch_tokens"] == 16384
    assert table.made["hard"]["by"] == "column"
    assert set(table.made["loss"]["versions"]) == {"rewarm", "python", "torch", "transformers"}
    assert "loss of 9 of 9 examples" in capsys.readouterr().out


def test_a_score_that_is_there_is_shown_and_not_made_again(run, model, monkeypatch, tmp_path, capsys):
    before = run("--by", "loss", "--model", model)
    monkeypatch.setattr(rewarm.scoring.score_job, "build_model", None)
    left = tmp_path / "s.parquet.loss.partial"
    left.mkdir()
    capsys.readouterr()
    assert run("--by", "loss", "--model", model, "--device", "cpu") == before
    assert "loss of 9 of 9 examples" in capsys.readouterr().out
    assert not left.exists()


def test_the_table_keeps_its_order_when_the_data_are_reordered(run, model, tmp_path):
    first = run("--by", "column", "--column", "level")
    again = tiny.write_jsonl(tmp_path / "again.jsonl", ROWS[::-1] + ROWS[:2])
    table = run("--by", "length", "--tokenizer", model, "--part", "completion", data=again)
    assert table.ids == first.ids
    assert table.scores["length"] == [n + 2.0 for n in range(9)]


def test_a_killed_command_goes_on_and_leaves_nothing_behind(run, model, monkeypatch, tmp_path):
    options = ("--by", "loss", "--model", model, "--batch-tokens", 30)
    expected = run(*options, "--name", "whole").scores["whole"]
    add, calls = rewarm.scoring.scored_data.Finished.add, []

    def killed(self, places, values):
        add(self, places, values)
        calls.append(places)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rewarm.scoring.scored_data.Finished, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run(*options)
    assert (tmp_path / "s.parquet.loss.partial").is_dir()
    assert "loss" not in ScoreTable.read(tmp_path / "s.parquet").scores
    assert run(*options).scores["loss"] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "s.parquet"]


def test_a_model_that_changed_meanwhile_is_refused(run, model, monkeypatch, tmp_path, capsys):
    other = tmp_path / "other"
    torch.manual_seed(1)
    build_model(tiny.LLAMA).save_pretrained(other)
    tiny.build_tokenizer().save_pretrained(other)

    def killed(self, places, values):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rewarm.scoring.scored_data.Finished, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run("--by", "loss", "--model", other)
    (other / "model.safetensors").touch()
    assert "was begun with weights" in fails(capsys, run, "--by", "loss", "--model", other)


def test_abilities_are_noted_and_printed(run, tmp_path, capsys):
    rows = [{**row, "a": int(row["level"] < 6), "b": int(row["level"] < 3)} for row in ROWS]
    path = tiny.write_jsonl(tmp_path / "answers.jsonl", rows)
    table = run("--by", "irt_difficulty", "--answers", "a", "b", data=path)
    abilities = table.made["irt_difficulty"]["abilities"]
    assert abilities["a"] > 0 > abilities["b"]
    assert f"ability {abilities['a']:+.3f}  a" in capsys.readouterr().out


def test_a_histogram_is_drawn(run, tmp_path, capsys):
    run("--by", "column", "--column", "level", "--plot", tmp_path / "h.png")
    assert (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.count("#") > 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "hardness"], "by is 'hardness'; it must be one of 'length', 'rarity', 'compression'"),
        (["--by", "column", "--column", "level", "--name", "id"], "name is 'id'"),
        (["--by", "column", "--column", "level", "--name", "a/b"], "name is 'a/b'"),
        (["--by", "loss"], "loss needs --model"),
        (["--by", "pass_rate", "--model", "m"], "pass_rate needs --reward"),
        (
            ["--by", "length", "--tokenizer", "t", "--reward", "r"],
            "--reward is not for length, but for pass_rate",
        ),
        (["--by", "compression", "--model", "m"], "--model is not for compression, but for loss, perplexity"),
        (["--by", "loss", "--model", "nowhere/at/all"], "tokenizer is 'nowhere/at/all'"),
        (["--by", "column", "--column", "prompt"], "column 'prompt': must be a number"),
    ],
)
def test_mistakes_are_one_line(run, capsys, tmp_path, arguments, message):
    assert message in fails(capsys, run, *arguments)
    assert not (tmp_path / "s.parquet").exists()


def test_another_score_of_the_same_name_is_refused(run, model, capsys):
    run("--by", "column", "--column", "level", "--name", "hard")
    line = fails(capsys, run, "--by", "length", "--tokenizer", model, "--name", "hard")
    assert "has a column 'hard' already, by column(column=level), not by length(part=all" in line


def test_other_data_are_refused(run, capsys, tmp_path):
    run("--by", "column", "--column", "level")
    other = tiny.write_jsonl(tmp_path / "other.jsonl", [{**ROWS[0], "level": 77}])
    line = fails(capsys, run, "--by", "compression", data=other)
    assert "s.parquet: the scores are of" in line
    assert "other.jsonl (1," in line


def test_it_can_be_called_from_python(tmp_path):
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    table = score(data, by="column", output=str(tmp_path / "s.parquet"), column="level")
    assert table.scores["column"] == [float(row["level"]) for row in Rows(data)]
