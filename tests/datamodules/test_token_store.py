"""Tokens on disk, against the encoder; rows of them, against cutting a list."""

import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from rewarm.datamodules import token_store as module
from rewarm.datamodules.token_store import TokenRows, token_store
from rewarm.text.encoding import Encoder
from tests import tiny

ENCODER = Encoder(tiny.build_tokenizer())


@pytest.fixture
def write(tmp_path):
    """Makes a store of some texts."""

    def make(texts, encoder=ENCODER, name="a.jsonl", **options):
        path = tiny.write_jsonl(tmp_path / name, [{"text": text} for text in texts])
        return token_store(path, encoder, **options)

    return make


def stream(rows):
    """Inputs and targets of all rows, one after the other; None where nothing is to be learnt."""
    for row in rows:
        for tokens, learn, _ in row.sequences:
            for place in range(len(tokens) - 1):
                target = int(tokens[place + 1]) if learn[place + 1] else None
                yield int(tokens[place]), target


texts = st.lists(st.text(alphabet=tiny.CHARACTERS, max_size=12), min_size=1, max_size=12).filter(any)


@given(texts, st.integers(1, 15))
@settings(deadline=None, max_examples=60)
def test_rows_are_the_documents_one_after_the_other_cut_anywhere(tmp_path_factory, given_texts, length):
    path = tiny.write_jsonl(tmp_path_factory.mktemp("s") / "a.jsonl", [{"text": t} for t in given_texts])
    rows = TokenRows(token_store(path, ENCODER), length, first=7)
    whole = [ENCODER.document(text).tokens.tolist() for text in given_texts if text]
    expected = [pair for ids in whole for pair in itertools.pairwise(ids)]
    assert list(stream(rows)) == expected
    assert [row.positions for row in rows][:-1] == [length] * (len(rows) - 1)
    assert [row.id for row in rows] == list(range(7, 7 + len(rows)))
    # No piece of a row goes over the end of a document.
    ends = [place for place, (_, target) in enumerate(expected) if target == ENCODER.tokenizer.eos_token_id]
    cuts, place = set(), 0
    for row in rows:
        for sequence in row.sequences:
            place += sequence.positions
            cuts.add(place)
    assert {end + 1 for end in ends} <= cuts
    with pytest.raises(IndexError):
        rows[len(rows)]


@given(texts, st.integers(1, 15))
@settings(deadline=None, max_examples=40)
def test_across_documents_rows_are_one_sequence_of_the_whole_stream(tmp_path_factory, given_texts, length):
    path = tiny.write_jsonl(tmp_path_factory.mktemp("s") / "a.jsonl", [{"text": t} for t in given_texts])
    rows = TokenRows(token_store(path, ENCODER), length, across=True)
    ids = [n for text in given_texts if text for n in ENCODER.document(text).tokens.tolist()]
    assert list(stream(rows)) == list(itertools.pairwise(ids))
    assert {len(row.sequences) for row in rows} == {1}


def test_many_at_once_are_tokenised_as_one_alone_whatever_the_tokenizer_adds_or_cuts(write):
    tokenizer = tiny.build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A </s>", special_tokens=[("<unk>", 2), ("</s>", 1)]
    )
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    encoder = Encoder(tokenizer)
    sentences = ["ab", "a longer one than four", "x"]
    store = write(sentences, encoder)
    begins = store.starts(0, 4)
    for number, text in enumerate(sentences):
        expected = encoder.document(text).tokens.tolist()
        assert store.read(begins[number], begins[number + 1]).tokens.tolist() == expected


def test_what_is_not_learnt_stays_so_in_either_width_of_token(tmp_path, monkeypatch):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"prompt": "12", "completion": "34"}] * 2)
    pair = ENCODER.pair("12", "34")
    for width, name in ((2, "narrow"), (4, "wide")):
        if name == "wide":
            monkeypatch.setattr(type(ENCODER.tokenizer), "__len__", lambda _: 40_000)
        Path(path).touch()
        store = token_store(path, ENCODER)
        read = store.read(0, len(pair.tokens))
        assert read.tokens.tolist() == pair.tokens.tolist()
        assert read.learn.tolist() == pair.learn.tolist()
        assert read.tokens.dtype == torch.long
        assert (store.folder / "tokens.bin").stat().st_size == 2 * len(pair.tokens) * width


def test_a_second_start_reads_nothing_and_another_tokenizer_or_text_begins_anew(write, monkeypatch):
    first = write(["abc", "de"])
    path = first.folder

    def refuse(*_):
        raise AssertionError("read again")

    source = Path(pickle.loads(pickle.dumps(first)).folder, "store.json")
    assert source.is_file()
    monkeypatch.setattr(module, "documents", refuse)
    again = token_store(str(_source(first)), ENCODER)
    assert (again.folder, again.digest) == (path, first.digest)
    for options in ({"sample_by": "document"}, {"most_tokens": 3}):
        with pytest.raises(AssertionError, match="read again"):
            token_store(str(_source(first)), ENCODER, **options)
    other = tiny.build_tokenizer()
    other.eos_token = "<unk>"
    with pytest.raises(AssertionError, match="read again"):
        token_store(str(_source(first)), Encoder(other))
    Path(_source(first)).write_text('{"text": "abcd"}\n')
    with pytest.raises(AssertionError, match="read again"):
        token_store(str(_source(first)), ENCODER)


def _source(store):
    return json.loads((store.folder / "store.json").read_text())["source"]


def test_the_digest_is_of_the_tokens_however_many_were_tokenised_at_once(write, monkeypatch):
    sentences = ["abc", "", "de", "fg h"]
    first = write(sentences)
    monkeypatch.setattr(module, "_BATCH", 3)
    second = write(sentences, name="b.jsonl")
    assert first.folder != second.folder
    assert (first.digest, first.num_tokens, first.num_empty) == (second.digest, 12, 1)
    assert second.num_tokens == 12
    # The same tokens in documents that end elsewhere are others.
    assert write(["ab"], name="c.jsonl").digest != write(["a", "b"], name="d.jsonl").digest


def test_no_more_is_read_than_the_documents_of_so_many_tokens(write, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 8)
    sentences = ["abcd"] * 20  # 5 tokens each
    for most, count in ((1, 1), (5, 1), (6, 2), (50, 10), (1000, 20)):
        store = write(sentences, name=f"{most}.jsonl", most_tokens=most)
        assert (store.num_documents, store.num_tokens) == (count, 5 * count)
        assert store.starts(count, count + 1) == (5 * count,)


def test_what_fails_leaves_nothing_behind_and_what_is_damaged_is_named(write, monkeypatch, tmp_path):
    store = write(["abc"])
    there = set(store.folder.parent.glob("**/*"))
    with pytest.raises(ValueError, match=r"b\.jsonl: all documents are empty"):
        write(["", ""], name="b.jsonl")
    assert {path for path in store.folder.parent.glob("**/*") if path.suffix != ".lock"} <= there
    (store.folder / "tokens.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="the tokens are damaged; remove the folder"):
        token_store(str(_source(store)), ENCODER)
