"""What is put in place is there whole, old or new, whatever happens and whoever looks."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rewarm.checkpoints.placing import check_free, flush_all, partial, put_in_place, remove
from rewarm.checkpoints.whole import newest_whole
from tests.checkpoints.test_whole import STATE, load, same, write_file, write_folder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def content(path):
    """What is at a path: the text of a file, those of a folder by their names, or None."""
    if path.is_dir():
        return {
            str(inner.relative_to(path)): inner.read_text() for inner in path.rglob("*") if inner.is_file()
        }
    return path.read_text() if path.exists() else None


def write_text(path, text):
    path.write_text(text)


def write_texts(path, text):
    (path / "inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        (path / name).write_text(text)


KINDS = [write_text, write_texts]


# --- what is written and what is refused --------------------------------------------------------------------


@pytest.mark.parametrize("write", KINDS)
def test_it_is_there_when_the_block_has_ended_and_not_before(tmp_path, write):
    path = tmp_path / "deep" / "er" / "out.txt"
    with put_in_place(path) as place:
        assert place.name == "out.txt"
        assert not place.exists()
        write(place, "new")
        assert not path.exists()
    write(tmp_path / "expected", "new")
    assert content(path) == content(tmp_path / "expected")
    assert names(path.parent) == ["out.txt"]


def test_a_text_is_a_path_too(tmp_path):
    with put_in_place(f"{tmp_path}/out.txt") as place:
        place.write_text("new")
    assert content(tmp_path / "out.txt") == "new"


@pytest.mark.parametrize("write", KINDS)
def test_what_is_there_is_refused_before_any_work_and_kept(tmp_path, write):
    write(tmp_path / "out", "old")
    before = content(tmp_path / "out")
    said = r"output .*out is there already: remove it or name another"
    with pytest.raises(ValueError, match=said), put_in_place(tmp_path / "out"):
        pytest.fail("the block began")
    with pytest.raises(ValueError, match="is there already"):
        check_free(tmp_path / "out")
    check_free(tmp_path / "other")
    assert content(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("write", KINDS)
def test_what_has_come_in_the_meantime_is_kept(tmp_path, write):

    def write_late():
        with put_in_place(tmp_path / "out") as place:
            write(place, "new")
            (tmp_path / "out").write_text("of somebody else")

    with pytest.raises(ValueError, match="is there already"):
        write_late()
    assert content(tmp_path / "out") == "of somebody else"
    assert names(tmp_path) == ["out"]


def test_a_link_to_nowhere_is_there_too(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="is there already"), put_in_place(tmp_path / "out"):
        pytest.fail("the block began")


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_asked_to_replace_it_leaves_the_new_one_alone(tmp_path, old, new):
    old(tmp_path / "out", "old")
    with put_in_place(tmp_path / "out", replace=True) as place:
        new(place, "new")
    new(tmp_path / "expected", "new")
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert names(tmp_path) == ["expected", "out"]


@pytest.mark.parametrize("write", KINDS)
def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path, write):
    write_texts(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with put_in_place(tmp_path / "out", replace=True) as place:
        write(place, "new")
    assert not (tmp_path / "out").is_symlink()
    assert content(tmp_path / "real")["a"] == "old"
    assert names(tmp_path) == ["out", "real"]


def test_a_link_can_be_put_in_place(tmp_path):
    write_texts(tmp_path / "real", "old")
    with put_in_place(tmp_path / "out") as place:
        place.symlink_to(tmp_path / "real")
    assert (tmp_path / "out").readlink() == tmp_path / "real"


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), put_in_place(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


# --- errors and full disks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("wrong"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("write", KINDS)
def test_after_an_error_the_old_one_is_left_and_nothing_else(tmp_path, write, error):
    write(tmp_path / "out", "old")
    before = content(tmp_path / "out")

    def write_half():
        with put_in_place(tmp_path / "out", replace=True) as place:
            write(place, "half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert content(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]


def test_on_a_full_file_system_the_old_one_is_left_and_there_is_room_for_it(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        (small / "out").write_bytes(b"o" * 100_000)
        for _ in range(2):
            full = pytest.raises(OSError, match=r"\[Errno 28\] No space left")
            with full, put_in_place(small / "out", replace=True) as place:
                place.write_bytes(b"n" * 200_000)
            assert (small / "out").read_bytes() == b"o" * 100_000
            assert names(small) == ["out"]
        with put_in_place(small / "out", replace=True) as place:
            place.write_bytes(b"n" * 100_000)
        assert (small / "out").read_bytes() == b"n" * 100_000
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("write", KINDS)
def test_everything_is_flushed_before_it_is_renamed_and_the_name_after_that(tmp_path, monkeypatch, write):
    events = []

    def fsync(descriptor):
        where = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(str(where.relative_to(tmp_path)))

    real = {name: getattr(os, name) for name in ("rename", "replace")}
    monkeypatch.setattr(os, "fsync", fsync)
    for name in real:
        monkeypatch.setattr(os, name, lambda a, b, name=name: (events.append("renamed"), real[name](a, b)))
    with put_in_place(tmp_path / "out") as place:
        write(place, "new")
    hidden = ".out.partial/out"
    inner = {f"{hidden}/{name}" for name in ("a", "b", "inner/c", "inner")} if write is write_texts else set()
    assert set(events[: len(inner)]) == inner
    assert events[len(inner) :] == [hidden, "renamed", "."]


def test_links_are_not_followed_when_a_folder_is_flushed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "loop").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "nowhere").symlink_to(tmp_path / "gone")
    flush_all(tmp_path / "folder")


# --- killed -------------------------------------------------------------------------------------------------

CALLS = ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir")


class Killed(BaseException):
    pass


def killed_at(monkeypatch, number, work):
    """Do something that is killed before its n-th change to the disk; return whether it ended before that."""
    count = 0

    def watched(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > number:  # none that follows, in a finally say, happens either
                raise Killed
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, watched(getattr(os, name)))
        try:
            work()
        except Killed:
            return False
    return True


def write_out(folder, write, text):
    with put_in_place(folder / "out", replace=True) as place:
        write(place, text)


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_killed_at_any_change_the_next_one_finds_the_old_or_the_new_and_can_fail(
    tmp_path, monkeypatch, old, new
):
    contents = []
    for kind, text in ((old, "old"), (new, "new"), (write_text, "third")):
        kind(tmp_path / text, text)
        contents.append(content(tmp_path / text))
    seen = set()
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        old(folder / "out", "old")
        ended = killed_at(monkeypatch, number, lambda folder=folder: write_out(folder, new, "new"))
        left = [content(path) for path in (folder / "out", folder / ".out.old") if path.exists()]
        assert left, f"killed at {number}"
        assert content(folder / "out") in (
            [*contents[:2], None] if write_texts in (old, new) else contents[:2]
        )
        with pytest.raises(ZeroDivisionError), put_in_place(folder / "out", replace=True):
            raise ZeroDivisionError
        seen.add(contents[:2].index(content(folder / "out")))
        write_out(folder, write_text, "third")
        assert content(folder / "out") == "third"
        assert names(folder) == ["out"]
        if ended:
            break
    assert seen == {0, 1}
    assert number > 4


@pytest.mark.parametrize("new", [write_file, write_folder])
@pytest.mark.parametrize("old", [write_file, write_folder])
def test_killed_at_any_change_a_whole_checkpoint_is_found_and_doing_it_again_ends_it(
    tmp_path, monkeypatch, old, new
):
    def write(path):
        with put_in_place(path, replace=True) as place:
            new(place)

    for number in itertools.count():
        path = tmp_path / str(number) / "step=12.ckpt"
        path.parent.mkdir()
        old(path)
        ended = killed_at(monkeypatch, number, lambda path=path: write(path))
        found = newest_whole(path.parent, lambda _: None)
        assert found is not None, f"killed at {number}"
        assert same(load(found), STATE)
        if ended:
            break
        write(path)
        assert newest_whole(path.parent, pytest.fail) == path
        assert path.is_dir() == (new is write_folder)
        assert names(path.parent) == ["step=12.ckpt"]
    assert number > 4


def test_killed_at_any_point_of_a_removal_no_part_keeps_the_name(tmp_path, monkeypatch):
    for number in range(40):
        path = tmp_path / "step=12.ckpt"
        write_texts(path, "whole")
        before = content(path)
        ended = killed_at(monkeypatch, number, lambda path=path: remove(path))
        assert content(path) in (before, None)
        if ended:
            break
        remove(path)
        shutil.rmtree(partial(path), ignore_errors=True)
    assert ended
    assert number > 3
    assert names(tmp_path) == []


def test_what_is_not_there_is_removed_without_a_word(tmp_path):
    remove(tmp_path / "step=1.ckpt")


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path):
    write_texts(tmp_path / "real", "old")
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "real")
    remove(tmp_path / "last.ckpt")
    assert content(tmp_path / "real")["a"] == "old"
    assert not (tmp_path / "last.ckpt").exists()


FOREVER = """
import sys
from pathlib import Path
from rewarm.checkpoints.placing import put_in_place
folder, size = Path(sys.argv[1]), 100_000
for number in range(10**9):
    text = f"{number} " * size
    with put_in_place(folder / "file", replace=True) as place:
        place.write_text(text)
    with put_in_place(folder / "folder", replace=True) as place:
        place.mkdir()
        for name in ("a", "b"):
            (place / name).write_text(text)
    if number == 1:
        print("begun", flush=True)
"""


def number_in(text):
    """The number that a text repeats, if it is whole."""
    number, *others = text.split()
    assert others == [number] * 99_999
    return int(number)


def test_a_writer_killed_at_any_time_leaves_what_is_whole(tmp_path):
    for delay in (0.0, 0.003, 0.011, 0.017, 0.029):
        writer = subprocess.Popen([sys.executable, "-c", FOREVER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"begun\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        number_in((tmp_path / "file").read_text())
        found = tmp_path / "folder" if (tmp_path / "folder").exists() else tmp_path / ".folder.old"
        a, b = (number_in((found / name).read_text()) for name in ("a", "b"))
        assert a == b
        assert set(names(tmp_path)) <= {"file", "folder", ".file.partial", ".folder.partial", ".folder.old"}


def test_who_reads_a_file_while_it_is_replaced_finds_one_of_them_whole(tmp_path):
    path, stop, read = tmp_path / "file", threading.Event(), set()
    path.write_text("0 " * 100_000)

    def look():
        while not stop.is_set():
            read.add(path.read_text())  # a missing file would end the thread with a warning, an error here

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(1, 30):
        with put_in_place(path, replace=True) as place:
            place.write_text(f"{number} " * 100_000)
    stop.set()
    reader.join()
    assert len({number_in(text) for text in read}) > 1
