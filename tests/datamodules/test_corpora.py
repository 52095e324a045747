"""Rows of text, put together again and counted."""

import itertools
import logging
import pickle
import random
from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback

import rewarm
from rewarm.datamodules.corpora import CorpusData
from rewarm.datamodules.corpus_replay import read_seen
from rewarm.functional.logprob import IGNORE_INDEX
from tests import fits, tiny

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
        ({"weights": [(1, {"a": 1.0})]}, r"weights is given from steps \[1\]; they must ascend from 0"),
        ({"weights": []}, r"weights is given from steps \[\]; they must ascend from 0"),
        (
            {"weights": [(0, {"a": 1.0}), (5, {"b": 1.0})]},
            r"weights from step 5 on is {'b': 1.0}; known are \['a'\]",
        ),
        ({"weights": [(0, {"a": 0.0})]}, "weights from step 0 on is {'a': 0.0}"),
        (
            {"train": {"a": "a.txt", "b": "b.txt"}, "weights": [(0, {"a": 1.0})]},
            r"weights never has \['b'\], which are in train",
        ),
        ({"seen": "x.ckpt"}, "seen is 'x.ckpt', but there is no replay"),
        ({"rehearsal": "random"}, "rehearsal is 'random'; it must be one of 'rows', 'uniform', 'power-law'"),
        ({"most_tokens": {"b": 5}}, r"most_tokens is {'b': 5}; known are \['a'\], from 1 on"),
        ({"most_tokens": {"a": 0}}, r"most_tokens is {'a': 0}; known are"),
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"num_workers": -1}, "num_workers is -1; it must be at least 0"),
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


# --- what a checkpoint remembers, and what it replays -----------------------------------------------------


def rows_drawn(loader, count):
    """Row ids of the next batches, row by row."""
    for batch in itertools.islice(loader, count):
        owners = dict(zip(owner_rows(batch), batch["ids"], strict=True))
        yield [owners[row] for row in sorted(owners)]


@pytest.mark.usefixtures("no_worker_outlives_the_test")
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (0, 1)])
def test_a_state_saved_anywhere_gives_the_rest_whatever_the_workers(corpus, before, after):
    texts = {"new": documents(40, 1), "old": documents(30, 2)}
    options = {"replay": ["old"], "replay_fraction": 0.25}
    whole = list(rows_drawn(corpus(texts, **options).train_dataloader(), 100))
    for cut in (0, 1, 7, len(whole) - 1) if before == after else (5,):
        first, second = (corpus(texts, num_workers=n, **options) for n in (before, after))
        loader = first.train_dataloader()
        assert list(rows_drawn(loader, cut)) == whole[:cut]
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        assert list(rows_drawn(second.train_dataloader(), 100)) == whole[cut:]
        for data in (first, second):
            data.teardown("fit")


def test_the_state_is_as_small_for_a_large_corpus(corpus):
    def state(count):
        data = corpus({"a": documents(count, 1), "b": documents(count, 2)}, weights={"a": 3.0, "b": 1.0})
        list(itertools.islice(data.train_dataloader(), 3))
        return len(pickle.dumps(data.state_dict()))

    assert state(900) <= state(9) + 40


def test_the_same_tokens_in_other_files_go_on(corpus, tmp_path):
    """A run may be moved; the fingerprint is of the tokens."""
    texts = {"a": documents(20, 1)}
    state = corpus(texts).state_dict()
    path = tiny.write_jsonl(tmp_path / "other.jsonl", [{"text": text} for text in texts["a"]])
    moved = CorpusData({"a": path}, str(tmp_path / "tokenizer"), max_length=LENGTH, batch_size=2)
    moved.setup()
    moved.load_state_dict(state)


def test_only_rows_that_a_run_has_seen_are_replayed_and_all_of_them(corpus, tmp_path):
    texts = {"web": documents(60, 1), "new": documents(60, 2)}
    first = corpus({"web": texts["web"]}, seed=4)
    seen = [row for rows in rows_drawn(first.train_dataloader(), 6) for row in rows]
    torch.save({"CorpusData": first.state_dict()}, tmp_path / "first.ckpt")
    replay = {"replay": ["web"], "replay_fraction": 0.5, "seen": str(tmp_path / "first.ckpt")}
    second = corpus(texts, **replay, seed=9)
    fresh = len(second._rows["new"])
    drawn = [row for rows in rows_drawn(second.train_dataloader(), 20) for row in rows]
    replayed = [row - fresh for row in drawn if row >= fresh]
    assert set(replayed) == set(seen)
    assert len(seen) == 12 < len(first._rows["web"])
    assert max(Counter(replayed).values()) - min(Counter(replayed).values()) <= 1
    # A third run is told by the second what the first had seen.
    torch.save({"CorpusData": second.state_dict()}, tmp_path / "second.ckpt")
    memory = {entry["name"]: entry["drawn"] for entry in read_seen(str(tmp_path / "second.ckpt")).values()}
    assert memory == {"web": 12, "new": 20}
    with pytest.raises(ValueError, match=r"new\.txt \(new\): .*first\.ckpt has not seen these rows"):
        corpus(texts, **replay | {"replay": ["new"]})
    with pytest.raises(ValueError, match=r"has not seen these rows, cut to 13 positions .* rows of web"):
        corpus(texts, **replay, max_length=13)


def test_what_was_seen_before_is_kept_when_a_run_goes_on(corpus):
    data = corpus({"a": documents(30, 1)})
    list(rows_drawn(data.train_dataloader(), 4))
    resumed = corpus({"a": documents(30, 1)})
    resumed.load_state_dict(data.state_dict())
    assert resumed.state_dict()["seen"] == data.state_dict()["seen"]
    list(rows_drawn(resumed.train_dataloader(), 3))
    assert [entry["drawn"] for entry in resumed.state_dict()["seen"].values()] == [14]


def test_phases_are_rehearsed_by_their_law(corpus):
    texts = {"now": documents(50, 1), "first": documents(40, 2), "second": documents(10, 3)}
    options = {"replay": ["first", "second"], "replay_fraction": 0.3}
    for rehearsal, shares in (("uniform", (0.15, 0.15)), ("power-law", (0.1, 0.2))):
        data = corpus(texts, **options, rehearsal=rehearsal)
        assert data.shares() == pytest.approx({"now": 0.7, "first": shares[0], "second": shares[1]})
    rows = {name: len(part) for name, part in data._rows.items()}
    by_rows = corpus(texts, **options).shares()
    assert by_rows["first"] / by_rows["second"] == pytest.approx(rows["first"] / rows["second"])


# --- shares that change, and branches ---------------------------------------------------------------------


def test_weights_are_given_from_a_step_on_or_by_a_function(corpus):
    texts = {"web": documents(90, 1), "qa": documents(90, 2), "old": documents(20, 3)}
    replay = {"replay": ["old"], "replay_fraction": 0.25}

    def ramp(step):
        return {"web": 1.0, "qa": 0.0 if step < 3 else 1.0}

    for weights in ([(0, {"web": 2.0}), (3, {"web": 1.0, "qa": 1.0})], ramp):
        data = corpus(texts, weights=weights, batch_size=8, **replay)
        web, qa = (len(data._rows[name]) for name in ("web", "qa"))
        assert data.shares(2) == pytest.approx({"web": 0.75, "qa": 0.0, "old": 0.25})
        assert data.shares(3) == pytest.approx({"web": 0.375, "qa": 0.375, "old": 0.25})
        for step, rows in enumerate(rows_drawn(data.train_dataloader(), 8)):
            assert sum(row >= web + qa for row in rows) == 2
            assert sum(web <= row < web + qa for row in rows) == (0 if step < 3 else 3)


def test_a_function_that_gives_no_shares_is_named_with_its_step(corpus):
    data = corpus({"a": documents(9, 1)}, weights=lambda step: {"a": 1.0 - step})
    with pytest.raises(ValueError, match="weights at step 1 is {'a': 0.0}; it needs"):
        list(data.train_dataloader())


def test_a_branch_adds_a_source_and_goes_on_with_the_others(corpus):
    web, qa = documents(60, 1), documents(30, 2)
    stable = corpus({"web": web})
    begun = [row for rows in rows_drawn(stable.train_dataloader(), 5) for row in rows]
    state = stable.state_dict()
    with pytest.raises(ValueError, match=r"made with \['web'\], now there are \['qa', 'web'\]"):
        corpus({"web": web, "qa": qa}).load_state_dict(state)
    branch = corpus({"web": web, "qa": qa}, weights={"web": 0.5, "qa": 0.5}, branch=True)
    branch.load_state_dict(state)
    rest = [row for rows in rows_drawn(branch.train_dataloader(), 10) for row in rows]
    count = len(branch._rows["web"])
    assert sum(row < count for row in rest) == 10
    assert not set(begun) & {row for row in rest if row < count}
    assert {entry["name"]: entry["drawn"] for entry in branch.state_dict()["seen"].values()} == {
        "web": 20,
        "qa": 10,
    }
    with pytest.raises(ValueError, match=r"web\.txt \(web\): the checkpoint was made with"):
        corpus({"web": web[1:], "qa": qa}, branch=True).load_state_dict(state)


# --- other ways to read -----------------------------------------------------------------------------------


def test_across_documents_positions_run_on_and_every_token_but_the_first_is_a_target(corpus):
    texts = documents(20, seed=2)
    data = corpus({"a": texts}, attend_across_documents=True, shuffle=False, batch_size=1)
    batches = list(data.train_dataloader())
    rows = list(rows_of(batches))
    assert all(positions == list(range(len(positions))) for _, _, positions in rows)
    stream = [n for text in texts for n in ids(text)]
    assert [token for inputs, _, _ in rows for token in inputs] == stream[:-1]
    assert [target for _, targets, _ in rows for target in targets] == stream[1:]


def test_no_more_is_read_of_a_source_than_is_asked_for(corpus):
    texts = documents(40, seed=2)
    data = corpus({"a": texts}, most_tokens={"a": 100})
    tokens = sum(batch["counts"]["tokens"] for batch in data.train_dataloader())
    assert tokens <= 100 + 40
    assert tokens < sum(len(ids(text)) for text in texts) / 2


def test_one_process_of_a_machine_makes_the_tokens_and_all_open_them(corpus, tmp_path, monkeypatch):
    data = corpus({"a": documents(9, 1)}, val={"b": tiny.write_jsonl(tmp_path / "b.jsonl", [{"text": "ab"}])})
    made = CorpusData(data.train, data.tokenizer_source, max_length=LENGTH, val=data.val)
    made.prepare_data()
    monkeypatch.setattr("rewarm.datamodules.token_store.documents", None)
    made.setup()
    assert len(made._rows["a"]) == len(data._rows["a"])


class Ids(Callback):
    """Keeps which rows each optimizer step took."""

    def __init__(self):
        self.steps = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.setdefault(trainer.global_step, set()).update(batch["ids"])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_fit_branches_off_a_checkpoint_with_other_sources_and_another_window(tmp_path):
    files = fits.Files(tmp_path)

    def fit(data, steps, ckpt_path=None, **options):
        ids = Ids()
        trainer = fits.trainer(max_steps=steps, callbacks=[ids], **options)
        trainer.fit(rewarm.ContinualPretraining(tiny.LLAMA, fits.sgd()), datamodule=data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        return ids.steps

    begun = fit(fits.corpus(files), 5)
    data = rewarm.CorpusData(
        {"new": files.new, "qa": files.sft},
        files.tokenizer,
        max_length=24,
        batch_size=2,
        weights=[(0, {"new": 1.0}), (7, {"new": 1.0, "qa": 1.0})],
        branch=True,
    )
    rest = fit(data, 12, str(tmp_path / "saved.ckpt"), accumulate_grad_batches=2)
    count = len(data._rows["new"])
    assert sorted(rest) == list(range(5, 12))
    new = [row for step in (*begun.values(), *rest.values()) for row in step if row < count]
    assert len(new) == len(set(new))  # none twice before all once
    instructions = [sum(row >= count for row in step) for step in rest.values()]
    assert instructions[:2] == [0, 0]
    assert instructions[2:] == [2] * 5
