"""HTTP: redirects and proxies."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bad_server import Server

from dtl.config.models import DataConfig
from dtl.data.remote import fetch as fetch_module
from dtl.data.remote.fetch import Unfetched, fetch, fetch_bytes

DATA = np.random.default_rng(0).bytes(300_000)


OPTIONS = DataConfig(retries=3, timeout=2.0)


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


def test_a_redirect_is_followed(server: Server) -> None:
    server.plan["b.tar"] = ["302 a.tar"]
    assert fetch_bytes(f"{server.url}/b.tar", options=OPTIONS) == DATA


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("file://{tmp}/secret", "Redirection to url '{address}' is not allowed"),
        ("file://localhost{tmp}/secret", "Redirection to url '{address}' is not allowed"),
        ("data:,secret", "Redirection to url '{address}' is not allowed"),
        ("ftp://127.0.0.1/secret", "unknown url type: ftp"),
    ],
)
def test_a_redirect_never_leads_to_a_local_file(server: Server, tmp_path: Path, address: str, said: str) -> None:
    (tmp_path / "secret").write_text("secret")
    address, file = address.format(tmp=tmp_path), io.BytesIO()
    server.always["a.tar"] = f"302 {address}"
    with pytest.raises(Unfetched) as caught:
        fetch(f"{server.url}/a.tar", file, options=OPTIONS)
    assert str(caught.value).endswith(f"{said.format(address=address)} (1 try)")
    assert file.getvalue() == b""
    assert {name for name, _, _ in server.requests} == {"a.tar"}


def test_proxies_of_the_environment_are_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    (server.folder / "http:").mkdir()
    with pytest.raises(Unfetched, match="HTTP 404"):
        fetch("http://elsewhere.invalid/a.tar", io.BytesIO(), options=OPTIONS)
    assert [name for name, _, _ in server.requests] == ["http://elsewhere.invalid/a.tar"]
