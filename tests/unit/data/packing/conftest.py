"""For the tests of packing: a folder of images, and the same packed."""

from __future__ import annotations

from pathlib import Path

import pytest
from packed_folders import pack
from tiny_images import image_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("source") / "photos", {"ant": 60, "bee": 50, "cat": 40})


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(source, folder, shard_bytes=50_000)
    return folder
