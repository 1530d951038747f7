"""The splits of a run, from what its config names."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_images import image_folder

from dtl.config.models import DataConfig
from dtl.data.splits_of_run import Splits, content_id, open_splits
from dtl.errors import UserError


def opened(tmp_path: Path, **data: object) -> Splits:
    return open_splits(DataConfig(**{"cache_dir": str(tmp_path / "cache"), **data}), progress=False, log=lambda line: None)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed, (split, count) in enumerate({"train": 12, "val": 6, "test": 4}.items()):
        image_folder(tmp_path / "photos" / split, {"a": count, "b": count}, seed=seed)
    return tmp_path / "photos"


def test_three_folders_are_three_splits(tmp_path: Path, photos: Path) -> None:
    splits = opened(tmp_path, train=str(photos))
    assert {name: shards.num_samples for name, shards in splits.all().items()} == {"train": 24, "val": 12, "test": 8}
    again = open_splits(DataConfig(train=str(photos), cache_dir=str(tmp_path / "cache")), progress=False, found=splits.places())
    assert again.ids() == splits.ids()


def test_a_test_set_named_by_itself(tmp_path: Path, photos: Path) -> None:
    splits = opened(tmp_path, train=str(photos / "train"), val_fraction=0.25, test=str(photos / "test"))
    assert {name: shards.num_samples for name, shards in splits.all().items()} == {"train": 18, "val": 6, "test": 8}
    assert opened(tmp_path, train=str(photos / "train"), val=str(photos / "val")).test is None


def test_images_are_known_by_content_in_any_order(tmp_path: Path, photos: Path) -> None:
    splits = opened(tmp_path, train=str(photos))
    alone = opened(tmp_path, train=str(photos / "train"), val=str(photos / "test"))
    assert splits.test is not None
    assert content_id(splits.test) == content_id(alone.val) != content_id(splits.val)


def test_a_test_set_of_other_classes(tmp_path: Path, photos: Path) -> None:
    image_folder(tmp_path / "others", {"a": 2, "wasps": 2}, seed=9)
    with pytest.raises(UserError, match=r"others has images of 1 class that the given class list does not have: 'wasps'"):
        opened(tmp_path, train=str(photos), test=str(tmp_path / "others"))
