"""Checkpoints on disk: which of them are there, and whether they are what was written.

A checkpoint is a file that `torch.save` wrote, or a folder of shards from `torch.distributed.checkpoint`.
"""

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from rewarm.checkpoints.placing import flush

Checksums = dict[str, dict[str, Any]]
"""Size in bytes and SHA-256 of each file, by its path in the folder."""

_CHECKSUMS = "checksums.json"
_METADATA = ".metadata"
_REST = "meta.pt"  # where Lightning puts what isn't sharded
_SHARD = re.compile(r"__(\d+)_\d+\.distcp")
_TORCH = "torch.distributed.checkpoint"
# All that torch writes into the metadata of shards, beside dtypes and the like.
_IN_METADATA = {
    "builtins.set",
    "collections.OrderedDict",
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    ),
    "torch.Size",
    "torch.serialization._get_layout",
    f"{_TORCH}.filesystem._StorageInfo",
    f"{_TORCH}.metadata.Metadata",
    f"{_TORCH}.metadata.MetadataIndex",
    f"{_TORCH}.metadata.StorageMeta",
    f"{_TORCH}.metadata.TensorStorageMetadata",
    f"{_TORCH}.metadata.BytesStorageMetadata",
    f"{_TORCH}.metadata.ChunkStorageMetadata",
    f"{_TORCH}.metadata.TensorProperties",
    f"{_TORCH}.metadata._MEM_FORMAT_ENCODING",
}


def verify(path: Path) -> None:
    """Read a checkpoint to its last byte, in bounded memory, and find out whether it is what was written.

    A file holds a CRC-32 of each of its records. A folder holds SHA-256 sums if `write_checksums` was there;
    if not, all files that its metadata names must be there with at least their length, and what isn't sharded
    must be whole.

    Args:
        path: A `.ckpt` file or folder.

    Raises:
        ValueError: If the checkpoint is missing, torn, truncated, changed or without one of its shards, or is
            none; the message names the checkpoint and what is wrong with it.

    Example:
        >>> verify(Path("nowhere.ckpt"))
        Traceback (most recent call last):
            ...
        ValueError: nowhere.ckpt: no such checkpoint file
    """
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint file")
    try:
        if not path.is_dir():
            _verify_archive(path)
        elif (path / _CHECKSUMS).is_file():
            _verify_checksums(path)
            if (path / _METADATA).exists():
                read_metadata(path)
        else:
            _verify_shards(path)
    except Exception as error:  # zipfile and pickle raise nearly anything for damaged bytes
        raise ValueError(f"{path}: the checkpoint is damaged ({' '.join(str(error).split())})") from error


def read_metadata(folder: Path) -> Metadata:
    """Read what a checkpoint folder says about its shards, which torch would unpickle unseen.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        The metadata. Once they were read here, torch may read them, too.

    Raises:
        ValueError: If the file is missing, or holds anything else than metadata of shards in this folder, of
            which nothing is built.

    Example:
        >>> import tempfile, warnings
        >>> import torch.distributed.checkpoint as dcp
        >>> folder = Path(tempfile.mkdtemp())
        >>> with warnings.catch_warnings(action="ignore"):
        ...     _ = dcp.save({"weight": torch.zeros(2)}, checkpoint_id=folder)
        >>> read_metadata(folder).state_dict_metadata["weight"].size
        torch.Size([2])
    """
    try:
        with (folder / _METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        outside = [info for info in metadata.storage_data.values() if "/" in str(info.relative_path)]
    except Exception as error:  # pickle raises nearly anything for damaged bytes
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise ValueError(f"{_METADATA} {reason}") from error
    if outside:
        raise ValueError(f"{_METADATA} names {outside[0].relative_path}, which is not in this folder")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _IN_METADATA and "." not in name:
            return super().find_class(module, name)
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            return value
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no metadata of shards holds")


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint of the latest step in a folder that is not damaged.

    Args:
        folder: Folder of checkpoints, which may be missing.
        say: Function that is told about each damaged checkpoint that is passed over.

    Returns:
        The checkpoint, or None if there is no whole one.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for step in (9, 10):
        ...     torch.save({"global_step": step}, folder / f"step={step}.ckpt")
        >>> _ = (folder / "step=11.ckpt").write_bytes(b"torn")
        >>> warnings = []
        >>> newest_whole(folder, warnings.append).name, len(warnings)
        ('step=10.ckpt', 1)
    """
    for path in newest_first(folder):
        try:
            verify(path)
        except ValueError as error:
            say(str(error))
        else:
            return path
    return None


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder by step, the latest first.

    The step is the one in the name (`step=N`), or else the one in the checkpoint, as in Lightning's
    `last.ckpt` and `hpc_ckpt_N.ckpt`. Of two checkpoints of one step the younger comes first. Checkpoints
    that don't tell their step come last.

    Args:
        folder: Folder of checkpoints, which may be missing.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for step in (9, 10):
        ...     torch.save({"global_step": step}, folder / f"step={step}.ckpt")
        >>> [path.name for path in newest_first(folder)]
        ['step=10.ckpt', 'step=9.ckpt']
    """
    if not folder.is_dir():
        return []
    listed = [p for p in folder.iterdir() if p.suffix == ".ckpt" and p.name[0] != "." and p.exists()]
    return sorted(listed, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def is_sharded(path: Path) -> bool:
    """Return whether a path is one checkpoint in a folder, whole or not, not a folder of checkpoints.

    Args:
        path: Path of a file or folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> is_sharded(folder)
        False
        >>> (folder / "__0_0.distcp").touch()
        >>> is_sharded(folder)
        True
    """
    return path.is_dir() and any(
        name in (_METADATA, _REST, _CHECKSUMS) or _SHARD.fullmatch(name) for name in os.listdir(path)
    )


def checksums(folder: Path, rank: int | None = None) -> Checksums:
    """Read the files of a checkpoint folder and return their checksums.

    Args:
        folder: Folder of the checkpoint.
        rank: Rank whose shards are read, and for rank 0 also all files that are no shards; None reads all
            files.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "__1_0.distcp").write_bytes(b"shard")
        >>> checksums(folder, rank=0), checksums(folder, rank=1)["__1_0.distcp"]["size"]
        ({}, 5)
    """

    def is_ours(path: Path) -> bool:
        shard = _SHARD.fullmatch(path.name)
        return rank is None or rank == (int(shard[1]) if shard else 0)

    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != _CHECKSUMS]
    ours = {path.relative_to(folder).as_posix(): path for path in paths if is_ours(path)}
    return dict(zip(ours, _parallel(_checksum, ours.values()), strict=True))


def write_checksums(folder: Path, sums: Checksums | None = None) -> None:
    """Write `checksums.json` into a checkpoint folder.

    Args:
        folder: Folder of the checkpoint.
        sums: Checksums that all ranks together found by `checksums`; None reads the files here.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "__0_0.distcp").write_bytes(b"shard")
        >>> write_checksums(folder)
        >>> verify(folder)
        >>> _ = (folder / "__0_0.distcp").write_bytes(b"SHARD")
        >>> verify(folder)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: ...: the checkpoint is damaged (__0_0.distcp was changed)
    """
    path = folder / _CHECKSUMS
    path.write_text(json.dumps(checksums(folder) if sums is None else sums, indent=1, sort_keys=True))
    flush(path)


def _verify_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if not any(record.filename.endswith("/data.pkl") for record in records):
            raise ValueError("not written by torch.save")
        # The directory has no CRC of its own, and torch believes what Python's zipfile does not look at.
        if len(set(archive.namelist())) < len(records) or any(
            record.compress_type or record.external_attr or record.compress_size != record.file_size
            for record in records
        ):
            raise ValueError("its directory was changed")
        if broken := archive.testzip():
            raise ValueError(f"record {broken} was changed")
    with path.open("rb") as file:
        torch._C.PyTorchFileReader(file)


def _verify_checksums(folder: Path) -> None:
    expected: Checksums = json.loads((folder / _CHECKSUMS).read_text())
    for name, known in expected.items():
        _check_size(folder / name, known["size"])
    found = _parallel(_checksum, (folder / name for name in expected))
    for (name, known), checksum in zip(expected.items(), found, strict=True):
        if checksum != known:
            raise ValueError(f"{name} was changed")


def _verify_shards(folder: Path) -> None:
    for name in (_METADATA, _REST):
        _check_size(folder / name, 0)
    ends: dict[str, int] = {}
    for info in read_metadata(folder).storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        _check_size(folder / name, end)
    _verify_archive(folder / _REST)


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if path.stat().st_size < size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {size}")


def _checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _parallel(
    read: Callable[[Path], dict[str, Any]], paths: Iterable[Path]
) -> list[dict[str, Any]]:  # hashing and reading let other threads run
    with ThreadPoolExecutor(max_workers=8) as threads:
        return list(threads.map(read, paths))


def _step(path: Path) -> int:
    if match := re.search(r"step=(\d+)", path.name):
        return int(match[1])
    try:
        content = path / _REST if path.is_dir() else path
        return int(torch.load(content, mmap=True, map_location="cpu", weights_only=True)["global_step"])
    except Exception:  # damaged, or with objects that are not trusted: `verify` will say what is wrong
        return -1
