"""Exact copies of images within a split and across splits: all of them, and nothing else."""

from __future__ import annotations

import csv
import io
import shutil
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from harness import run
from packed_folders import pack
from tiny_images import encoded, image_folder

from dtl.commands import index, verify
from dtl.commands import pack as pack_command
from dtl.data.copies import COPIES_NAME, Copies, describe_copies, find_copies
from dtl.data.decoding.png import store_png
from dtl.data.shards.index import Shards


def opened(place: Path, *splits: str) -> dict[str, Shards]:
    return {split: Shards.open(place / split) for split in splits}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits of 12 images of two classes, with copies of every kind between and within them."""
    root = tmp_path_factory.mktemp("three")
    for seed, split in enumerate(("train", "val", "test")):
        image_folder(root / "images" / split, {"a": 6, "b": 6}, seed=seed)
    for old, new in (
        ("train/a/0000", "val/a/x"),
        ("train/a/0000", "test/b/x"),
        ("train/b/0001", "train/b/x"),
        ("val/a/0002", "val/b/y"),
        ("val/b/0003", "test/b/y"),
    ):
        shutil.copy(root / "images" / f"{old}.jpg", root / "images" / f"{new}.jpg")
    pack(root / "images", root / "packed")
    return root / "packed"


def by_hand(splits: dict[str, Shards]) -> set[frozenset[tuple[str, str]]]:
    """Groups of (split, path) with the same bytes, by comparing them all."""
    groups: dict[bytes, set[tuple[str, str]]] = {}
    for split, shards in splits.items():
        for sample, data in enumerate(shards.read(range(shards.num_samples))):
            assert isinstance(data, bytes)
            groups.setdefault(data, set()).add((split, shards.name(sample)))
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def found(copies: Copies) -> set[frozenset[tuple[str, str]]]:
    return {frozenset((split, path) for split, path, _ in copies.members(group)) for group in range(copies.num_groups)}


@pytest.mark.parametrize("names", [("train", "val", "test"), *combinations(("train", "val", "test"), 2), ("train",)])
def test_all_copies_are_found(three: Path, names: tuple[str, ...]) -> None:
    """Whichever splits are looked at, the groups are those of comparing all bytes, and the counts are theirs."""
    splits = opened(three, *names)
    copies, wanted = find_copies(splits), by_hand(splits)
    assert found(copies) == wanted
    for one in names:
        assert copies.repeated_in(one) == sum(max(0, len([1 for split, _ in group if split == one]) - 1) for group in wanted)
        for other in set(names) - {one}:
            groups = [group for group in wanted if {one, other} <= {split for split, _ in group}]
            assert copies.also_in(one, other) == sum(split == one for group in groups for split, _ in group)


def test_what_is_said_about_them(three: Path) -> None:
    assert describe_copies(find_copies(opened(three, "train", "val", "test"))) == (
        "copies of the same image: 1 of 14 images of val is also in train (val/a/x.jpg), so accuracy on val is overestimated; "
        "1 of 14 images of test is also in train (test/b/x.jpg), so accuracy on test is overestimated; "
        "2 of 14 images of test are also in val (test/b/x.jpg, test/b/y.jpg), so accuracy on test is overestimated; "
        "1 of 13 images of train repeats another one; 1 of 14 images of val repeats another one; "
        "2 images have two labels (val/b/y.jpg of val is 'b', val/a/0002.jpg of val is 'a')"
    )


def test_different_images_of_the_same_size_and_checksum_are_no_copies(tmp_path: Path) -> None:
    """Each chunk of a PNG ends with its CRC, so the CRC-32 of PNGs of one size have 16 bits: among a thousand, some are the same."""
    seen: dict[int, bytes] = {}
    pair: tuple[bytes, bytes] | None = None
    for number in range(4000):
        data = store_png(np.random.default_rng(number).integers(0, 256, (6, 6), np.uint8))
        if (other := seen.setdefault(zlib.crc32(data), data)) != data:
            pair = (other, data)
            break
    assert pair is not None
    assert len(pair[0]) == len(pair[1])
    for name, data in zip("ab", pair):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").write_bytes(data)
    pack(tmp_path / "images", tmp_path / "packed")
    shards = Shards.open(tmp_path / "packed")
    assert len(set(shards.crcs.tolist())) == len(set(shards.sizes.tolist())) == 1
    copies = find_copies({"all": shards})
    assert (copies.num_groups, copies.num_unknown, describe_copies(copies)) == (0, 0, "")
    unread = find_copies({"all": shards}, most_bytes=0)
    assert (unread.num_groups, unread.num_unknown) == (0, 2)
    assert describe_copies(unread) == (
        "possible copies of the same image: 2 images have the size and CRC-32 of another one, but were not compared (dtl verify compares them)"
    )


def test_a_limit_of_bytes_takes_first_what_is_in_two_splits(three: Path) -> None:
    splits = opened(three, "train", "val")
    all_of_them = find_copies(splits)
    size = next(int(splits[split].sizes[sample]) for split, sample in zip(("train", "val"), all_of_them.samples[all_of_them.groups == all_of_them.groups[0]]))
    assert all_of_them.num_groups == 3
    for most in range(0, 20 * size, max(1, size // 4)):
        some = find_copies(splits, most_bytes=most)
        assert found(some) <= found(all_of_them)
        assert some.num_unknown == 2 * (3 - some.num_groups)
        assert some.also_in("val", "train") == 1 or not some.num_groups
    assert find_copies(splits, most_bytes=20 * size).num_groups == 3


def test_a_damaged_image_is_no_copy(three: Path, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path / "packed")
    splits = opened(tmp_path / "packed", "train", "val")
    sample = next(sample for sample in range(splits["val"].num_samples) if splits["val"].name(sample) == "val/a/x.jpg")
    with (tmp_path / "packed" / "val" / "shard-00000.tar").open("r+b") as file:
        file.seek(int(splits["val"].offsets[sample]) + 30)
        file.write(b"\0\0\0\0")
    copies = find_copies(opened(tmp_path / "packed", "train", "val"))
    assert (copies.also_in("val", "train"), copies.num_unknown) == (0, 1)


def test_a_share_of_train_set_aside_has_no_copy_of_the_rest(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", {"a": 10, "b": 10})
    for number in range(8):
        shutil.copy(tmp_path / f"images/a/{number:04d}.jpg", tmp_path / f"images/{'ab'[number % 2]}/copy{number}.jpg")
    pack(tmp_path / "images", tmp_path / "packed", val_fraction=0.3)
    copies = find_copies(opened(tmp_path / "packed", "train", "val"))
    assert copies.num_groups == 8
    assert copies.also_in("val", "train") == copies.also_in("train", "val") == 0
    assert len(copies.with_two_labels()) == 4


def test_labels_are_compared_by_name(tmp_path: Path) -> None:
    """Numbers mean other classes in sets that were packed apart."""
    data = encoded(seed=1)
    for split, classes in (("train", "ab"), ("val", "0a")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.jpg").write_bytes(data if name == "a" else encoded(seed=hash(name) % 1000 + 5))
        pack(tmp_path / split, tmp_path / "packed" / split)
    copies = find_copies(opened(tmp_path / "packed", "train", "val"))
    assert copies.num_groups == 1
    assert not len(copies.with_two_labels())


def test_the_list_of_them(three: Path, tmp_path: Path) -> None:
    copies = find_copies(opened(three, "train", "val"))
    copies.write_csv(tmp_path / COPIES_NAME)
    rows = list(csv.DictReader(io.StringIO((tmp_path / COPIES_NAME).read_text())))
    assert list(rows[0]) == ["group", "split", "path", "label"]
    assert sorted((row["split"], row["path"], row["label"]) for row in rows) == [
        ("train", "train/a/0000.jpg", "a"), ("train", "train/b/0001.jpg", "b"), ("train", "train/b/x.jpg", "b"),
        ("val", "val/a/0002.jpg", "a"), ("val", "val/a/x.jpg", "a"), ("val", "val/b/y.jpg", "b"),
    ]  # fmt: skip


def test_no_file_stays_open(three: Path) -> None:
    splits = opened(three, "train", "val")
    before = len(list(Path("/proc/self/fd").iterdir()))
    find_copies(splits)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_commands_say_it(three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Packing, indexing and verifying; it is no damage."""
    assert verify.run([str(three)]) == 0
    said = capsys.readouterr()
    assert said.err == f"{describe_copies(find_copies(opened(three, 'train', 'val', 'test')))}\n"
    assert said.out.count("no problems") == 3
    assert pack_command.run([str(three.parent / "images"), str(tmp_path / "again")]) == 0
    said = capsys.readouterr()
    assert f"{describe_copies(find_copies(opened(three, 'train', 'val', 'test')))}\n" in said.err
    assert index.run([str(three / "val"), "--out", str(tmp_path / "index")]) == 0
    said = capsys.readouterr()
    assert "copies of the same image: 1 of 14 images of the shards repeats another one; 1 image has two labels (" in said.err


CONFIG = """\
data: {image_size: 16, global_batch_size: 8, workers: 0}
model: {name: dtl/resnet_tiny}
phases: {all: {train: all, steps: 2, lr: 0.01}}
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_says_it_once_and_keeps_the_list(tmp_path: Path, ranks: int) -> None:
    image_folder(tmp_path / "photos/train", {"a": 8, "b": 8})
    image_folder(tmp_path / "photos/val", {"a": 2, "b": 2}, seed=1)
    shutil.copy(tmp_path / "photos/train/a/0003.jpg", tmp_path / "photos/val/a/z.jpg")
    (tmp_path / "c.yaml").write_text(CONFIG)
    arguments = ["--config", "c.yaml", "--data.train", "photos", "--run.name", "r", "--tracking.wandb", "off"]
    said = run(arguments, cwd=tmp_path, world=ranks).err()
    line = "copies of the same image: 1 of 5 images of val is also in train (val/a/z.jpg), so accuracy on val is overestimated; "
    assert said.count("copies of the same image") == said.count(f"{line}all are listed in runs/r/copies.csv\n") == 1
    assert len((tmp_path / "runs/r/copies.csv").read_text().splitlines()) == 3
    (tmp_path / "photos/val/a/z.jpg").unlink()
    assert "copies of the same image" not in run([*arguments, "--run.resume", "never"], cwd=tmp_path, world=ranks).err()
    assert not (tmp_path / "runs/r/copies.csv").exists()
