"""Ways to damage packed shards, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dtl.data.shards.index import INDEX_NAME, ROW_COLUMNS, Shards, write_index
from dtl.data.shards.manifest import dataset_id


def flip_bit(folder: Path, sample: int, *, at: float = 0.5) -> None:
    """One bit inside the image of `sample`."""
    _edit(folder, sample, lambda data: data[: (k := int(len(data) * at))] + bytes([data[k] ^ 8]) + data[k + 1 :])


def zero_block(folder: Path, sample: int) -> None:
    """64 bytes inside the image become zero."""
    _edit(folder, sample, lambda data: data[: (k := len(data) // 2)] + bytes(64) + data[k + 64 :])


def shard_path(folder: Path, sample: int) -> Path:
    shards = Shards.open(folder, whole=True)
    return folder / shards.manifest.shards[shards.shard_of(sample)].url


def cut_shard(folder: Path, sample: int, *, in_header: bool = False) -> None:
    """The shard ends in the middle of the image of `sample`, or in the middle of its header."""
    shards = Shards.open(folder, whole=True)
    offset, size = int(shards.offsets[sample]), int(shards.sizes[sample])
    path = shard_path(folder, sample)
    path.write_bytes(path.read_bytes()[: offset - 200 if in_header else offset + size // 2])


def damage_header(folder: Path, sample: int) -> None:
    """The tar header before the image."""
    shards, path = Shards.open(folder, whole=True), shard_path(folder, sample)
    data = bytearray(path.read_bytes())
    data[int(shards.offsets[sample]) - 500] ^= 1
    path.write_bytes(data)


def put_image(folder: Path, sample: int, data: bytes, *, width: int | None = None, height: int | None = None) -> None:
    """Other bytes in place of the image, padded to its size, with the crc that belongs to them: made so by a broken tool."""
    size = int(Shards.open(folder, whole=True).sizes[sample])
    assert len(data) <= size
    _edit(folder, sample, lambda old: data + bytes(size - len(data)))
    import zlib

    changes: dict[str, Any] = {"crcs": zlib.crc32(data + bytes(size - len(data)))}
    changes |= {} if width is None else {"widths": width}
    changes |= {} if height is None else {"heights": height}
    rewrite_index(folder, sample, **changes)


def rewrite_index(folder: Path, sample: int, **changes: int) -> None:
    """Change columns of one sample, in an index and a manifest that fit each other."""
    shards = Shards.open(folder, whole=True)
    columns = {name: np.array(getattr(shards, name)) for name in ROW_COLUMNS}
    for name, value in changes.items():
        columns[name][sample] = value
    digest = write_index(folder / INDEX_NAME, np.array(shards.shard_sizes), columns)
    identity = dataset_id(shards.classes, sizes=columns["sizes"], crcs=columns["crcs"], labels=columns["labels"])
    replace(shards.manifest, index_sha256=digest, dataset_id=identity).write(folder)


def _edit(folder: Path, sample: int, change: Callable[[bytes], bytes]) -> None:
    shards, path = Shards.open(folder, whole=True), shard_path(folder, sample)
    offset, size = int(shards.offsets[sample]), int(shards.sizes[sample])
    data = path.read_bytes()
    new = change(data[offset : offset + size])
    assert len(new) == size
    path.write_bytes(data[:offset] + new + data[offset + size :])


def set_sha256(folder: Path) -> None:
    """Make the manifest fit the shards as they are now."""
    import hashlib

    path = folder / "manifest.json"
    facts = json.loads(path.read_text())
    for shard in facts["shards"]:
        data = (folder / shard["url"]).read_bytes()
        shard |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps(facts))
