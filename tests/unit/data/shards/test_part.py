"""Some samples of a packed split as a split of its own."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from tiny_images import image_folder

from dtl.data.packing.pack import pack
from dtl.data.shards.index import Shards, write_part
from dtl.data.shards.part import PART_NAME
from dtl.errors import UserError


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    image_folder(tmp_path / "photos", {"a": 30, "b": 20})
    pack(tmp_path / "photos", tmp_path / "packed", shard_bytes=20_000, processes=1, progress=False)
    return Shards.open(tmp_path / "packed")


def test_a_part_has_its_samples_with_their_bytes_paths_and_keys(tmp_path: Path, shards: Shards) -> None:
    assert len(shards.shard_sizes) > 2
    chosen = np.arange(50) % 3 == 0
    write_part(shards, chosen, tmp_path / "part")
    for part in (opened := Shards.open(tmp_path / "part"), pickle.loads(pickle.dumps(opened))):
        samples = np.flatnonzero(chosen)
        assert part.num_samples == len(samples) == part.manifest.num_samples
        assert part.read(range(len(samples))) == shards.read(samples)
        assert [part.path(at) for at in range(len(samples))] == [shards.path(int(sample)) for sample in samples]
        assert [part.key(at) for at in range(len(samples))] == [shards.key(int(sample)) for sample in samples]
        assert [part.shard_of(at) for at in range(len(samples))] == [shards.shard_of(int(sample)) for sample in samples]
        assert part.dataset_id != shards.dataset_id
        assert part.place == tmp_path / "part"
        assert part.folder == shards.folder.absolute()


def test_data_that_changed_under_a_part_is_noticed(tmp_path: Path, shards: Shards) -> None:
    write_part(shards, np.arange(50) < 20, tmp_path / "home" / "val")
    path = tmp_path / "home" / "val" / PART_NAME
    path.write_text(path.read_text().replace(shards.dataset_id, "1" * 32))
    with pytest.raises(UserError, match=r"is a part of other data than .* holds now; delete .*home, and run again"):
        Shards.open(tmp_path / "home" / "val")
