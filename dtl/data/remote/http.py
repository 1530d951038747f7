"""One answer of an HTTP server, from a given byte on. Retries and checks are `dtl.data.remote.fetch`'s.

The standard library's client: proxies come from the environment (http_proxy, https_proxy, no_proxy), certificates are checked. Redirects
are followed, ten of them, to http and https only, and never from https to http; user and password go to the host that they were given for.
A server that sends something, but nothing that is of use (headers without end, one byte a minute), is left after the same time as a silent one.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import math
import re
import socket
import ssl
import string
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from dtl.credentials import of_netrc, redacted_line, user_and_password, with_credentials
from dtl.data.remote.stream import BLOCK_BYTES, FetchError, Stream
from dtl.version import __version__

_CONNECT_SECONDS = 20.0
_MOST_REDIRECTS = 10
_KEPT = ("User-agent", "Range", "If-range")  # headers that a redirect keeps; not those for a proxy
_MOST_REASON = 100  # characters of a server's message
_AWAY = (502, 503, 504)
"""A proxy's word that the server behind it does not answer."""
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524)
_HINTS = {
    401: "it needs a password: give it in the address, on the command line or in your --config file, or in ~/.netrc",
    403: "access is refused, or a signed address has expired",
    404: "check the address",
    410: "it was removed from the server",
}


def open_http(url: str, start: int, validator: str | None, timeout: float) -> Stream:
    """The bytes of `url` from `start` on; from 0 where the server gives the whole file, as it does when it is not `validator`'s any more."""
    try:
        request = _request(url)
        if start:
            request.add_header("Range", f"bytes={start}-")
            if validator is not None:
                request.add_header("If-Range", validator)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _unreachable(error) from None
    patience = _Patience(timeout)
    try:
        response = _opener(patience).open(request, timeout=min(timeout, _CONNECT_SECONDS))
        return _stream(response, start, validator, patience)
    except urllib.error.HTTPError as error:
        patience.end()
        with error:
            raise _refused(error, start) from None
    except urllib.error.URLError as error:
        patience.end()
        raise (patience.ran_out(away=True) or _unreachable(error.reason)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        patience.end()
        raise (patience.ran_out(away=True) or _unreachable(error)) from None
    except BaseException:
        patience.end()
        raise


class _Patience:
    """Cuts the connection when no file data has come for `timeout` seconds, since timeouts of sockets start again with each byte.

    Begun with a request; `await_more` begins a wait, `rest` ends it, `end` closes all.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._sockets: list[socket.socket] = []
        self._since = time.monotonic()
        self._ended, self._cut = threading.Event(), False
        threading.Thread(target=self._watch, daemon=True, name="dtl-http").start()

    def await_more(self) -> None:
        self._since = time.monotonic()

    def rest(self) -> None:
        """While what came is written: no fault of the server's."""
        self._since = math.inf

    def ran_out(self, *, away: bool = False) -> FetchError | None:
        """Why the connection broke, if it was cut here. `away`: before any answer."""
        return FetchError(f"no file data was received for {self.timeout:g} s", away=away) if self._cut else None

    def holds(self, opened: socket.socket) -> None:
        self._sockets.append(opened.dup())  # TLS takes the socket itself away

    def end(self) -> None:
        self._ended.set()
        self._shut()
        while self._sockets:
            self._sockets.pop().close()

    def _watch(self) -> None:
        # A little later than the sockets' own time limits, whose messages are plainer.
        while not self._ended.wait(min(1.0, self.timeout / 4)):
            if time.monotonic() - self._since > self.timeout + max(2.0, self.timeout / 4):
                self._cut = True
                return self._shut()

    def _shut(self) -> None:
        for opened in list(self._sockets):
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)


@lru_cache(1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _opener(patience: _Patience) -> urllib.request.OpenerDirector:
    """http and https only: a redirect must not lead to a local file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _Plain(patience),
        _Encrypted(patience),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(patience),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _watched(patience: _Patience, context: ssl.SSLContext | None) -> Callable[..., http.client.HTTPConnection]:
    """Makes connections whose sockets the patience may cut, from before a proxy's or a TLS handshake on."""

    def make(host: str, *, timeout: float) -> http.client.HTTPConnection:
        connection = (
            http.client.HTTPConnection(host, timeout=timeout) if context is None else http.client.HTTPSConnection(host, timeout=timeout, context=context)
        )
        connect = connection._create_connection  # type: ignore[attr-defined]

        def create(address: tuple[str, int], timeout: float, source: tuple[str, int] | None = None) -> socket.socket:
            opened: socket.socket = connect(address, timeout, source)
            patience.holds(opened)
            return opened

        connection._create_connection = create  # type: ignore[attr-defined]
        return connection

    return make


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, patience: _Patience) -> None:
        super().__init__()
        self._make = _watched(patience, None)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._make, req)


class _Encrypted(urllib.request.HTTPSHandler):
    def __init__(self, patience: _Patience) -> None:
        super().__init__()
        self._make = _watched(patience, _tls())

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._make, req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """The library's own reads the whole answer, which may have no end, and follows from https to http."""

    def __init__(self, patience: _Patience) -> None:
        self._patience = patience

    def http_error_302(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        fp.close()
        place = headers.get("Location") or headers.get("URI")
        if place is None:
            raise FetchError(f"HTTP {code} redirect without a Location header", retry=False)
        try:
            parts = urlsplit(urljoin(req.full_url, quote(place, encoding="iso-8859-1", safe=string.punctuation)))
            here = urlsplit(req.full_url)
            host = parts.netloc.rpartition("@")[2]
            shown = urlunsplit((parts.scheme, host, parts.path, "", ""))[:200]
        except ValueError:
            raise FetchError(f"HTTP {code} redirects to an invalid address", retry=False) from None
        if parts.scheme not in ("http", "https") or not host:
            raise FetchError(f"HTTP {code} redirects to {shown}, but only http and https are followed", retry=False)
        if here.scheme == "https" and parts.scheme == "http":
            raise FetchError(f"HTTP {code} redirects from https to {shown}, which is not encrypted", retry=False)
        self._patience.await_more()
        hops = getattr(req, "hops", 0) + 1
        if hops > _MOST_REDIRECTS:
            raise FetchError(f"HTTP {code} is redirect number {hops} in a row (to {shown}): too many redirects", retry=False)
        further = urllib.request.Request(
            urlunsplit(parts._replace(netloc=host, fragment="")), headers={name: text for name, text in req.headers.items() if name in _KEPT}
        )
        further.hops = hops  # type: ignore[attr-defined]
        if (here.scheme, here.netloc) == (parts.scheme, host) and req.unredirected_hdrs.get("Authorization"):
            further.add_unredirected_header("Authorization", req.unredirected_hdrs["Authorization"])
        return self.parent.open(further, timeout=req.timeout)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _request(url: str) -> urllib.request.Request:
    parts = urlsplit(with_credentials(url))
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host, fragment="")), headers={"User-Agent": f"dtl/{__version__}"})
    if (known := user_and_password(parts.netloc) or of_netrc(parts.hostname or "")) is not None:
        # Not redirected: another host must not see it.
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(":".join(known).encode()).decode())
    return request


def _stream(response: http.client.HTTPResponse, start: int, validator: str | None, patience: _Patience) -> Stream:
    patience.rest()
    headers = response.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        raise FetchError(f"the server sends it with Content-Encoding {headers['Content-Encoding'][:_MOST_REASON]}, which is not supported", retry=False)
    length = _number(headers.get("Content-Length"))
    total, begins = length, 0
    if response.status == 206:
        begins, total = _range(headers)
        if begins != start:
            raise FetchError(f"the server sent bytes from {begins} on, but bytes from {start} were requested")
        if validator is not None and _validator(headers) not in (None, validator):
            raise FetchError("the file changed on the server during the download", restart=True)
    elif response.status != 200:
        raise FetchError(f"HTTP {response.status} {response.reason[:_MOST_REASON]}")
    ends = None if length is None else begins + length

    def close() -> None:
        patience.end()
        response.close()

    return Stream(
        start=begins,
        total=total if total is not None else ends,
        ends=ends,
        validator=_validator(headers),
        status=response.status,
        blocks=_blocks(response, patience),
        close=close,
    )


def _blocks(response: http.client.HTTPResponse, patience: _Patience) -> Iterator[bytes]:
    _set_timeout(response, patience.timeout)
    while True:
        patience.await_more()
        try:
            block = response.read1(BLOCK_BYTES)
        except TimeoutError:
            raise FetchError(f"no data was received for {patience.timeout:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise (patience.ran_out() or FetchError(f"the connection was lost ({_words(error)})")) from None
        patience.rest()
        if not block:
            if (cut := patience.ran_out()) is not None:
                raise cut
            return
        yield block


def _set_timeout(response: http.client.HTTPResponse, timeout: float) -> None:
    """Reading may take longer than connecting; the socket is not public, and stays at the shorter time where it is not found."""
    raw = getattr(getattr(response, "fp", None), "raw", None)
    sock = getattr(raw, "_sock", None)
    if isinstance(sock, socket.socket):
        sock.settimeout(timeout)


def _refused(error: urllib.error.HTTPError, start: int) -> FetchError:
    hint = f" ({_HINTS[error.code]})" if error.code in _HINTS else ""
    reason = f"HTTP {error.code} {str(error.reason)[:_MOST_REASON]}{hint}"
    if error.code == 416 and start:
        return FetchError(reason, restart=True)
    after = _number(error.headers.get("Retry-After")) if error.headers is not None else None
    return FetchError(reason, retry=error.code in _TRY_AGAIN, after=after, missing=error.code in (404, 410), away=error.code in _AWAY)


def _unreachable(reason: object) -> FetchError:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return FetchError(f"the server's certificate is not accepted ({reason.verify_message})", retry=False)
    if isinstance(reason, TimeoutError):
        return FetchError("the server does not answer in time", away=True)
    if isinstance(reason, socket.gaierror):
        return FetchError(f"the host name cannot be resolved ({reason.strerror})", away=True)
    if isinstance(reason, (str, ValueError, http.client.InvalidURL)):
        return FetchError(redacted_line(_words(reason)), retry=False)
    return FetchError(_words(reason), away=True)


def _words(error: object) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, http.client.IncompleteRead):
        return "the response is incomplete"
    return " ".join(str(error).split())[: 2 * _MOST_REASON] or type(error).__name__


def _range(headers: Message) -> tuple[int, int | None]:
    """(first byte, size of the whole file) of a Content-Range."""
    found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", headers.get("Content-Range", "").strip())
    if found is None:
        raise FetchError("the server sent part of the file without a valid Content-Range", restart=True)
    return int(found[1]), None if found[2] == "*" else int(found[2])


def _validator(headers: Message) -> str | None:
    """What If-Range takes: a strong ETag, or else the time of the last change."""
    tag, changed = headers.get("ETag"), headers.get("Last-Modified")
    found = tag if tag is not None and not tag.startswith("W/") else changed
    return found if found is not None and re.fullmatch("[ -~]{1,200}", found) else None  # it is sent back as a header


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\s*[0-9]{1,18}\s*", text) else None
