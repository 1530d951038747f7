"""For the tests of remote data: a server with one file, quick retries, and no proxy of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_server import Server
from served_file import DATA

from dtl.data.remote import fetch as fetch_module


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "_FIRST_PAUSE", 0.01)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "www").mkdir()
    (tmp_path / "www/a.tar").write_bytes(DATA)
    with Server(tmp_path / "www") as running:
        yield running
