"""Worker processes of packing, verifying and indexing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_images import image_folder

from dtl.data.packing.pack import pack as pack_loudly


def pack(source: Path | str, destination: Path, **options: Any) -> Any:
    return pack_loudly(source, destination, progress=False, **{"processes": 1, **options})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("source") / "photos", {"ant": 60, "bee": 50, "cat": 40})


def test_a_child_that_dies_is_a_clear_fault(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtl.data import workers as pack_pool

    monkeypatch.setattr(pack_pool, "fresh_python", lambda *_: [sys.executable, "-c", "import os; os._exit(9)"])
    with pytest.raises(RuntimeError, match="a packing process ended with status 9"):
        pack(source, tmp_path / "d", processes=2)
