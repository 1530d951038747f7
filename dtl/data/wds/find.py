"""Which files are meant: folders of tars, brace patterns, globs, lists of shards, remote addresses; and which split a tar belongs
to by its name. A shard is a Path, or the address of a remote one as a str.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from shlex import quote
from typing import NoReturn

from dtl.credentials import bare, expand_braces
from dtl.data.remote.address import base_name, is_remote, kind_of, shown
from dtl.data.remote.pipe_fsspec import find_by_fsspec
from dtl.data.remote.stream import FetchError
from dtl.data.shards.index import DHASHES_NAME
from dtl.data.sources.archive import is_tar_of_folders
from dtl.data.sources.base import IMAGE_EXTENSIONS
from dtl.data.sources.list_file import list_text
from dtl.data.sources.splits import SERVES_AS, NoSplit, choose, plain_name, split_folders, split_in
from dtl.data.sources.unread import data_set_of_others
from dtl.errors import UserError
from dtl.files import MAX_FILE_BYTES, expand_home, open_regular
from dtl.text import near_path

_TAR = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst|lz4))$", re.IGNORECASE)


Tar = Path | str


def find_shards(sources: Sequence[Tar]) -> list[Tar]:
    """The tars that `sources` name, in their order: of folders and globs sorted by name, of patterns and lists as written.

    UserError for what does not exist, for what is named twice, and for a folder that holds the tars of several splits. Whether remote
    shards exist turns out when they are fetched.
    """
    found: list[Tar] = []
    for source in sources:
        found += _shards_of(str(source))
    missing = [path for path in found if isinstance(path, Path) and not path.is_file()]
    if missing:
        first = missing[0]
        raise UserError(f"{first} does not exist{near_path(first) if len(found) == 1 else f' ({len(missing):,} of {len(found):,} shards are missing)'}")
    seen: set[Tar] = set()
    for path in found:
        same = path.resolve() if isinstance(path, Path) else path
        if same in seen:
            raise UserError(f"{path} is given twice, so each of its samples would count twice; give it once")
        seen.add(same)
    return found


def is_remote_folder(source: str) -> bool:
    """Whether an address means a folder with a manifest, and not tars."""
    if not is_remote(source) or kind_of(source) == "pipe":
        return False
    return not _TAR.search(base_name(source)) and not _is_pattern(source.partition("?")[0])


def shards_for_training(source: str | Path, split: str) -> Sequence[Tar] | None:
    """The tars of `split` that a training source names, or None where it is something else (a folder of images, a list ...).

    A folder may hold the tars of train and val side by side, distinguished by their names, or in folders train/ and val/.
    """
    if isinstance(source, str) and is_remote(source):
        return find_shards([source])
    text, place = str(source), expand_home(source)
    if place.is_dir():
        if folders := split_folders(place, lambda folder: bool(_only_tars(folder))):
            name = choose(folders, split, place)
            return find_shards([place / name]) if name is not None else _refuse_split(place, split, folders)
        tars = _only_tars(place)
        if not tars:
            return None
        groups = _by_split(tars)
        if len(groups) == 1:
            return tars
        return next((groups[served] for served in SERVES_AS[split] if served in groups), None) or _refuse_split(place, split, groups)
    if place.exists():
        if _TAR.search(place.name):
            return None if is_tar_of_folders(place) else find_shards([text])
        return find_shards([text]) if _is_list(place) else None
    return find_shards([text]) if _is_pattern(text) else None


def _shards_of(text: str) -> Sequence[Tar]:
    if is_remote(text):
        return _remote_shards(bare(text))
    place = expand_home(text)
    if place.is_dir():
        tars = _tars_in(place)
        if not tars:
            other = data_set_of_others(place)
            raise UserError(f"{place} holds no tar files{f': {other}' if other else ''}")
        if len(groups := _by_split(tars)) > 1:
            split, members = next(iter(groups.items()))
            out = place / f"{split or 'rest'}-index"
            pattern = f"{place}/{_common_start(members)}*"
            raise UserError(
                f"{place} holds the shards of {', '.join(name or 'unnamed' for name in groups)}; index each split separately: "
                f"dtl index {quote(pattern)} --out {quote(str(out))}"
            )
        return tars
    if place.exists():
        return _read_list(place) if not _TAR.search(place.name) and _is_list(place) else [place]
    if not _is_pattern(text):
        return [place]
    paths: list[Path] = []
    for one in _expand_braces(text):
        if glob.has_magic(one):
            matched = sorted(glob.glob(str(expand_home(one))))
            if not matched:
                raise UserError(f"no file matches {one}")
            paths += map(Path, matched)
        else:
            paths.append(expand_home(one))
    return paths


def _remote_shards(text: str) -> list[str]:
    """Addresses of tars. http has no lists of files; fsspec's file systems do."""
    found: list[str] = []
    for url in _expand_braces(text):
        if kind_of(url) == "fsspec" and glob.has_magic(url):
            try:
                matched = find_by_fsspec(url)
            except FetchError as error:
                raise UserError(f"{shown(url)}: {error.reason}") from None
            if not matched:
                raise UserError(f"no file matches {url}")
            found += matched
            continue
        if kind_of(url) == "http" and "*" in base_name(url):
            raise UserError(f"{shown(url)}: a web server does not list its files; give the shards with braces: train-{{000..010}}.tar")
        if kind_of(url) != "pipe" and not _TAR.search(base_name(url)):
            raise UserError(
                f"{shown(url)} is not a tar; give the shards with braces (train-{{000..010}}.tar). "
                "A remote folder made by dtl pack needs no index: --data.train ADDRESS"
            )
        found.append(url)
    return found


def _expand_braces(text: str) -> list[str]:
    try:
        return expand_braces(text)
    except ValueError as error:
        raise UserError(f"{text[:200]}: its braces do not match{f' ({error})' if 'names' in str(error) else ''}") from None


def _is_pattern(text: str) -> bool:
    return bool(re.search(r"\{.*\}", text)) or glob.has_magic(text)


def _tars_in(place: Path) -> list[Path]:
    return sorted(entry for entry in place.iterdir() if _TAR.search(entry.name) and not entry.name.startswith(".") and entry.is_file())


def _only_tars(place: Path) -> list[Path]:
    """The tars of a folder that has tars, but no folders and no images: a root of image folders, or a class, may keep the archive it came from.

    What packing keeps beside tars, an array too, is no image.
    """
    if not place.is_dir():
        return []
    for entry in place.iterdir():
        if entry.name != DHASHES_NAME and entry.suffix.lower() in IMAGE_EXTENSIONS:
            return []
        if entry.is_dir() and not entry.name.startswith(".") and not entry.name.endswith("-index"):
            return []
    return _tars_in(place)


def _by_split(tars: Sequence[Path]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for tar in tars:
        groups.setdefault(split_in(tar.name) or "", []).append(tar)
    return groups


def _refuse_split(place: Path, split: str, groups: Iterable[str]) -> NoReturn:
    raise NoSplit(f"{place} holds the shards of {', '.join(name or 'unnamed' for name in groups)}, but none of {plain_name(split)}")


def _common_start(paths: Sequence[Path]) -> str:
    first, last = paths[0].name, paths[-1].name
    same = next((at for at, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    return first[:same].rstrip("0123456789")


def _is_list(place: Path) -> bool:
    """Whether the first line that is not empty or a comment names a tar."""
    try:
        with open_regular(place) as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"{place} cannot be read: {error.strerror}") from None
    lines = [line.strip() for line in head.decode("utf-8", "replace").splitlines()]
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return "\0" not in first and bool(_TAR.search(first.partition("?")[0] if is_remote(first) else first))


def know_listed(source: str | Path) -> None:
    """Take over the credentials of the addresses in a list of shards, where `source` is one; another process has read it already."""
    place = Path(source)
    if not is_remote(str(source)) and place.is_file() and not _TAR.search(place.name) and _is_list(place):
        _read_list(place)


def _read_list(place: Path) -> list[Tar]:
    """One shard per line, relative to the list, or an address; empty lines and lines that begin with # are skipped."""
    found: list[Tar] = []
    try:
        lines = list_text(place, MAX_FILE_BYTES).splitlines()
    except ValueError as error:
        raise UserError(f"{place} is not a list of shards: {error}") from None
    for line in lines:
        text = line.strip()
        if text.startswith("pipe:"):
            raise UserError(f"{place} contains a command ({text[:100]}), and commands are run only from your own config: give it with --data.train")
        if text and not text.startswith("#"):
            found += _shards_of(text if is_remote(text) else str(place.parent / expand_home(text)))
    return found
