"""What dtl does not read is counted and named, with what to do; no file is passed over in silence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image
from tiny_images import encoded, image_folder

from dtl.config.models import DataConfig
from dtl.data.open import ensure_packed
from dtl.data.packing.pack import pack
from dtl.data.sources.open import open_source
from dtl.data.sources.unread import UNREAD_EXTENSIONS, describe_passed_over
from dtl.data.wds.find import find_shards
from dtl.errors import UserError
from dtl.inference.images import find_images
from dtl.reading import Reading


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_the_line() -> None:
    assert describe_passed_over([]) == ""
    assert describe_passed_over(["a.HEIC", "b.heic", "c.cr2", "x.jp2", "notes.txt", "Makefile"]) == (
        "passed over: 2 .heic, 1 .cr2, 1 .jp2 in image formats that dtl does not read: .heic is read after pip install pillow-heif; convert the others to "
        "JPEG or PNG first (Pillow reads .jp2; .cr2 after pip install rawpy); 1 without any, 1 .txt without an image's extension"
    )


def test_predict_accounts_for_every_file(tmp_path: Path) -> None:
    image_folder(tmp_path / "new", {"a": 2})
    for name in ("IMG_1.HEIC", "a/IMG_2.heic", "raw.CR2", "a/labels.json", ".hidden.heic"):
        put(tmp_path / "new" / name)
    lines: list[str] = []
    assert len(find_images([str(tmp_path / "new")], log=lines.append)) == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"{tmp_path}/new: passed over: 2 .heic, 1 .cr2 in image formats that dtl does not read")
    assert lines[0].endswith("1 .json without an image's extension")
    with pytest.raises(
        UserError,
        match=r"neither an image nor a list of images: not an image that can be read here: HEIC, which needs the package pillow-heif \(pip",
    ):
        find_images([str(put(tmp_path / "x.heic", b"\0\0\0\x18ftypheix" + bytes(50)))])
    for path in (tmp_path / "new").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"new holds no images \(passed over: 2 .heic, 1 .cr2 in image formats"):
        find_images([str(tmp_path / "new")])


def test_packing_and_training_say_it_each_time(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", {"a": 3, "b": 3})
    put(root / "a/IMG_1.HEIC")
    put(root / "IMG_2.heic")
    said = "passed over: 2 .heic in an image format that dtl does not read: .heic is read after pip install pillow-heif"
    assert said in pack(root, tmp_path / "p", processes=1, progress=False).notes
    for _ in range(2):
        lines: list[str] = []
        ensure_packed(root, DataConfig(cache_dir=str(tmp_path / "cache")), split="train", processes=1, progress=False, log=lines.append)
        assert any(said in line for line in lines)
    for path in (root / "b").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"class folder 'b' holds no image that dtl reads \(passed over: 5 .heic"):
        open_source(root)


def test_the_advice_converts(tmp_path: Path) -> None:
    """What is named as readable by Pillow is, and what it makes is read."""
    Image.open(put(tmp_path / "a.jpg", encoded(height=10, width=12))).save(tmp_path / "new.jp2")
    assert ".jp2" in UNREAD_EXTENSIONS
    Image.open(tmp_path / "new.jp2").convert("RGB").save(tmp_path / "new.jpg", quality=95)
    assert find_images([str(tmp_path / "new.jpg")]).pixels(0, Reading()).shape == (10, 12, 3)


OTHERS = {
    "MDS": (["index.json", "shard.00000.mds"], "MosaicML's format"),
    "MDS, compressed, in splits": (["train/index.json", "train/shard.00000.mds.zstd"], "MosaicML's format"),
    "parquet": (["data/train-00000-of-00002.parquet"], "Parquet files"),
    "tfrecord": (["flowers-train.tfrecord-00000-of-00005"], "TFRecord files"),
    "lmdb": (["data.mdb", "lock.mdb"], "LMDB"),
    "Hugging Face": (["dataset_info.json", "state.json", "data-00000-of-00001.arrow"], "Hugging Face's datasets"),
}


@pytest.mark.parametrize("which", OTHERS)
def test_data_sets_of_other_tools_are_named(tmp_path: Path, which: str) -> None:
    files, kind = OTHERS[which]
    for name in files:
        put(tmp_path / "set" / name)
    packed = which in ("parquet", "Hugging Face")
    what = r": give it to --data.train, or pack it first" if packed else ", which dtl does not read: write its images into a folder for each class"
    said = rf"set holds no (images|tar files).*it is a data set .*{kind}.*{what}"
    for read in (*([] if packed else [open_source]), lambda place: find_images([str(place)]), lambda place: find_shards([place])):
        with pytest.raises(UserError, match=said):
            read(tmp_path / "set")


def test_a_test_set_without_labels(tmp_path: Path) -> None:
    root = tmp_path / "k"
    image_folder(root / "train", {"a": 5, "b": 5})
    for number in range(3):
        put(root / f"test/{number}.jpg", encoded(seed=number))
    with pytest.raises(
        UserError, match=rf"test has 3 images without class folders.*--data.train {root}/train --data.val-fraction 0.2 .*predict runs/NAME {root}/test"
    ):
        open_source(root)
    assert pack(root / "train", tmp_path / "p", val_fraction=0.2, processes=1, progress=False).splits[1].num_samples == 2
    image_folder(root / "val", {"a": 2, "b": 2})
    source = open_source(root)
    assert source.split_names == ("train", "val")
    assert any("test has 3 images without class folders" in note and "left out" in note for note in source.notes)


def test_a_class_whose_name_is_not_utf8(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", {"caf": 2, "the": 2})
    os.rename(os.fsencode(root) + b"/caf", os.fsencode(root) + b"/caf\xe9")
    with pytest.raises(UserError, match=r"the name of the class folder 'caf\\udce9' is not UTF-8 .*rename it"):
        pack(root, tmp_path / "p", processes=1, progress=False)
