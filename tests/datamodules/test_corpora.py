"""Rows of text, put together again and counted."""

import logging
import random
from collections import Counter

import pytest

from rewarm.datamodules.corpora import CorpusData
from rewarm.functional.logprob import IGNORE_INDEX
from tests import tiny

TOKENIZER = tiny.build_tokenizer()
LENGTH = 12


def documents(count, seed, longest=40):
    rng = random.Random(seed)
    letters = tiny.CHARACTERS.replace("\n", "").replace(" ", "")
    return ["".join(rng.choices(letters, k=rng.randrange(1, longest))) for _ in range(count)]


def ids(text):
    return [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]


@pytest.fixture
def corpus(tmp_path):
    """Makes a CorpusData of written sources."""
    tokenizer = tiny.save_tokenizer(tmp_path / "tokenizer")

    def make(sources, replay=(), **options):
        paths = {}
        for name, texts in sources.items():
            paths[name] = str(tmp_path / f"{name}.txt")
            (tmp_path / f"{name}.txt").write_text("\n".join(texts))
        data = CorpusData(
            {name: path for name, path in paths.items() if name not in replay},
            tokenizer,
            **{"max_length": LENGTH, "batch_size": 2, "replay": {name: paths[name] for name in replay}}
            | options,
        )
        data.setup()
        return data

    return make


def rows_of(batches):
    """Every row of some batches as lists of input, target and position."""
    for batch in batches:
        for place in range(len(batch["input_ids"])):
            length = int((batch["sequence_ids"][place] >= 0).sum())
            yield [batch[name][place, :length].tolist() for name in ("input_ids", "targets", "position_ids")]


def test_the_rows_one_after_the_other_are_the_documents(corpus):
    texts = documents(30, seed=0)
    rows = list(rows_of(corpus({"a": texts}, batch_size=1, shuffle=False).train_dataloader()))
    stream = []
    for inputs, targets, _ in rows:
        for token, target in zip(inputs, targets, strict=True):
            stream += [token, target] if target == TOKENIZER.eos_token_id else [token]
    assert stream == [token for text in texts for token in ids(text)]
    assert [len(inputs) for inputs, _, _ in rows[:-1]] == [LENGTH] * (len(rows) - 1)
    assert len(rows) == -(-sum(len(ids(text)) - 1 for text in texts) // LENGTH)


def test_every_token_but_the_first_of_each_document_is_a_target_once(corpus):
    texts = documents(40, seed=1)
    batches = list(corpus({"a": texts}, batch_size=1).train_dataloader())  # shuffled
    targets = Counter(token for _, targets, _ in rows_of(batches) for token in targets)
    assert targets == Counter(token for text in texts for token in ids(text)[1:])
    assert sum(batch["counts"]["tokens"] for batch in batches) == targets.total()


def test_positions_restart_with_each_document_and_each_row(corpus):
    texts = documents(20, seed=2)
    for inputs, targets, positions in rows_of(corpus({"a": texts}).train_dataloader()):
        expected, place = [], 0
        for _, target in zip(inputs, targets, strict=True):
            expected.append(place)
            place = 0 if target == TOKENIZER.eos_token_id else place + 1
        assert positions == expected


def test_rows_of_a_batch_are_filled_up_with_padding_that_counts_nothing(corpus):
    (batch,) = corpus({"a": ["abc", "de"]}, batch_size=1).train_dataloader()
    eos = TOKENIZER.eos_token_id
    assert batch["input_ids"].tolist() == [[*ids("abc")[:-1], *ids("de")[:-1]] + [0] * 7]
    assert batch["targets"].tolist() == [[*ids("bc")[:-1], eos, *ids("e")[:-1], eos] + [IGNORE_INDEX] * 7]
    assert batch["sequence_ids"].tolist() == [[0, 0, 0, 1, 1] + [-1] * 7]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, *range(7)]]


def test_empty_documents_are_left_out_with_a_count(corpus, caplog):
    with caplog.at_level(logging.INFO):
        data = corpus({"a": ["abc", "", "", "de"]})
    assert sum(len(example.sequences) for example in data._rows["a"]) == 2
    assert "a.txt: 2 of 4 documents are empty and left out" in caplog.text


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_replay_is_exact_in_every_batch_and_an_epoch_is_one_pass_over_the_new(corpus, fraction, batch_size):
    new, more, old = documents(40, 3), documents(15, 4), documents(60, 5)
    data = corpus(
        {"new": new, "more": more, "old": old},
        replay=["old"],
        replay_fraction=fraction,
        batch_size=batch_size,
    )
    fresh = len(data._rows["new"]) + len(data._rows["more"])
    loader = data.train_dataloader()
    old_rows, drawn = [], Counter()
    for batch in loader:
        owners = {int(row): number for number, row in zip(batch["ids"], owner_rows(batch), strict=True)}
        drawn.update(owners.values())
        old_rows += [owners[row] >= fresh for row in sorted(owners)]
    for width in (batch_size, 8):
        for start in range(len(old_rows) - width + 1):
            assert abs(sum(old_rows[start : start + width]) - fraction * width) <= 1 + 1e-9
    assert len(loader) == -(-round(fresh / (1 - fraction) + 0.4999) // batch_size)
    # The last batch is full, so a few rows may begin their next pass.
    assert sum(count - 1 for row, count in drawn.items() if row < fresh) <= batch_size + 2
    assert sum(drawn[row] == 0 for row in range(fresh)) <= 2
    assert sum(data.shares().values()) == pytest.approx(1.0)


def owner_rows(batch):
    """The row of each sequence of a batch."""
    first = {}
    for row, numbers in enumerate(batch["sequence_ids"].tolist()):
        for number in numbers:
            if number >= 0:
                first.setdefault(number, row)
    return [first[number] for number in range(len(batch["ids"]))]


def test_no_replay_is_plain_training_on_the_new_rows(corpus):
    data = corpus({"new": documents(20, 6)}, batch_size=1)
    assert data.shares() == {"new": 1.0}
    drawn = [number for batch in data.train_dataloader() for number in set(batch["ids"])]
    assert sorted(drawn) == list(range(len(data._rows["new"])))


def test_weights_are_shares_of_the_new_rows(corpus):
    data = corpus(
        {"a": documents(9, 7), "b": documents(20, 8), "old": documents(9, 9)},
        replay=["old"],
        replay_fraction=0.2,
        weights={"a": 3.0, "b": 1.0},
    )
    assert data.shares() == pytest.approx({"a": 0.6, "b": 0.2, "old": 0.2})


def test_each_validation_source_is_shown_once_under_its_name(corpus, tmp_path):
    texts = {name: documents(10, seed) for seed, name in enumerate("xy")}
    paths = {}
    for name, lines in texts.items():
        paths[name] = tiny.write_jsonl(tmp_path / f"{name}.jsonl", [{"text": line} for line in lines])
    loaders = corpus({"a": documents(5, 1)}, val=paths).val_dataloader()
    for (name, lines), loader in zip(texts.items(), loaders, strict=True):
        batches = list(loader)
        assert {batch["domain"] for batch in batches} == {name}
        assert sum(batch["counts"]["tokens"] for batch in batches) == sum(
            len(ids(line)) - 1 for line in lines
        )


def test_paragraphs_and_whole_files_are_documents_too(corpus):
    lines = ["ab", "c", "", "de"]
    for sample_by, count in (("line", 3), ("paragraph", 2), ("document", 1)):
        data = corpus({"a": lines}, sample_by=sample_by)
        assert sum(len(example.sequences) for example in data._rows["a"]) == count


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train": {}}, "train names no source"),
        ({"replay_fraction": 1.0}, r"replay_fraction is 1.0; it must be in \[0, 1\)"),
        ({"replay_fraction": -0.1}, r"replay_fraction is -0.1; it must be in \[0, 1\)"),
        ({"replay_fraction": 0.1}, "they go together"),
        ({"replay": {"b": "b.txt"}}, "they go together"),
        ({"replay": {"a": "a.txt"}, "replay_fraction": 0.1}, r"\['a'\] are both in train and in replay"),
        ({"weights": {"b": 1.0}}, r"weights names \['b'\], train has \['a'\]"),
        ({"weights": {"a": 0.0}}, "weights is {'a': 0.0}; none may be below 0, and not all may be 0"),
        ({"weights": {"a": -1.0}}, "weights is {'a': -1.0}; none may be below 0"),
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"num_workers": -1}, "num_workers is -1; it must not be below 0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(options, named):
    with pytest.raises(ValueError, match=named):
        CorpusData(**{"train": {"a": "a.txt"}, "tokenizer": "t"} | options)


def test_a_source_without_text_is_named(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt: all documents are empty"):
        corpus({"a": ["", "", "\n"]}, sample_by="line")
    path = tiny.write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}, {"prompt": "x"}])
    data = CorpusData({"b": path}, tiny.save_tokenizer(tmp_path / "t"))
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2, column 'text': must be text, is missing"):
        data.setup()


@pytest.mark.parametrize("changed", ["new", "old"])
def test_a_source_of_another_run_is_refused_by_name(corpus, changed):
    texts = {"new": documents(9, 1), "more": documents(4, 2), "old": documents(20, 3)}
    replay = {"replay": ["old"], "replay_fraction": 0.25}
    first = corpus(texts, **replay)
    state, rows = first.state_dict(), len(first._rows[changed])
    corpus(texts, **replay).load_state_dict(state)
    corpus(texts, **replay | {"replay_fraction": 0.5}).load_state_dict(state)  # a setting, not data
    with pytest.raises(ValueError, match=rf"{changed}\.txt \({changed}\): .* was made with {rows} examples"):
        corpus(texts | {changed: texts[changed][1:]}, **replay).load_state_dict(state)


@pytest.mark.parametrize("options", [{"max_length": 13}, {"sample_by": "document"}])
def test_rows_that_are_cut_in_another_way_are_refused(corpus, options):
    texts = {"a": documents(9, 1)}
    with pytest.raises(ValueError, match="resume with the same data, or start a new run from an exported"):
        corpus(texts, **options).load_state_dict(corpus(texts).state_dict())


def test_other_sources_than_those_of_the_checkpoint_are_named(corpus):
    state = corpus({"a": documents(9, 1)}).state_dict()
    with pytest.raises(
        ValueError, match=r"the checkpoint was made with \['a'\], now there are \['a', 'b'\];"
    ):
        corpus({"a": documents(9, 1), "b": documents(9, 2)}).load_state_dict(state)
