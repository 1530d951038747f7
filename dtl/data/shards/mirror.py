"""A remote folder that dtl has packed or indexed: its manifest, index and names are copied here, its shards are fetched when needed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from dtl.config.models import DataConfig
from dtl.data.remote.address import is_remote, join, kind_of, shown, without_query
from dtl.data.remote.fetch import MAX_FILE_BYTES, Unfetched, fetch_bytes, fetch_file
from dtl.data.shards.index import DHASHES_NAME, GROUPS_NAME, INDEX_NAME, KEYS_NAME, PATHS_NAME, index_bytes
from dtl.data.shards.manifest import MANIFEST_NAME, Manifest
from dtl.data.shards.quarantine import QUARANTINE_NAME, Quarantine
from dtl.data.sources.splits import SPLIT_WORDS, NoSplit, addresses_to_try
from dtl.errors import UserError
from dtl.files import sha256_of_file, temporary_suffix, write_whole
from dtl.untrusted import read_json

_ORIGIN_NAME = "origin.json"
_MOST_NAME_BYTES = 8192  # of a sample's key or path, on average


class Unreachable(UserError):
    """The server of a remote folder did not answer."""


def mirror_place(place: Path, url: str) -> Path:
    return place / "folders" / hashlib.sha256(without_query(url).rstrip("/").encode()).hexdigest()[:20]


def find_remote_folder(url: str, splits: Sequence[str], *, options: DataConfig) -> tuple[str, bytes] | None:
    """(address, manifest) of the remote folder `url`, or else of the first folder in it that is named after one of `splits`.

    Unreachable for no connection.
    """
    try:
        for folder in (url, *(join(url, name) for split in splits for name in addresses_to_try(split))):
            text = fetch_bytes(join(folder, MANIFEST_NAME), options=options)
            if text is not None:
                return folder, text
    except Unfetched as error:
        raise (UserError if error.refused else Unreachable)(str(error)) from None
    return None


def earlier_mirror(place: Path, url: str, splits: Sequence[str]) -> Path | None:
    """The copy that an earlier command has made of the folder that `find_remote_folder` would find: for a machine without internet."""
    for folder in (url, *(join(url, name) for split in splits for name in addresses_to_try(split))):
        copied = mirror_place(place, folder)
        if (copied / _ORIGIN_NAME).is_file():
            return copied
    return None


def refuse_remote_folder(url: str, splits: Sequence[str]) -> NoReturn:
    names = [name for split in splits for name in SPLIT_WORDS[split]]
    raise NoSplit(
        f"{shown(url)} holds no {MANIFEST_NAME}, neither directly nor in {', '.join(f'{name}/' for name in names)}; "
        "list its tars with braces (train-{000..010}.tar), or pack the data with `dtl pack` and copy the folder there"
    )


def mirror(url: str, text: bytes, folder: Path, *, options: DataConfig) -> Path:
    """Bring `folder` up to date with the remote folder `url`, whose manifest is `text`; under a lock of the caller's. UserError."""
    for leftover in folder.glob(f".*{temporary_suffix()}"):
        leftover.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(text).hexdigest()
    try:
        manifest = _manifest(url, text)
        if _origin(folder) != {"url": url, "sha256": digest}:
            (folder / _ORIGIN_NAME).unlink(missing_ok=True)
            _fetch_beside(url, folder, manifest, options)
            manifest.write(folder)
            origin = json.dumps({"url": url, "sha256": digest})
            write_whole(folder / _ORIGIN_NAME, lambda file: file.write(origin.encode()))
        _fetch_quarantine(url, folder, manifest, options)
    except Unfetched as error:
        raise UserError(str(error)) from None
    return folder


def _origin(folder: Path) -> Any:
    """What the mirror is a copy of. Written last, so what has it is whole."""
    try:
        return read_json(folder / _ORIGIN_NAME)
    except (OSError, UserError):
        return None


def _manifest(url: str, text: bytes) -> Manifest:
    """The remote manifest with the addresses of its shards."""
    manifest = Manifest.parse(text, shown(join(url, MANIFEST_NAME)))
    return replace(manifest, shards=tuple(replace(shard, url=_shard_url(url, shard.url)) for shard in manifest.shards))


def _shard_url(url: str, name: str) -> str:
    """A manifest that comes from elsewhere names files below it, or addresses of the same kind: no commands, nothing of this machine."""
    if is_remote(name):
        kinds = name.partition("://")[0].lower(), url.partition("://")[0].lower()
        if kind_of(name) == "pipe" or (kind_of(name) == "fsspec" and kinds[0] != kinds[1]) or kinds == ("http", "https"):
            raise _refused(url, name, ": a remote manifest may list only files below it and addresses of its own kind")
        return name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise _refused(url, name, ", which is outside its folder")
    if "::" in name and kind_of(url) == "fsspec":  # a chain of file systems, which may begin on this machine
        raise _refused(url, name, ": a remote manifest may list only files below it and addresses of its own kind")
    return join(url, name)


def _refused(url: str, name: str, why: str) -> UserError:
    return UserError(f"{shown(join(url, MANIFEST_NAME))} lists the shard {name[:100]!r}{why}")


def _fetch_beside(url: str, folder: Path, manifest: Manifest, options: DataConfig) -> None:
    if not _is(folder / INDEX_NAME, manifest.index_sha256):
        size = index_bytes(len(manifest.shards), manifest.num_samples)
        _fetch_file(url, folder, INDEX_NAME, manifest.index_sha256, options, size=size)
    most = _MOST_NAME_BYTES * (manifest.num_samples + 1)
    keys = manifest.made_by.get("keys_sha256")
    if keys is None:
        (folder / KEYS_NAME).unlink(missing_ok=True)
    elif not _is(folder / KEYS_NAME, keys):
        _fetch_file(url, folder, KEYS_NAME, keys, options, most=most)
    for name in (PATHS_NAME, GROUPS_NAME, DHASHES_NAME):  # for reports, groups and twins: they need not be there
        try:
            _fetch_file(url, folder, name, None, options, most=most)
        except Unfetched as error:
            (folder / name).unlink(missing_ok=True)
            if not error.missing:
                raise


def _fetch_quarantine(url: str, folder: Path, manifest: Manifest, options: DataConfig) -> None:
    """Looked for at each start: it is written beside the manifest without changing it."""
    path = folder / QUARANTINE_NAME
    text = fetch_bytes(join(url, QUARANTINE_NAME), options=options)
    if text is None:
        path.unlink(missing_ok=True)
        return
    found = Quarantine.parse(text, shown(join(url, QUARANTINE_NAME)))
    if not _is(folder / found.index, found.index_sha256):
        _fetch_file(url, folder, found.index, found.index_sha256, options, most=index_bytes(len(manifest.shards), manifest.num_samples))
    write_whole(path, lambda file: file.write(text))


def _fetch_file(url: str, folder: Path, name: str, sha256: str | None, options: DataConfig, *, size: int | None = None, most: int = MAX_FILE_BYTES) -> None:
    address = join(url, name)
    free = shutil.disk_usage(folder).free
    if (size or 0) > free:
        raise UserError(
            f"{shown(address)}: it has {size:,} bytes according to the manifest, but the cache {folder} has only {free:,} free; "
            "choose another disk with --data.cache-dir"
        )
    fetch_file(address, folder / name, options=options, size=size, sha256=sha256, most=min(most, MAX_FILE_BYTES))


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of_file(path) == sha256
