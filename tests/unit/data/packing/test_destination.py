"""The folder that is packed into: what may be there, and errors of the disk."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packed_folders import hashes, pack
from tiny_images import image_folder

from dtl.data.shards.index import Shards
from dtl.errors import UserError


def test_two_at_once_into_one_folder(source: Path, tmp_path: Path) -> None:
    from dtl.data.packing.destination import prepare_destination, working_alone
    from dtl.data.packing.job import MADE

    folder = prepare_destination(tmp_path / "d", "refuse")
    with working_alone(folder, tmp_path / "d", MADE), pytest.raises(UserError, match="another process is packing into"):
        pack(source, tmp_path / "d")


def test_a_packed_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    pack(root, tmp_path / "d")
    first = hashes(tmp_path / "d")
    with pytest.raises(UserError, match=r"already holds a packed data set; choose another folder, or replace it with --overwrite"):
        pack(root, tmp_path / "d", seed=1)
    assert hashes(tmp_path / "d") == first
    pack(root, tmp_path / "d", existing="replace", val_fraction=0.4)
    assert sorted(entry.name for entry in (tmp_path / "d").iterdir()) == ["train", "val"]
    pack(root, tmp_path / "d", existing="replace")
    assert hashes(tmp_path / "d") == first


@pytest.mark.parametrize("existing", ["refuse", "replace"])
def test_a_folder_with_other_things_is_never_touched(tmp_path: Path, existing: str) -> None:
    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    before = hashes(root)
    with pytest.raises(UserError, match=r"is not empty \(it holds 'a' and more\); choose a new folder"):
        pack(root, root, existing=existing)
    (tmp_path / "d" / "train").mkdir(parents=True)
    (tmp_path / "d" / "train" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        pack(root, tmp_path / "d", existing=existing)
    assert hashes(root) == before
    assert (tmp_path / "d" / "train" / "thesis.tex").exists()


def test_destinations_that_cannot_be(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; the destination must be a folder"):
        pack(root, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        pack(root, tmp_path / "file" / "below")
    with pytest.raises(UserError, match="cannot be written"):
        pack(root, Path("/proc/dtl-test"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_one_line_and_gives_the_space_back(tmp_path: Path, processes: int) -> None:
    root = image_folder(tmp_path / "s", {"a": 40, "b": 40})
    code = f"""
import resource, sys
from dtl.data.packing.pack import pack
from dtl.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a file of more fails, as on a full disk
try:
    pack({str(root)!r}, {str(tmp_path / "d")!r}, processes={processes}, progress=False)
except UserError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith(f"{tmp_path / 'd'}: the disk is full (File too large)"), out.stdout + out.stderr
    assert out.stderr == ""
    assert list((tmp_path / "d").iterdir()) == []


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"the disk has 0.00 GiB free, but packing needs 0.00 GiB"):
        pack(root, tmp_path / "d")
    assert not list((tmp_path / "d").glob("*.tar"))


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_packing_without_locks_goes_on_with_one_line(
    source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: int
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("dtl.files.fcntl.flock", refuse)
    pack(source, tmp_path / "d", shard_bytes=50_000)
    assert capsys.readouterr().err.count(f"{tmp_path}/d is on a file system without locks: do not start a second process that writes there") == 1
    assert hashes(tmp_path / "d") == hashes(packed)


@pytest.mark.parametrize("reason", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_packing_into_a_folder_that_cannot_be_synced(source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    real, refused = os.fsync, []

    def fsync(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            refused.append(number)
            raise OSError(reason, os.strerror(reason))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    pack(source, tmp_path / "d", shard_bytes=50_000)
    assert refused
    assert hashes(tmp_path / "d") == hashes(packed)
    assert Shards.open(tmp_path / "d").num_samples == Shards.open(packed).num_samples


@pytest.mark.parametrize("existing", ["refuse", "replace"])
def test_shards_of_others_are_not_taken_for_ours(tmp_path: Path, existing: str) -> None:
    """Others call their tars shard-000000.tar too: alone, under an index that dtl made of them, beside a manifest of another program."""
    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    indexed = '{"shards": [], "dataset_id": "x", "made_by": {"source": "WebDataset shards"}}'
    for case, manifest in (("alone", None), ("indexed", indexed), ("theirs", '{"name": "app"}')):
        place = tmp_path / case
        place.mkdir()
        (place / "shard-000000.tar").write_bytes(b"theirs")
        if manifest is not None:
            (place / "manifest.json").write_text(manifest)
        before = hashes(place)
        unasked = existing == "refuse" and manifest is not None
        with pytest.raises(UserError, match="already holds a packed data set" if unasked else "that dtl did not pack"):
            pack(root, place, existing=existing)
        assert hashes(place) == before


def test_links_in_the_destination_lead_nowhere(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "shard-00000.tar").write_bytes(b"mine")
    for name in ("train", f".packing-{socket.gethostname()}"):
        place = tmp_path / f"d{name}"
        place.mkdir()
        (place / name).symlink_to(mine)
        with pytest.raises(UserError, match=r"is not empty|is a link"):
            pack(root, place, existing="replace", val_fraction=0.4)
    assert (mine / "shard-00000.tar").read_bytes() == b"mine"


def test_half_a_packing_of_ours_gives_room_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while an old data set was being removed: what is left is ours, and the next packing removes it."""
    from dtl.data.packing import destination

    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    pack(root, tmp_path / "d")

    def killed(place: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(destination, "remove_ours", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(root, tmp_path / "d", existing="replace", seed=1)
    assert not (tmp_path / "d/manifest.json").exists()
    pack(root, tmp_path / "d", seed=1)
    assert Shards.open(tmp_path / "d").num_samples == 6


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("thesis.tex", "photos.tar", "mine.npy") for kind in ("file", "folder", "link", "pipe")),
        *((name, kind) for name in ("job.json", "lock") for kind in ("folder", "link", "pipe")),
    ],
)
def test_a_working_folder_that_holds_what_dtl_did_not_make(tmp_path: Path, name: str, kind: str) -> None:
    """Whoever knows the node's name can put anything there: nothing of it hangs, is followed or is removed."""
    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    work = tmp_path / "d" / f".packing-{socket.gethostname()}"
    work.mkdir(parents=True)
    (tmp_path / "outside").write_text("mine")
    make = {
        "file": lambda path: path.write_text("theirs"),
        "folder": lambda path: path.mkdir(),
        "link": lambda path: path.symlink_to(tmp_path / "outside"),
        "pipe": os.mkfifo,
    }
    make[kind](work / name)
    with pytest.raises(UserError, match=rf"it holds '{name}', which dtl did not make|/{name}: it is a (folder|link|named pipe), not a regular file"):
        pack(root, tmp_path / "d")
    assert (tmp_path / "outside").read_text() == "mine"
    assert os.path.lexists(work / name)


def test_a_packing_that_is_refused_removes_nothing_of_the_one_that_runs(tmp_path: Path) -> None:
    from dtl.data.packing.destination import working_alone
    from dtl.data.packing.job import MADE

    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    pack(root, tmp_path / "d")
    before = hashes(tmp_path / "d")
    work = tmp_path / "d" / f".packing-{socket.gethostname()}"
    work.mkdir()
    with working_alone(work, tmp_path / "d", MADE), pytest.raises(UserError, match="another process is packing into"):
        pack(root, tmp_path / "d", existing="replace")
    (work / "lock").unlink()
    work.rmdir()
    assert hashes(tmp_path / "d") == before
