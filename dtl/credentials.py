"""User, password and query (tokens, signatures) of addresses: taken off where the user gives an address, and put back where it is opened.

Between the two an address is a plain text without them, so none can stand in a message, a config, a checkpoint, a cache, a report or a tracker. They live in
this process, and in the environment of the helper processes that fetch for it; never in a file. Where an address has none, http asks ~/.netrc.

They belong to the address that was given, to whatever lies below it, and to all files of a pattern; never to another host.
"""

from __future__ import annotations

import json
import netrc
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

PIPE = "pipe:"
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# Also with one slash (an address that was taken for a path), and without a scheme (the rest of one that was taken for package.module:function).
_USER = re.compile(r"((?<=\w\w:/)/?|(?<![\w./:])//)[^/\s'\"]*@")
_QUERY = re.compile(r"((?:\bhttps?://?|(?<![\w./:])//)[^\s?#'\"]*)[?#][^\s'\"]*", re.IGNORECASE)
_ANYWHERE = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"]+", re.IGNORECASE)
_HTTP = re.compile(r"(?P<netloc>[^/?#]*)(?P<path>[^?#]*)(?P<query>(?:\?[^#]*)?)(?P<fragment>(?:#.*)?)", re.DOTALL)
_OTHER = re.compile(r"(?P<netloc>[^/]*)(?P<path>.*)(?P<query>)(?P<fragment>)", re.DOTALL)
_PATTERN = re.compile(r"[{*\[]")
_VARIABLE = "DTL_ADDRESS_CREDENTIALS"  # for helper processes of this run; readable by this user only (/proc/PID/environ)

MOST_NAMES = 1_000_000
"""Of one pattern."""
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?\d+)?\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")

# A shorter one is not a secret, and occurs in many lines.
_SHORTEST = 6

# Address without them, or its beginning and a star where it is a pattern -> (user and password, query).
_known: dict[str, tuple[str, str]] = {}


def is_address(text: str) -> bool:
    return bool(_ADDRESS.match(text))


def bare(address: str) -> str:
    """The address without user, password and query, which from now on only `with_credentials` gives back, in this process.

    Everything else (a path, a `pipe:` command, None) stays as it is.
    """
    if not isinstance(address, str) or not is_address(address):
        return address
    clean, user, query, fragment = _split(address)
    if user or query:
        for name in _names(clean):
            _known[name] = (user, query)
    return clean + fragment


def note(words: Iterable[str]) -> None:
    """Know the addresses in a command line, whatever its words turn out to mean: no message repeats their secrets."""
    for word in words:
        if PIPE not in word:
            for found in _ANYWHERE.findall(word):
                bare(found)


def _split(address: str) -> tuple[str, str, str, str]:
    """The address without the rest, user and password, query, fragment (with its #)."""
    scheme, _, rest = address.partition("://")
    parts = (_HTTP if scheme.lower() in ("http", "https") else _OTHER).fullmatch(rest)
    assert parts is not None, "both take any text"
    user, _, host = parts["netloc"].rpartition("@")
    return f"{scheme}://{host}{parts['path']}", user, parts["query"][1:], parts["fragment"]


def _names(clean: str) -> list[str]:
    """What stands for an address in `_known`: itself, or for a pattern what all its addresses begin with."""
    found = _PATTERN.search(clean)
    if found is None:
        return [clean.rstrip("/")]
    start = clean[: found.start()]
    if start.count("/") >= 3:
        return [start + "*"]
    try:  # a pattern within the name of the host
        return [one.rstrip("/") for one in expand_braces(clean)]
    except ValueError:
        return []  # whoever opens it finds that it is not a pattern


def with_credentials(address: str) -> str:
    """The address as it is to be opened."""
    if not is_address(address):
        return address
    found = max((name for name in _known if _covers(name, address.partition("#")[0])), key=len, default=None)
    if found is None:
        return address
    user, query = _known[found]
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc}" if user else parts.netloc, query=query or parts.query))


def _covers(name: str, address: str) -> bool:
    if name.endswith("*"):  # a pattern: its files lie in one folder
        return address.startswith(name[:-1]) and "/" not in address[len(name) - 1 :]
    return address == name or address.startswith(name + "/")


def of_netrc(host: str) -> tuple[str, str] | None:
    """User and password of a host in ~/.netrc; None without one, and for a file that others may read or that is damaged."""
    try:
        found = netrc.netrc().hosts.get(host) if host != "default" else None  # not netrc's `default`, which is for any host
    except (OSError, netrc.NetrcParseError, ValueError):
        return None
    return (found[0], found[2]) if found and found[0] and found[2] else None


def user_and_password(netloc: str) -> tuple[str, str] | None:
    """Of an address's network location (`user:password@host:port`), decoded."""
    user, at, _host = netloc.rpartition("@")
    if not at:
        return None
    name, _, password = user.partition(":")
    return unquote(name), unquote(password)


def redact(value: Any) -> Any:
    """Texts and settings without the user, password and query of any address in them, and without the commands of `pipe:`."""
    if isinstance(value, Mapping):
        return {key: redact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if is_address(value) and not any(letter.isspace() for letter in value):
        return _split(value)[0]
    return PIPE if value.startswith(PIPE) else redacted_line(value)


def redacted_line(text: str) -> str:
    """A line without the user, password and query of any address in it, and without those that this process knows, wherever they stand."""
    for user, query in _known.values():
        for whole in (f"{user}@" if user else "", f"?{query}" if query else ""):
            text = text.replace(whole, "") if whole else text
        for secret in (query, user.partition(":")[2], unquote(user.partition(":")[2])):
            text = text.replace(secret, "***") if len(secret) >= _SHORTEST else text
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


# ---- patterns


def expand_braces(text: str) -> list[str]:
    """The names of a pattern, as webdataset expands it: train-{0000..0146}.tar, {a,b}.tar. ValueError for braces that do not match, or for too many names."""
    import braceexpand  # what webdataset itself uses

    number = 1
    for first, last in _RANGE.findall(text):
        number *= abs(int(last) - int(first)) + 1
    for group in _CHOICE.findall(text):
        number *= group.count(",") + 1
    if number > MOST_NAMES:  # before any of them is made
        raise ValueError(f"more than {MOST_NAMES:,} names")
    return list(braceexpand.braceexpand(text))


# ---- helper processes


def environment() -> dict[str, str]:
    """The environment of a helper process that opens addresses for this one."""
    return {**os.environ, _VARIABLE: json.dumps(_known)} if _known else dict(os.environ)


def _take_over() -> None:
    """In a helper process: the credentials from its parent's environment, which are not passed to its own child processes."""
    for name, (user, query) in json.loads(os.environ.pop(_VARIABLE, "{}")).items():
        _known[name] = (user, query)


_take_over()
