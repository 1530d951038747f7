"""dtl.files: whole or not there, synced where a disk can, one lock that a killed process lets go of."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from dtl import files
from dtl.errors import UserError


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "value"
    files.write_whole(path, lambda file: file.write(b"old"))

    def broken(file: object) -> None:
        file.write(b"half of the n")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, broken)
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["value"]


def test_readers_keep_the_file_that_they_have_open(tmp_path: Path) -> None:
    path = tmp_path / "value"
    files.write_json_whole(path, {"a": 1})
    with path.open() as held:
        files.write_json_whole(path, {"a": 2})
        assert '"a": 1' in held.read()
    assert '"a": 2' in path.read_text()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_folder_that_cannot_be_synced_is_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    files.fsync_folder(tmp_path)


def test_a_disk_that_fails_to_sync_is_not_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(OSError, match="Input/output"):
        files.fsync_folder(tmp_path)


def new_folder(at: Path, text: str) -> Path:
    at.mkdir()
    (at / "file").write_text(text)
    return at


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_published_folder_is_found_whenever_the_process_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    """Killed before the first rename, between the two, after both."""
    target = new_folder(tmp_path / "model", "old")
    done: list[object] = []
    real: Callable[..., None] = os.rename

    def rename(*names: object) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(names)
        real(*names)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(files, "fsync_folder", lambda folder: None)
    if renames < 2:
        with pytest.raises(KeyboardInterrupt):
            files.publish(new_folder(tmp_path / ".new", "new"), target)
    else:
        files.publish(new_folder(tmp_path / ".new", "new"), target)
    assert (files.published(target) / "file").read_text() == ("new" if renames == 2 else "old")


def test_hash_and_size(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(data)
    assert files.hash_file(tmp_path / "file") == files.FileFacts(len(data), sha256(data).hexdigest())
    assert files.sha256_of_file(tmp_path / "file") == sha256(data).hexdigest()


def test_a_lock_is_held_by_one_and_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"import sys; from dtl.files import flock; file = open({str(path)!r}, 'a'); print(flock(file, wait=False), flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with path.open("a") as file:
        assert files.flock(file, wait=False) == "busy"
        holder.kill()
        holder.communicate()
        assert files.flock(file) == "held"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_without_locks_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with (tmp_path / "lock").open("a") as file:
        assert files.flock(file) == files.flock(file, wait=False) == "none"


def test_another_failure_of_a_lock_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
    with (tmp_path / "lock").open("a") as file, pytest.raises(OSError, match="Input/output"):
        files.flock(file)


def test_what_a_user_put_into_a_folder_that_is_replaced_moves_along(tmp_path: Path) -> None:
    def version(text: str) -> Path:
        (tmp_path / "new").mkdir()
        (tmp_path / "new/ours").write_text(text)
        return tmp_path / "new"

    target = tmp_path / "model"
    files.publish(version("1"), target, made=("ours",))
    (target / "mine").write_text("mine")
    (target / "folder").mkdir()
    (target / "folder/mine").write_text("mine")
    files.publish(version("2"), target, made=("ours",))
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == ["folder", "folder/mine", "mine", "ours"]
    assert (target / "ours").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # A link is exchanged, and what it led to stays as it was.
    (tmp_path / "link").symlink_to(target)
    files.publish(version("3"), tmp_path / "link", made=("ours",))
    assert (target / "ours").read_text() == "2"
    assert (tmp_path / "link/ours").read_text() == "3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        files.write_whole(tmp_path / "pipe", lambda file: file.write(b"x"))
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_what_goes_to_an_open_stream_goes_there_and_replaces_nothing(tmp_path: Path) -> None:
    """As root, `dtl predict --out /dev/stdout > file` put a regular file into /dev in place of the link: standard output is a regular file there."""
    code = "import os; from pathlib import Path; from dtl.files import write_whole; write_whole(Path({0!r}), lambda file: file.write(b'rows'))"
    for place in ("/dev/stdout", "/proc/self/fd/1", "/dev/fd/1", str(tmp_path / "link")):
        if "link" in place:
            os.symlink("/proc/self/fd/1", place)
        with (tmp_path / "out").open("wb") as out:
            subprocess.run([sys.executable, "-c", code.format(place)], stdout=out, check=True)
        assert (tmp_path / "out").read_bytes() == b"rows"
        piped = subprocess.run([sys.executable, "-c", code.format(place)], capture_output=True, check=True)
        assert piped.stdout == b"rows"
    assert os.readlink("/dev/stdout").startswith("/proc/self/fd")
    assert os.path.islink(tmp_path / "link")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_not_a_file_is_not_replaced_and_one_line(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "x.json"
    {"folder": place.mkdir, "pipe": lambda: os.mkfifo(place), "device": lambda: place.symlink_to("/dev/full")}[kind]()
    with pytest.raises(UserError, match=r"x.json cannot be written: it exists and is not a regular file$"):
        files.write_json_whole(place, {})
    with pytest.raises(OSError, match="is not a regular file"):
        files.write_json_whole(place, {})
