"""Documents from every kind of source, against what was written."""

import json
import os

import datasets
import pytest

from rewarm.datamodules.corpus_text import documents, source_identity
from rewarm.text.encoding import Encoder
from tests import tiny

ENCODER = Encoder(tiny.build_tokenizer(tiny.CHAT_TEMPLATE))
TEXTS = ["ab", "", "c\nd", " e ", "f" * 5000]


def read(path, sample_by="line"):
    return list(documents(path, sample_by, ENCODER))


def write_lines(path, lines):
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.fixture
def sources(tmp_path):
    """The same texts in every form that has a column `text`, with another column beside it."""
    data = datasets.Dataset.from_dict({"text": TEXTS, "number": [*range(len(TEXTS))]})
    (tmp_path / "shards").mkdir()
    for number, part in enumerate((data.select([0, 1]), data.select([2, 3, 4]))):
        part.to_parquet(str(tmp_path / "shards" / f"{number}.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "array.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    return {
        "lines": tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": text, "x": 1} for text in TEXTS]),
        "files": [tiny.write_jsonl(tmp_path / f"{n}.jsonl", [{"text": t}]) for n, t in enumerate(TEXTS)],
        "parquet": str(tmp_path / "shards" / "1.parquet"),
        "shards": str(tmp_path / "shards"),
        "saved": str(tmp_path / "saved"),
        "array": str(tmp_path / "array.json"),
    }


@pytest.mark.parametrize("kind", ["lines", "files", "parquet", "shards", "saved", "array"])
def test_every_kind_of_source_gives_its_texts_in_order(sources, kind):
    assert read(sources[kind]) == (TEXTS[2:] if kind == "parquet" else TEXTS)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_a_text_file_is_cut_as_a_string_would_be(tmp_path, monkeypatch, chunk):
    text = "a\nb\n\n\nc\n\n\n\nd e\n\nf\n"
    path = write_lines(tmp_path / "a.txt", [text.removesuffix("\n")])
    monkeypatch.setattr("rewarm.datamodules.corpus_text._CHUNK", chunk)
    assert read(path, "paragraph") == text.split("\n\n")
    assert read(path, "line") == text.removesuffix("\n").split("\n")
    assert read(path, "document") == [text]


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ['{"text": "one"}', '{"text": "two"}', "broken"])
    stream = documents(path, "line", ENCODER)
    assert [next(stream), next(stream)] == ["one", "two"]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3, column 1: not JSON"):
        next(stream)


@pytest.mark.parametrize(
    ("rows", "encode"),
    [
        ([{"prompt": "1+1=", "completion": "2"}], lambda: ENCODER.pair("1+1=", "2")),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
            lambda: ENCODER.conversation(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            ),
        ),
    ],
)
def test_instruction_data_come_tokenised_with_what_is_learnt(tmp_path, rows, encode):
    (found,) = read(tiny.write_jsonl(tmp_path / "a.jsonl", rows))
    assert found.tokens.tolist() == encode().tokens.tolist()
    assert found.learn.tolist() == encode().learn.tolist()
    assert not found.learn.all()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n\n{"prompt": "x"}',
            r"a\.jsonl, line 3, column 'text': must be text, is missing",
        ),
        ("a.jsonl", '{"text": "x"}\n{"text": 5}', r"a\.jsonl, line 2, column 'text': must be text, is int"),
        ("a.jsonl", '{"text": "x"}\n[1]', r"a\.jsonl, line 2: a row must be a JSON object, not list"),
        ("a.jsonl", "", r"a\.jsonl: the file is empty"),
        ("a.jsonl", '{"other": "x"}', r"a\.jsonl: cannot train on the columns other"),
        ("a.parquet", "PAR", r"a\.parquet: cannot be read as parquet"),
        ("a.bin", "x", r"a\.bin: known kinds of files are"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=problem):
        read(str(tmp_path / name))


def test_what_is_not_utf_8_or_not_there_is_named(tmp_path):
    for name, where in (
        ("a.txt", "a.txt: cannot be read as text"),
        ("a.jsonl", "a.jsonl, line 1: not UTF-8"),
    ):
        (tmp_path / name).write_bytes(b'{"text": "\xff"}')
        with pytest.raises(ValueError, match=where):
            read(str(tmp_path / name))
    for name in ("b.txt", "b.jsonl", "b.parquet", "b.csv"):
        with pytest.raises(ValueError, match=f"{name}: no such file"):
            read(str(tmp_path / name))
    with pytest.raises(ValueError, match="no such file or data set folder"):
        read(str(tmp_path / "folder"))
    with pytest.raises(
        ValueError, match="somebody/corpus: no such file or folder, and not on the Hub or no network"
    ):
        read("somebody/corpus")


def test_a_source_is_told_from_others_by_size_time_and_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc" * 100)
    first, status = source_identity(str(path)), path.stat()
    assert source_identity([str(path)]) == first
    moved = path.rename(tmp_path / "b.txt")
    assert source_identity(str(moved)) == first  # wherever it lies
    for change in ("abd" + "abc" * 99, "abc" * 99):
        moved.write_text(change)
        os.utime(moved, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert source_identity(str(moved)) != first
    moved.write_text("abc" * 100)
    os.utime(moved, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert source_identity(str(moved)) != first
    assert source_identity("somebody/corpus") != source_identity("somebody/other")


def test_a_large_file_is_only_sampled(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(10**9)
    taken = []
    monkeypatch.setattr(
        "hashlib.blake2b",
        lambda **_: type("", (), {"update": lambda s, b: taken.append(len(b)), "hexdigest": lambda s: ""})(),
    )
    source_identity(str(path))
    assert sum(taken) == 65_536
