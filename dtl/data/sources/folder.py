"""Image folders: one folder a class, or a root with train/ and val/ of such folders. Class order is that of torchvision's ImageFolder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dtl.data.sources.base import ALL, IMAGE_EXTENSIONS, UNLABELLED, VAL_NAMES, Source, SourceBuilder
from dtl.data.sources.display_names import find_display_names
from dtl.errors import UserError

_SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin"))


@dataclass
class _Told:
    """What was left out, by kind, for one line each at the end."""

    hidden: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        kinds = (
            (self.hidden, "hidden or system file left out", "hidden or system files left out"),
            (self.others, "file without an image's extension left out", "files without an image's extension left out"),
            (self.loose, "image outside of any class folder left out", "images outside of any class folder left out"),
        )
        return self.lines + [f"{_count(paths, one, many)} ({_few(paths)})" for paths, one, many in kinds if paths]


def open_folder(root: Path, *, classes: Sequence[str] | None, names: str | Path | None, on_error: str, labelled: bool = True) -> Source:
    """List an image folder. See `open_source`."""
    told = _Told()
    if not labelled and (not _has_classes(root) if classes is None else tuple(classes) == (UNLABELLED,)):
        return _open_unlabelled(root, told)
    parts = _find_splits(root, told)
    split_names = tuple(parts)
    builder, order = SourceBuilder(), tuple(classes) if classes is not None else None
    for split, place in enumerate(parts.values()):
        counts = _add_split(builder, root, place, told, split=split, order=order)
        if not any(counts.values()):
            raise UserError(_why_no_images(root / place, root, told))
        if order is None:
            order = _train_classes(root / place, counts, told, drop_empty=on_error == "skip")
        else:
            _refuse_unknown(root / place, [name for name, count in counts.items() if count], order, given=classes is not None)
            _tell_empty(place, counts, order, told)
    assert order is not None
    display = find_display_names(order, given=names, beside=[root / parts[split_names[0]], root, root.parent], told=told.lines)
    return builder.build(kind="image folder", root=root, classes=order, split_names=split_names, display_names=display, notes=told.notes())


def _has_classes(root: Path) -> bool:
    """Whether the folder is one for a classifier, so that all phases share what it is packed into."""
    told = _Told()
    place = next(iter(_find_splits(root, told, of_classes=False).values()))
    return len(_class_folders(root / place, root, told)) > 1 and not told.loose


def _open_unlabelled(root: Path, told: _Told) -> Source:
    """All images below the root, or below its train/ and val/, as one class."""
    parts = _find_splits(root, told, of_classes=False)
    builder = SourceBuilder()
    for split, place in enumerate(parts.values()):
        listed = _images(root, Path(place), told)
        if not listed:
            raise UserError(_why_no_images(root / place, root, told))
        paths, sizes, mtimes = zip(*listed)
        builder.add(paths, label=0, split=split, sizes=sizes, mtimes=mtimes)
    return builder.build(
        kind="folder of images without labels", root=root, classes=(UNLABELLED,), split_names=tuple(parts), display_names={}, notes=told.notes()
    )


def _add_split(builder: SourceBuilder, root: Path, place: str, told: _Told, *, split: int, order: Sequence[str] | None) -> dict[str, int]:
    """Add the images of a split class by class, so that no more than one class is held as objects; returns images per class folder.

    Without an `order` the classes are the folders that have images, as they come. A folder that `order` lacks is counted, not added.
    """
    counts: dict[str, int] = {}
    labels = None if order is None else {name: label for label, name in enumerate(order)}
    found = 0
    for name in _class_folders(root / place, root, told):
        listed = _images(root, Path(place) / name, told)
        counts[name] = len(listed)
        label = found if labels is None else labels.get(name)
        if not listed or label is None:
            continue
        found += 1
        paths, sizes, mtimes = zip(*listed)
        builder.add(paths, label=label, split=split, sizes=sizes, mtimes=mtimes)
    return counts


def _find_splits(root: Path, told: _Told, *, of_classes: bool = True) -> dict[str, str]:
    """Split -> its folder under root; {"all": ""} where the root's own folders are the classes, or hold the images."""
    folders = {entry.name.lower(): entry.name for entry in _entries(root) if entry.is_dir()}
    present = [name for name in VAL_NAMES if name in folders]
    if "train" not in folders or not present:
        return {ALL: ""}
    if of_classes and not any(entry.is_dir() and not _is_hidden(entry.name) for entry in _entries(root / folders["train"])):
        return {ALL: ""}  # classes that happen to be called train and test: they hold images, not folders
    parts = {"train": folders["train"], "val": folders[present[0]]}
    others = [folders[name] for name in folders if folders[name] not in parts.values() and not _is_hidden(name)]
    if "test" in present[1:]:
        parts["test"] = folders["test"]
        others.remove(folders["test"])
        told.lines.append(f"'{parts['val']}' is used for validation, 'test' is kept apart")
    elif parts["val"] != "val":
        told.lines.append(f"'{parts['val']}' is used for validation")
    if others:
        told.lines.append(f"left out beside train and {parts['val']}: {_few(sorted(others))}")
    return parts


def _class_folders(place: Path, root: Path, told: _Told) -> list[str]:
    folders = []
    for entry in _entries(place):
        if _is_hidden(entry.name):
            told.hidden.append(_below(entry.path, root))
        elif entry.is_dir():
            folders.append(entry.name)
        elif _is_image(entry.name):
            told.loose.append(_below(entry.path, root))
    return sorted(folders)


def _images(root: Path, folder: Path, told: _Told) -> list[tuple[str, int, int]]:
    """(path under root, bytes, mtime) of all images in a class folder and the folders in it, sorted by path."""
    listed: list[tuple[str, int, int]] = []
    stack = [(str(folder), frozenset[tuple[int, int]]())]
    while stack:
        place, above = stack.pop()
        status = os.stat(root / place)
        if (status.st_dev, status.st_ino) in above:
            continue  # a link back to a folder that we are in
        inside = above | {(status.st_dev, status.st_ino)}
        for entry in _entries(root / place):
            path = entry.name if place == "." else f"{place}/{entry.name}"
            if _is_hidden(entry.name):
                told.hidden.append(path)
            elif entry.is_dir():
                stack.append((path, inside))
            elif _is_image(entry.name):
                listed.append((path, *_size_and_time(entry)))
            else:
                told.others.append(path)
    return sorted(listed)


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:
        return 0, 0  # a broken link: packing lists it as unreadable
    return status.st_size, status.st_mtime_ns


def _train_classes(place: Path, counts: dict[str, int], told: _Told, *, drop_empty: bool) -> tuple[str, ...]:
    order = tuple(name for name, count in counts.items() if count)
    empty = [name for name, count in counts.items() if not count]
    if empty and not drop_empty:
        what = f"class folder {_few(empty)} holds" if len(empty) == 1 else f"{len(empty)} class folders hold"
        raise UserError(
            f"{place}: {what} no image{'' if len(empty) == 1 else f' ({_few(empty)})'}; remove what is no class, or leave it out with --data.on-error skip"
        )
    if empty:
        told.lines.append(f"class folders without an image left out: {_few(empty)}")
    if len(order) == 1:
        inner = sorted(entry.name for entry in _entries(place / order[0]) if entry.is_dir() and not _is_hidden(entry.name))
        hint = f"; did you mean {place / order[0]}, which has {len(inner)} folders?" if len(inner) > 1 else "; a classifier needs two or more"
        raise UserError(f"{place} has one class only, '{order[0]}'{hint}; without labels, only the task rotate can learn")
    return order


def _refuse_unknown(place: Path, present: Sequence[str], order: Sequence[str], *, given: bool) -> None:
    known = set(order)
    unknown = [name for name in present if name not in known]
    if unknown:
        where = "the given class list" if given else "training"
        raise UserError(f"{place} has images of {_count(unknown, 'class', 'classes')} that {where} does not know: {_few(unknown)}; known are {_few(order)}")


def _tell_empty(place: str, counts: dict[str, int], order: Sequence[str], told: _Told) -> None:
    without = [name for name in order if not counts.get(name)]
    if without:
        told.lines.append(f"{place or 'the folder'} has no image of {_count(without, 'class', 'classes')}: {_few(without)}")


def _why_no_images(place: Path, root: Path, told: _Told) -> str:
    loose, others = ([path for path in paths if (root / path).is_relative_to(place)] for paths in (told.loose, told.others))
    if loose:
        return (
            f"{place} has {_count(loose, 'image')} directly in it and no images in class folders; "
            f"put each class in a folder of its own ({place.name or place}/CLASS/{os.path.basename(loose[0])}), "
            "or give a list file with a line `path label` for each image; without labels, only the task rotate can learn"
        )
    if others:
        return f"{place} holds no images, only other files ({_few(others)}); read are {', '.join(sorted(IMAGE_EXTENSIONS))}"
    return f"{place} holds no images"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}") from None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _below(path: str, root: Path) -> str:
    return os.path.relpath(path, root)


def _count(items: Sequence[str], one: str, many: str = "") -> str:
    return f"{len(items):,} {one if len(items) == 1 else many or one + 's'}"


def _few(items: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(f"'{item}'" for item in items[:limit]) + more
