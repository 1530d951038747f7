"""What packing finds out about the values and the orientation of images, and how a run reads them: new sets, sets of before, and both together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from packed_folders import pack
from PIL import Image
from tiny_images import encoded
from wds_tars import write_tar
from wide_images import wide_png

from dtl.commands.verify import run
from dtl.config.models import DataConfig
from dtl.data.loading.loader import BatchDataset
from dtl.data.open import channel_statistics, check_reading, reading_of
from dtl.data.sampling.plan import MicroBatch
from dtl.data.shards.index import INDEX_NAME, Shards
from dtl.data.shards.manifest import MANIFEST_NAME
from dtl.data.splits_of_run import content_keys
from dtl.data.transforms.transforms import eval_transform
from dtl.data.wds.index import index_shards
from dtl.errors import UserError
from dtl.reading import Reading

RNG = np.random.default_rng(0)


def sideways(height: int = 10, width: int = 16, seed: int = 0, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(kind, height=height, width=width, seed=seed, exif=exif)


def write_images(root: Path, *, low: int = 100, high: int = 3000) -> Path:
    """Two classes: 8 bits, 16 bits, and photos that lie on their side."""
    for label, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for number in range(3):
            values = RNG.integers(low, high, (10, 16)).astype(np.uint16)
            values[0, 0], values[1, 1] = low + label, high - label
            (root / name / f"{number}.png").write_bytes(wide_png(values))
            (root / name / f"{number}.jpg").write_bytes(sideways(seed=10 * label + number))
            (root / name / f"x{number}.jpg").write_bytes(encoded(height=10, width=16, seed=20 + 10 * label + number))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pixels")
    for split, low, high in (("train", 100, 3000), ("val", 50, 4000)):
        write_images(root / "images" / split, low=low, high=high)
    pack(root / "images", root / "packed")
    return root


def as_before(source: Path, place: Path) -> Path:
    """A packed folder as an older dtl would have packed it."""
    place.mkdir()
    for path in source.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    shards = Shards.open(source)
    widths, heights, _ = shards.shapes(exif=False)
    data = bytearray((place / INDEX_NAME).read_bytes())
    data[8:12] = (1).to_bytes(4, "little")
    tail = 5 * shards.num_samples
    data[-tail:] = widths.astype("<u2").tobytes() + heights.astype("<u2").tobytes() + (np.asarray(shards.flags) & 15).tobytes()
    (place / INDEX_NAME).write_bytes(data)
    manifest = json.loads((place / MANIFEST_NAME).read_text())
    del manifest["pixels"]
    manifest["index_sha256"] = hashlib.sha256(data).hexdigest()
    (place / MANIFEST_NAME).write_text(json.dumps(manifest))
    return place


def images_of(shards: Shards, reading: Reading) -> tuple[np.ndarray, list[str]]:
    """All images at 8 x 8 pixels, and why some could not be read."""
    numbers = np.arange(shards.num_samples)
    request = MicroBatch(epoch=0, step=0, samples=numbers, slots=numbers, weights=np.ones(len(numbers), np.float32))
    batch = BatchDataset(shards, eval_transform(image_size=8, fit="stretch", reading=reading), image_size=8, seed=0).__getitems__(request)
    return batch.images.numpy().copy(), [damage.reason for _, damage in batch.bad]


def test_the_range_is_that_of_the_training_images(folder: Path) -> None:
    train, val = Shards.open(folder / "packed/train"), Shards.open(folder / "packed/val")
    assert train.manifest.pixels is not None
    assert (train.manifest.pixels.wide, train.manifest.pixels.low, train.manifest.pixels.high) == (6, 100, 3000)
    reading = reading_of(train, DataConfig())
    assert reading == Reading((100, 3000), exif=True, alpha=True)
    assert reading_of(train, DataConfig(range=(0, 4095), exif="ignore")) == Reading((0, 4095), exif=False, alpha=True)
    lines = check_reading(reading, {"training": train, "validation": val})
    assert [line.split(" have ")[0] for line in lines] == ["warning: 6 of 18 images of training", "warning: 6 of 18 images of validation"]
    images, bad = images_of(val, reading)
    assert not bad
    assert images.shape == (18, 3, 8, 8)


def test_any_number_of_processes_finds_the_same(folder: Path, tmp_path: Path) -> None:
    pack(folder / "images", tmp_path / "packed", processes=2)
    for name in (MANIFEST_NAME, INDEX_NAME):
        assert (tmp_path / "packed/train" / name).read_bytes() == (folder / "packed/train" / name).read_bytes()


def test_the_index_has_the_turned_size_and_the_stored_one_can_be_had(folder: Path) -> None:
    train = Shards.open(folder / "packed/train")
    widths, heights, turns = train.shapes()
    assert sorted(zip(widths, heights, turns, strict=True)) == sorted(6 * [(10, 16, 6)] + 12 * [(16, 10, 1)])
    np.testing.assert_array_equal(train.widths, widths)
    stored = train.shapes(exif=False)
    assert {*zip(*(column.tolist() for column in stored), strict=True)} == {(16, 10, 1)}


def test_shards_of_before_are_read_as_before_and_hold_out_the_same(folder: Path, tmp_path: Path) -> None:
    now, before = Shards.open(folder / "packed/train"), Shards.open(as_before(folder / "packed/train", tmp_path / "before"))
    assert before.manifest.pixels is None
    np.testing.assert_array_equal(content_keys(before), content_keys(now))
    reading = reading_of(before, DataConfig())
    assert reading == Reading(None, exif=False, alpha=True)
    with pytest.raises(UserError, match="pack the data again"):
        reading_of(before, DataConfig(exif="apply"))
    images, bad = images_of(before, reading)
    assert len(bad) == 6
    assert "data.range" in bad[0]
    # A run of before goes on with what it saw, also where its images have been packed again.
    same, _ = images_of(now, Reading())
    np.testing.assert_array_equal(images, same)
    turned, _ = images_of(now, Reading(exif=True))
    assert not np.array_equal(same, turned)
    (line,) = check_reading(Reading((0, 1), exif=True, alpha=True), {"validation": before})
    assert "does not have the images' EXIF orientation" in line


def test_wide_images_to_validate_on_need_a_range(folder: Path) -> None:
    with pytest.raises(UserError, match=r"6 images of validation have more than 8 bits a channel \(from 50 to 4000\)"):
        check_reading(Reading(exif=True), {"validation": Shards.open(folder / "packed/val")})


def test_a_set_of_one_value_is_told(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(wide_png(np.full((4, 4 + ord(name) % 3), 7, np.uint16)))
    pack(tmp_path / "images", tmp_path / "packed")
    shards = Shards.open(tmp_path / "packed")
    assert check_reading(reading_of(shards, DataConfig()), {"training": shards}) == [
        "warning: all values of the images of training that have more than 8 bits are 7"
    ]
    assert not images_of(shards, reading_of(shards, DataConfig()))[0].any()


def test_tars_of_others_are_indexed_alike(tmp_path: Path) -> None:
    values = RNG.integers(10, 4000, (10, 16)).astype(np.uint16)
    write_tar(tmp_path / "0.tar", [("0.jpg", sideways()), ("0.cls", b"0"), ("1.png", wide_png(values)), ("1.cls", b"1")])
    index_shards([tmp_path], progress=False, processes=1)
    shards = Shards.open(tmp_path)
    assert [column.tolist() for column in shards.shapes()] == [[10, 16], [16, 10], [6, 1]]
    assert reading_of(shards, DataConfig()).range == (values.min(), values.max())
    assert not images_of(shards, reading_of(shards, DataConfig()))[1]


def test_arrays_are_packed_indexed_and_verified(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        np.save(tmp_path / "images" / name / "0.npy", RNG.integers(0, 256, (9, 12, 5)).astype(np.uint8))
        np.save(tmp_path / "images" / name / "1.npy", RNG.integers(0, 4096, (5, 9, 12)).astype(np.uint16))
    pack(tmp_path / "images", tmp_path / "packed")
    shards = Shards.open(tmp_path / "packed")
    reading = reading_of(shards, DataConfig(channels=5))
    assert (reading.channels, shards.manifest.pixels.wide if shards.manifest.pixels else 0) == (5, 2)
    assert images_of(shards, reading)[0].shape == (4, 5, 8, 8)
    assert not images_of(shards, reading)[1]
    assert images_of(shards, reading_of(shards, DataConfig()))[1] == 4 * ["it has 5 channels, and data.channels is 3"]
    mean, std = channel_statistics(shards, reading)
    assert len(mean) == len(std) == 5
    assert all(0.3 < value < 0.7 for value in mean)
    assert run(["--quiet", str(tmp_path / "packed")]) == 0
    with pytest.raises(UserError, match=r"mean and std of 4 channels cannot be measured: .*it has 5 channels, and data.channels is 4"):
        channel_statistics(shards, reading_of(shards, DataConfig(channels=4)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_smaller_image_keeps_its_orientation(tmp_path: Path, kind: str) -> None:
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / f"0.{kind.lower()}").write_bytes(sideways(40, 64, seed=ord(name), kind=kind))
    pack(tmp_path / "images", tmp_path / "packed", short_side=20)
    shards = Shards.open(tmp_path / "packed")
    assert [column.tolist() for column in shards.shapes()] == [[20, 20], [32, 32], [6, 6]]
    assert not images_of(shards, Reading(exif=True))[1]
