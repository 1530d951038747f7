"""What is remote, and how it is named: http(s) addresses, `pipe:` commands, and the addresses that fsspec reads."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from dtl.credentials import PIPE, is_address
from dtl.errors import UserError
from dtl.files import user_path


def default_cache_dir() -> Path:
    """$DTL_CACHE, or ~/.cache/dtl; where there is no home that can be written (containers with a bare user id), .dtl-cache in the working folder."""
    if given := os.environ.get("DTL_CACHE"):
        return user_path(given)
    return Path.home() / ".cache" / "dtl" if has_home() else Path(".dtl-cache").absolute()


def has_home() -> bool:
    """Whether this user has a home folder whose caches can be written."""
    try:
        place = Path.home() / ".cache" / "dtl"
    except RuntimeError:  # no $HOME, and no entry in /etc/passwd
        return False
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    return os.access(existing, os.W_OK)


def cache_place(cache_dir: str | Path | None, *, shared: bool = False, own: bool = True) -> Path:
    """The cache folder, created if it does not exist. UserError if others may write to it, since labels and pixels come from it.

    `shared`: the user chose a cache that others write too. Then what is verified by its hash each time (remote shards, `own` false) lies in
    it directly, and all else in a folder of the user's own in it.
    """
    place = user_path(cache_dir) if cache_dir is not None else default_cache_dir()
    try:
        if not shared:
            return own_folder(place)
        place.mkdir(parents=True, exist_ok=True)
        return own_folder(_private_part(place)) if own else place
    except OSError as error:
        raise UserError(f"the cache {place} cannot be created: {error.strerror}; choose another one (data.cache_dir or $DTL_CACHE)") from None


def private_cache(cache_dir: str | Path | None, *, shared: bool = False) -> Path:
    """The folder that `cache_place` would give; nothing is made or looked at."""
    place = user_path(cache_dir) if cache_dir is not None else default_cache_dir()
    return _private_part(place) if shared else place


def _private_part(place: Path) -> Path:
    return place / f"of-user-{os.geteuid()}"


def own_folder(place: Path) -> Path:
    """`place`, or where it leads to if it is a link, owned by this user and writable only by them; missing folders are created so."""
    for level in reversed([level for level in (place, *place.parents) if not level.exists()]):
        level.mkdir(mode=0o700, exist_ok=True)
    real = place.resolve() if place.is_symlink() else place  # which may be turned to elsewhere later
    facts = real.stat()
    if facts.st_uid != os.geteuid():
        raise UserError(
            f"the cache {place} belongs to another user (id {facts.st_uid}), who could replace its files; "
            "choose one of your own (data.cache_dir or $DTL_CACHE), or share it with --data.cache-shared true"
        )
    if stat.S_IMODE(facts.st_mode) & 0o022:
        raise UserError(f"the cache {place} is writable by other users: run chmod 700 {place}, or share it with --data.cache-shared true")
    return real


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
        raise UserError(f"{shown(folder)}: a pipe: command gives one tar, not a folder; list the shards: pipe:COMMAND {{000..010}}")
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
    """The address without what changes when it is signed again."""
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
