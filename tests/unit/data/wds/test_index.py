"""Shards that others wrote: indexed without a change, trained on as ours, and refused by name where they are not sound."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
from tiny_images import encoded, image_folder
from wds_tars import check_like_webdataset, indexed, interop, numbered, sample, write_tar

from dtl.commands import index as command
from dtl.config.models import DataConfig
from dtl.data.open import ensure_packed
from dtl.data.packing.pack import pack
from dtl.data.shards.index import Manifest, Shards
from dtl.errors import UserError

# --- what others write


@interop
@pytest.mark.parametrize("fields", [{"mtime": None}, {"mtime": 0.0}, {"mtime": 1700000000.5}])
def test_webdatasets_own_writer(tmp_path: Path, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Its default is the time of day with a fraction, so a PAX header before each member."""
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "imagenet-%03d.tar"), maxcount=7, verbose=0, **fields) as writer:
        for number in range(20):
            image = encoded(seed=number, height=10 + number % 3, width=16)
            writer.write({"__key__": f"n0144_{number}", "jpg": image, "cls": number % 4, "json": {"filename": "x" * number}})
    capsys.readouterr()
    paths = sorted(tmp_path.glob("*.tar"))
    before = [path.read_bytes() for path in paths]
    shards = indexed(tmp_path)
    check_like_webdataset(shards, paths)
    assert shards.labels.tolist() == [number % 4 for number in range(20)]
    assert shards.classes == ("0", "1", "2", "3")
    assert shards.heights.tolist() == [10 + number % 3 for number in range(20)]
    assert [path.read_bytes() for path in paths] == before, "the shards are only read"
    assert [shard.url for shard in shards.manifest.shards] == [path.name for path in paths]
    assert [shard.sha256 for shard in shards.manifest.shards] == [hashlib.sha256(data).hexdigest() for data in before]


# --- labels


def test_a_validation_set_with_the_classes_of_training(tmp_path: Path) -> None:
    train = indexed(write_tar(tmp_path / "train" / "a.tar", [m for n, c in enumerate("abc") for m in sample(f"k{n}", c, seed=n)]))
    val_tar = write_tar(tmp_path / "val" / "a.tar", sample("v", "c", seed=9))
    val = indexed(val_tar, classes=train.classes)
    assert (val.classes, val.labels.tolist()) == (train.classes, [2])
    assert command.run([str(tmp_path / "val"), "--classes", str(tmp_path / "train"), "--overwrite", "--quiet"]) == 0
    with pytest.raises(UserError, match="label 'c' of sample v is not one of the 2 classes given"):
        indexed(val_tar, classes=("a", "b"), existing="replace")


# --- shards that are not sound


def test_keys_and_members_that_are_there_twice(tmp_path: Path) -> None:
    a, b, other = sample("a", 0, seed=1), sample("b", 1, seed=2), sample("a", 1, seed=3)
    with pytest.raises(UserError, match=r"x.tar: two samples have the key a \(samples 0 and 2 of the shard\)"):
        indexed(write_tar(tmp_path / "x.tar", [*a, *b, *other]))
    with pytest.raises(UserError, match=r"x.tar: member a.jpg at byte \d+ occurs twice"):
        indexed(write_tar(tmp_path / "x.tar", [a[0], a[0], a[1]]))


def test_the_same_shard_twice(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.tar", 0, 3)
    (tmp_path / "link.tar").symlink_to(path)
    with pytest.raises(UserError, match=r"link.tar is given twice"):
        indexed(tmp_path)
    (tmp_path / "link.tar").unlink()
    (tmp_path / "b.tar").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"b.tar is a copy of .*a.tar, and each sample would count twice; give only one of them"):
        indexed(tmp_path)


# --- which shards, where the index goes


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    for number in range(60):
        numbered(tmp_path / f"s-{number:03d}.tar", number, 1)
    open_now = len(os.listdir("/proc/self/fd"))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 30, before[1]))
    try:
        shards = indexed(tmp_path)
        assert [shards.key(number) for number in range(60)] == [f"s{number:05d}" for number in range(60)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_two_folders_need_a_place_for_the_index(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a" / "0.tar", 0, 2), numbered(tmp_path / "b" / "0.tar", 5, 2)
    with pytest.raises(UserError, match=r"the shards lie in 2 folders .*--out FOLDER"):
        indexed(a, b)
    assert indexed(a, b, out=tmp_path / "out").num_samples == 4


def test_an_index_or_a_packed_set_that_is_there(tmp_path: Path) -> None:
    path = numbered(tmp_path / "t" / "a.tar", 0, 3)
    first = indexed(path).dataset_id
    with pytest.raises(UserError, match=r"already has an index; .*--overwrite"):
        indexed(path)
    assert indexed(path, existing="replace").dataset_id == first
    pack(image_folder(tmp_path / "photos", {"a": 2, "b": 2}), tmp_path / "packed", processes=1, progress=False)
    before = (tmp_path / "packed/manifest.json").read_bytes()
    with pytest.raises(UserError, match="was packed by dtl and already has an index"):
        indexed(tmp_path / "packed", existing="replace")
    assert (tmp_path / "packed/manifest.json").read_bytes() == before


def test_a_working_folder_that_holds_what_dtl_did_not_make(tmp_path: Path) -> None:
    """It is refused in one line, and stays; what a killed index left is cleared, and is never taken for a shard that was fetched."""
    tar = write_tar(tmp_path / "a.tar", sample("k", "a"))
    work = tmp_path / f".indexing-{socket.gethostname()}"
    work.mkdir()
    for name in ("photos.tar", "notes.txt"):
        (work / name).write_bytes(b"theirs")
        with pytest.raises(UserError, match=rf"\.indexing-.*: it holds '{name}', which dtl did not make; move it out"):
            indexed(tar)
        (work / name).unlink()
    for name in ("lock", "00001.tar"):
        (work / "lock").unlink(missing_ok=True)
        (work / name).symlink_to(tmp_path / "outside")
        with pytest.raises(UserError, match=rf"lock: it is a link|it holds '{name}'"):
            indexed(tar)
        (work / name).unlink()
    assert not (tmp_path / "outside").exists()
    for name in ("00000.tar", "00007.tar", "00003.json", "job.json", ".job.json.0123abcd.node.tmp"):
        (work / name).write_bytes(b"left by a kill")
    assert indexed(tar).num_samples == 1
    assert not work.exists()


def test_an_index_that_is_refused_removes_nothing_of_the_one_that_runs(tmp_path: Path) -> None:
    from dtl.data.packing.destination import working_alone
    from dtl.data.wds.tasks import MADE

    tar = write_tar(tmp_path / "a.tar", sample("k", "a"))
    work = tmp_path / f".indexing-{socket.gethostname()}"
    work.mkdir()
    with working_alone(work, tmp_path, MADE):
        (work / "00000.keys").write_bytes(b"of the one that runs")
        with pytest.raises(UserError, match="another process is packing into"):
            indexed(tar)
        assert (work / "00000.keys").exists()


def test_empty_shards_are_allowed_but_not_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match="no usable sample in 1 shard"):
        indexed(tmp_path)
    numbered(tmp_path / "b.tar", 0, 3)
    assert indexed(tmp_path).shard_sizes.tolist() == [0, 3]


def test_a_lost_table_of_names_only_loses_names(tmp_path: Path) -> None:
    shards = indexed(numbered(tmp_path / "a.tar", 0, 3))
    assert shards.damaged(1, "why").key == "s00001"
    (tmp_path / "keys.bin").write_bytes(b"DTLSTR01")
    assert Shards.open(tmp_path).damaged(1, "why").key == ""
    assert all(isinstance(one, bytes) for one in Shards.open(tmp_path).read([0, 1, 2]))


# --- given to training


def given_to_training(tmp_path: Path, source: Path | str, said: list[str], **options: Any) -> Path:
    data = {key: str(value) if isinstance(value := options.pop(key), Path) else value for key in list(options) if key in DataConfig.model_fields}
    options = {"split": "train", "progress": False, "log": said.append, **options}
    return ensure_packed(source, DataConfig(**{"cache_dir": str(tmp_path / "cache"), **data}), **options)


def test_a_folder_of_tars_is_indexed_once_into_the_cache(tmp_path: Path) -> None:
    path = numbered(tmp_path / "t" / "a.tar", 0, 6)
    said: list[str] = []
    folder = given_to_training(tmp_path, tmp_path / "t", said)
    assert said[0] == f"indexing {tmp_path / 't'} (1 WebDataset shard) into {folder}; the shards themselves are not changed"
    assert said[1] == "  6 images of 3 classes"
    assert list((tmp_path / "t").iterdir()) == [path]
    shards = Shards.open(folder)
    assert shards.manifest.shards[0].url == str(path)
    assert all(isinstance(one, bytes) for one in shards.read(range(6)))
    again: list[str] = []
    assert given_to_training(tmp_path, f"{tmp_path}/t/a.tar", again) == folder
    assert again == []
    numbered(path, 3, 5)
    assert Shards.open(given_to_training(tmp_path, tmp_path / "t", again)).num_samples == 5


@pytest.mark.parametrize("layout", ["side by side", "folders"])
def test_both_splits(tmp_path: Path, layout: str) -> None:
    names = ("in-train-0.tar", "in-val-0.tar") if layout == "side by side" else ("train/0.tar", "valid/0.tar")
    numbered(tmp_path / "t" / names[0], 0, 6)
    numbered(tmp_path / "t" / names[1], 20, 3)
    said: list[str] = []
    train = Shards.open(given_to_training(tmp_path, tmp_path / "t", said))
    val = Shards.open(given_to_training(tmp_path, tmp_path / "t", said, split="val", classes=train.classes))
    assert (train.num_samples, val.num_samples, val.classes) == (6, 3, train.classes)
    with pytest.raises(UserError, match=r"give --data.val SHARDS"):
        given_to_training(tmp_path, tmp_path / "t", said, val_fraction=0.1)


def test_an_image_folder_that_keeps_its_archive_is_an_image_folder(tmp_path: Path) -> None:
    image_folder(tmp_path / "photos", {"a": 2, "b": 2})
    numbered(tmp_path / "photos" / "download.tar", 0, 2)
    said: list[str] = []
    assert Manifest.read(given_to_training(tmp_path, tmp_path / "photos", said)).made_by["source"] == "image folder"
