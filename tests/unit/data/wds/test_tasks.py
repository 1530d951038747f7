"""Indexing in several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from wds_tars import indexed, numbered

from dtl.data.wds.index import index_shards
from dtl.errors import UserError


def test_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    for number in range(5):
        numbered(tmp_path / f"{number}.tar", 10 * number, 4)
    files = []
    for processes in (1, 3):
        index_shards([tmp_path], out=tmp_path / "out", processes=processes, progress=False, existing="replace")
        files.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert files[0] == files[1]
    assert set(files[0]) == {"manifest.json", "index.bin", "keys.bin"}


def test_an_error_in_a_process_is_one_line(tmp_path: Path) -> None:
    numbered(tmp_path / "a.tar", 0, 3)
    (tmp_path / "b.tar").write_bytes(numbered(tmp_path / "c.tar", 9, 2).read_bytes()[:700])
    with pytest.raises(UserError, match=r"b.tar: damaged at byte"):
        indexed(tmp_path, processes=2)
