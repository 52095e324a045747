"""Rows to examples: what is cut, what is left out, and who is told."""

import pytest
import torch

from rewarm.datamodules.tokenising import tokenise, truncated
from rewarm.text.encoding import Encoder, Tokens
from rewarm.text.formats import Rows
from tests import fits, tiny


def sequence(prompt, completion):
    tokens = torch.tensor([*prompt, *completion])
    return Tokens(tokens, torch.arange(len(tokens)) >= len(prompt))


@pytest.fixture
def found(tmp_path):
    """Tokenises rows of a prompt and a completion, each a list of tokens; a text instead says why not."""

    def make(rows, **options):
        def encode(number, row):
            return row["why"] if row.get("why") else (sequence(row["prompt"], row["completion"]),)

        data = Rows(tiny.write_jsonl(tmp_path / "rows.jsonl", rows))
        encoder = Encoder(tiny.build_tokenizer())
        return tokenise(data, encode, **{"encoder": encoder, "max_length": 4, "overlong": "drop"} | options)

    return make


def test_what_is_left_is_numbered_anew_and_remembers_its_row(found, caplog):
    rows = [
        {"prompt": [5], "completion": [6, 7]},
        {"prompt": [5], "completion": [], "why": "unwanted"},
        {"prompt": [5] * 4, "completion": [6, 7]},
        {"prompt": [5, 6], "completion": []},
        {"prompt": [8], "completion": [9]},
    ]
    result = found(rows)
    assert [
        (example.id, number) for example, number in zip(result.examples, result.numbers, strict=True)
    ] == [
        (0, 0),
        (1, 4),
    ]
    assert [example.sequences[0].tokens.tolist() for example in result.examples] == [[5, 6, 7], [8, 9]]
    assert result.left_out == {
        "unwanted, dropped": 1,
        "too long, dropped": 1,
        "without a target, dropped": 1,
    }
    assert "rows.jsonl: 1 of 5 rows too long, dropped" in caplog.text


@pytest.mark.parametrize(
    ("overlong", "tokens"), [("keep_start", [1, 2, 3, 4, 5]), ("keep_end", [2, 3, 4, 5, 6])]
)
def test_a_row_that_is_too_long_keeps_one_end(found, overlong, tokens):
    # Four positions hold five tokens: the last is only a target.
    result = found([{"prompt": [1, 2], "completion": [3, 4, 5, 6]}], overlong=overlong)
    assert result.examples[0].sequences[0].tokens.tolist() == tokens
    assert result.left_out == {"too long, truncated": 1}


def test_a_row_that_is_too_long_is_named_where_that_is_an_error(found):
    rows = [{"prompt": [1], "completion": [2]}, {"prompt": [1], "completion": [2] * 9}]
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: 9 positions, but max_length is 4"):
        found(rows, overlong="error")


def test_without_any_row_there_is_nothing_to_train_on(found):
    with pytest.raises(ValueError, match="no row is left to train on"):
        found([{"prompt": [5], "completion": [], "why": "unwanted"}])


def test_a_start_that_is_cut_keeps_its_bos_token():
    (kept,) = truncated((sequence([1, 2, 3, 4], [5, 6]),), 3, "keep_end", 1)
    assert kept.tokens.tolist() == [1, 4, 5, 6]
    assert kept.learn.tolist() == [False, False, True, True]


def test_a_pair_is_cut_in_what_both_share_or_not_at_all():
    pair = sequence([1, 2, 3, 4], [5, 6]), sequence([1, 2, 3, 4], [7])
    first, second = truncated(pair, 3, "keep_end", None)
    assert (first.tokens.tolist(), second.tokens.tolist()) == ([3, 4, 5, 6], [3, 4, 7])
    assert truncated(pair, 3, "keep_end", 1)[1].tokens.tolist() == [1, 4, 7]
    apart = sequence([1, 2, 3, 4], [5, 6]), sequence([1, 9, 3, 4], [7])
    assert truncated(apart, 3, "keep_end", None) == ()


@pytest.fixture
def files(tmp_path):
    return fits.Files(tmp_path)


def test_straddling_tokens_are_counted_in_the_log(files, caplog):
    data = fits.instructions(files)
    data.encoder.straddled = 2
    data.setup()
    assert "2 sequences have a token across prompt and completion" in caplog.text
    assert data.encoder.straddled == 0
