"""Packing in tests: quietly, what came of it, and folders with images that cannot be read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from tiny_images import encoded, image_folder

from dtl.data.packing.pack import pack as pack_loudly


def pack(source: Path | str, destination: Path, **options: Any) -> Any:
    return pack_loudly(source, destination, progress=False, **{"processes": 1, **options})


def hashes(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file below."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def with_bad_images(root: Path) -> Path:
    image_folder(root, {"ant": 20, "bee": 20})
    good = encoded(height=80, width=80)
    (root / "ant" / "zero bytes.jpg").write_bytes(b"")
    (root / "ant" / "text.jpg").write_bytes(b"this is no image")
    (root / "bee" / "cut.jpg").write_bytes(good[: len(good) // 2])
    (root / "bee" / "broken link.png").symlink_to(root / "nowhere")
    (root / "bee" / "page.jpg").write_bytes(b"<html>404</html>")
    return root


def small_shards(make: pytest.TempPathFactory) -> Path:
    """Two classes of 20 and 15 images, in several shards."""
    folder = make.mktemp("packed") / "shards"
    pack(image_folder(make.mktemp("source"), {"ant": 20, "bee": 15}), folder, shard_bytes=30_000)
    return folder
