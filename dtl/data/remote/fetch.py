"""One remote file into one local file, complete and checked, or an error in one line. Never a hang, never two versions glued together.

An interrupted download resumes from its last byte (HTTP Range with If-Range), with growing pauses. What came is checked by size
and sha256 where they are known; an HTML page that a proxy or a portal sends with status 200 is not accepted.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dtl.data.remote.address import kind_of, shown
from dtl.data.remote.http import open_http
from dtl.data.remote.pipe_fsspec import open_fsspec, open_pipe
from dtl.data.remote.stream import FetchError, Stream, Unfetched
from dtl.files import temporary_suffix
from dtl.text import to_stderr

if TYPE_CHECKING:
    from dtl.config.models import DataConfig

__all__ = ["Fetched", "Unfetched", "fetch", "fetch_bytes", "fetch_file", "options_of_helper"]

MAX_MANIFEST_BYTES = 256 << 20
"""Of manifest.json and quarantine.json: the manifest of a million shards."""
MAX_FILE_BYTES = 256 << 30
"""Of a tar or a file of weights whose size is not known."""

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
# After an attempt that received this much, the count of failed attempts starts again.
_PROGRESS_BYTES = 2**18
# A server that sends a byte now and then is as good as silent.
_SLOWEST_BYTES = 1024
# Left free on a disk of any size, or a fiftieth of a small one; looked at after so many bytes.
_RESERVE_BYTES, _LOOK_EVERY = 2**30, 2**26
_OPEN: dict[str, Callable[[str, int, str | None, float], Stream]] = {"http": open_http, "pipe": open_pipe, "fsspec": open_fsspec}


@dataclass(frozen=True)
class Fetched:
    """What came."""

    size: int
    sha256: str


def fetch(
    url: str,
    file: BinaryIO,
    *,
    options: DataConfig,
    size: int | None = None,
    sha256: str | None = None,
    most: int = MAX_FILE_BYTES,
    log: Callable[[str], None] | None = None,
) -> Fetched:
    """Write the bytes of `url` into `file` (open for reading and writing), from its start; raises Unfetched.

    What `file` holds already is kept as the beginning where `sha256` can verify it, and replaced otherwise. Never more than
    `size` bytes are written, or `most` where it is not known, and never so many that the disk is full.
    """
    download = _Download(url, file, size, sha256, most, options)
    failures, pause = 0, _FIRST_PAUSE
    while True:
        before = download.at
        try:
            return download.run()
        except FetchError as error:
            if error.restart:
                download.restart()
            if download.at - before >= _PROGRESS_BYTES:
                failures, pause = 0, _FIRST_PAUSE
            failures += 1
            if not error.retry or failures > options.retries:
                tries = "1 attempt" if failures == 1 else f"{failures} attempts"
                line, refused = f"{shown(url)} cannot be downloaded: {error.reason} ({tries})", not error.retry and not error.missing
                raise Unfetched(line, missing=error.missing, changed=error.changed, refused=refused, away=error.away) from None
            wait = min(max(pause * random.uniform(0.75, 1.25), error.after or 0.0), _LONGEST_PAUSE)
            if failures > 1:
                (log or _print)(f"{shown(url)}: {error.reason} (attempt {failures} of {options.retries + 1}); retrying in {wait:.0f} s")
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)


def fetch_bytes(url: str, *, options: DataConfig, most: int = MAX_MANIFEST_BYTES) -> bytes | None:
    """A small file as it is; None where it does not exist. Raises Unfetched."""
    file = io.BytesIO()
    try:
        fetch(url, file, options=options, most=most)
    except Unfetched as error:
        if error.missing:
            return None
        raise
    return file.getvalue()


def fetch_file(url: str, path: Path, *, options: DataConfig, size: int | None = None, sha256: str | None = None, most: int = MAX_FILE_BYTES) -> Fetched:
    """`fetch` into a file of this name, of which nothing is left unless all went well."""
    part = path.with_name(f".{path.name}{temporary_suffix()}")
    try:
        with open_for_fetch(part) as file:
            found = fetch(url, file, options=options, size=size, sha256=sha256, most=most)
        part.replace(path)
        return found
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class _Download:
    """The state over all tries: how many bytes are there, and of which version."""

    def __init__(self, url: str, file: BinaryIO, size: int | None, sha256: str | None, most: int, options: DataConfig) -> None:
        self.url, self.file, self.size, self.sha256, self.most, self.options = url, file, size, sha256, most, options
        self.at = 0
        self._disk = _Disk(file)
        self.validator: str | None = None
        self._digest = hashlib.sha256()
        self._known_start = False  # the first bytes were looked at
        self._is_loader, self._parent = multiprocessing.parent_process() is not None, os.getppid()
        if sha256 is not None and size is not None and kind_of(url) != "pipe":
            self._take_over(size)
        else:
            self.restart()

    def restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.at, self.validator, self._digest, self._known_start = 0, None, hashlib.sha256(), False

    def run(self) -> Fetched:
        """One try, from where the last one ended. Raises FetchError."""
        if not self._complete():
            if self.at and self.validator is None and (self.sha256 is None or kind_of(self.url) == "pipe"):
                self.restart()  # nothing shows whether it is still the same file
            stream = _OPEN[kind_of(self.url)](self.url, self.at, self.validator, self.options.timeout)
            try:
                self._take(stream)
            finally:
                stream.close()
        return self._checked()

    def _take_over(self, size: int) -> None:
        """What an earlier process left of this file."""
        self.file.seek(0)
        while block := self.file.read(2**20):
            self._digest.update(block)
            self.at += len(block)
        if self.at > size:
            self.restart()
        self._known_start = self.at > 0

    def _take(self, stream: Stream) -> None:
        if stream.start != self.at:
            assert stream.start == 0, stream.start
            self.restart()
        if self.validator is None:
            self.validator = stream.validator
        if self.size is None and stream.total is not None and stream.total > self.most:
            raise FetchError(f"it has {stream.total:,} bytes, more than the {self.most:,} that are allowed for such a file", retry=False)
        slow = _Slow(self.options.timeout)
        for block in stream.blocks:
            if not self._known_start:
                _refuse_page(block, stream)
                self._known_start = True
            if self.size is not None and self.at + len(block) > self.size:
                raise FetchError(f"the server sent more than the {self.size:,} bytes stated in the manifest: the file has changed on the server", changed=True)
            if self.size is None and self.at + len(block) > self.most:
                raise FetchError(f"it has more than the {self.most:,} bytes that are allowed for such a file", retry=False)
            self._disk.check(len(block))
            self.file.write(block)
            self._digest.update(block)
            self.at += len(block)
            slow.check(len(block))
            if self._is_loader and os.getppid() != self._parent:
                raise SystemExit(1)  # a loader process ends with its trainer, also in the middle of a download
        if self.size is not None and stream.total is not None and stream.total != self.size:
            raise FetchError(
                f"it has {stream.total:,} bytes on the server, but {self.size:,} according to the manifest: it has changed on the server", changed=True
            )
        ends = stream.ends if stream.ends is not None else self.size
        if ends is not None and self.at < ends:
            raise FetchError(f"the connection ended {ends - self.at:,} bytes early, at {self.at:,} of {ends:,}")

    def _complete(self) -> bool:
        return self.size is not None and self.at == self.size

    def _checked(self) -> Fetched:
        if self.size is not None and self.at != self.size:
            raise FetchError(f"{self.at:,} bytes were received, but it has {self.size:,} according to the manifest", changed=True)
        digest = self._digest.hexdigest()
        if self.sha256 is not None and digest != self.sha256:
            raise FetchError("its sha256 differs from the one in the manifest: it was changed on the server or in transit", changed=True)
        self.file.flush()
        return Fetched(self.at, digest)


class _Disk:
    """Leaves room on the disk that is written to: what a server sends without end must not take it from others."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            self._number: int | None = file.fileno()
        except OSError:  # in memory
            self._number = None
        self._allowed = 0

    def check(self, size: int) -> None:
        """Before `size` bytes are written. Raises FetchError."""
        if self._number is None:
            return
        if size > self._allowed:
            facts = os.fstatvfs(self._number)
            free, reserve = facts.f_bavail * facts.f_frsize, min(_RESERVE_BYTES, facts.f_blocks * facts.f_frsize // 50)
            if free < reserve + size:
                raise FetchError(f"the disk has only {free / 1e6:,.0f} MB left", retry=False)
            self._allowed = min(_LOOK_EVERY, free - reserve)
        self._allowed -= size


class _Slow:
    """FetchError for fewer than 1 KB/s over twice the time limit."""

    def __init__(self, timeout: float) -> None:
        self._span = 2 * timeout
        self._since, self._bytes = time.monotonic(), 0

    def check(self, size: int) -> None:
        self._bytes += size
        now = time.monotonic()
        if now - self._since < self._span:
            return
        if self._bytes < _SLOWEST_BYTES * self._span:
            raise FetchError(f"only {self._bytes:,} bytes were received in {now - self._since:.0f} s")
        self._since, self._bytes = now, 0


def _refuse_page(block: bytes, stream: Stream) -> None:
    """FetchError for an HTML page, as proxies send with status 200."""
    text = block[:2048].lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        found = re.search(rb"<title[^>]*>(.*?)</title>", block[:4096], re.IGNORECASE | re.DOTALL)
        title = f" ('{' '.join(found[1].decode('utf-8', 'replace').split())[:80]}')" if found else ""
        status = f" with status {stream.status}" if stream.status else ""
        raise FetchError(f"the server sent an HTML page{title}{status} instead of the file")


def _print(line: str) -> None:
    to_stderr(f"dtl: {line}")


def options_of_helper(facts: dict[str, Any]) -> DataConfig:
    """The data section of the config, in a helper process that got it as JSON.

    Only where something is remote: without pydantic a helper starts in half the time, so what helpers import does not import the config.
    """
    from dtl.config.models import DataConfig

    return DataConfig.model_validate(facts)


def open_for_fetch(path: Path) -> Any:
    """A file to fetch into, with what it holds."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "r+b")
