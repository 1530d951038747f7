"""What is remote, and how it is named: http(s) addresses, `pipe:` commands, and the addresses that fsspec reads."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from dtl.errors import UserError

PIPE = "pipe:"
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_USER = re.compile(r"://[^/\s]*@")
_QUERY = re.compile(r"(://[^\s?#]*)[?#]\S*")


def default_cache_dir() -> Path:
    """$DTL_CACHE, or ~/.cache/dtl."""
    return Path(os.environ.get("DTL_CACHE") or Path.home() / ".cache" / "dtl").expanduser()


def is_remote(source: str | Path) -> bool:
    return isinstance(source, str) and (source.startswith(PIPE) or bool(_ADDRESS.match(source)))


def kind_of(url: str) -> str:
    """http, pipe or fsspec."""
    if url.startswith(PIPE):
        return "pipe"
    return "http" if url.lower().startswith(("http://", "https://")) else "fsspec"


def join(folder: str, name: str) -> str:
    """The address of `name` in a remote folder; a query (as of a signed address) is kept. UserError for a `pipe:` command."""
    if kind_of(folder) == "pipe":
        raise UserError(f"{shown(folder)}: a command gives one tar, it is no folder; name the shards: pipe:COMMAND {{000..010}}")
    if kind_of(folder) == "fsspec":
        return f"{folder.rstrip('/')}/{name}"
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def base_name(url: str) -> str:
    """The last part of the address; a command's last word that looks like a file."""
    if kind_of(url) == "pipe":
        words = [word for word in re.split(r"[\s'\"|<>]+", url.removeprefix(PIPE)) if "." in word]
        return PurePosixPath(words[-1]).name if words else "shard.tar"
    path = urlsplit(url).path if kind_of(url) == "http" else url.partition("://")[2]
    return PurePosixPath(path.rstrip("/")).name


def without_query(url: str) -> str:
    """What stays the same when an address is signed anew."""
    if kind_of(url) != "http":
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # no address; the error comes when it is opened
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def shown(url: str) -> str:
    """The address for a message: without passwords and signatures."""
    return without_query(url) + ("?..." if kind_of(url) == "http" and "?" in url else "")


def redact(value: Any) -> Any:
    """Settings as they may leave with a model: URLs without user, password, query and fragment (tokens stand there), `pipe:` without its command."""
    if isinstance(value, dict):
        return {key: redact(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [redact(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return "pipe:" if value.startswith("pipe:") else _QUERY.sub(r"\1", _USER.sub("://", value))
