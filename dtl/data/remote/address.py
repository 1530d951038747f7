"""What is remote, and how it is named: http(s) addresses, `pipe:` commands, and the addresses that fsspec reads."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from dtl.credentials import PIPE, is_address
from dtl.errors import UserError


def default_cache_dir() -> Path:
    """$DTL_CACHE, or ~/.cache/dtl."""
    return Path(os.environ.get("DTL_CACHE") or Path.home() / ".cache" / "dtl").expanduser()


def is_remote(source: str | Path) -> bool:
    return isinstance(source, str) and (source.startswith(PIPE) or is_address(source))


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
