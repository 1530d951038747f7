"""`dtl index` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wds_tars import numbered

from dtl.commands import index as command
from dtl.errors import UserError


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbered(tmp_path / "a.tar", 0, 4)
    assert command.run([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "4 images of 3 classes in 1 shard" in out
    assert str(tmp_path) in out
    made_by = json.loads((tmp_path / "manifest.json").read_text())["made_by"]
    assert made_by["source"] == "WebDataset shards"


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--retries", "-1"], r"^retries: .*must be at least 0 \(got -1\)$"), (["--timeout", "0"], r"^timeout: .*must be above 0 \(got 0.0\)$")],
)
def test_bad_options(tmp_path: Path, options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        command.run([str(tmp_path), *options])
