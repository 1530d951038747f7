"""Answers of HTTP servers, of any bytes: a file within its limit, or an error of one line. Nothing stays in the folder otherwise."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtl.config.models import DataConfig
from dtl.data.remote.fetch import Unfetched, fetch_bytes, fetch_file

MOST = 5_000
OPTIONS = DataConfig(retries=0, timeout=5.0)
ANY = st.binary(max_size=40)
NUMBER = st.one_of(st.integers(-5, 9000).map(lambda n: b"%d" % n), st.sampled_from([b"9" * 30, b"1e3", b"", b"0x10", "٣".encode()]))
STATUS = st.one_of(st.sampled_from([b"200", b"200", b"206", b"301", b"302", b"304", b"404", b"416", b"500", b"100", b"999"]), NUMBER)
HEADER = st.one_of(
    st.builds(b"Content-Length: %s\r\n".__mod__, NUMBER),
    st.builds(lambda a, b, c: b"Content-Range: bytes %s-%s/%s\r\n" % (a, b, c), NUMBER, NUMBER, NUMBER),
    st.sampled_from([b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"ETag: \x1b[2J\r\n", b"\r\n", b"Location: file:/\r\n"]),
    st.builds(b"Location: %s\r\n".__mod__, ANY),
    st.builds(b"Retry-After: %s\r\n".__mod__, NUMBER),
    ANY,
)
CHUNK = st.builds(lambda size, data: size + b"\r\n" + data + b"\r\n", st.one_of(st.sampled_from([b"5", b"0", b"-5", b"ffffffffff", b"5;x=y"]), ANY), ANY)
BODY = st.one_of(ANY, st.lists(CHUNK, max_size=4).map(b"".join), st.integers(0, 20_000).map(lambda n: b"x" * n), st.just(b"<html><title>\x1b[2K</title>"))
HEAD = st.builds(lambda status, reason, headers: b"HTTP/1.1 %s %s\r\n%s" % (status, reason, b"".join(headers)), STATUS, ANY, st.lists(HEADER, max_size=4))
ANSWER = st.one_of(st.builds(lambda head, body: head + b"\r\n" + body, HEAD, BODY), ANY)


class _Handler(socketserver.StreamRequestHandler):
    answer = b""

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        self.wfile.write(self.answer)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request: object, client_address: object) -> None:
        """The client has seen enough."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/set/manifest.json"
        server.shutdown()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(answer=ANSWER)
def test_any_answer(answer: bytes, url: str, tmp_path: Path) -> None:
    _Handler.answer = answer
    why = url
    try:
        found = fetch_bytes(url, options=OPTIONS, most=MOST)
        assert found is None or len(found) <= MOST
    except Unfetched as error:
        why = str(error)
    assert why.startswith(url)
    assert len(why) < 1000
    try:
        fetch_file(url, tmp_path / "file", options=OPTIONS, most=MOST)
        (tmp_path / "file").unlink()
    except Unfetched:
        pass
    assert list(tmp_path.iterdir()) == []
