"""What somebody may have meant by the paths of a list that do not exist: most often one change holds for all of them."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from dtl.data.sources.base import IMAGE_EXTENSIONS
from dtl.data.sources.splits import sub_folders

_TRIED = 20  # each takes hundreds of looks at the disk
_MOST_FOLDERS = 20


def near_paths(missing: Sequence[tuple[str, str]], folder: Path) -> str:
    """`; FIX ('FOUND' exists)` for the fix that finds most of them, or nothing. `missing`: path and label of some lines; paths begin in `folder`."""
    looked = missing[:_TRIED]
    fixes: Counter[str] = Counter()
    example: dict[str, str] = {}
    folders = sub_folders(folder)[:_MOST_FOLDERS]
    with suppress(OSError):  # no working folder, say: there is no hint then
        for name, label in looked:
            found = next(((path, fix) for path, fix in _guesses(name, label, folder, folders) if os.path.isfile(folder / path)), None)
            if found is not None:
                fixes[found[1]] += 1
                example.setdefault(found[1], found[0])
    if not fixes:
        return ""
    fix, count = fixes.most_common(1)[0]
    of = "" if count == len(looked) else f" for {count:,} of the {'first ' if len(missing) > _TRIED else ''}{len(looked):,}"
    return f"; {fix}{of} ('{example[fix]}' exists)"


def _guesses(name: str, label: str, folder: Path, folders: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(path, what to do about the list) of all that may have been meant, the likeliest first."""
    yield from _respelled(name)
    yield from _of_csv_line(name)
    if label:
        for cut in _words_of_label(name):
            yield cut, "labels of several words need tabs between path and label, or CSV with a header (path,label)"
    slashed = name.replace("\\", "/")
    also = "" if slashed == name else "write / in place of backslashes, and "
    yield from ((path, also + fix) for path, fix in _other_extension(slashed))
    before = [(label, "the label and /")] if label else []
    before += [(below, f"{below}/") for below in folders]
    before += [(f"{below}/{label}", f"{below}/, the label and /") for below in folders if label]
    for below, what in before:
        yield f"{below}/{slashed}", f"{also}put {what} before each path"
    for below, what in before:
        yield from ((path, f"{also}put {what} before each path, and {fix}") for path, fix in _other_extension(f"{below}/{slashed}"))
    yield from _elsewhere(slashed, folder)
    if (path := _in_other_case(slashed, folder)) is not None:
        yield path, f"{also}upper and lower case count: write paths as the files are named"


def _respelled(name: str) -> Iterator[tuple[str, str]]:
    if "\\" in name:
        yield name.replace("\\", "/"), "write / in place of backslashes"
    if name.strip("\"'") != name:
        yield name.strip("\"'"), "leave out the quotes (in CSV, quotes are double)"
    if name.startswith("~"):
        yield os.path.expanduser(name), "write out the home folder in place of ~"
    if name.startswith("file://"):
        yield unquote(name.partition("://")[2]), "write the path without file:// and percent signs"
    if name.startswith("/"):
        yield name.lstrip("/"), "leave out the leading /"
    if "%" in name:
        yield unquote(name), "write the characters themselves in place of % and digits"
    for form in ("NFC", "NFD"):
        if unicodedata.normalize(form, name) != name:
            yield unicodedata.normalize(form, name), f"the letters with accents are encoded in another way; convert the list to Unicode {form}"


def _of_csv_line(name: str) -> Iterator[tuple[str, str]]:
    for delimiter in (",", ";"):
        first, found, _ = name.partition(delimiter)
        if found:
            yield first.strip().strip("\"'"), f"a list whose columns are separated by {delimiter} begins with a header (path{delimiter}label)"


def _words_of_label(name: str) -> Iterator[str]:
    """The path where a part of a label of several words was taken for it."""
    while " " in name:
        name = name.rpartition(" ")[0]
        yield name.strip().strip("\"'")


def _other_extension(name: str) -> Iterator[tuple[str, str]]:
    stem, old = os.path.splitext(name)
    known = old.lower() in IMAGE_EXTENSIONS
    for extension in (spelled for known_one in sorted(IMAGE_EXTENSIONS) for spelled in (known_one, known_one.upper())):
        yield (f"{stem}{extension}", f"the extension is {extension}") if known else (f"{name}{extension}", f"add the extension {extension} to each path")


def _elsewhere(name: str, folder: Path) -> Iterator[tuple[str, str]]:
    if not os.path.isabs(name):
        yield os.path.abspath(name), f"paths begin in the folder of the list; move the list to {Path.cwd()}"
        for above in list(folder.absolute().parents)[:3]:
            yield str(above / name), f"paths begin in the folder of the list; move the list to {above}"
    parts = Path(name).parts
    for skipped in range(1, min(len(parts), 8)):
        yield str(Path(*parts[skipped:])), f"paths begin in the folder of the list; leave out {os.path.join(*parts[:skipped])} of each"


def _in_other_case(name: str, folder: Path) -> str | None:
    found = Path(folder)
    parts = Path(name).parts
    for part in parts:
        if os.path.lexists(found / part):
            found = found / part
            continue
        try:
            same = [entry for entry in os.listdir(found) if entry.lower() == part.lower()]
        except OSError:
            return None
        if len(same) != 1:
            return None
        found = found / same[0]
    return str(found) if os.path.isabs(name) else os.path.relpath(found, folder)
