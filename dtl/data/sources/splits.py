"""The names of splits: of folders of images, of tars, of packed shards here and elsewhere. No other module has a list of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from dtl.errors import UserError

# Split -> the names it goes by, in upper or lower case, best first.
SPLIT_WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev", "eval"), "test": ("test", "testing")}
# What serves as each split. A source that is named for validation may have only a test set; training's own test set never validates ("own val").
# A source without splits is all of what it is named for, and has none of its own.
SERVES_AS = {"train": ("train",), "own val": ("val",), "own test": ("test",), "val": ("val", "test"), "test": ("test",)}
_SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_RANK = {word: rank for rank, word in enumerate(_SPLIT_OF)}
_WORD = re.compile(rf"(?:^|[-_. ])({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})(?=[-_. 0-9]|$)", re.IGNORECASE)
_SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin"))


class NoSplit(UserError):
    """The source has splits, but not this one."""


class HasSplits(UserError):
    """The source has splits of its own, so it cannot be split."""


def plain_name(split: str) -> str:
    """As people call it."""
    return split.removeprefix("own ")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's own business: `.git`, `__MACOSX` ..."""
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def split_named(name: str) -> str | None:
    """The split that the whole name stands for: `Training` is "train"."""
    return _SPLIT_OF.get(name.lower())


def split_in(name: str) -> str | None:
    """The split that a word of the name stands for: `seg_train` and `train_set` are "train", `test_positive` is "test"."""
    word = _WORD.search(name)
    return _SPLIT_OF[word[1].lower()] if word else None


def group_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Split -> those of `names` that stand for it, best first: whole names in the order of SPLIT_WORDS, then names with such a word in them."""
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (_RANK.get(name.lower(), len(_RANK)), name != name.lower(), name)):
        if (split := split_in(name)) is not None:
            found.setdefault(split, []).append(name)
    return {split: found[split] for split in SPLIT_WORDS if split in found}


def choose(folders: Mapping[str, Sequence[str]], split: str, place: str | Path) -> str | None:
    """The folder that serves as `split`, of those that `group_by_split` found. UserError where several would do and none has the plain name."""
    for served in SERVES_AS[split]:
        names = folders.get(served, ())
        if len(names) > 1 and split_named(names[0]) is None:
            raise UserError(f"{place} has {len(names)} folders for {served}: {', '.join(names)}; keep only one of them, or give the folders themselves")
        if names:
            return names[0]
    return None


def sub_folders(place: Path) -> list[str]:
    """The folders in `place`, sorted, without hidden ones; none where it cannot be listed."""
    try:
        return sorted(entry.name for entry in place.iterdir() if not is_hidden(entry.name) and entry.is_dir())
    except OSError:
        return []


def split_folders(place: Path, holds: Callable[[Path], bool]) -> dict[str, list[str]]:
    """Split -> the folders below `place` for it, best first, of those that hold what is looked for.

    They lie in `place`, or in the only folder that it has (`archive/train`).
    """
    names = sub_folders(place)
    found = group_by_split(name for name in names if split_in(name) and holds(place / name))
    if found or len(names) != 1:
        return found
    inner = group_by_split(name for name in sub_folders(place / names[0]) if split_in(name) and holds(place / names[0] / name))
    return {split: [f"{names[0]}/{name}" for name in several] for split, several in inner.items()}


def addresses_to_try(split: str) -> list[str]:
    """Folder names under which a web server, which has no list of its folders, may keep a split."""
    words = SPLIT_WORDS[split]
    return [*words, *(word.capitalize() for word in words), *(word.upper() for word in words)]
