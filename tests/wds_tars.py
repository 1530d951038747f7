"""WebDataset shards as others write them, for tests."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tiny_images import encoded


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
