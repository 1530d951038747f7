"""Image folders: one folder a class, or a root with train/ and val/ of such folders. Class order is that of torchvision's ImageFolder.

They lie on a disk or in an archive: `Tree`.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from dtl.data.sources.base import ALL, IMAGE_EXTENSIONS, UNLABELLED, Source, SourceBuilder
from dtl.data.sources.display_names import find_display_names
from dtl.data.sources.splits import choose, group_by_split, is_hidden, split_named
from dtl.data.sources.tree import Tree, folders_in, joined
from dtl.data.sources.unread import UNREAD_EXTENSIONS, describe_passed_over, extension_of, how_to_read
from dtl.errors import UserError


@dataclass
class _Notes:
    """What was left out, by kind, for one line each at the end."""

    hidden: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    """Images in formats that dtl does not read."""
    lines: list[str] = field(default_factory=list)

    def all(self) -> list[str]:
        kinds = (
            (self.hidden, "hidden or system file left out", "hidden or system files left out"),
            (self.others, "file without an image's extension left out", "files without an image's extension left out"),
            (self.loose, "image outside of any class folder left out", "images outside of any class folder left out"),
        )
        lines = self.lines + [f"{_count(paths, one, many)} ({_few(paths)})" for paths, one, many in kinds if paths]
        return [*lines, describe_passed_over(self.unread)] if self.unread else lines


def open_folder(tree: Tree, *, classes: Sequence[str] | None, names: str | Path | None, on_error: str, labelled: bool = True) -> Source:
    """List an image folder. See `open_source`."""
    root, notes = tree.root, _Notes()
    if not labelled and (not _has_classes(tree) if classes is None else tuple(classes) == (UNLABELLED,)):
        return _open_unlabelled(tree, notes)
    parts = _find_splits(tree, notes)
    split_names = tuple(parts)
    builder, order = SourceBuilder(), tuple(classes) if classes is not None else None
    for split, place in enumerate(parts.values()):
        counts = _add_split(builder, tree, place, notes, split=split, order=order)
        if not any(counts.values()):
            loose = [path for path in notes.loose if os.path.dirname(path) == place] if split and not counts else []
            if not loose:
                raise UserError(_why_no_images(root / place, root, notes))
            # As competitions keep it: images to predict, without labels.
            what = f"{root / place} has {_count(loose, 'image')} without class folders, such as a competition's test set, whose labels are not known"
            if "val" in split_names[:split]:
                predict = f"predict them after training with `dtl predict runs/NAME {quote(str(root / place))}`"
                notes.lines.append(f"{what}: left out{'' if tree.is_archive else f'; {predict}'}")
                notes.loose = [path for path in notes.loose if path not in set(loose)]
                split_names = split_names[:split]
                break
            if tree.is_archive:
                raise UserError(f"{what}. Unpack the archive, and train on its folder {parts['train']} with --data.val-fraction 0.2")
            train = quote(str(root / parts["train"]))
            raise UserError(
                f"{what}. Train on a part of the other images and validate on the rest: --data.train {train} --data.val-fraction 0.2 "
                f"(dtl pack {train} DST --val-fraction 0.2), and predict these afterwards: dtl predict runs/NAME {quote(str(root / place))}"
            )
        if order is None:
            order = _train_classes(tree, place, counts, notes, drop_empty=on_error == "skip")
        else:
            _refuse_unknown(root / place, [name for name, count in counts.items() if count], order, given=classes is not None)
            _note_empty(place, counts, order, notes)
    assert order is not None
    beside = [root.parent] if tree.is_archive else [root / parts[split_names[0]], root, root.parent]
    display = find_display_names(order, given=names, beside=beside, notes=notes.lines)
    return builder.build(kind=tree.kind, root=root, classes=order, split_names=split_names, display_names=display, notes=notes.all())


def _has_classes(tree: Tree) -> bool:
    """Whether the folder is one for a classifier, so that all phases share what it is packed into."""
    notes = _Notes()
    place = next(iter(_find_splits(tree, notes, of_classes=False).values()))
    return len(_class_folders(tree, place, notes)) > 1 and not notes.loose


def _open_unlabelled(tree: Tree, notes: _Notes) -> Source:
    """All images below the root, or below its train/ and val/, as one class."""
    parts = _find_splits(tree, notes, of_classes=False)
    builder = SourceBuilder()
    for split, place in enumerate(parts.values()):
        listed = _images(tree, place, notes)
        if not listed:
            raise UserError(_why_no_images(tree.root / place, tree.root, notes))
        paths, sizes, mtimes = zip(*listed)
        builder.add(paths, label=0, split=split, sizes=sizes, mtimes=mtimes)
    return builder.build(
        kind=f"{tree.kind} without labels" if tree.is_archive else "folder of images without labels",
        root=tree.root,
        classes=(UNLABELLED,),
        split_names=tuple(parts),
        display_names={},
        notes=notes.all(),
    )


def _add_split(builder: SourceBuilder, tree: Tree, place: str, notes: _Notes, *, split: int, order: Sequence[str] | None) -> dict[str, int]:
    """Add the images of a split class by class, so that no more than one class is held as objects; returns images per class folder.

    Without an `order` the classes are the folders that have images, as they come. A folder that `order` lacks is counted, not added.
    """
    counts: dict[str, int] = {}
    labels = None if order is None else {name: label for label, name in enumerate(order)}
    found = 0
    for name in _class_folders(tree, place, notes):
        listed = _images(tree, joined(place, name), notes)
        counts[name] = len(listed)
        label = found if labels is None else labels.get(name)
        if not listed or label is None:
            continue
        found += 1
        paths, sizes, mtimes = zip(*listed)
        builder.add(paths, label=label, split=split, sizes=sizes, mtimes=mtimes)
    return counts


def _find_splits(tree: Tree, notes: _Notes, *, of_classes: bool = True) -> dict[str, str]:
    """Split -> its folder under root; {"all": ""} where the root's own folders are the classes, or hold the images.

    The folders of the splits may lie in the only folder of the root.
    """
    tree.entries("")  # UserError where it cannot be listed
    names = folders_in(tree, "")
    parts = _splits_in(tree, "", notes, of_classes=of_classes)
    if parts is None and len(names) == 1:
        parts = _splits_in(tree, names[0], notes, of_classes=of_classes)
    if parts is not None:
        return parts
    if of_classes and len(names) > 1 and all(map(split_named, names)):
        _refuse_classes_of_splits(tree.root, names)
    return {ALL: ""}


def _splits_in(tree: Tree, place: str, notes: _Notes, *, of_classes: bool) -> dict[str, str] | None:
    """The folders in `place` for train, val and test; None where its folders are not splits."""
    names, shown = folders_in(tree, place), tree.root / place
    folders = group_by_split(name for name in names if split_named(name))
    if "train" in folders and len(folders) > 1:
        # Classes that happen to be called train and test hold images, not folders.
        if of_classes and not folders_in(tree, joined(place, folders["train"][0])):
            return None
    else:
        folders = _same_classes(tree, place, names)
    train, val, test = choose(folders, "train", shown), choose(folders, "own val", shown), choose(folders, "test", shown)
    held_out = {split: name for split, name in (("val", val), ("test", test)) if name is not None}
    if train is None or not held_out:
        return None
    parts = {"train": train, **held_out}
    if train != "train":
        notes.lines.append(f"'{train}' is used for training")
    if val not in (None, "val") or (val is not None and test is not None):
        notes.lines.append(f"'{val}' is used for validation{'' if test is None else f', {test!r} is the test set'}")
    elif test is not None:
        notes.lines.append(f"'{test}' is the test set")
    if others := [name for name in names if name not in parts.values()]:
        notes.lines.append(f"other folders than {', '.join([train, *held_out.values()][:-1])} and {[*held_out.values()][-1]} left out: {_few(others)}")
    return {split: _unwrapped(tree, joined(place, name)) for split, name in parts.items()}


def _same_classes(tree: Tree, place: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Split -> folders whose names have a word for it (`seg_train`), where one for train and one for val or test hold the same class folders.

    So the classes `test_positive` and `test_negative` stay classes. A val or test folder may lack some of the classes.
    """
    found = group_by_split(names)
    classes = {name: set(folders_in(tree, _unwrapped(tree, joined(place, name)))) for several in found.values() for name in several}
    train = [name for name in found.get("train", ()) if classes[name]]
    held = set().union(*(classes[name] for name in train))
    same = {split: [name for name in several if classes[name] and classes[name] <= held] for split, several in found.items() if split != "train"}
    same = {split: several for split, several in same.items() if several}
    return {"train": train, **same} if train and same else {}


def _unwrapped(tree: Tree, place: str) -> str:
    """The folder itself, or the one in it where that is all it has, and of the same name (as unpacking an archive leaves it)."""
    name = os.path.basename(place)
    return f"{place}/{name}" if folders_in(tree, place) == [name] else place


def _refuse_classes_of_splits(root: Path, names: Sequence[str]) -> None:
    found = group_by_split(names)
    if "train" not in found:
        raise UserError(f"{root} has only folders for {' and '.join(found)} ({_few(names)}), and none for training; name the training folder train")
    if len(found) == 1:
        raise UserError(f"{root} has two folders for training ({_few(names)}); set --data.train to the one to train on, and give --data.val")
    place = root / found["train"][0]
    raise UserError(f"{root} has the splits {_few(names)}, but {place} has no class folders in it; put each class in its own folder ({place}/CLASS/IMAGE)")


def _class_folders(tree: Tree, place: str, notes: _Notes) -> list[str]:
    folders = []
    for entry in tree.entries(place):
        path = joined(place, entry.name)
        if is_hidden(entry.name):
            notes.hidden.append(path)
        elif entry.is_folder:
            _refuse_not_utf8(tree, place, entry.name)
            folders.append(entry.name)
        elif _is_image(entry.name):
            notes.loose.append(path)
        elif extension_of(entry.name) in UNREAD_EXTENSIONS:
            notes.unread.append(path)
    return folders


def _images(tree: Tree, folder: str, notes: _Notes) -> list[tuple[str, int, int]]:
    """(path under root, bytes, mtime) of all images in a class folder and the folders in it, sorted by path."""
    listed: list[tuple[str, int, int]] = []
    stack = [(folder, frozenset[Hashable]())]
    while stack:
        place, above = stack.pop()
        identity = tree.identity(place)
        if identity in above:
            continue  # a link back to a folder that we are in
        inside = above | {identity}
        for entry in tree.entries(place):
            path = joined(place, entry.name)
            if is_hidden(entry.name):
                notes.hidden.append(path)
            elif entry.is_folder:
                stack.append((path, inside))
            elif _is_image(entry.name):
                listed.append((path, *entry.size_and_time()))
            elif extension_of(entry.name) in UNREAD_EXTENSIONS:
                notes.unread.append(path)
            else:
                notes.others.append(path)
    return sorted(listed)


def _train_classes(tree: Tree, inside: str, counts: dict[str, int], notes: _Notes, *, drop_empty: bool) -> tuple[str, ...]:
    place = tree.root / inside
    order = tuple(name for name, count in counts.items() if count)
    empty = [name for name, count in counts.items() if not count]
    if empty and not drop_empty:
        what = f"class folder {_few(empty)} holds" if len(empty) == 1 else f"{len(empty)} class folders hold"
        unread = f" that dtl reads ({describe_passed_over(notes.unread)})" if notes.unread else ""
        raise UserError(
            f"{place}: {what} no image{'' if len(empty) == 1 else f' ({_few(empty)})'}{unread}; "
            "remove folders that are not classes, or use --data.on-error skip"
        )
    if empty:
        notes.lines.append(f"class folders without an image left out: {_few(empty)}")
    if len(order) == 1:
        inner = [] if tree.is_archive else folders_in(tree, joined(inside, order[0]))
        hint = (
            f"; did you mean {place / order[0]}, which has {len(inner)} folders?"
            if len(inner) > 1
            else f"; a classifier needs two or more{', and more than its one image' if counts[order[0]] == 1 else ''}"
        )
        raise UserError(f"{place} has only one class, '{order[0]}'{hint}; without labels, use the task rotate")
    return order


def _refuse_unknown(place: Path, present: Sequence[str], order: Sequence[str], *, given: bool) -> None:
    known = set(order)
    unknown = [name for name in present if name not in known]
    if unknown:
        where = "the given class list" if given else "training"
        raise UserError(f"{place} has images of {_count(unknown, 'class', 'classes')} that {where} does not have: {_few(unknown)}; it has {_few(order)}")


def _note_empty(place: str, counts: dict[str, int], order: Sequence[str], notes: _Notes) -> None:
    without = [name for name in order if not counts.get(name)]
    if without:
        notes.lines.append(f"{place or 'the folder'} has no image of {_count(without, 'class', 'classes')}: {_few(without)}")


def _why_no_images(place: Path, root: Path, notes: _Notes) -> str:
    loose, others = ([path for path in paths if (root / path).is_relative_to(place)] for paths in (notes.loose, notes.others))
    if loose:
        return (
            f"{place} has {_count(loose, 'image')} directly in it and no images in class folders; "
            f"put each class in its own folder ({place.name or place}/CLASS/{os.path.basename(loose[0])}), "
            "or give a list file with a line `path label` for each image; without labels, use the task rotate"
        )
    unread = [path for path in notes.unread if (root / path).is_relative_to(place)]
    if unread:
        count = _count(unread, "image")
        return f"{place} has {count} in formats that dtl does not read ({_few(unread)}): {how_to_read(sorted({extension_of(path) for path in unread}))}"
    if others:
        return f"{place} holds no images, only other files ({_few(others)}); the supported extensions are {', '.join(sorted(IMAGE_EXTENSIONS))}"
    return f"{place} holds no images"


def _refuse_not_utf8(tree: Tree, place: str, name: str) -> None:
    """A class's name goes into files of text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        where = tree.root / place
        rename = "unpack it and rename it" if tree.is_archive else f"rename it, or all of them: convmv -f latin1 -t utf8 -r --notest {quote(str(where))}"
        raise UserError(f"{where}: the name of the class folder '{name}' is not UTF-8 (it may come from an old archive); {rename}") from None


def _is_image(name: str) -> bool:
    return extension_of(name) in IMAGE_EXTENSIONS


def _count(items: Sequence[str], one: str, many: str = "") -> str:
    return f"{len(items):,} {one if len(items) == 1 else many or one + 's'}"


def _few(items: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(f"'{item}'" for item in items[:limit]) + more
