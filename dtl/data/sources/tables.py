"""Parquet and Arrow files of an image data set as a source, as Hugging Face's `datasets` and its hub keep them.

An image is a struct of `bytes` and `path`, or bytes alone; a label is a number whose names stand in the schema's metadata (ClassLabel), a number, or
text. Rows cannot be read in any order at a fair price, so packing first copies the images into one file. Needs pyarrow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from dtl.data.shards.strings import StringTable
from dtl.data.sources.base import ALL, MEMBER, WHOLE, Bundle, Source, SourceBuilder
from dtl.data.sources.display_names import find_display_names
from dtl.data.sources.list_file import LABEL_COLUMNS
from dtl.data.sources.splits import SPLIT_WORDS, is_hidden, split_in, split_named, sub_folders
from dtl.errors import UserError
from dtl.files import open_regular
from dtl.text import counted, some
from dtl.untrusted import parse_json

TABLE_EXTENSIONS = (".parquet", ".arrow")
_IMAGE_COLUMNS, _MORE_LABELS = ("image", "img", "picture", "jpg", "png"), ("labels", "fine_label")
_LEAST_LIMIT, _MOST_TIMES = 1 << 30, 100  # images may become so many times the bytes of their files: a dictionary can repeat one image for ever
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class _Table:
    path: Path
    name: str
    """Below the root."""
    split: str


def table_files(path: Path) -> list[_Table]:
    """The Parquet or Arrow files that a path is or holds: beside each other, or in folders for splits; empty where there are none."""
    if path.is_file():
        return [_Table(path, path.name, ALL)] if path.suffix.lower() in TABLE_EXTENSIONS else []
    places = [path, *(path / name for name in sub_folders(path))]
    places += [inside / name for inside in places[1:] for name in sub_folders(inside) if split_in(name)]  # CONFIGURATION/train
    found = []
    for place in places:
        of_place = split_named(place.name) if place != path else None
        for file in sorted(entry for entry in place.iterdir() if entry.suffix.lower() in TABLE_EXTENSIONS and not is_hidden(entry.name)):
            found.append(_Table(file, str(file.relative_to(path)), of_place or split_in(file.stem) or ALL))
    return found


def open_tables(
    path: Path, *, classes: Sequence[str] | None, names: str | Path | None, on_error: str, labelled: bool = True, columns: Mapping[str, str] | None = None
) -> Source:
    """List the rows of Parquet or Arrow files. See `open_source`. `columns`: the columns to use instead of those that are found, for path and label."""
    files = table_files(path)
    splits = _splits(path, files)
    notes: list[str] = []
    readers = [_Reader(file, columns or {}) for file in files]
    order = _class_names(path, readers, classes, drop_empty=on_error == "skip", notes=notes)
    split_names = _labelled_splits(readers, splits, notes)
    kept = [reader for split in split_names for reader in readers if reader.file.split == split]
    builder = SourceBuilder()
    for reader in kept:
        count, split = reader.num_rows, split_names.index(reader.file.split)
        sizes, mtimes = [reader.num_bytes // max(count, 1)] * count, [reader.file.path.stat().st_mtime_ns] * count
        builder.add_table(StringTable.build(reader.names()), labels=_numbers(reader, order), split=split, sizes=sizes, mtimes=mtimes)
    display = find_display_names(order, given=names, beside=[path.parent], notes=notes)
    source = builder.build(
        kind=f"{files[0].path.suffix[1:].capitalize()} data set",
        root=path,
        classes=order,
        split_names=split_names,
        display_names=display,
        notes=[*notes, *_unused(readers)],
    )
    if not source.num_samples:
        raise UserError(f"{path} has no rows")

    def copy(file: BinaryIO, max_bytes: int) -> npt.NDArray[np.void]:
        return _copy_images(kept, source.num_samples, file, max_bytes)

    return replace(source, bundle=Bundle(write=copy))


class _Reader:
    """One file: its columns by what they are for, and its rows. Nothing stays open."""

    def __init__(self, file: _Table, columns: Mapping[str, str]) -> None:
        self.file, self.num_bytes = file, file.path.stat().st_size
        with self._opened() as rows:
            self.schema: Any = rows.schema
            self.num_rows: int = rows.num_rows
            if self.num_rows > self.num_bytes:
                raise UserError(f"{file.path} says that it has {self.num_rows:,} rows in {self.num_bytes:,} bytes, which cannot hold an image each")
            features = self._features()
            self.image = columns.get("path") or self._find("image", [name for name, kind in features.items() if kind == "Image"], _IMAGE_COLUMNS)
            typed = [name for name, kind in features.items() if kind == "ClassLabel"]
            self.label = columns.get("label") or self._find("label", typed, (*LABEL_COLUMNS, *_MORE_LABELS))
            for name in (self.image, self.label):
                if name not in self.schema.names:
                    raise UserError(f"{file.path} has no column '{name}'; it has {some(self.schema.names, quoted=True)}")
            self.names_of_labels = self._class_label(self.label)
            self._check_image()
            self.labels = self._labels(rows.column(self.label))

    @contextmanager
    def _opened(self) -> Iterator[_Rows]:
        pa, parquet = _pyarrow()
        try:
            with open_regular(self.file.path) as file:
                if self.file.path.suffix.lower() == ".parquet":
                    yield _ParquetRows(parquet.ParquetFile(file))
                    return
            with pa.memory_map(str(self.file.path)) as mapped:
                yield _ArrowRows(pa, mapped)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.file.path} cannot be read: {' '.join(str(error).split())[:300]}") from None

    def _features(self) -> dict[str, str]:
        """Column -> its kind, as `datasets` writes it into the schema."""
        features = self._metadata()
        return {name: str(feature.get("_type")) for name, feature in features.items() if isinstance(feature, dict)}

    def _metadata(self) -> dict[str, Any]:
        text = (self.schema.metadata or {}).get(b"huggingface")
        if text is None:
            return {}
        found = parse_json(text, f"{self.file.path}: the schema's metadata")
        info = found.get("info") if isinstance(found, dict) else None
        features = info.get("features") if isinstance(info, dict) else None
        return features if isinstance(features, dict) else {}

    def _class_label(self, column: str) -> tuple[str, ...] | None:
        feature = self._metadata().get(column)
        names = feature.get("names") if isinstance(feature, dict) else None
        if names is None:
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
            raise UserError(f"{self.file.path}: the names of the column '{column}' in its schema's metadata are not different texts")
        return tuple(names)

    def _find(self, what: str, typed: list[str], known: Sequence[str]) -> str:
        typed = [name for name in typed if name in self.schema.names]
        found = typed if len(typed) == 1 else [name for name in known if name in (typed or self.schema.names)]
        if not found:
            has = some(typed or self.schema.names, quoted=True)
            key = "path" if what == "image" else "label"
            raise UserError(f"{self.file.path}: which column is the {what}? It has {has}; name it with --data.columns {key}=COLUMN")
        return found[0]

    def _check_image(self) -> None:
        pa, _ = _pyarrow()
        kind = self.schema.field(self.image).type
        self.is_struct = pa.types.is_struct(kind) and any(kind.field(at).name == "bytes" for at in range(kind.num_fields))
        self.has_path = self.is_struct and any(kind.field(at).name == "path" and _is_text(kind.field(at).type) for at in range(kind.num_fields))
        data = kind.field("bytes").type if self.is_struct else kind
        if not (pa.types.is_binary(data) or pa.types.is_large_binary(data)):
            what = f"the column '{self.image}' holds {str(kind)[:100]}, not the bytes of images (binary, or a struct of bytes and path)"
            raise UserError(f"{self.file.path}: {what}")

    def _labels(self, column: Any) -> list[Any]:
        """Numbers, or texts; None for a row without a label."""
        pa, _ = _pyarrow()
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_integer(column.type):
            return [None if label == -1 else label for label in column.to_pylist()]
        if _is_text(column.type) and self.names_of_labels is None:
            return [text or None for text in column.to_pylist()]
        kind = str(column.type)[:100]
        raise UserError(f"{self.file.path}: the column '{self.label}' holds {kind}, not a label; name another with --data.columns label=COLUMN")

    def names(self) -> Iterator[str]:
        """What the images are called in lists and on pages: file, row, and the name that the image had."""
        digits = max(6, len(str(self.num_rows - 1)))
        paths: Sequence[Any] = [None] * self.num_rows
        if self.has_path:
            with self._opened() as rows:
                paths = rows.inner(self.image, "path")
        for row, path in enumerate(paths):
            last = str(path).replace("\\", "/").rpartition("/")[2] if path else ""
            yield f"{self.file.name}/{row:0{digits}d}{f'/{last}' if last else ''}"

    def images(self) -> Iterator[bytes | None]:
        """The bytes of the images, row by row; None where there are none."""
        with self._opened() as rows:
            for batch in rows.batches(self.image):
                for value in batch.field("bytes") if self.is_struct else batch:
                    yield value.as_py()


class _Rows(Protocol):
    """The columns of a file that is open."""

    schema: Any
    num_rows: int

    def column(self, name: str) -> Any: ...

    def inner(self, name: str, field: str) -> Sequence[Any]:
        """The values of one field of a struct, without reading the others."""
        ...

    def batches(self, name: str) -> Iterator[Any]:
        """The arrays of a column, a few rows each."""
        ...


class _ParquetRows:
    def __init__(self, file: Any) -> None:
        self._file, self.schema, self.num_rows = file, file.schema_arrow, file.metadata.num_rows

    def column(self, name: str) -> Any:
        return self._file.read(columns=[name]).column(0)

    def inner(self, name: str, field: str) -> Sequence[Any]:
        return [path for chunk in self._file.read(columns=[f"{name}.{field}"]).column(0).chunks for path in chunk.field(field).to_pylist()]

    def batches(self, name: str) -> Iterator[Any]:
        return (batch.column(0) for batch in self._file.iter_batches(_ROWS_AT_ONCE, columns=[name]))


class _ArrowRows:
    """Checked whole: Arrow itself believes the offsets in a file."""

    def __init__(self, pa: Any, mapped: Any) -> None:
        try:
            self._rows = pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
            self._rows = pa.ipc.open_file(mapped).read_all()
        self._rows.validate(full=True)
        self.schema, self.num_rows = self._rows.schema, self._rows.num_rows

    def column(self, name: str) -> Any:
        return self._rows.column(name)

    def inner(self, name: str, field: str) -> Sequence[Any]:
        return [path for chunk in self._rows.column(name).chunks for path in chunk.field(field).to_pylist()]

    def batches(self, name: str) -> Iterator[Any]:
        return iter(self._rows.column(name).chunks)


def _splits(path: Path, files: list[_Table]) -> list[str]:
    """In their usual order. UserError where some files belong to splits and others to none."""
    found = {file.split for file in files}
    if ALL in found and len(found) > 1:
        without = next(file.name for file in files if file.split == ALL)
        raise UserError(f"{path}: {without} has no split in its name (train, val, test), but other files have; rename it, or move it away")
    return [split for split in (ALL, *SPLIT_WORDS) if split in found]


def _class_names(path: Path, readers: list[_Reader], classes: Sequence[str] | None, *, drop_empty: bool, notes: list[str]) -> tuple[str, ...]:
    """The names of the metadata in their order, or the labels themselves, sorted; without those that no row has, where that is wanted."""
    stored = {reader.names_of_labels for reader in readers}
    if len(stored) > 1:
        raise UserError(f"{path}: its files do not agree about the names of their labels")
    names = stored.pop()
    kinds = {type(label) for reader in readers for label in reader.labels if label is not None}
    if len(kinds) > 1:
        raise UserError(f"{path}: some of its files have numbers as labels, and others texts")
    counts = Counter(label for reader in readers for label in reader.labels)
    present = sorted(label for label in counts if label is not None)
    if names is not None and present and not 0 <= present[0] <= present[-1] < len(names):
        raise UserError(f"{path}: labels go from {present[0]} to {present[-1]}, but its metadata names {len(names)} classes")
    if classes is not None:
        known = set(classes)
        unknown = [name for label in present if (name := names[label] if names else str(label)) not in known]
        if unknown:
            raise UserError(f"{path} has images of classes that training does not have: {some(unknown, quoted=True)}")
        return tuple(classes)
    empty = [] if names is None else [name for label, name in enumerate(names) if label not in counts]
    if empty and not drop_empty:
        raise UserError(f"{path}: no row has the {counted(len(empty), 'label')} {some(empty, quoted=True)}; leave such classes out with --data.on-error skip")
    if empty:
        notes.append(f"classes without an image left out: {some(empty, quoted=True)}")
    order = tuple(str(label) for label in present) if names is None else tuple(names[label] for label in present)
    if len(order) < 2:
        raise UserError(f"{path} has {'only one class, ' + repr(order[0]) if order else 'no labels'}; a classifier needs two or more")
    return order


def _labelled_splits(readers: list[_Reader], splits: list[str], notes: list[str]) -> tuple[str, ...]:
    """Those whose rows have labels; competitions keep their test sets without. UserError for single rows that have none."""
    kept = []
    for split in splits:
        of_split = [reader for reader in readers if reader.file.split == split]
        rows, missing = sum(reader.num_rows for reader in of_split), sum(reader.labels.count(None) for reader in of_split)
        if missing and missing == rows and split in ("val", "test") and len(splits) > 1:
            notes.append(f"'{split}' is left out: its {counted(rows, 'row')} have no labels")
            continue
        if missing:
            first = next(reader for reader in of_split if None in reader.labels)
            where = f"{first.file.path}, row {first.labels.index(None)}"
            raise UserError(f"{where}: no label (column '{first.label}'); {missing:,} of {rows:,} rows have none")
        kept.append(split)
    return tuple(kept)


def _numbers(reader: _Reader, order: Sequence[str]) -> npt.NDArray[np.int32]:
    number, names = {name: position for position, name in enumerate(order)}, reader.names_of_labels
    return np.fromiter((number[names[label] if names else str(label)] for label in reader.labels), np.int32, reader.num_rows)


def _unused(readers: list[_Reader]) -> list[str]:
    unused = sorted({name for reader in readers for name in reader.schema.names if name not in (reader.image, reader.label)})
    return [f"{'column' if len(unused) == 1 else 'columns'} not used: {some(unused, limit=10, quoted=True)}"] if unused else []


def _copy_images(readers: list[_Reader], count: int, target: BinaryIO, max_bytes: int) -> npt.NDArray[np.void]:
    members, row, at = np.zeros(count, MEMBER), 0, 0
    for reader in readers:
        most = at + max(_LEAST_LIMIT, _MOST_TIMES * reader.num_bytes)
        for number, data in enumerate(reader.images()):
            if data is None:
                raise UserError(f"{reader.file.path}, row {number}: no bytes of an image, only a path or nothing; write the data set with its images in it")
            if row >= count or at + len(data) > most:
                raise UserError(f"{reader.file.path} holds more than its size and its header say; it is damaged")
            kept = data if len(data) <= max_bytes else b""
            members[row] = (at, len(kept), len(data), 0, WHOLE)
            target.write(kept)
            at, row = at + len(kept), row + 1
    if row != count:
        raise UserError(f"{readers[-1].file.path} holds {row:,} rows where its header says {count:,}; it is damaged")
    return members


def _is_text(kind: Any) -> bool:
    pa, _ = _pyarrow()
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet and Arrow files need pyarrow, which is not installed: pip install pyarrow") from None
    return pa, pyarrow.parquet
