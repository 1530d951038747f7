"""The manifest of packed shards."""

from __future__ import annotations

import json
import os
import pickle
import time
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
        (lambda f: os.truncate(f / "index.bin", 3), "is not an index written by dtl"),
        (lambda f: flip_last_byte(f / "index.bin"), "does not belong to the manifest.json beside it"),
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: os.truncate(f / "manifest.json", 50), r"manifest.json: not valid JSON: EOF"),
        (lambda f: (f / "manifest.json").write_text("[]"), r"manifest.json: must be an object"),
        (lambda f: edit(f, lambda m: m.update(version=99)), "format version 99, but this dtl reads version 1"),
        (lambda f: edit(f, lambda m: m.pop("classes")), r"manifest.json: classes is missing"),
        (lambda f: edit(f, lambda m: m["classes"].append("dog")), "is damaged: 4 class names"),
        (lambda f: edit(f, lambda m: m["class_counts"].__setitem__(0, 7)), "is damaged: class_counts add up to"),
        (lambda f: edit(f, lambda m: m["shards"][0].pop("bytes")), r"manifest.json: shards.0.bytes is missing"),
        (lambda f: edit(f, lambda m: m["shards"][0].update(sha256="/home/me/work")), r"shards.0.sha256: '/home/me/work' is not a SHA-256"),
        (lambda f: edit(f, lambda m: m["shards"][0].update(url="../x.tar")), r"is damaged: the shard '../x.tar' lies outside its folder"),
        (lambda f: edit(f, lambda m: m["shards"][0].update(url="/dev/zero")), r"is damaged: the shard '/dev/zero' lies outside its folder"),
        (lambda f: edit(f, lambda m: m["shards"][0].update(url="a\n.tar")), r"shards.0.url: .* is neither a path nor an address"),
        (lambda f: edit(f, lambda m: m["shards"][0].update(bytes=10**400)), r"shards.0.bytes: 1000.* is not an integer from 0"),
        (lambda f: edit(f, lambda m: m["shards"][0].update(samples=-1)), r"shards.0.samples: -1 is not an integer"),
        (lambda f: edit(f, lambda m: m["shards"][0].update(samples=True)), r"shards.0.samples: must be a whole number"),
        (lambda f: edit(f, lambda m: m.update(classes={})), r"classes: must be a list"),
        (lambda f: edit(f, lambda m: m.update(dataset_id="../../x")), r"dataset_id: '../../x' is not a hexadecimal number"),
        (lambda f: edit(f, lambda m: m.update(index_sha256="x")), r"index_sha256: 'x' is not a SHA-256"),
        (lambda f: edit(f, lambda m: m.update(classes=["a", "b", "c\0"])), r"classes.2: holds a NUL character"),
        (lambda f: edit(f, lambda m: m["made_by"].update(keys_sha256="../x")), r"made_by: keys_sha256 is not a SHA-256"),
        (lambda f: edit(f, lambda m: m["made_by"].update(rules=[1])), r"made_by: rules must be an object"),
        (lambda f: (f / "manifest.json").write_text('{"a":' * 5000), r"manifest.json: not valid JSON: recursion limit"),
        (lambda f: (f / "manifest.json").write_text('{"version": 1e999}'), r"manifest.json: "),
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


def test_a_hundred_thousand_shards_are_read_and_pickled_in_about_a_second() -> None:
    shards = [{"url": f"shard-{n:06d}.tar", "samples": 1000, "bytes": 128 << 20, "sha256": f"{n:064x}"} for n in range(100_000)]
    facts = {"version": 1, "classes": ["a"], "display_names": {}, "class_counts": [100_000_000], "dataset_id": "ab" * 16, "index_sha256": "0" * 64}
    text = json.dumps({**facts, "shards": shards, "made_by": {}}).encode()
    Manifest.parse(text, "warm")
    started = time.process_time()
    manifest = Manifest.parse(text, "manifest.json")
    assert time.process_time() - started < 3  # 0.3 s alone
    started = time.process_time()
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    assert time.process_time() - started < 3


def test_an_unknown_field_is_of_a_later_version_and_ignored(copy: Path) -> None:
    edit(copy, lambda m: m.update(more=1))
    assert Manifest.read(copy).num_samples == 120
