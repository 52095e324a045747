"""Files and folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def put_in_place(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a place to write a file or a folder, which becomes `path` when the block ends without an error.

    The place is in a hidden folder beside `path` and has its name. At the end all that was written is flushed
    to the disk, and then renamed. After an error, such as a full disk, the hidden folder is gone and what was
    at `path` is still there. A killed process leaves the hidden folder, which the next call removes.

    A file takes the place of a file in one step, so that whoever reads finds one of the two. For folders no
    system call does that: for an instant there is none, while the old one is beside it, as `.NAME.old`. If
    the process is killed just then, the next call brings it back. A checkpoint steps aside as
    `NAME.old.ckpt`, under which `rewarm.checkpoints.whole.newest_first` finds it.

    One process at a time may write to a path; different paths do not disturb each other.

    Args:
        path: Path where the file, folder or link shall be. Missing folders above it are made.
        replace: Whether what is written may take the place of what is there. A link is itself replaced, and
            what it points to stays.

    Yields:
        The path to write to, where nothing is yet.

    Raises:
        ValueError: If something is at `path`, when the block begins or when it ends, and `replace` is False.
        OSError: If the place cannot be written to, or nothing was written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with put_in_place(f"{folder}/shares.json") as place:
        ...         _ = place.write_text("[0.5, 0.5]")
        ...     os.listdir(folder)
        ['shares.json']
    """
    path = Path(path)
    if not replace:
        check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden, aside = partial(path), _aside(path)
    _discard(hidden)
    if os.path.lexists(aside):
        aside.rename(hidden if os.path.lexists(path) else path)
        _discard(hidden)
    hidden.mkdir()
    try:
        place = hidden / path.name
        yield place
        flush_all(place)
        if not replace:
            check_free(path)
        if os.path.lexists(path) and (path.is_dir() or place.is_dir()):
            path.rename(aside)
            place.rename(path)
            aside.rename(place)
        else:
            place.replace(path)
        flush(path.parent)
    finally:
        _discard(hidden)


def check_free(path: str | Path) -> None:
    """Find out before long work whether `put_in_place` will refuse its output.

    Args:
        path: Path where the output shall be.

    Raises:
        ValueError: If something is there.

    Example:
        >>> check_free(".")
        Traceback (most recent call last):
            ...
        ValueError: output . is there already: remove it or name another
    """
    if os.path.lexists(path):
        raise ValueError(f"output {path} is there already: remove it or name another")


def partial(path: Path) -> Path:
    """Return the hidden folder beside a path that holds what is not whole yet.

    Example:
        >>> partial(Path("run/step=20.ckpt")).name
        '.step=20.ckpt.partial'
    """
    return path.with_name(f".{path.name}.partial")


def remove(path: Path) -> None:
    """Remove a file or folder if it is there; an interruption leaves no part of it under its name.

    Args:
        path: Path of the file or folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (Path(folder) / "run").mkdir()
        ...     remove(Path(folder) / "run")
        ...     os.listdir(folder)
        []
    """
    if path.is_dir() and not path.is_symlink():
        hidden = partial(path)
        _discard(hidden)
        path.rename(hidden)
        _discard(hidden)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk, so that they outlive a power cut.

    Args:
        path: Path of the file or folder.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(b"done")
        ...     file.flush()
        ...     flush(Path(file.name))
    """
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such call
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(path: Path) -> None:
    """Have a file, or a folder with everything in it, written to the disk; what links point to is not.

    Args:
        path: Path of the file, folder or link.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "done.txt").write_text("done")
        ...     flush_all(Path(folder))
    """
    if path.is_symlink():
        return
    if path.is_dir():
        for inner in path.iterdir():
            flush_all(inner)
    flush(path)


def _aside(path: Path) -> Path:
    if path.suffix == ".ckpt":
        return path.with_name(f"{path.stem}.old{path.suffix}")
    return path.with_name(f".{path.name}.old")


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
