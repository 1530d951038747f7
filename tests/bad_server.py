"""A real HTTP server on loopback that serves a folder, counts what it is asked for, and misbehaves as told.

`server.plan[NAME]` is a list of misbehaviours for the next requests of that path, used up one by one; then it serves well:
"500", "404", "503 after 1", "drop N" (closes after N bytes), "short" (lies about its length), "html", "hang", "other tag", "no range", "302 ADDRESS".
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

PAGE = b"<!DOCTYPE html><html><head><title>Please log in</title></head><body>" + b"x" * 2000 + b"</body></html>"


class Server:
    """Serves `folder` while it is open. `requests` are (path, first byte, status)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}
        self.requests: list[tuple[str, int, int]] = []
        self.lock_with: tuple[str, str] | None = None
        """(user:password, query) without which nothing is served."""
        self.seconds_per_block = 0.0
        self.validators = True
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = _Quiet(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take(self, name: str) -> str:
        with self._lock:
            left = self.plan.get(name)
            return left.pop(0) if left else self.always.get(name, "")

    def note(self, name: str, start: int, status: int) -> None:
        with self._lock:
            self.requests.append((name, start, status))

    def downloads(self, suffix: str = ".tar") -> Counter[str]:
        """How often each file was sent from its start."""
        return Counter(name for name, start, status in self.requests if name.endswith(suffix) and start == 0 and status in (200, 206))


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that were killed are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    owner: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _may(self) -> bool:
        if self.owner.lock_with is None:
            return True
        user, query = self.owner.lock_with
        return self.headers.get("Authorization") == "Basic " + base64.b64encode(user.encode()).decode() and self.path.partition("?")[2] == query

    def do_GET(self) -> None:
        if not self._may():
            return self._answer(401, b"who are you", self.path.partition("?")[0].lstrip("/"), 0, {})
        name = self.path.partition("?")[0].lstrip("/")
        what = self.owner.take(name)
        file = self.owner.folder / name
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if what == "hang":
            self.owner.note(name, start, 0)
            time.sleep(3.0)
            self.close_connection = True
            return
        if what == "html":
            return self._answer(200, PAGE, name, start, {"Content-Type": "text/html"})
        if what[:3].isdigit():
            more = {"Retry-After": what.split()[-1]} if "after" in what else {}
            more |= {"Location": what.split()[1]} if what.startswith("302 ") else {}
            return self._answer(int(what[:3]), b"error", name, start, more)
        if not file.is_file():
            return self._answer(404, b"nothing", name, start, {})
        data = file.read_bytes()
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = {"ETag": tag} if self.owner.validators else {}
        condition = self.headers.get("If-Range")
        status = 200
        if start and what != "no range" and condition in (None, tag):
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        if what == "other tag":
            headers["ETag"] = '"another"'
        self._answer(status, data, name, start, headers, what)

    def _answer(self, status: int, body: bytes, name: str, start: int, headers: dict[str, str], what: str = "") -> None:
        self.owner.note(name, start, status)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) + (1000 if what == "short" else 0)))
        self.end_headers()
        if what.startswith("drop"):
            body = body[: int(what.split()[1])]
        if self.owner.seconds_per_block:
            for at in range(0, len(body), 4096):
                self.wfile.write(body[at : at + 4096])
                self.wfile.flush()
                time.sleep(self.owner.seconds_per_block)
        else:
            self.wfile.write(body)
        if what.startswith(("drop", "short")):
            self.close_connection = True
