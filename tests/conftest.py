"""For all tests: few threads, no services, no home folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores: tests that start processes would fight over them
os.environ["WANDB_MODE"] = "disabled"
os.environ["WANDB_SILENT"] = "true"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTL_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
