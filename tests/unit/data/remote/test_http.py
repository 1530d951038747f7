"""HTTP: redirects, passwords, proxies, and servers that never end."""

from __future__ import annotations

import contextlib
import io
import os
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import bad_server
import pytest
from bad_server import Server
from served_file import DATA

from dtl.config.models import DataConfig
from dtl.data.remote import fetch as fetch_module
from dtl.data.remote.fetch import Unfetched, fetch, fetch_bytes, fetch_file

OPTIONS = DataConfig(retries=3, timeout=2.0)


def test_a_redirect_is_followed(server: Server) -> None:
    server.plan["b.tar"] = ["302 a.tar"]
    assert fetch_bytes(f"{server.url}/b.tar", options=OPTIONS) == DATA


@pytest.mark.parametrize("address", ["file://{tmp}/secret", "file://localhost{tmp}/secret", "data:,secret", "ftp://127.0.0.1/secret"])
def test_a_redirect_never_leads_to_a_local_file(server: Server, tmp_path: Path, address: str) -> None:
    (tmp_path / "secret").write_text("secret")
    address, file = address.format(tmp=tmp_path), io.BytesIO()
    server.always["a.tar"] = f"302 {address}"
    with pytest.raises(Unfetched) as caught:
        fetch(f"{server.url}/a.tar", file, options=OPTIONS)
    assert str(caught.value).endswith("but only http and https are followed (1 attempt)")
    assert file.getvalue() == b""
    assert {name for name, _, _ in server.requests} == {"a.tar"}


def test_redirects_that_lead_in_a_circle_end(server: Server) -> None:
    server.always["a.tar"], server.always["b.tar"] = "302 b.tar?token=x", "302 a.tar"
    with pytest.raises(Unfetched, match=r"HTTP 302 is redirect number 11 in a row .* too many redirects") as caught:
        fetch_bytes(f"{server.url}/a.tar", options=OPTIONS)
    assert "token" not in str(caught.value)


def test_a_password_is_not_given_to_another_host(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []
    note = bad_server._Handler.do_GET
    monkeypatch.setattr(bad_server._Handler, "do_GET", lambda self: (seen.append((self.headers["Host"], self.headers["Authorization"])), note(self)))
    here = server.url.removeprefix("http://")
    with Server(server.folder) as other:
        server.plan["a.tar"] = ["302 b.tar"]
        server.plan["b.tar"] = [f"302 {other.url.replace('://', '://x:y@')}/a.tar"]
        assert fetch_bytes(f"http://me:word@{here}/a.tar", options=OPTIONS) == DATA
        assert seen == [(here, "Basic bWU6d29yZA==")] * 2 + [(other.url.removeprefix("http://"), None)]


def test_user_and_password_of_a_host_come_from_netrc(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    note = bad_server._Handler.do_GET
    monkeypatch.setattr(bad_server._Handler, "do_GET", lambda self: (seen.append(self.headers["Authorization"]), note(self)))
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".netrc"
    file.write_text("machine 127.0.0.1 login me password word\ndefault login all password any\n")
    file.chmod(0o600)
    fetch_bytes(f"{server.url}/a.tar", options=OPTIONS)
    fetch_bytes(f"{server.url.replace('127.0.0.1', 'localhost')}/a.tar", options=OPTIONS)
    assert seen == ["Basic bWU6d29yZA==", None]


class _Endless(socketserver.StreamRequestHandler):
    """`start`, then `again` without end."""

    start, again, pause = b"", b"", 0.0

    def handle(self) -> None:
        self.rfile.readline()
        with contextlib.suppress(OSError):
            self.wfile.write(self.start)
            while True:
                self.wfile.write(self.again)
                time.sleep(self.pause)


@contextlib.contextmanager
def endless(start: bytes, again: bytes, pause: float = 0.0) -> Iterator[str]:
    handler = type("Handler", (_Endless,), {"start": start, "again": again, "pause": pause})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/manifest.json"
        server.shutdown()


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("headers", [b"", b"Content-Length: 99999999999\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_an_answer_without_end_is_left_at_its_limit(headers: bytes) -> None:
    with (
        endless(OK + headers + b"\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n") as url,
        pytest.raises(Unfetched, match="more than the 3,000,000 "),
    ):
        fetch_bytes(url, options=OPTIONS, most=3_000_000)


@pytest.mark.parametrize(
    ("start", "again", "pause", "why"),
    [
        (OK, b"X-More: 1\r\n", 0.0, "got more than 100 headers"),
        (OK, b"x" * 10_000, 0.0, "header line"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001, "no file data was received for 1 s"),
        (OK, b"x", 0.05, "no file data was received for 1 s"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", b"X-Trailer: 1\r\n", 0.001, "no file data was received for 1 s"),
        (b"HTTP/1.1 302 Found\r\nLocation: ftp://x/\r\n\r\n", b"x" * 65536, 0.0, "only http and https are followed"),
    ],
)
def test_a_server_that_sends_nothing_of_use_is_left(start: bytes, again: bytes, pause: float, why: str) -> None:
    begun = time.monotonic()
    with endless(start, again, pause) as url, pytest.raises(Unfetched, match=why):
        fetch_bytes(url, options=DataConfig(retries=0, timeout=1.0))
    assert time.monotonic() - begun < 10


def test_a_file_without_end_leaves_nothing_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with endless(OK + b"\r\n", b"x" * 65536) as url:
        with pytest.raises(Unfetched, match="more than the 1,000,000 bytes"):
            fetch_file(url, tmp_path / "index.bin", options=OPTIONS, most=1_000_000)
        facts = os.statvfs(tmp_path)
        full = os.statvfs_result((facts.f_bsize, facts.f_frsize, facts.f_blocks, 0, 0, *facts[5:]))
        monkeypatch.setattr(fetch_module.os, "fstatvfs", lambda number: full)
        with pytest.raises(Unfetched, match="the disk has only 0 MB left"):
            fetch_file(url, tmp_path / "index.bin", options=OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_proxies_of_the_environment_are_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    (server.folder / "http:").mkdir()
    with pytest.raises(Unfetched, match="HTTP 404"):
        fetch("http://elsewhere.invalid/a.tar", io.BytesIO(), options=OPTIONS)
    assert [name for name, _, _ in server.requests] == ["http://elsewhere.invalid/a.tar"]
