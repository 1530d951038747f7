"""WebDataset shards as others write them, for tests."""

from __future__ import annotations

import gc
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_images import encoded

from dtl.config.models import DataConfig
from dtl.data.shards.index import Shards
from dtl.data.wds.index import index_shards


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, kind: int = tarfile.PAX_FORMAT, **facts: Any) -> Path:
    """A tar of files in this order, by Python's tarfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in facts.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(key: str, label: Any, *, seed: int = 0, extension: str = "jpg", kind: str = "JPEG", **more: bytes) -> list[tuple[str, bytes]]:
    """Members of one sample with a cls."""
    return [
        (f"{key}.{extension}", encoded(kind, seed=seed, height=12, width=16)),
        (f"{key}.cls", str(label).encode()),
        *((f"{key}.{e}", d) for e, d in more.items()),
    ]


def numbered(path: Path, start: int, count: int, *, classes: int = 3) -> Path:
    members = [member for number in range(start, start + count) for member in sample(f"s{number:05d}", number % classes, seed=number)]
    return write_tar(path, members)


def with_json(key: str, fields: dict[str, Any], *, seed: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", encoded(seed=seed, height=12, width=16)), (f"{key}.json", json.dumps(fields).encode())]


def indexed(*sources: Path | str, **options: Any) -> Shards:
    data = {key: str(value) if isinstance(value := options.pop(key), Path) else value for key in list(options) if key in DataConfig.model_fields}
    return Shards.open(index_shards(sources, DataConfig(**data), progress=False, **{"processes": 1, **options}).folder)


def as_webdataset_reads(paths: list[Path]) -> list[dict[str, Any]]:
    import webdataset

    found = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    gc.collect()
    return found


def check_like_webdataset(shards: Shards, paths: list[Path], image: str = "jpg") -> None:
    expected = as_webdataset_reads(paths)
    assert [shards.key(number) for number in range(shards.num_samples)] == [one["__key__"] for one in expected]
    assert shards.read(np.arange(shards.num_samples)) == [one[image] for one in expected]
    assert shards.shard_sizes.sum() == len(expected)


interop = pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset 1.0.2 leaves the last tar open
