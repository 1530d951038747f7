"""One answer of an HTTP server, from a given byte on. Retries and checks are `dtl.data.remote.fetch`'s.

The standard library's client: proxies come from the environment (http_proxy, https_proxy, no_proxy), redirects are followed, certificates
are checked. Timeouts hold for connecting and for each read.
"""

from __future__ import annotations

import base64
import http.client
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from urllib.parse import urlsplit, urlunsplit

from dtl.credentials import of_netrc, redacted_line, user_and_password, with_credentials
from dtl.data.remote.stream import BLOCK_BYTES, FetchError, Stream
from dtl.version import __version__

_CONNECT_SECONDS = 20.0
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524)
_HINTS = {
    401: "it needs a password: give it in the address, on the command line or in your --config file, or in ~/.netrc",
    403: "access is refused, or a signed address has expired",
    404: "it is not there",
    410: "it is gone",
}


def open_http(url: str, start: int, validator: str | None, timeout: float) -> Stream:
    """The bytes of `url` from `start` on; from 0 where the server gives the whole file, as it does when it is not `validator`'s any more."""
    try:
        request = _request(url)
        if start:
            request.add_header("Range", f"bytes={start}-")
            if validator is not None:
                request.add_header("If-Range", validator)
        response = _opener().open(request, timeout=min(timeout, _CONNECT_SECONDS))
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(error, start) from None
    except urllib.error.URLError as error:
        raise _unreachable(error.reason) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _unreachable(error) from None
    try:
        return _stream(response, start, validator, timeout)
    except BaseException:
        response.close()
        raise


def _opener() -> urllib.request.OpenerDirector:
    """http and https only: a redirect must not lead to a local file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _request(url: str) -> urllib.request.Request:
    parts = urlsplit(with_credentials(url))
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host, fragment="")), headers={"User-Agent": f"dtl/{__version__}"})
    if (known := user_and_password(parts.netloc) or of_netrc(parts.hostname or "")) is not None:
        name_and_password = ":".join(known)
        # Not redirected: another host must not see it.
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(name_and_password.encode()).decode())
    return request


def _stream(response: http.client.HTTPResponse, start: int, validator: str | None, timeout: float) -> Stream:
    headers = response.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        raise FetchError(f"the server sends it encoded ({headers['Content-Encoding']}), not as it is", retry=False)
    length = _number(headers.get("Content-Length"))
    total, begins = length, 0
    if response.status == 206:
        begins, total = _range(headers)
        if begins != start:
            raise FetchError(f"the server sent bytes from {begins} on, asked for {start}")
        if validator is not None and _validator(headers) not in (None, validator):
            raise FetchError("the file was changed at the server during the download", restart=True)
    elif response.status != 200:
        raise FetchError(f"HTTP {response.status} {response.reason}")
    ends = None if length is None else begins + length
    return Stream(
        start=begins,
        total=total if total is not None else ends,
        ends=ends,
        validator=_validator(headers),
        status=response.status,
        blocks=_blocks(response, timeout),
        close=response.close,
    )


def _blocks(response: http.client.HTTPResponse, timeout: float) -> Iterator[bytes]:
    _set_timeout(response, timeout)
    while True:
        try:
            block = response.read1(BLOCK_BYTES)
        except TimeoutError:
            raise FetchError(f"no byte came for {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise FetchError(f"the connection broke ({_words(error)})") from None
        if not block:
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
    reason = f"HTTP {error.code} {error.reason}{hint}"
    if error.code == 416 and start:
        return FetchError(reason, restart=True)
    after = _number(error.headers.get("Retry-After")) if error.headers is not None else None
    return FetchError(reason, retry=error.code in _TRY_AGAIN, after=after, missing=error.code in (404, 410))


def _unreachable(reason: object) -> FetchError:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return FetchError(f"the server's certificate is not accepted ({reason.verify_message})", retry=False)
    if isinstance(reason, TimeoutError):
        return FetchError("the server does not answer in time")
    if isinstance(reason, socket.gaierror):
        return FetchError(f"the host is not known ({reason.strerror})")
    if isinstance(reason, (str, ValueError, http.client.InvalidURL)):
        return FetchError(redacted_line(str(reason)), retry=False)
    return FetchError(_words(reason))


def _words(error: object) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, http.client.IncompleteRead):
        return "the answer was cut"
    return " ".join(str(error).split()) or type(error).__name__


def _range(headers: Message) -> tuple[int, int | None]:
    """(first byte, size of the whole file) of a Content-Range."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", "").strip())
    if found is None:
        raise FetchError("the server answers a range without saying which (no Content-Range)", restart=True)
    return int(found[1]), None if found[2] == "*" else int(found[2])


def _validator(headers: Message) -> str | None:
    """What If-Range takes: a strong ETag, or else the time of the last change."""
    tag = headers.get("ETag")
    if tag is not None and not tag.startswith("W/"):
        return str(tag)
    changed = headers.get("Last-Modified")
    return None if changed is None else str(changed)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdecimal() else None
