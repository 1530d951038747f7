"""The manifest of packed shards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_images import image_folder

from dtl.data.packing.pack import pack
from dtl.data.shards.index import Manifest, Shards
from dtl.errors import UserError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images of 3 classes in several shards."""
    root = image_folder(tmp_path_factory.mktemp("source"), {"ant": 50, "bee": 40, "cat": 30})
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(root, folder, shard_bytes=60_000, processes=1, progress=False)
    return folder


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    import shutil

    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "index.bin").unlink(), "index.bin cannot be read: No such file"),
        (lambda f: os.truncate(f / "index.bin", 100), "has 100 bytes where"),
        (lambda f: os.truncate(f / "index.bin", 3), "is not an index of dtl"),
        (lambda f: flip_last_byte(f / "index.bin"), "does not belong to the manifest.json beside it"),
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: os.truncate(f / "manifest.json", 50), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is not a manifest of dtl"),
        (lambda f: edit(f, lambda m: m.update(version=99)), "format version 99, this dtl reads version 1"),
        (lambda f: edit(f, lambda m: m.pop("classes")), "missing or unknown fields: classes"),
        (lambda f: edit(f, lambda m: m.update(more=1)), "missing or unknown fields: more"),
        (lambda f: edit(f, lambda m: m["classes"].append("dog")), "is damaged: 4 classes"),
        (lambda f: edit(f, lambda m: m["class_counts"].__setitem__(0, 7)), "is damaged: the classes have"),
        (lambda f: edit(f, lambda m: m["shards"][0].pop("bytes")), "is damaged: KeyError"),
        (lambda f: edit(f, lambda m: m["shards"].reverse()), "does not belong to the manifest.json beside it"),
    ],
)
def test_an_index_or_manifest_that_is_not_whole_is_refused(copy: Path, damage: object, message: str) -> None:
    damage(copy)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        Shards.open(copy)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(folder: Path, change: object) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    change(raw)  # type: ignore[operator]
    if [shard["samples"] for shard in raw["shards"]] == [shard["samples"] for shard in reversed(raw["shards"])]:
        raw["shards"][0]["samples"] += 1  # reversed shards of equal sizes would be the same to the index
        raw["shards"][-1]["samples"] -= 1
    (folder / "manifest.json").write_text(json.dumps(raw))


def test_manifest_round_trip(packed: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(packed)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"], "no temporary file is left"
    assert sum(manifest.class_counts) == manifest.num_samples == 120
    assert manifest.class_counts == (50, 40, 30)
