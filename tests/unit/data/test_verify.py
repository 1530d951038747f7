"""`dtl verify` finds every damage and names it; what it sets aside is left out everywhere, and comes back when mended."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import damage
import numpy as np
import pytest
from packed_folders import small_shards
from PIL import Image
from tiny_images import encoded, huge_bmp, image_folder
from wds_tars import sample as members
from wds_tars import write_tar

from dtl.data.packing.pack import pack
from dtl.data.shards.index import Shards
from dtl.data.verify import verify
from dtl.data.wds.index import index_shards
from dtl.errors import UserError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory)


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def checked(folder: Path, **options: bool) -> tuple[int, list[int], str]:
    """(status, damaged samples, all that was said)."""
    report = verify(folder, processes=1, progress=False, **options)
    lines: list[str] = []
    from dtl.data.verify import describe

    describe(report, lines.append)
    return (0 if report.is_usable else 2), [bad.sample for bad in report.new_samples], "\n".join(lines)


def _label_in_tar(folder: Path) -> None:
    path = damage.shard_path(folder, 9)
    shards = Shards.open(folder)
    data = bytearray(path.read_bytes())
    at = int(shards.offsets[9]) - 1024  # cls comes before jpg
    data[at] = ord("1") if data[at] == ord("0") else ord("0")
    path.write_bytes(data)
    damage.set_sha256(folder)


DAMAGES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "one bit": (lambda f: damage.flip_bit(f, 9), 1, "the checksum is wrong"),
    "a zeroed block": (lambda f: damage.zero_block(f, 9), 1, "the checksum is wrong"),
    "cut": (lambda f: damage.cut_shard(f, 9), -1, "bytes before the image does"),
    "cut in a header": (lambda f: damage.cut_shard(f, 9, in_header=True), -1, "bytes before the image does"),
    "missing": (lambda f: damage.shard_path(f, 9).unlink(), -1, "the shard is missing"),
    "a header": (lambda f: damage.damage_header(f, 9), -2, "not a tar header: its checksum is wrong"),
    "a label": (lambda f: damage.rewrite_index(f, 9, labels=7), 1, "label 7 is not one of 2 classes"),
    "another label": (_label_in_tar, 1, "in the tar"),
    "a size in the index": (lambda f: damage.rewrite_index(f, 9, widths=5), 1, "but 5 x 12 according to the index"),
    "an offset": (lambda f: damage.rewrite_index(f, 9, offsets=512), 1, "the checksum is wrong"),
    "no image": (lambda f: damage.put_image(f, 9, b"nothing"), 1, "not an image"),
    "half an image": (lambda f: damage.put_image(f, 9, encoded(height=10, width=12)[:-40]), 1, "image file is truncated"),
    "too large": (lambda f: damage.put_image(f, 9, huge_bmp(), width=60_000, height=60_000), 1, "pixels"),
    "another shard": (lambda f: shutil.copy(damage.shard_path(f, 34), damage.shard_path(f, 9)), -1, "the checksum is wrong"),
}


@pytest.mark.parametrize("which", list(DAMAGES))
def test_every_damage_is_found_and_named(copy: Path, which: str) -> None:
    do, count, reason = DAMAGES[which]
    key = Shards.open(copy).key(9)
    do(copy)
    shard = Shards.open(copy).manifest.shards[Shards.open(copy).shard_of(9)].url
    status, samples, said = checked(copy)
    assert status == 2
    assert reason in said
    assert shard in said
    if count == 1:
        assert samples == [9]
        # The key stands in the tar before the image, so a wrong offset finds another one.
        assert f"{shard}: sample {'000000' if which == 'an offset' else key} at byte " in said
    elif count == -1:
        assert 9 in samples
        assert len(samples) > 1
    # Setting the damaged samples aside leaves a split that is sound, but where no sample is damaged: a header alone.
    if count == -2:
        return
    checked(copy, quarantine=True)
    left = Shards.open(copy)
    assert left.num_samples == 35 - len(samples)
    assert all(isinstance(one, bytes) for one in left.read(np.arange(left.num_samples)))
    assert checked(copy)[1] == []


def test_quarantine_grows(copy: Path) -> None:
    damage.flip_bit(copy, 3)
    first = checked(copy, quarantine=True)
    damage.flip_bit(copy, 4)
    before = Shards.open(copy).dataset_id
    status, samples, _ = checked(copy)
    assert (first[0], status, samples) == (0, 2, [4])
    checked(copy, quarantine=True)
    assert Shards.open(copy).quarantined.tolist() == [3, 4]
    assert Shards.open(copy).dataset_id != before
    assert len(list(copy.glob("index-without-*"))) == 1


def test_a_quarantine_that_does_not_belong_is_refused(copy: Path) -> None:
    damage.flip_bit(copy, 3)
    checked(copy, quarantine=True)
    path = copy / "quarantine.json"
    good = path.read_text()
    for text, said in [
        (good.replace('"of": "', '"of": "0'), "belongs to another data set"),
        (good.replace('"of": "', '"of": "x'), "of: .* is not a hexadecimal number"),
        (good[:50], "quarantine.json: not valid JSON"),
        (good.replace('"version": 1', '"version": 9'), "version: format version 9"),
        (good.replace('"key"', '"kex"'), "samples.0.key is missing"),
        (good.replace('"sample": 3', '"sample": 300'), "is damaged: its sample numbers must be increasing"),
        (good.replace('"index": "', '"index": "../'), "index: .* must be a file name without a folder"),
        (good.replace('"index": "', '"index": "x'), "cannot be read"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            Shards.open(copy)
    checked(copy, quarantine=True)
    assert Shards.open(copy).num_samples == 34


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    pack(image_folder(tmp_path / "s", {"a": 2, "b": 2}), tmp_path / "d", processes=1, progress=False)
    (tmp_path / "d/shard-00000.tar").unlink()
    with pytest.raises(UserError, match=r"all 4 samples are damaged .the shard is missing."):
        verify(tmp_path / "d", processes=1, progress=False, quarantine=True)
    assert not (tmp_path / "d/quarantine.json").exists()


def test_a_class_that_is_lost_is_told(tmp_path: Path) -> None:
    pack(image_folder(tmp_path / "s", {"a": 4, "b": 1}), tmp_path / "d", processes=1, progress=False)
    damage.flip_bit(tmp_path / "d", Shards.open(tmp_path / "d").labels.tolist().index(1))
    assert "no sample is left of 1 class: b" in checked(tmp_path / "d", quarantine=True)[2]


@pytest.mark.parametrize("label", ["number", "name", "folder"])
def test_shards_of_others(tmp_path: Path, label: str) -> None:
    found = []
    for number in range(6):
        name = f"c{number % 2}"
        key = f"{name}/k{number}" if label == "folder" else f"k{number}"
        found.append(members(key, number % 2 if label == "number" else name, seed=number))
    field = None if label != "folder" else "folder"
    path = write_tar(tmp_path / "a.tar", [one for pair in found for one in pair])
    index_shards([path], label_field=field, processes=1, progress=False)
    assert checked(tmp_path) == (0, [], "")
    damage.flip_bit(tmp_path, 2)
    status, samples, said = checked(tmp_path)
    assert (status, samples) == (2, [2])
    assert f"a.tar: sample {'c0/' if label == 'folder' else ''}k2 at byte " in said
    checked(tmp_path, quarantine=True)
    assert [Shards.open(tmp_path).key(n).rpartition("/")[2] for n in range(5)] == ["k0", "k1", "k3", "k4", "k5"]
    (tmp_path / "keys.bin").unlink()
    assert "keys.bin: at byte 0: it is missing" in checked(tmp_path)[2]


@pytest.mark.parametrize("how", ["another folder", "a link"])
def test_a_disk_that_is_not_mounted_is_not_damage(tmp_path: Path, how: str) -> None:
    """Shards that lie elsewhere than their index; beside it, a missing one is lost (`DAMAGES`)."""
    path = write_tar(tmp_path / "disk/a.tar", [one for n in range(6) for one in members(f"k{n}", n % 2, seed=n)])
    folder = tmp_path / "index"
    if how == "a link":
        folder.mkdir()
        (folder / "a.tar").symlink_to(path)
        path = folder / "a.tar"
    index_shards([path], out=folder, processes=1, progress=False)
    assert checked(folder) == (0, [], "")
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    status, samples, said = checked(folder, quarantine=True)
    assert (status, samples) == (2, [])
    assert "a.tar: 6 samples not checked: the shard is missing" in said
    assert not (folder / "quarantine.json").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_the_system_refuses_is_not_damage(copy: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """No permission, a network file system that is gone, too many open files (root may read all, so the call itself fails here)."""

    def refuses(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("dtl.data.shards.index.open_descriptor", refuses)
    monkeypatch.setattr("dtl.data.verify_tasks.open_tar", refuses)
    status, samples, said = checked(copy, quarantine=True)
    assert (status, samples) == (2, [])
    assert f"samples not checked: the shard cannot be read ({os.strerror(number)})" in said
    assert not (copy / "quarantine.json").exists()


def test_too_little_memory_is_not_damage(tmp_path: Path) -> None:
    """An image that a process may not decode whole (`ulimit -v`): nothing is known about it."""
    root = image_folder(tmp_path / "source", {"ant": 3, "bee": 3})
    Image.new("1", (12_000, 12_000)).save(root / "ant" / "large.png")
    pack(root, tmp_path / "packed", processes=1, progress=False, verify=False)

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (450 << 20, 450 << 20))

    command = [sys.executable, "-m", "dtl", "verify", str(tmp_path / "packed"), "--processes", "1", "--quarantine"]
    variables = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=little, env=variables, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "shard-00000.tar: 1 sample not checked: there is not enough memory to decode it (12000 x 12000 pixels)\n" in done.stderr
    assert "1 could not be read, so nothing is known about them" in done.stdout
    assert not (tmp_path / "packed/quarantine.json").exists()
    assert checked(tmp_path / "packed") == (0, [], "")


def test_the_same_for_any_number_of_processes(copy: Path) -> None:
    damage.flip_bit(copy, 30)
    damage.cut_shard(copy, 5)
    reports = [verify(copy, processes=processes, progress=False) for processes in (1, 3)]
    assert reports[0].samples == reports[1].samples
    assert reports[0].shards == reports[1].shards
