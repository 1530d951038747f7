"""One remote file, whole or an error in one line, from servers, commands and file systems that misbehave."""

from __future__ import annotations

import hashlib
import io
import socket
import threading
import time

import numpy as np
import pytest
from bad_server import Server
from harness import wait_for
from served_file import DATA

from dtl.config.models import DataConfig
from dtl.data.remote.fetch import Fetched, Unfetched, fetch, fetch_bytes

SHA = hashlib.sha256(DATA).hexdigest()
OPTIONS = DataConfig(retries=3, timeout=2.0)


def got(server: Server, *, known: bool = True, options: DataConfig = OPTIONS, file: io.BytesIO | None = None) -> bytes:
    file = io.BytesIO() if file is None else file
    facts = {"size": len(DATA), "sha256": SHA} if known else {}
    found = fetch(f"{server.url}/a.tar", file, options=options, **facts)
    assert found == Fetched(len(file.getvalue()), hashlib.sha256(file.getvalue()).hexdigest())
    return file.getvalue()


def refused(server: Server, **options: object) -> str:
    with pytest.raises(Unfetched) as caught:
        got(server, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{server.url}/a.tar cannot be downloaded: ")
    return str(caught.value)


# --- servers that recover


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "troubles", [[], ["500"], ["503 after 0", "429"], ["drop 100000"], ["drop 0"], ["short"], ["html"], ["drop 50000", "500", "drop 50000"], ["hang"]]
)
def test_a_download_survives(server: Server, troubles: list[str], known: bool) -> None:
    server.plan["a.tar"] = list(troubles)
    options = OPTIONS if "hang" not in troubles else DataConfig(retries=3, timeout=0.5)
    assert got(server, known=known, options=options) == DATA
    assert len(server.requests) <= len(troubles) + 1


def test_a_cut_download_goes_on_from_its_last_byte(server: Server) -> None:
    server.plan["a.tar"] = ["drop 100000", "drop 100000"]
    assert got(server) == DATA
    assert [(start, status) for _, start, status in server.requests] == [(0, 200), (100_000, 206), (200_000, 206)]


def test_any_number_of_cuts_is_survived_as_long_as_bytes_come(server: Server) -> None:
    big = np.random.default_rng(1).bytes(3_000_000)
    (server.folder / "a.tar").write_bytes(big)
    server.plan["a.tar"] = ["drop 300000"] * 9
    file = io.BytesIO()
    fetch(f"{server.url}/a.tar", file, options=DataConfig(retries=1, timeout=2.0))
    assert file.getvalue() == big
    assert len(server.requests) == 10


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("validators", [True, False])
def test_two_versions_are_never_glued(server: Server, known: bool, validators: bool) -> None:
    """The file changes at the server between two ranges; of equal length, so that only content tells."""
    other = bytes(255 - byte for byte in DATA)
    (server.folder / "a.tar").write_bytes(other)
    server.validators = validators
    server.plan["a.tar"] = ["drop 100000"]
    cut = threading.Event()

    def change() -> None:
        wait_for(lambda: server.requests, what="the first request")
        (server.folder / "a.tar").write_bytes(DATA)
        cut.set()

    threading.Thread(target=change).start()
    server.seconds_per_block = 0.004  # the first answer takes 0.1 s
    assert got(server, known=known) == DATA
    assert cut.is_set()


def test_a_server_without_ranges_sends_all_again(server: Server) -> None:
    server.plan["a.tar"] = ["drop 100000", "no range"]
    assert got(server) == DATA
    assert [(start, status) for _, start, status in server.requests] == [(0, 200), (100_000, 200)]


def test_what_a_killed_process_left_is_gone_on_from(server: Server) -> None:
    assert got(server, file=io.BytesIO(DATA[:123_456])) == DATA
    assert [start for _, start, _ in server.requests] == [123_456]


@pytest.mark.parametrize("left", [b"x" * 1000, DATA + b"more", b"x" * len(DATA)])
def test_what_was_left_by_something_else_is_replaced(server: Server, left: bytes) -> None:
    assert got(server, file=io.BytesIO(left)) == DATA


def test_what_is_whole_already_is_not_asked_for(server: Server) -> None:
    assert got(server, file=io.BytesIO(DATA)) == DATA
    assert server.requests == []


def test_without_a_checksum_nothing_is_taken_over(server: Server) -> None:
    assert got(server, known=False, file=io.BytesIO(DATA[:1000])) == DATA
    assert [start for _, start, _ in server.requests] == [0]


# --- servers that do not


@pytest.mark.parametrize(
    ("trouble", "said", "tries"),
    [
        ("500", "HTTP 500 Internal Server Error", 4),
        ("404", "HTTP 404 Not Found (check the address)", 1),
        ("403", "HTTP 403 Forbidden (access is refused, or a signed address has expired)", 1),
        ("html", "the server sent an HTML page ('Please log in') with status 200 instead of the file", 4),
        ("short", "the connection ended 1,000 bytes early, at 300,000 of 301,000", 4),
        ("drop 0", "the connection ended 300,000 bytes early, at 0 of 300,000", 4),
    ],
)
def test_what_stays_wrong_is_said_in_one_line(server: Server, trouble: str, said: str, tries: int) -> None:
    server.always["a.tar"] = trouble
    known = trouble != "short"
    count = "1 attempt" if tries == 1 else f"{tries} attempts"
    assert refused(server, known=known).endswith(f"{said} ({count})")
    assert len(server.requests) == tries


def test_another_file_than_the_manifests(server: Server) -> None:
    (server.folder / "a.tar").write_bytes(DATA[:-1])
    assert "it has 299,999 bytes on the server, but 300,000 according to the manifest: it has changed" in refused(server)
    (server.folder / "a.tar").write_bytes(DATA + b"x")
    assert "more than the 300,000 bytes stated in the manifest" in refused(server)
    (server.folder / "a.tar").write_bytes(b"x" * len(DATA))
    assert "its sha256 differs from the one in the manifest" in refused(server)


def test_a_silent_server_is_given_up(server: Server) -> None:
    server.always["a.tar"] = "hang"
    begun = time.monotonic()
    assert "the server does not answer in time (2 attempts)" in refused(server, options=DataConfig(retries=1, timeout=0.3))
    assert time.monotonic() - begun < 3


def test_nobody_listens_and_nobody_is_known() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for url, said in (
        (f"http://127.0.0.1:{port}/a.tar", "Connection refused (2 attempts)"),
        ("http://no-such-host.invalid/a.tar", "the host name cannot be resolved"),
        ("http://[::1/a.tar", "Invalid IPv6 URL (1 attempt)"),
        ("nothing://x/a.tar", "nothing:// is not supported"),
    ):
        with pytest.raises(Unfetched, match=said.replace("(", r"\(").replace(")", r"\)")):
            fetch(url, io.BytesIO(), options=DataConfig(retries=1, timeout=1.0))


def test_passwords_and_signatures_stay_out_of_messages(server: Server) -> None:
    url = server.url.replace("http://", "http://me:secret@") + "/b.tar?signature=abc"
    with pytest.raises(Unfetched) as caught:
        fetch(url, io.BytesIO(), options=OPTIONS)
    assert str(caught.value).startswith(f"{server.url}/b.tar?... cannot be downloaded: HTTP 404")


def test_what_is_missing_is_none(server: Server) -> None:
    assert fetch_bytes(f"{server.url}/none", options=OPTIONS) is None
    assert fetch_bytes(f"{server.url}/a.tar", options=OPTIONS) == DATA
