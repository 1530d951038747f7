"""Downloads that are not http: the output of a shell command, and whatever fsspec reads."""

from __future__ import annotations

import os
import queue
import select
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

from dtl.credentials import PIPE, bare, redacted_line, with_credentials
from dtl.data.remote.stream import BLOCK_BYTES, FetchError, Stream


def open_pipe(url: str, start: int, validator: str | None, timeout: float) -> Stream:
    """The standard output of a command, always from its first byte. A command that fails, or any part of a pipeline, is an error."""
    command = url.removeprefix(PIPE).strip()
    bash = shutil.which("bash")
    shell = [bash, "-o", "pipefail", "-c", command] if bash else ["sh", "-c", command]
    errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the stream)
    try:
        # A session of its own, so that the whole pipeline can be ended.
        process = subprocess.Popen(shell, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
    except OSError as error:
        errors.close()
        raise FetchError(f"the command cannot be started ({error.strerror})", retry=False) from None

    def close() -> None:
        assert process.stdout is not None
        process.stdout.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.close()

    return Stream(0, None, None, None, None, _output(process, errors, timeout), close)


def _output(process: subprocess.Popen[bytes], errors: BinaryIO, timeout: float) -> Iterator[bytes]:
    assert process.stdout is not None
    number = process.stdout.fileno()
    poll = select.poll()
    poll.register(number, select.POLLIN | select.POLLHUP)
    while True:
        if not poll.poll(timeout * 1000):
            raise FetchError(f"the command printed nothing for {timeout:g} s")
        block = os.read(number, BLOCK_BYTES)
        if not block:
            break
        yield block
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise FetchError(f"the command closed its output, but did not exit within {timeout:g} s") from None
    if status:
        ending = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        raise FetchError(f"the command {ending}{_last_line(errors)}", retry=status not in (126, 127))


def _last_line(errors: BinaryIO) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4096))
    lines = [line.strip() for line in errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""


def open_fsspec(url: str, start: int, validator: str | None, timeout: float) -> Stream:
    """A file of an fsspec file system, from `start` on."""
    try:
        import fsspec  # comes with torch
    except ImportError:
        raise FetchError("reading it needs the package fsspec: pip install fsspec", retry=False) from None
    done = threading.Event()
    blocks: queue.Queue[Any] = queue.Queue(8)

    def put(item: Any) -> None:
        while not done.is_set():
            try:
                return blocks.put(item, timeout=0.2)
            except queue.Full:
                continue

    def read() -> None:
        try:
            system, path = fsspec.core.url_to_fs(with_credentials(url))
            facts = system.info(path)
            put((facts.get("size"), _version(facts)))
            with system.open(path, "rb", cache_type="none") as file:
                file.seek(start)
                while not done.is_set() and (block := file.read(BLOCK_BYTES * 16)):
                    put(bytes(block))
            put(b"")
        except BaseException as error:
            put(_failed(url, error))

    # In a thread, whatever time limits the file system has: nothing here may wait for ever.
    threading.Thread(target=read, daemon=True, name="dtl-fsspec").start()

    def take() -> Any:
        try:
            item = blocks.get(timeout=timeout)
        except queue.Empty:
            raise FetchError(f"no data was received for {timeout:g} s") from None
        if isinstance(item, FetchError):
            raise item
        return item

    try:
        size, version = take()
    except BaseException:
        done.set()
        raise
    if start and validator is not None and version != validator:
        done.set()
        raise FetchError("the file changed during the download", restart=True)
    total = int(size) if size is not None else None
    return Stream(start, total, total, version, None, iter(take, b""), done.set)


def find_by_fsspec(pattern: str) -> list[str]:
    """Addresses that match a pattern, sorted. Raises FetchError."""
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(with_credentials(pattern))
        return sorted(bare(system.unstrip_protocol(found)) for found in system.glob(path))
    except Exception as error:
        raise _failed(pattern, error) from None


def _version(facts: dict[str, Any]) -> str | None:
    for name in ("ETag", "etag", "md5Hash", "crc32c", "LastModified", "last_modified", "mtime"):
        if facts.get(name):
            return f"{name}={facts[name]}"
    return None


def _failed(url: str, error: BaseException) -> FetchError:
    scheme = url.partition("://")[0]
    words = redacted_line(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, ImportError):
        return FetchError(f"reading {scheme}:// needs another package ({words})", retry=False)
    if isinstance(error, ValueError) and "Protocol not known" in words:
        return FetchError(f"{scheme}:// is not supported (use http, https, pipe: or a file system of fsspec)", retry=False)
    if isinstance(error, FileNotFoundError):
        return FetchError("file not found", missing=True)
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return FetchError(f"access is refused ({words})", retry=False)
    away = isinstance(error, (ConnectionError, TimeoutError)) or "Connect" in type(error).__name__  # botocore and aiohttp have classes of their own
    return FetchError(f"{type(error).__name__}: {words}"[:300], away=away)
