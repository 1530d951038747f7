"""`dtl verify`: sound shards, another index, quarantine, both splits."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import damage
import numpy as np
import pytest
from packed_folders import small_shards
from tiny_images import image_folder

from dtl.commands import verify as command
from dtl.data.packing.pack import pack
from dtl.data.shards.index import Shards
from dtl.errors import UserError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory)


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def test_sound_shards_are_all_right(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run([str(packed), "--processes", "2"]) == 0
    said = capsys.readouterr()
    assert "35 samples in" in said.out
    assert said.out.rstrip().endswith("no problems")
    assert said.err == ""


def test_bad_options(packed: Path) -> None:
    with pytest.raises(UserError, match=r"^cache_gb: .*must be above 0 \(got 0.0\)$"):
        command.run([str(packed), "--cache-gb", "0"])


def test_another_index_is_refused(copy: Path, tmp_path: Path) -> None:
    pack(image_folder(tmp_path / "o", {"ant": 20, "bee": 15}, seed=3), tmp_path / "other", shard_bytes=30_000, processes=1, progress=False)
    shutil.copy(tmp_path / "other/index.bin", copy / "index.bin")
    with pytest.raises(UserError, match=r"index.bin does not belong to the manifest.json beside it"):
        command.run([str(copy)])
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds no manifest.json, .* `dtl index "):
        command.run([str(copy)])


def test_quarantine_leaves_samples_out_and_gives_them_back(copy: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Shards.open(packed)
    bad = [3, 9, 20]
    images = {name: path.read_bytes() for path in copy.glob("*.tar") for name in [path.name]}
    for sample in bad:
        damage.flip_bit(copy, sample)
    assert command.run([str(copy)]) == 2
    assert "3 damaged; repair the shards, or leave these out: dtl verify" in capsys.readouterr().out
    assert command.run([str(copy), "--quarantine"]) == 0
    said = capsys.readouterr()
    assert "3 in quarantine" in said.out
    assert "no other problems" in said.out
    assert command.run([str(copy)]) == 0

    left, rest = Shards.open(copy), [sample for sample in range(35) if sample not in bad]
    assert left.quarantined.tolist() == bad
    for name in ("labels", "offsets", "sizes", "crcs", "widths", "heights", "flags"):
        np.testing.assert_array_equal(getattr(left, name), getattr(whole, name)[rest], err_msg=name)
    for shards in (left, pickle.loads(pickle.dumps(left))):
        assert shards.read(np.arange(32)) == whole.read(rest)
        assert [shards.key(sample) for sample in range(32)] == [whole.key(sample) for sample in rest]
        assert [shards.path(sample) for sample in range(32)] == [whole.path(sample) for sample in rest]
        assert shards.shard_of(31) == len(shards.manifest.shards) - 1
    assert left.dataset_id != whole.dataset_id
    assert left.shard_sizes.tolist() == [shard.samples for shard in left.manifest.shards]
    assert sum(left.manifest.class_counts) == left.manifest.num_samples == 32
    assert left.manifest.class_counts == tuple(np.bincount(left.labels).tolist())
    entries = json.loads((copy / "quarantine.json").read_text())["samples"]
    assert [entry["key"] for entry in entries] == [whole.key(sample) for sample in bad]

    for name, data in images.items():
        (copy / name).write_bytes(data)
    assert command.run([str(copy), "--quarantine"]) == 0
    assert "quarantine.json was removed" in capsys.readouterr().err
    assert Shards.open(copy).dataset_id == whole.dataset_id
    assert not list(copy.glob("index-without-*"))


def test_splits_are_checked_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(image_folder(tmp_path / "s", {"a": 8, "b": 8}), tmp_path / "d", val_fraction=0.25, processes=1, progress=False)
    damage.flip_bit(tmp_path / "d/val", 1)
    assert command.run([str(tmp_path / "d")]) == 2
    out = capsys.readouterr().out
    assert "d/train: 12 samples" in out
    assert "; no problems" in out
    assert "1 damaged" in out
