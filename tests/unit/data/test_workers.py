"""Worker processes of packing, verifying and indexing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny_images import image_folder

from dtl.data.decoding.headers import Limits
from dtl.data.packing.pack import pack as pack_loudly
from dtl.data.verify import VERIFYING


def pack(source: Path | str, destination: Path, **options: Any) -> Any:
    return pack_loudly(source, destination, progress=False, **{"processes": 1, **options})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("source") / "photos", {"ant": 60, "bee": 50, "cat": 40})


def test_a_child_that_dies_is_a_clear_fault(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtl.data import workers as pack_pool

    monkeypatch.setattr(pack_pool, "fresh_python", lambda *_: [sys.executable, "-c", "import os; os._exit(9)"])
    with pytest.raises(RuntimeError, match="a worker process exited with status 9"):
        pack(source, tmp_path / "d", processes=2)


@pytest.mark.parametrize("module", ["packing.tasks", "wds.tasks", "verify_tasks", "remote.prefetch"])
def test_a_helper_starts_without_pydantic(module: str) -> None:
    """And without torch: that is most of the time that starting takes."""
    code = f"import sys; import dtl.data.{module}; print(sorted({{'pydantic', 'torch', 'yaml'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_a_helper_of_local_shards_works(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "d")
    facts = json.dumps({"split": str(tmp_path / "d"), "options": None, "limits": asdict(Limits())})
    task = json.dumps({"kind": "images", "shard": 0, "first": 0, "last": 150})
    code = "import sys; from dtl.data.workers import serve; serve(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, VERIFYING], input=f"{facts}\n{task}\n", check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[0]) == {
        "kind": "done",
        "answer": {"kind": "images", "shard": 0, "samples": 150, "findings": [], "unread": [0, ""]},
    }
    assert done.stderr == ""
