"""Recognise what can be packed: an image folder, a root with train/ and val/ of such folders, an archive of them, a list file, CIFAR's batches, `digits`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dtl.data.sources.archive import open_archive
from dtl.data.sources.arrays import cifar_folder, open_cifar, open_digits
from dtl.data.sources.base import Source
from dtl.data.sources.folder import open_folder
from dtl.data.sources.list import open_list
from dtl.data.sources.tables import open_tables, table_files
from dtl.data.sources.tree import Folder
from dtl.data.sources.unread import data_set_of_others
from dtl.errors import UserError
from dtl.files import MAX_FILE_BYTES, user_path
from dtl.text import near_path

_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".tbz2", ".bz2", ".txz", ".xz")
_UNREAD_ARCHIVES = (".zst", ".lz4", ".7z", ".rar")


def open_source(
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    names: str | Path | None = None,
    on_error: str = "fail",
    labelled: bool = True,
    max_file_bytes: int = MAX_FILE_BYTES,
    columns: Mapping[str, str] | None = None,
) -> Source:
    """Recognise and list a source. UserError where there is nothing to train on.

    `columns` {path, label, split: column}: those of a list or a table, where they have other names than the usual ones.
    `classes` fixes class names and their order (a validation set takes those of its training set): others are refused, and a class
    without an image is no error then. `names` is a JSON file {class: display name}. With `on_error="skip"` a class folder without
    an image is left out, otherwise refused. With `labelled=False` a folder or list without labels is one class, `UNLABELLED`.
    """
    if str(source) == "digits" and not Path(source).exists():
        found = open_digits()
    else:
        path = user_path(source)
        _check_exists(path)
        if path.is_file() and path.suffix.lower() in _UNREAD_ARCHIVES:
            raise UserError(
                f"{path} is an archive of a kind that dtl does not read (it reads .zip, .tar, .tar.gz, .tar.bz2, .tar.xz); unpack it and give the folder"
            )
        if path.is_file() and path.suffix.lower() in _ARCHIVES:
            found = open_archive(path, classes=classes, names=names, on_error=on_error, labelled=labelled)
        elif path.is_file() and table_files(path):
            found = open_tables(path, classes=classes, names=names, on_error=on_error, columns=columns)
        elif path.is_file():
            found = open_list(path, classes=classes, names=names, labelled=labelled, max_bytes=max_file_bytes, columns=columns)
        elif not path.is_dir():
            raise UserError(f"{path} is neither a folder nor a regular file; give a folder of images, a list file, or the word digits")
        elif (batches := cifar_folder(path)) is not None:
            found = open_cifar(batches)
        else:
            try:
                found = open_folder(Folder(path), classes=classes, names=names, on_error=on_error, labelled=labelled)
            except UserError:
                if table_files(path):
                    found = open_tables(path, classes=classes, names=names, on_error=on_error, columns=columns)
                elif other := data_set_of_others(path):
                    raise UserError(f"{path} holds no images: {other}") from None
                else:
                    raise
    if classes is not None and found.classes != tuple(classes):
        raise UserError(f"{source} has other classes ({len(found.classes)}: '{found.classes[0]}' ...) than training ({len(classes)}: '{classes[0]}' ...)")
    return found


def _check_exists(path: Path) -> None:
    if path.exists():
        return
    if path.is_symlink():
        raise UserError(f"{path} is a link to {path.readlink()}, which does not exist")
    hint = near_path(path, others=["digits"])
    if not path.parent.is_dir():
        raise UserError(f"{path} does not exist (nor does the folder {path.parent}){hint}")
    raise UserError(f"{path} does not exist{hint or '; give a folder of images, a list file, or the word digits'}")
