"""What the preview prints, against rows small enough to count by hand."""

import io

import pytest
from rich.console import Console

from rewarm import cli
from rewarm.commands.preview import histogram, marked, preview
from rewarm.text.encoding import Encoder
from tests import tiny

ROWS = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": "2+2=", "completion": "4 because of this"},
    {"prompt": "a prompt of its own =", "completion": "x"},
]


def shown(tmp_path, rows, template=None, **options):
    console = Console(width=100, record=True, file=io.StringIO(), color_system="truecolor")
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    preview(path, tokenizer=tiny.save_tokenizer(tmp_path / "t", template), console=console, **options)
    return console.export_text(styles=False)


def spans(text):
    return [(str(text)[span.start : span.end], str(span.style)) for span in text.spans]


def test_learnt_tokens_are_green_and_the_others_dim():
    encoder = Encoder(tiny.build_tokenizer())
    assert spans(marked(encoder.pair("1+1=", "2"), encoder)) == [("1+1=", "dim"), ("2</s>", "green")]
    pieces = encoder.segments([("ab", 0.0), ("c", 0.5), ("d", 1.0)])
    assert spans(marked(pieces, encoder)) == [("ab", "dim"), ("c", "yellow"), ("d</s>", "green")]


def test_counts_and_lengths_are_those_of_the_rows(tmp_path):
    text = shown(tmp_path, ROWS, max_length=12)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    # 5 positions, 12 of 21, and 12 of 22, of which no completion is left.
    for line in (
        "read 3",
        "too long, dropped 0",
        "too long, truncated 2",
        "without a target, dropped 1",
        "trained on 2",
        "tokens learnt 11 of 17 (64.7%)",
        "median 12, mean 8.5, longest 12",
    ):
        assert line in lines
    assert "example 0" in text
    assert "1+1=2</s>" in text


def test_both_sides_of_a_pair_are_shown(tmp_path):
    text = shown(tmp_path, [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}])
    assert "example 0 chosen" in text
    assert "1+1=3</s>" in text


def test_as_many_samples_as_asked_for_and_the_same_with_the_same_seed(tmp_path):
    rows = [{"prompt": f"{n}=", "completion": "x"} for n in range(30)]
    texts = [shown(tmp_path, rows, samples=4, seed=seed) for seed in (0, 0, 1)]
    assert texts[0].count("example ") == 4
    assert texts[0] == texts[1] != texts[2]
    assert "example " not in shown(tmp_path, rows, samples=0)


def test_bars_are_in_proportion_and_every_length_is_counted():
    lines = histogram([1, 1, 1, 1, 10, 11, 100], 100).splitlines()
    assert lines[0] == "    1-10     5 " + 40 * "#"
    assert lines[1] == "   11-20     1 " + 8 * "#"
    assert lines[2] == "   21-30     0"
    assert lines[9].endswith("1 " + 8 * "#")
    assert lines[10] == "median 1, mean 17.9, longest 100"
    assert histogram([3], 1000).splitlines()[0].split()[:2] == ["1-1", "0"]


def test_it_is_a_command_whose_mistakes_are_one_line(tmp_path, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    tokenizer = tiny.save_tokenizer(tmp_path / "t")
    cli.main(["preview", path, "--tokenizer", tokenizer, "--max-length", "64", "--samples", "1"])
    assert "trained on" in capsys.readouterr().out
    for arguments, named in (
        (["--overlong", "error", "--max-length", "12"], "line 2: 21 positions, but max_length is 12"),
        (["--samples", "-1"], "samples is -1"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["preview", path, "--tokenizer", tokenizer, *arguments])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
