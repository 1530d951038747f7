"""Eight small shards on a server, and caches of them, for tests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from bad_server import Server

from dtl.config.models import DataConfig
from dtl.data.remote.cache import ShardCache, open_cache
from dtl.data.remote.schedule import ShardUses
from dtl.data.sampling.plan import EpochPlan
from dtl.data.shards.manifest import Manifest, Shard

NUM, SIZE, SAMPLES = 8, 20_000, 10


def make(folder: Path, address: str) -> Manifest:
    folder.mkdir(exist_ok=True)
    shards = []
    for number in range(NUM):
        data = np.random.default_rng(number).bytes(SIZE)
        (folder / f"s-{number}.tar").write_bytes(data)
        shards.append(Shard(url=f"{address}/s-{number}.tar", samples=SAMPLES, bytes=SIZE, sha256=hashlib.sha256(data).hexdigest()))
    return Manifest(
        version=1, classes=("a",), display_names={}, shards=tuple(shards), class_counts=(NUM * SAMPLES,), dataset_id="id", index_sha256="x", made_by={}
    )


def cache_of(server: Server, tmp_path: Path, **options: Any) -> ShardCache:
    made = open_cache(make(tmp_path / "www", server.url), tmp_path, DataConfig(cache_dir=str(tmp_path / "cache"), **{"retries": 1, **options}))
    assert made is not None
    return made


def content(cache: ShardCache, number: int) -> bytes:
    found = cache.open(number)
    try:
        return os.pread(found, 2 * SIZE, 0)
    finally:
        os.close(found)


def uses_of(*, window: int = SAMPLES, behind: int = 0, shuffle: bool = True) -> ShardUses:
    plan = EpochPlan(np.full(NUM, SAMPLES), seed=1, epoch=0, global_batch_size=SAMPLES, window=window, shuffle=shuffle)
    return ShardUses.of(plan, behind=behind)


def used(cache: ShardCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.glob("[0-9a-f]*"))
