"""Damage is recognised, and the newest whole checkpoint is found."""

import os
import random
import tracemalloc
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp

from rewarm.checkpoints import whole as checkpoints
from rewarm.checkpoints.whole import (
    checksums,
    is_sharded,
    newest_first,
    newest_whole,
    verify,
    write_checksums,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

STATE = {
    "state_dict": {"weight": torch.arange(400.0).view(40, 10), "bias": torch.arange(7)},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.full((5,), 0.5)}}}],
    "loops": {"fit_loop": {"position": [1, 2, "three"]}},
    "global_step": 12,
}


def write_file(path):
    torch.save(STATE, path)
    return path


def write_folder(path, sums=True):
    """As Lightning and `Checkpoint` write it."""
    path.mkdir()
    shards = {name: STATE[name] for name in ("state_dict", "optimizer_states")}
    dcp.save(shards, checkpoint_id=path, no_dist=True)
    torch.save({name: STATE[name] for name in ("loops", "global_step")}, path / "meta.pt")
    if sums:
        write_checksums(path)
    return path


def load(path):
    if path.is_file():
        return torch.load(path, weights_only=True)
    state = torch.load(path / "meta.pt", weights_only=True)
    shards = {
        "state_dict": {name: torch.empty_like(tensor) for name, tensor in STATE["state_dict"].items()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.empty(5)}}}],
    }
    dcp.load(shards, checkpoint_id=path, no_dist=True)
    return state | shards


def same(one, other):
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in other)
    if isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


def flip(path, position, bit):
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_whole_checkpoint_passes(tmp_path, write):
    path = write(tmp_path / "step=1.ckpt")
    verify(path)
    assert same(load(path), STATE)


def directory_of(path):
    """The part of an archive that no CRC is for."""
    with zipfile.ZipFile(path) as archive:
        return range(archive.start_dir, path.stat().st_size)


def test_a_flipped_bit_in_a_file_is_found_or_does_no_harm(tmp_path):
    path = write_file(tmp_path / "step=1.ckpt")
    rng, size = random.Random(0), path.stat().st_size
    anywhere = [(rng.randrange(size), rng.randrange(8)) for _ in range(200)]
    found = 0
    for position, bit in anywhere + [(position, bit) for position in directory_of(path) for bit in range(8)]:
        flip(path, position, bit)
        try:
            verify(path)
        except ValueError:
            found += 1
        else:
            assert same(load(path), STATE), f"byte {position}, bit {bit}"
        flip(path, position, bit)
    verify(path)
    assert found > 3000


def test_every_flipped_bit_of_a_tensor_is_found(tmp_path):
    path = write_file(tmp_path / "step=1.ckpt")
    whole = path.read_bytes()
    weight = STATE["state_dict"]["weight"].numpy().tobytes()
    start = whole.index(weight)
    for position in range(start, start + len(weight), 37):
        flip(path, position, position % 8)
        with pytest.raises(ValueError, match=r"record .*/data/\d was changed"):
            verify(path)
        flip(path, position, position % 8)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt", "checksums.json"])
def test_a_flipped_bit_in_a_folder_is_found(tmp_path, name):
    path = write_folder(tmp_path / "step=1.ckpt")
    whole, rng = (path / name).read_bytes(), random.Random(0)
    for _ in range(40):
        position, bit = rng.randrange(len(whole)), rng.randrange(8)
        flip(path / name, position, bit)
        # The sums themselves have spaces and line breaks.
        if name != "checksums.json" or whole[position : position + 1].strip():
            with pytest.raises(ValueError, match=r"step=1\.ckpt: the checkpoint is damaged"):
                verify(path)
        flip(path / name, position, bit)
    verify(path)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = write_file(tmp_path / "step=1.ckpt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(
        ValueError, match=r"step=1\.ckpt: the checkpoint is damaged \(File is not a zip file\)"
    ):
        verify(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda path: os.truncate(path / "__0_0.distcp", 99), "__0_0.distcp has 99 bytes instead of"),
        (lambda path: (path / "meta.pt").unlink(), "meta.pt is missing"),
        (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    ],
)
@pytest.mark.parametrize("sums", [True, False])
def test_what_a_folder_lacks_is_named_with_and_without_checksums(tmp_path, damage, message, sums):
    path = write_folder(tmp_path / "step=1.ckpt", sums)
    verify(path)
    damage(path)
    with pytest.raises(ValueError, match=message):
        verify(path)
    assert is_sharded(path)


def test_without_checksums_what_is_not_sharded_is_still_checked(tmp_path):
    path = write_folder(tmp_path / "step=1.ckpt", sums=False)
    flip(path / "meta.pt", (path / "meta.pt").stat().st_size // 3, 0)
    with pytest.raises(ValueError, match="was changed"):
        verify(path)


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path):
    with pytest.raises(ValueError, match="nowhere.ckpt: no such checkpoint file"):
        verify(tmp_path / "nowhere.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint\n")
    with pytest.raises(ValueError, match="not a zip file"):
        verify(tmp_path / "text.ckpt")
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as archive:
        archive.writestr("notes.txt", "")
    with pytest.raises(ValueError, match="not written by torch.save"):
        verify(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"the checkpoint is damaged \(.metadata is missing\)"):
        verify(tmp_path)
    assert not is_sharded(tmp_path)


def test_verifying_takes_little_memory(tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(16_000_000)}}, tmp_path / "a.ckpt")
    tracemalloc.start()
    verify(tmp_path / "a.ckpt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8_000_000 < (tmp_path / "a.ckpt").stat().st_size


def test_the_shards_of_a_rank_are_its_own_and_the_rest_is_of_the_first(tmp_path):
    for name in ("__0_0.distcp", "__1_0.distcp", "__1_1.distcp", "__11_0.distcp", ".metadata", "meta.pt"):
        (tmp_path / name).write_text(name)
    parts = [checksums(tmp_path, rank) for rank in range(12)]
    assert parts[0].keys() == {"__0_0.distcp", ".metadata", "meta.pt"}
    assert parts[1].keys() == {"__1_0.distcp", "__1_1.distcp"}
    together = {name: sum for part in parts for name, sum in part.items()}
    assert together == checksums(tmp_path)
    assert together["meta.pt"]["size"] == 7
    # echo -n meta.pt | sha256sum
    assert together["meta.pt"]["sha256"].startswith("b67f1fe221abbf21")


# --- which one is the newest --------------------------------------------------------------------------------


def test_the_newest_whole_one_is_found_and_each_damaged_one_before_it_is_told(tmp_path):
    for step in (5, 20, 100, 30):
        write_file(tmp_path / f"epoch=0-step={step}.ckpt")
    (tmp_path / "epoch=0-step=100.ckpt").write_bytes(b"")
    flip(tmp_path / "epoch=0-step=30.ckpt", 700, 3)
    (tmp_path / ".step=200.ckpt.partial").mkdir()
    (tmp_path / "step=300.ckpt.damaged").write_bytes(b"")
    said = []
    assert newest_whole(tmp_path, said.append) == tmp_path / "epoch=0-step=20.ckpt"
    assert [line.split(": the checkpoint is damaged")[0] for line in said] == [
        str(tmp_path / "epoch=0-step=100.ckpt"),
        str(tmp_path / "epoch=0-step=30.ckpt"),
    ]


def test_files_and_folders_stand_in_one_order(tmp_path):
    write_folder(tmp_path / "step=9.ckpt")
    write_file(tmp_path / "step=10.ckpt")
    write_folder(tmp_path / "step=11.ckpt")
    assert [path.name for path in newest_first(tmp_path)] == ["step=11.ckpt", "step=10.ckpt", "step=9.ckpt"]


def test_a_name_without_a_step_counts_by_the_step_in_the_checkpoint(tmp_path):
    write_file(tmp_path / "step=11.ckpt")
    write_file(tmp_path / "last.ckpt")  # of step 12
    write_file(tmp_path / "step=13.ckpt")
    write_folder(tmp_path / "hpc_ckpt_1.ckpt")  # of step 12
    (tmp_path / "broken.ckpt").write_bytes(b"")
    names = [path.name for path in newest_first(tmp_path)]
    assert names == ["step=13.ckpt", "hpc_ckpt_1.ckpt", "last.ckpt", "step=11.ckpt", "broken.ckpt"]


def test_there_is_none_in_an_empty_or_missing_folder_or_if_all_are_damaged(tmp_path):
    said = []
    assert newest_whole(tmp_path / "nowhere", said.append) is None
    assert newest_whole(tmp_path, said.append) is None
    assert said == []
    (tmp_path / "step=1.ckpt").write_bytes(b"")
    assert newest_whole(tmp_path, said.append) is None
    assert len(said) == 1


def test_checksums_read_in_parallel_keep_their_order(tmp_path):
    for number in range(30):
        (tmp_path / f"__{number}_0.distcp").write_text(str(number) * (1 + 997 * (30 - number)))
    write_checksums(tmp_path)
    verify(tmp_path)
    assert checkpoints.checksums(tmp_path).keys() == {p.name for p in tmp_path.glob("*.distcp")}
