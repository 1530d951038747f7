"""The file of each class's samples: built once, checked when it is read, built again when it is damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import damage
import pytest
from tiny_images import image_folder

from dtl.data.packing.pack import pack
from dtl.data.sampling.class_members import ClassMembers
from dtl.data.shards.index import Shards
from dtl.errors import UserError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = image_folder(tmp_path_factory.mktemp("source"), {"ant": 30, "bee": 6, "cow": 2})
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(root, folder, shard_bytes=20_000, processes=1, progress=False)
    return folder


def test_the_file_of_members(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards.open(packed)
    expected = ClassMembers.of_labels(shards.labels, 3)
    for chunk in (1_000_000, 7, 1):
        monkeypatch.setattr("dtl.data.sampling.class_members._CHUNK", chunk)
        cache = tmp_path / str(chunk)
        for _ in range(2):  # made, then found
            found = ClassMembers.of_shards(shards, cache_dir=cache)
            assert found.members.tolist() == expected.members.tolist()
            assert found.starts.tolist() == expected.starts.tolist() == [0, 30, 36, 38]
        assert len(list((cache / "by-class").iterdir())) == 1
    file = next((tmp_path / "7/by-class").iterdir())
    for damaged in (file.read_bytes()[:-1], b"", file.read_bytes()[:-1] + b"\xff"):
        file.write_bytes(damaged)
        assert ClassMembers.of_shards(shards, cache_dir=tmp_path / "7").members.tolist() == expected.members.tolist()


def test_labels_that_are_none_are_refused(packed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    damage.rewrite_index(copy, 9, labels=3)
    with pytest.raises(UserError, match=r"1 of 38 labels are not among the 3 classes, and data.balance draws by class; .*dtl verify .* --quarantine"):
        ClassMembers.of_shards(Shards.open(copy), cache_dir=tmp_path / "cache")
