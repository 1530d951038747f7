"""twins.jsonl and the line about it: features come in place of hashes, exact copies have a line of their own, and a run says it once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import run, start
from recipes import write_recipe
from tiny_images import picture

from dtl.data.twins import Twin, Twins


@pytest.fixture
def twins(tmp_path: Path) -> Twins:
    """Of three training images and three validation and test images, of which val/2 is train/0 byte for byte."""

    def shards(split: str, sizes: list[int]) -> Any:
        numbers = np.array(sizes)
        return SimpleNamespace(num_samples=3, name=lambda sample: f"{split}/{sample}.jpg", sizes=numbers, crcs=numbers)

    return Twins(tmp_path / "twins.jsonl", {"train": shards("train", [1, 2, 3]), "val": shards("val", [4, 5, 1]), "test": shards("test", [6, 7, 8])})


def listed(twins: Twins) -> list[dict[str, Any]]:
    return [json.loads(row) for row in twins.file.read_text().splitlines()]


def test_nothing_found_is_no_file_and_no_line(twins: Twins) -> None:
    twins.record("bits", [])
    assert twins.line() == ""
    assert not twins.file.exists()


def test_features_come_in_place_of_hashes_of_the_same_images(twins: Twins) -> None:
    twins.record("bits", [Twin("val", 0, 2, 3), Twin("val", 2, 0, 0), Twin("test", 0, 2, 3)])
    assert not twins.are_known_by("cosine")
    assert twins.line() == (
        "1 of 3 validation images has a twin in train (such as val/0.jpg and train/2.jpg); 1 of 3 test images has a twin in train (such as test/0.jpg and "
        f"train/2.jpg), by the hashes made while packing, so accuracy may be overestimated; all are listed in {twins.file}"
    )
    twins.record("cosine", [Twin("val", 0, 1, 0.71789), Twin("val", 1, 2, 0.9)])
    assert twins.are_known_by("cosine")
    assert listed(twins) == [
        {"split": "val", "sample": 0, "path": "val/0.jpg", "other": "train/1.jpg", "cosine": 0.7179},
        {"split": "val", "sample": 1, "path": "val/1.jpg", "other": "train/2.jpg", "cosine": 0.9},
        {"split": "val", "sample": 2, "path": "val/2.jpg", "other": "train/0.jpg", "bits": 0, "copy": True},
        {"split": "test", "sample": 0, "path": "test/0.jpg", "other": "train/2.jpg", "bits": 3},
    ]
    assert twins.line() == (
        "2 of 3 validation images have twins in train (such as val/1.jpg and train/2.jpg); 1 of 3 test images has a twin in train (such as test/0.jpg and "
        "train/2.jpg), by the cached features (whitened cosine of 0.55 or more) and the hashes made while packing, so accuracy may be overestimated; "
        f"all are listed in {twins.file}"
    )


@pytest.mark.parametrize("content", [b"", b"{\n", b'{"split": "val", "path": 1}\n', b"\xff\n"])
def test_a_damaged_list_is_none(twins: Twins, content: bytes) -> None:
    twins.file.write_bytes(content)
    assert twins.line() == ""
    twins.record("cosine", [Twin("val", 2, 0, 1.0)])
    assert twins.line() == "", "exact copies have a line of their own"
    assert len(listed(twins)) == 1


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 48 training images one is in val again, smaller."""
    place = tmp_path_factory.mktemp("twins") / "photos"
    for split, first, count in (("train", 0, 24), ("val", 100, 4)):
        for name in "ab":
            (place / split / name).mkdir(parents=True)
            for number in range(count):
                picture(first + 30 * ord(name) + number).save(place / split / name / f"{number}.png")
    picture(30 * ord("b") + 3).resize((60, 60)).save(place / "val/a/copy.png")
    return place


HEAD = {"train": "head", "steps": 6, "lr": 0.1, "keep": "last"}
BY_FEATURES, BY_HASHES = "by the cached features", "by the hashes made while packing"


@pytest.mark.parametrize(
    ("phases", "how"),
    [
        ({"head": {**HEAD, "cache_features": False}}, BY_HASHES),
        ({"head": {**HEAD, "cache_features": True}}, BY_FEATURES),
        ({"all": {"train": "all", "steps": 3, "lr": 0.01}, "head": {**HEAD, "cache_features": True}}, BY_HASHES),
    ],
    ids=["images", "cached features", "images, then features"],
)
def test_a_run_prints_one_line_also_through_a_kill(tmp_path: Path, photos: Path, phases: dict[str, Any], how: str) -> None:
    data = {"train": str(photos), "image_size": 32, "global_batch_size": 16, "workers": 0, "augment": {"preset": "none"}}
    words = ["--config", str(write_recipe(tmp_path, data=data, phases=phases, checkpoint={"async": False}))]
    first = start(words, cwd=tmp_path, env={"KILL_AT": "5"}, by_rank={0: {"before": "kill_hooks:at_a_step"}}).wait()
    assert first.codes == [-9]
    second = run(words, cwd=tmp_path)
    assert "resuming at step" in second.err()
    (line,) = [line for line in (first.err() + second.err()).splitlines() if "in train" in line]
    assert line.startswith("1 of 9 validation images has a twin in train (such as val/a/copy.png and train/b/3.png), " + how)
    last = json.loads((tmp_path / "runs/tiny/twins.jsonl").read_text())
    assert (last["path"], last["other"], "cosine" in last) == ("val/a/copy.png", "train/b/3.png", "cache_features" in str(phases) and "True" in str(phases))
