"""Scores without a model, against what they are defined as."""

import math
import zlib
from collections import Counter

import pytest
import torch

from rewarm.datamodules.score_table import ScoreTable
from rewarm.scoring.scored_data import ScoredData
from rewarm.scoring.text_scores import column, compression, irt_difficulty, length, rarity
from rewarm.text.encoding import Encoder
from tests import tiny

ROWS = [
    {"prompt": "12+7=", "completion": "19", "level": 2.5},
    {"prompt": "1+1=", "completion": "2 or so", "level": 1},
    {"prompt": "1+1=", "completion": "2 or so", "level": 1},
    {"prompt": "", "completion": "a text", "level": 0},
]


@pytest.fixture
def data(tmp_path):
    return ScoredData(tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS))


def encoder():
    return Encoder(tiny.build_tokenizer())


def test_length_counts_the_tokens_of_a_part(data):
    # One token per character, and one for the end.
    assert length(data, encoder()).columns == {"": [8.0, 12.0, 7.0]}
    assert length(data, encoder(), part="completion").columns[""] == [3.0, 8.0, 7.0]
    assert length(data, encoder(), part="prompt").columns[""] == [5.0, 4.0, 0.0]


def test_rarity_counts_the_part_of_all_rows(data):
    counts = Counter("".join(row["prompt"] for row in ROWS))
    expected = [
        -sum(math.log(counts[letter] / counts.total()) for letter in ROWS[number]["prompt"])
        for number in (0, 1)
    ]
    found = rarity(data, encoder(), part="prompt").columns[""]
    assert found[:2] == pytest.approx(expected)
    assert found[2] is None


def test_compression_is_that_of_the_text(data):
    text = (ROWS[0]["prompt"] + ROWS[0]["completion"]).encode()
    assert compression(data).columns[""][0] == len(zlib.compress(text, 9)) / len(text)
    assert compression(data, part="prompt").columns[""][2] is None


def test_a_column_is_taken_as_it_is_or_named(data):
    assert column(data, column="level").columns == {"": [2.5, 1.0, 0.0]}
    with pytest.raises(ValueError, match="rows.jsonl, line 1, column 'prompt': must be a number"):
        column(data, column="prompt")


# --- item response theory -----------------------------------------------------------------------------


def answers(tmp_path, models=6, samples=20, examples=40):
    """Tables of models of known ability on examples of known difficulty."""
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.linspace(-2, 2, examples)
    data = ScoredData(
        tiny.write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"{n}", "answer": n} for n in range(examples)])
    )
    paths = []
    for model in range(models):
        p = torch.sigmoid(torch.tensor(model - 2.5) - difficulty)
        passed = (torch.rand(samples, examples, generator=generator) < p).sum(0).double().tolist()
        columns = {"pass_rate_passed": passed, "pass_rate_samples": [float(samples)] * examples}
        table = ScoreTable(
            "d", data.ids[::-1], {n: v[::-1] for n, v in columns.items()}, {"pass_rate": {"by": "pass_rate"}}
        )
        table.write(tmp_path / f"{model}.parquet")
        paths.append(str(tmp_path / f"{model}.parquet"))
    return data, paths, difficulty


def test_difficulties_are_fitted_to_the_pass_rates_of_several_tables(tmp_path):
    data, paths, difficulty = answers(tmp_path)
    result = irt_difficulty(data, answers=paths)
    found = torch.tensor(result.columns[""])
    assert torch.corrcoef(torch.stack([found, difficulty]))[0, 1] > 0.95
    abilities = list(result.notes["abilities"].values())
    assert abilities == sorted(abilities)
    assert next(iter(result.notes["abilities"])) == f"{paths[0]}:pass_rate"


def test_columns_of_right_and_wrong_are_answers_too(tmp_path):
    rows = [{"prompt": f"{n}", "a": int(n < 3), "b": int(n < 1)} for n in range(4)]
    data = ScoredData(tiny.write_jsonl(tmp_path / "d.jsonl", rows))
    result = irt_difficulty(data, answers=["a", "b"])
    one, two, three, four = result.columns[""]
    assert two == pytest.approx(three)
    assert one < two < four
    assert result.notes["abilities"]["a"] > result.notes["abilities"]["b"]


def test_examples_that_nobody_answered_have_no_difficulty(tmp_path):
    data, paths, _ = answers(tmp_path, models=2)
    for path in paths:
        table = ScoreTable.read(path)
        table.scores["pass_rate_passed"][-1] = table.scores["pass_rate_samples"][-1] = None
        table.write(path)
    found = irt_difficulty(data, answers=paths).columns[""]
    assert found[0] is None
    assert None not in found[1:]


def test_answers_that_will_not_do_are_named(tmp_path):
    data, paths, _ = answers(tmp_path, models=2)
    with pytest.raises(ValueError, match="answers has 1 model"):
        irt_difficulty(data, answers=paths[:1])
    with pytest.raises(ValueError, match="answers has 'nobody': neither a score table nor"):
        irt_difficulty(data, answers=["nobody", "answer"])
    with pytest.raises(ValueError, match="column 'answer' holds something else than 0 and 1"):
        irt_difficulty(data, answers=["answer", paths[0]])
    other = ScoredData(tiny.write_jsonl(tmp_path / "e.jsonl", [{"prompt": "1", "answer": 0}]))
    with pytest.raises(ValueError, match="the scores are of d"):
        irt_difficulty(other, answers=paths)
    ScoreTable("d", data.ids, {"x": [1.0] * len(data)}, {"x": {"by": "length"}}).write(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="has no pass rates"):
        irt_difficulty(data, answers=[str(tmp_path / "x.parquet"), paths[0]])
