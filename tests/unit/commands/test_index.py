"""`dtl index` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wds_tars import numbered

from dtl.commands import index as command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbered(tmp_path / "a.tar", 0, 4)
    assert command.run([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "4 images of 3 classes in 1 shard" in out
    assert str(tmp_path) in out
    made_by = json.loads((tmp_path / "manifest.json").read_text())["made_by"]
    assert made_by["source"] == "WebDataset shards"
