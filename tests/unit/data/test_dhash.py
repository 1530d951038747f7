"""Copies that were encoded or resized again are found by what packing kept; sets without it say nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageEnhance
from tiny_images import picture

from dtl.data.dhash import DHASHES_NAME, MOST_BITS, dhashes, find_alike, points_of, read_dhashes
from dtl.data.packing.pack import pack
from dtl.data.shards.index import Shards
from dtl.data.twins import Twin, Twins


def look(image: Image.Image) -> npt.NDArray[np.uint64]:
    return dhashes(points_of(np.asarray(image.convert("RGB")))[None])[0]


def differ(one: Image.Image, other: Image.Image) -> int:
    found = look(one) ^ look(other)
    return sum(int(word).bit_count() for word in found)


def test_a_copy_looks_alike_and_another_image_does_not() -> None:
    image, coded = picture(1), io.BytesIO()
    image.save(coded, "JPEG", quality=40)
    for copy in (Image.open(coded), image.resize((50, 60)), ImageEnhance.Brightness(image).enhance(1.2)):
        assert differ(image, copy) <= MOST_BITS
    assert min(differ(image, picture(seed)) for seed in range(2, 40)) > 2 * MOST_BITS
    for nothing in (picture(1, 15), Image.new("RGB", (60, 60), (9, 99, 199))):
        assert not look(nothing).any()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shards]:
    """Of 12 training images val/a/copy.jpg is one, smaller; val/a/same.png is one, byte for byte."""
    photos = tmp_path_factory.mktemp("dhash") / "photos"
    for split, first, count in (("train", 0, 12), ("val", 100, 4)):
        for name in "ab":
            (photos / split / name).mkdir(parents=True)
            for number in range(count):
                picture(first + 20 * ord(name) + number).save(photos / split / name / f"{number}.png")
    Image.open(photos / "train/b/3.png").resize((50, 50)).save(photos / "val/a/copy.jpg", quality=80)
    (photos / "val/a/same.png").write_bytes((photos / "train/a/5.png").read_bytes())
    pack(photos, photos.with_name("packed"), progress=False)
    return {split: Shards.open(photos.with_name("packed") / split) for split in ("train", "val")}


def test_validation_images_that_look_like_a_training_image_are_named(packed: dict[str, Shards], tmp_path: Path) -> None:
    twins = Twins(tmp_path / "twins.jsonl", packed)
    twins.record("bits", [Twin(*one) for one in find_alike(packed)])
    line = twins.line()
    assert line.startswith("1 of 10 validation images has a twin in train (such as val/a/copy.jpg and train/b/3.png), by the hashes made while packing, so")
    listed = [json.loads(row) for row in (tmp_path / "twins.jsonl").read_text().splitlines()]
    assert {(row["split"], row["path"], row["other"]) for row in listed} == {
        ("val", "val/a/copy.jpg", "train/b/3.png"), ("val", "val/a/same.png", "train/a/5.png"),
    }  # fmt: skip
    for row in listed:
        assert (packed["val"].name(row["sample"]), row["bits"] <= MOST_BITS) == (row["path"], True)


def test_packed_before_there_were_hashes_or_with_damaged_ones_says_nothing(packed: dict[str, Shards]) -> None:
    file = packed["val"].folder / DHASHES_NAME
    kept = file.read_bytes()
    assert read_dhashes(packed["val"]) is not None
    for content in (None, b"", kept[:-8], kept.replace(b"<u8", b"<i8")):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        assert read_dhashes(packed["val"]) is None
        assert find_alike(packed) == []
    file.write_bytes(kept)
