"""Jobs that are cut short, shared, or asked for what they cannot do."""

import itertools
import json

import pytest
import torch

from rewarm.lightning_modules.policy import build_model
from rewarm.rollouts.ranks import Place
from rewarm.scoring import score_job
from rewarm.scoring.model_scores import loss
from rewarm.scoring.score_job import Job, batches_of
from rewarm.scoring.scored_data import Finished, ScoredData
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    build_model(tiny.LLAMA).save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tmp_path, model):
    """Makes a job on some rows, in a folder of its own."""
    numbers = itertools.count()

    def job(rows, by="test", folder=None, **options):
        path = tiny.write_jsonl(tmp_path / f"{next(numbers)}.jsonl", rows)
        folder = folder or tmp_path / f"work{next(numbers)}"
        return Job(ScoredData(path), folder, {"by": by}, **{"model": model} | options)

    return job


ROWS = [
    {"prompt": f"{n}+{n}=" + "a" * (n % 3), "completion": "xyz"[n % 3] * (1 + 2 * n % 5), "n": n}
    for n in range(14)
]


def test_batches_hold_similar_lengths_within_the_limit():
    lengths = [(7 * n) % 23 + 1 for n in range(40)]
    lengths[3] = None
    made = batches_of(lengths, [str(n) for n in range(40)], 50)
    assert sorted(place for batch in made for place in batch) == [n for n in range(40) if n != 3]
    for batch in made:
        assert len(batch) * max(lengths[place] for place in batch) <= 50
    flat = [lengths[place] for batch in made for place in batch]
    assert flat == sorted(flat, reverse=True)
    assert batches_of([90, 3], ["a", "b"], 50) == [[0], [1]]


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_killed_job_goes_on_with_the_same_result(make, tmp_path, monkeypatch, after):
    whole = loss(make(ROWS, batch_tokens=20)).columns
    add, calls = Finished.add, []

    def killed(self, places, values):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(places)
        add(self, places, values)

    monkeypatch.setattr(Finished, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        loss(make(ROWS, folder=tmp_path / "cut", batch_tokens=20))
    with (tmp_path / "cut" / "rank0.records").open("ab") as file:
        file.write(b"torn")
    again = []
    monkeypatch.setattr(Finished, "add", lambda self, *values: (again.append(values[0]), add(self, *values)))
    assert loss(make(ROWS, folder=tmp_path / "cut", batch_tokens=20)).columns == whole
    assert sorted(calls + again) == sorted(
        batches_of([len(r["prompt"] + r["completion"]) for r in ROWS], make(ROWS).data.ids, 20)
    )


def test_ranks_share_the_batches(make, tmp_path, monkeypatch):
    whole = loss(make(ROWS, batch_tokens=20)).columns
    monkeypatch.setattr(score_job, "gather", lambda value, place: [value])  # there is no other
    for rank in (1, 0):
        place = Place(rank, 2, None)
        monkeypatch.setattr(score_job, "_joined", lambda place=place: place)
        found = loss(make(ROWS, folder=tmp_path / "shared", batch_tokens=20)).columns
    assert found == whole
    sizes = [(tmp_path / "shared" / f"rank{rank}.records").stat().st_size for rank in (0, 1)]
    assert min(sizes) > 0
    assert sum(sizes) == len(ROWS) * (8 + 2 * 4)


def test_bad_arguments_are_named(make):
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        make(ROWS, dtype="int8")
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        make(ROWS, batch_tokens=0)


def test_what_was_done_is_kept_as_json(make, tmp_path):
    loss(make(ROWS, by="loss", folder=tmp_path / "w"))
    assert json.loads((tmp_path / "w" / "job.json").read_text()) == {"by": "loss"}
