"""Every road by which a file of a stranger comes in: none runs what is in it, each says what it is."""

import io
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import rewarm
from rewarm import cli
from rewarm.checkpoints.weights import open_weights
from rewarm.checkpoints.whole import newest_first, newest_whole, read_metadata, verify
from rewarm.commands.fit import checkpoint_to_load
from rewarm.datamodules.corpus_replay import read_seen
from rewarm.datamodules.corpus_text import _streamed_rows
from rewarm.lightning_modules.fsdp2_strategy import _shapes_of_shards
from rewarm.lightning_modules.policy import build_empty, build_model
from rewarm.text.encoding import load_tokenizer
from rewarm.text.formats import Rows
from tests.trust import strangers


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    """A terminal on which somebody says yes to everything."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers")
    for kind in ("checkpoints", "models", "data"):
        (folder / kind).mkdir()
    mark = folder / "ran"
    return {
        "mark": mark,
        "checkpoints": strangers.checkpoints(folder / "checkpoints", mark),
        "models": strangers.models(folder / "models", mark),
        "data": strangers.data(folder / "data", mark),
    }


def refused(mark: Path, road, *errors: type[Exception]) -> str | None:
    """Return the error of a road, None if it let the file in without running it."""
    error = None
    try:
        road()
    except errors or (ValueError,) as raised:  # noqa: B030
        error = str(raised)
    except SystemExit as raised:
        error = f"exit {raised.code}"
    assert not mark.exists()
    return error


ROADS = {
    "open_weights": open_weights,
    "read_seen": lambda path: read_seen(path),
    "fit --ckpt_path": lambda path: checkpoint_to_load(path, "fit"),
    "validate --ckpt_path": lambda path: checkpoint_to_load(path, "validate"),
    "a folder of checkpoints": lambda path: newest_whole(path.parent, lambda _: None),
    "their order": lambda path: newest_first(path.parent),
    "load_from_checkpoint": lambda path: rewarm.CurriculumSFT.load_from_checkpoint(path),
    "shapes of shards": _shapes_of_shards,
    "export": lambda path: cli.main(["export", str(path), "--output", str(path.parent.parent / "out")]),
    "average": lambda path: cli.main(
        ["average", str(path), str(path), "--output", str(path.parent.parent / "out")]
    ),
    "schedule": lambda path: cli.main(["schedule", "--checkpoint", str(path)]),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("place", ["file", "metadata", "sums", "rest", "outside"])
def test_a_checkpoint_of_a_stranger_runs_no_code(place, road, made):
    path = made["checkpoints"][place]
    refused(made["mark"], lambda: ROADS[road](path), Exception)


@pytest.mark.parametrize("place", ["metadata", "sums", "outside"])
def test_metadata_that_is_none_is_refused_in_one_line(place, made):
    path = made["checkpoints"][place]
    message = {"outside": "names ../__0_0.distcp, which is not in this folder"}.get(
        place, "names posix.system"
    )
    for read in (verify, open_weights):
        error = refused(made["mark"], lambda read=read: read(path))
        assert message in error
        assert str(path) in error
        assert "\n" not in error


@pytest.mark.parametrize("place", ["file", "rest"])
def test_a_checkpoint_with_objects_is_not_exported(place, made):
    error = refused(made["mark"], lambda: open_weights(made["checkpoints"][place]))
    assert "holds more than weights and plain values, so it is not loaded: that could run code" in error


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_metadata_that_torch_writes_is_read_as_torch_reads_it(tmp_path):
    saved = {
        "a": {
            str(dtype): torch.zeros(3, 2, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.int64)
        },
        "b": {"number": 1, "text": "x", "list": [1, torch.zeros(())]},
    }
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    ours, torchs = read_metadata(tmp_path), dcp.FileSystemReader(tmp_path).read_metadata()
    assert len(ours.state_dict_metadata) == 7
    assert ours.state_dict_metadata == torchs.state_dict_metadata
    assert ours.storage_data == torchs.storage_data
    assert ours.planner_data == torchs.planner_data


@pytest.mark.parametrize("kind", ["known", "unknown", "tokenizer", "pickle"])
@pytest.mark.parametrize(
    "load", [build_model, build_empty, load_tokenizer, lambda path: open_weights(Path(path))]
)
def test_a_model_of_a_stranger_runs_no_code(kind, load, made):
    error = refused(made["mark"], lambda: load(str(made["models"][kind])), ValueError, OSError)
    assert error is None or "trust_remote_code=True" not in error


def test_a_model_with_code_says_what_it_is(made):
    unknown = str(made["models"]["unknown"])
    for load in (build_model, build_empty):
        with pytest.raises(
            ValueError, match="unknown', which comes with code of its own, and that is not run; it must"
        ):
            load(unknown)
    with pytest.raises(ValueError, match="tokenizer', which comes with code of its own, and that is not run"):
        load_tokenizer(str(made["models"]["tokenizer"]))


@pytest.mark.parametrize("kind", ["script", "pickle", "archive"])
@pytest.mark.parametrize("load", [lambda path: list(Rows(path)), lambda path: list(_streamed_rows(path))])
def test_data_of_a_stranger_run_no_code(kind, load, made, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    refused(made["mark"], lambda: load(str(made["data"][kind])), Exception)


def test_the_proofs_would_run(made, tmp_path):
    mark = tmp_path / "ran"
    torch.save(strangers.Touch(mark), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists()
