"""An archive of class folders is packed into the bytes that its folder is packed into; whatever else it holds is one line."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packed_folders import hashes
from tiny_images import image_folder

from dtl.config.models import DataConfig
from dtl.data.open import ensure_packed
from dtl.data.packing.job import Job, PackOptions
from dtl.data.packing.pack import pack
from dtl.data.sources import archive
from dtl.data.sources.open import open_source
from dtl.data.wds.find import shards_for_training
from dtl.errors import UserError


def zipped(folder: Path, path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as target:
        for file in sorted(folder.rglob("*")):
            target.write(file, file.relative_to(folder))
    return path


def tarred(folder: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as target:  # type: ignore[call-overload]
        for file in sorted(folder.iterdir()):
            target.add(file, f"./{file.name}")
    return path


KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "a.zip": lambda folder, path: zipped(folder, path),
    "stored.zip": lambda folder, path: zipped(folder, path, zipfile.ZIP_STORED),
    "a.tar": tarred,
    "a.tar.gz": lambda folder, path: tarred(folder, path, "w:gz"),
    "a.tgz": lambda folder, path: tarred(folder, path, "w:gz"),
    "a.tar.bz2": lambda folder, path: tarred(folder, path, "w:bz2"),
    "a.TAR.XZ": lambda folder, path: tarred(folder, path, "w:xz"),
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes in a folder around the splits, as downloads have it, with what systems leave behind."""
    image_folder(tmp_path / "photos/archive/train", {"ant": 5, "bee/small": 4})
    image_folder(tmp_path / "photos/archive/val", {"ant": 2, "bee/small": 1})
    (tmp_path / "photos/__MACOSX").mkdir()
    (tmp_path / "photos/__MACOSX/._a.png").write_bytes(b"x")
    (tmp_path / "photos/archive/train/ant/notes.txt").write_text("about ants")
    (tmp_path / "photos/archive/train/ant/empty").mkdir()
    return tmp_path / "photos"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_it_is_packed_as_its_folder_is(photos: Path, tmp_path: Path, name: str, processes: int) -> None:
    file = KINDS[name](photos, tmp_path / name)
    expected = pack(photos, tmp_path / "of_folder", progress=False)
    report = pack(file, tmp_path / "of_archive", processes=processes, progress=False)
    assert report.classes == expected.classes == ("ant", "bee")
    assert report.notes == expected.notes
    for split in ("train", "val"):
        of_folder, of_archive = hashes(tmp_path / "of_folder" / split), hashes(tmp_path / "of_archive" / split)
        of_folder.pop("manifest.json"), of_archive.pop("manifest.json")  # it names the kind of source
        assert of_archive == of_folder
    assert sorted(entry.name for entry in (tmp_path / "of_archive").iterdir()) == ["train", "val"]


def test_training_packs_it_once(photos: Path, tmp_path: Path) -> None:
    options = DataConfig(cache_dir=str(tmp_path / "cache"))
    for name in ("a.zip", "a.tar", "a.tgz"):
        file = KINDS[name](photos, tmp_path / name)
        lines: list[str] = []
        folders = [ensure_packed(str(file), options, split=split, progress=False, log=lines.append) for split in ("train", "own val", "train")]
        assert folders[0] == folders[2] != folders[1]
        assert sum("packing" in line for line in lines) == 1
        changed = [f"{path.name}: {path.read_bytes()!r}" for path in tmp_path.iterdir() if path.is_file() and path != file]
        file.touch()
        assert ensure_packed(str(file), options, split="train", progress=False, log=lines.append) != folders[0], "another time, another set"
        assert changed == [f"{path.name}: {path.read_bytes()!r}" for path in tmp_path.iterdir() if path.is_file() and path != file]


def test_which_tars_are_shards(photos: Path, tmp_path: Path) -> None:
    """A plain tar of class folders without splits is used where it is, as before; one with splits, whose folders would all be trained on, is not."""
    assert shards_for_training(tarred(photos / "archive/train", tmp_path / "flat.tar"), "train") is not None
    assert shards_for_training(tarred(photos, tmp_path / "splits.tar"), "train") is None
    assert shards_for_training(tarred(photos / "archive/train", tmp_path / "flat.tar.gz", "w:gz"), "train") is None
    folder = tmp_path / "shard"
    image_folder(folder, {"a": 2})
    for image in list((folder / "a").iterdir()):
        image.with_suffix(".cls").write_text("1")
    assert shards_for_training(tarred(folder, tmp_path / "shard.tar"), "train") is not None
    assert shards_for_training(tarred(folder, tmp_path / "shard.tgz", "w:gz"), "train") is not None, "refused there, with what decompresses it"
    with pytest.raises(UserError, match=r"shard.tar is a WebDataset shard, .* dtl index .*shard.tar$"):
        open_source(tmp_path / "shard.tar")


def test_an_interrupted_packing_goes_on_with_its_copy(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = KINDS["a.tgz"](photos, tmp_path / "a.tgz")
    source, options = open_source(file), PackOptions()
    folder = tmp_path / "out/.dtl-packing"
    folder.mkdir(parents=True)
    first = Job.create(folder, source, options)
    monkeypatch.setattr(archive, "_unpack", None)
    again = Job.create(folder, source, options)
    assert [first.read(at) for at in range(first.num_samples)] == [again.read(at) for at in range(first.num_samples)]


def _info(name: str, *, kind: int = stat.S_IFREG) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o644) << 16
    return info


def _zip_of(path: Path, *infos: zipfile.ZipInfo, data: bytes = b"x") -> Path:
    with zipfile.ZipFile(path, "w") as target:
        for info in infos:
            target.writestr(info, data)
    return path


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ([_info("../a/1.png")], "the name of a member is not one of a file below its folder: '../a/1.png'"),
        ([_info("/a/1.png")], "not one of a file below its folder"),
        ([_info("a/" * 100 + "1.png")], "not one of a file below its folder"),
        ([_info("a/1.png", kind=stat.S_IFLNK)], "member 'a/1.png' is a link or a device"),
        ([_info("a/1.png"), _info("a\\1.png")], "holds 'a/1.png' twice"),
        ([_info("a"), _info("a/1.png")], "holds 'a' as a file, and 'a/1.png' in it"),
        ([_info("a/1.png"), _info("a")], "holds 'a' twice"),
        ([_info("a/1.png")], "has only one class, 'a'; a classifier needs two or more"),
        ([_info("1.png"), _info("2.png")], "has 2 images directly in it"),
        ([_info("train/a/1.png"), _info("train/b/1.png"), _info("test/1.png")], "Unpack the archive, and train on its folder train"),
        ([], "holds no images"),
    ],
)
def test_what_a_zip_may_not_hold_is_one_line(tmp_path: Path, infos: list[zipfile.ZipInfo], message: str, recwarn: pytest.WarningsRecorder) -> None:
    path = _zip_of(tmp_path / "a.zip", *infos)
    with pytest.raises(UserError, match=message) as raised:
        open_source(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_encrypted_unknown_and_overlapping_zips(tmp_path: Path) -> None:
    path = _zip_of(tmp_path / "a.zip", _info("a/1.png"), _info("b/1.png"))
    whole = path.read_bytes()
    entry = whole.index(b"PK\1\2")
    for at, value, message in [
        (8, 1, "is encrypted"),
        (10, 14, "compressed by a method that is not read here .14;"),
        (20, 1 << 20, "has members that overlap"),
    ]:
        path.write_bytes(whole[: entry + at] + struct.pack("<H" if at < 20 else "<I", value) + whole[entry + at + (2 if at < 20 else 4) :])
        with pytest.raises(UserError, match=message):
            open_source(path)
    path.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"a.zip is not a complete zip archive: File is not a zip file"):
        open_source(path)


def test_an_image_that_is_damaged_in_the_archive_is_named(photos: Path, tmp_path: Path) -> None:
    path = zipped(photos / "archive/train", tmp_path / "a.zip", zipfile.ZIP_STORED)
    with zipfile.ZipFile(path) as opened:
        info = next(one for one in opened.infolist() if one.filename.startswith("ant/") and one.filename.endswith(".jpg"))
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(info.filename) + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"1 of 9 images cannot be read: {info.filename}: its bytes are not those that the archive was made of"):
        pack(path, tmp_path / "out", progress=False)
    assert pack(path, tmp_path / "out2", on_error="skip", progress=False).skipped[0][0] == info.filename


def test_large_images_and_bombs(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "archive/train/ant/zeros.png").write_bytes(bytes(3 << 20))
    for name in ("a.zip", "a.tar", "a.tgz"):
        with pytest.raises(UserError, match=r"ant/zeros.png: it has 3,145,728 bytes, more than the 1,048,576"):
            pack(KINDS[name](photos, tmp_path / name), tmp_path / f"out-{name}", max_file_bytes=1 << 20, progress=False)
    monkeypatch.setattr(archive, "_LEAST_LIMIT", 1 << 20)
    monkeypatch.setattr(archive, "_MOST_TIMES", 1)
    with pytest.raises(UserError, match=r"a.tgz unpacks to more than 0 GiB, far more than it holds; unpack it, and give the folder"):
        open_source(tmp_path / "a.tgz")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_damaged_compressed_tars(photos: Path, tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    whole = compress(tarred(photos, tmp_path / "a.tar").read_bytes())
    path = tmp_path / "b.tar.gz"
    for data in (whole[:-20], whole[: len(whole) // 2], whole[:30] + b"\xff" * 30 + whole[60:], compress(b"a text, and no tar"), compress(b"")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"b.tar.gz (is damaged, or not an archive|cannot be read): ") as raised:
            open_source(path)
        assert "\n" not in str(raised.value)


def test_an_archive_that_changes_meanwhile(photos: Path, tmp_path: Path) -> None:
    path = KINDS["a.tgz"](photos, tmp_path / "a.tgz")
    source = open_source(path)
    shutil.copy(KINDS["a.tgz"](photos / "archive/train", tmp_path / "other.tgz"), path)
    with pytest.raises(UserError, match=r"a.tgz changed while it was packed"):
        pack(source, tmp_path / "out", progress=False)


def test_archives_that_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "photos.7z").write_bytes(b"x")
    with pytest.raises(UserError, match=r"photos.7z is an archive of a kind that dtl does not read .*; unpack it and give the folder"):
        open_source(tmp_path / "photos.7z")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("a/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"a.tar: member a/1.png at byte 0 is a symbolic link"):
        open_source(tmp_path / "a.tar")
