"""The tensors of files that were written by pickling: torch's two formats, TorchScript archives, and plain pickles of arrays.

They are read by `dtl.pickles`, never by Python's or torch's unpickler, so nothing in them runs, whatever they name. Objects of unknown classes
are dropped, and named; the tensors in them are kept. Of a whole pickled module those are its parameters and buffers.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dtl import pickles
from dtl.errors import UserError
from dtl.pickles import BadPickle, Name, Unknown
from dtl.text import counted, some
from dtl.untrusted import open_regular

_MAX_ENTRIES = 1_000_000  # of an archive; each tensor is one
_MAX_VALUES = 2_000_000
_MAX_DEPTH = 100
_MAGIC = 0x1950A86A20F9469CFC6C  # the first thing in files before torch 1.6: a pickled number
_OWN_NAMES = ("torch.", "collections.", "numpy.", "builtins.", "_codecs.", "copyreg.", "__torch__.")
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32,
    "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool, "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


@dataclass
class Storage:
    """A flat piece of memory that tensors share. `find` gives its values when the first of them is needed."""

    dtype: torch.dtype
    numel: int
    find: Callable[[], torch.Tensor]
    values: torch.Tensor | None = None

    def flat(self) -> torch.Tensor:
        if self.values is None:
            self.values = self.find()
        return self.values


@dataclass(eq=False)
class View:
    """A tensor as it lies in the pickle: a storage and how it is looked at."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: torch.dtype | None = None

    def tensor(self) -> torch.Tensor:
        """Raises BadPickle where the view leads outside of its storage, or is far larger than it."""
        if not isinstance(self.storage, Storage) or not isinstance(self.size, tuple) or not isinstance(self.stride, tuple):
            raise BadPickle("a tensor has arguments that torch does not write")
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or len(self.size) > 64 or not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
            raise BadPickle("a tensor has an invalid shape")
        flat = self.storage.flat()
        if self.dtype is not None and self.dtype != flat.dtype:
            if flat.numel() * flat.element_size() % self.dtype.itemsize:
                raise BadPickle("the size of a tensor's storage is not a multiple of its element size")
            flat = flat.view(self.dtype)
        count = math.prod(self.size)
        if count == 0:
            return flat.new_empty(self.size)
        if self.offset + sum((side - 1) * step for side, step in zip(self.size, self.stride)) >= flat.numel():
            raise BadPickle("a tensor extends beyond the end of its storage")
        if count > max(flat.numel(), 1 << 20):
            raise BadPickle("a tensor is far larger than its storage")
        return torch.as_strided(flat, self.size, self.stride, self.offset)


@dataclass(eq=False)
class SparseView:
    """A sparse tensor in coordinates, which is read as a dense one."""

    indices: Any
    values: Any
    size: Any

    def tensor(self) -> torch.Tensor:
        if not isinstance(self.indices, View) or not isinstance(self.values, View) or not isinstance(self.size, tuple):
            raise BadPickle("a sparse tensor has arguments that torch does not write")
        indices, values = self.indices.tensor(), self.values.tensor()
        if not all(type(side) is int and side >= 0 for side in self.size) or math.prod(self.size) > max(1 << 20, 1000 * values.numel()):
            raise BadPickle("a sparse tensor is far larger than its values")
        try:
            return torch.sparse_coo_tensor(indices, values, self.size, check_invariants=True).to_dense()
        except (RuntimeError, TypeError) as error:
            raise BadPickle(f"a sparse tensor is damaged ({error})") from None


@dataclass
class Read:
    """What was found: plain containers of tensors and numbers. `dropped`: what each class of unknown objects is called, and how many there were."""

    content: Any
    dropped: dict[str, int] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    """Classes and functions that the file names, and that neither torch nor NumPy need for tensors."""

    def remarks(self) -> tuple[str, ...]:
        """What a report says was left out."""
        found = [f"{counted(count, 'object')} of {what}" for what, count in self.dropped.items()]
        others = [name for name in self.names if name not in self.dropped]
        return (*found, *([f"references to {some(others, limit=4)} (not imported)"] if others else []))


def read_pickled(path: Path) -> Read:
    """Everything in a torch file, a TorchScript archive or a pickle. UserError where it is none of them, or damaged."""
    try:
        with open_regular(path) as file:
            names: set[str] = set()
            if file.read(4) == b"PK\x03\x04":
                found = _from_archive(file, names)
            else:
                file.seek(0)
                found = _from_stream(file, names)
            plain = _Plain()
            content = plain.of(found, 0)
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error})") from error
    except (BadPickle, zipfile.BadZipFile, NotImplementedError, RecursionError, UnicodeDecodeError, struct.error) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not readable as a torch file or a pickle ({reason}); it is damaged, cut short or of another format") from error
    return Read(content, plain.dropped, tuple(sorted(name for name in names if not name.startswith(_OWN_NAMES))))


# ---- where the bytes are


def _from_archive(file: BinaryIO, names: set[str]) -> Any:
    """torch >= 1.6, and TorchScript: a zip of data.pkl and one entry for each storage, which are mapped, not read."""
    _check_directory(file)
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    main = next((name for name in entries if name.partition("/")[2] == "data.pkl"), None)
    if main is None:
        raise BadPickle("a zip archive without data.pkl")
    root = main.removesuffix("data.pkl")
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def place(name: str) -> tuple[int, int]:
        """(first byte, bytes) of an entry."""
        entry = entries.get(root + name)
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise BadPickle(f"the archive has no uncompressed entry {name[:100]}")
        header = memory[entry.header_offset : entry.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise BadPickle(f"the archive's entry {name[:100]} is damaged")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.file_size > len(memory):
            raise BadPickle(f"the archive's entry {name[:100]} is cut short")
        return start, entry.file_size

    def content(name: str) -> bytes:
        start, size = place(name)
        return memory[start : start + size]

    if root + "byteorder" in entries and content("byteorder") != sys.byteorder.encode():
        raise BadPickle("written on a machine with another byte order")
    storages: dict[str, Storage] = {}

    def persistent(key: Any) -> Any:
        kind, name, _, numel = _storage_key(key)
        if name not in storages:
            storages[name] = Storage(kind, numel, lambda: _flat(memory, *place(f"data/{name}"), kind, numel))
        return storages[name]

    return pickles.load(io.BytesIO(content("data.pkl")), _MAKERS, persistent=persistent, names=names)


def _check_directory(file: BinaryIO) -> None:
    """Python's zipfile reads the whole list of entries, however long it says that it is."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - (1 << 16) - 22 - 76))
    tail = file.read(1 << 17)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise BadPickle("a zip archive whose end is missing")
    count, length = struct.unpack("<HI", tail[at + 10 : at + 16])
    if (large := tail.rfind(b"PK\x06\x06", 0, at)) >= 0 and at - large >= 56:
        count, length = struct.unpack("<QQ", tail[large + 32 : large + 48])
    if count > _MAX_ENTRIES or length > 64 * _MAX_ENTRIES:
        raise BadPickle(f"an archive of {count:,} entries")


def _from_stream(file: BinaryIO, names: set[str]) -> Any:
    """A pickle, or torch's format before 1.6: pickles one after another, then the bytes of each storage."""
    buffered = io.BufferedReader(file, 1 << 20)  # type: ignore[type-var]
    try:
        first = pickles.load(buffered, _MAKERS, persistent=_refuse_outside, names=names)
        if first != _MAGIC:
            return first
        storages: dict[str, Storage] = {}

        def persistent(key: Any) -> Any:
            if isinstance(key, tuple) and len(key) == 4 and key[0] == "module":
                return key[1]  # a class, beside its source code
            kind, name, view, numel = _storage_key(key)
            if view is not None:
                raise BadPickle("a storage is a view of another one, as torch before 0.4 wrote it")
            return storages.setdefault(name, Storage(kind, numel, _missing))

        pickles.load(buffered, _MAKERS)  # the protocol
        pickles.load(buffered, _MAKERS)  # the machine
        found = pickles.load(buffered, _MAKERS, persistent=persistent, names=names)
        keys = pickles.load(buffered, _MAKERS)
        left = os.fstat(file.fileno()).st_size - buffered.tell()
        for key in keys if isinstance(keys, list) else ():
            (numel,) = struct.unpack("<q", _exactly(buffered, 8))
            storage = storages.get(str(key))
            if storage is None or numel != storage.numel or numel * storage.dtype.itemsize > left:
                raise BadPickle("a storage does not match the pickle, or is cut short")
            data = bytearray(numel * storage.dtype.itemsize)
            if buffered.readinto(data) != len(data):
                raise BadPickle("the file ends early")
            left -= len(data) + 8
            storage.values = _flat(data, 0, len(data), storage.dtype, numel)
        return found
    finally:
        buffered.detach()


def _exactly(file: Any, size: int) -> bytes:
    data: bytes = file.read(size)
    if len(data) < size:
        raise BadPickle("the file ends early")
    return data


def _missing() -> torch.Tensor:
    raise BadPickle("a storage is missing")


def _refuse_outside(_: Any) -> Any:
    raise BadPickle("it refers to storages outside of the pickle, but does not begin as a torch file does")


def _storage_key(key: Any) -> tuple[torch.dtype, str, Any, int]:
    """(type, name, view or None, number of elements) of a persistent id."""
    if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] != "storage" or not isinstance(key[1], Name):
        raise BadPickle("it refers to something that is not a storage")
    kind = _STORAGES.get(key[1].text.removeprefix("torch.").removeprefix("cuda.").removeprefix("storage.").removesuffix("Storage"))
    if kind is None or type(key[4]) is not int or key[4] < 0:
        raise BadPickle(f"the type {key[1].text[:60]} is not a storage of numbers")
    return kind, str(key[2]), key[5] if len(key) == 6 else None, key[4]


def _flat(memory: Any, start: int, size: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
    if numel * dtype.itemsize > size:
        raise BadPickle("a storage has fewer bytes than its tensors need")
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    if start % dtype.itemsize:  # torch aligns them; others may not
        return torch.frombuffer(bytearray(memory[start : start + numel * dtype.itemsize]), dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=start)


# ---- what is made of calls


def _view(arguments: tuple[Any, ...]) -> View:
    if len(arguments) < 4:
        raise BadPickle("a tensor has arguments that torch does not write")
    storage, offset, size, stride = arguments[:4]
    return View(storage, offset, size, stride)


def _typed_view(arguments: tuple[Any, ...]) -> View:
    dtype = _DTYPES.get(arguments[6].text) if len(arguments) > 6 and isinstance(arguments[6], Name) else None
    if dtype is None:
        raise BadPickle("a tensor has arguments that torch does not write")
    storage, offset, size, stride = arguments[:4]
    return View(storage, offset, size, stride, dtype)


def _sparse(arguments: tuple[Any, ...]) -> Any:
    layout = arguments[0] if arguments else None
    if not isinstance(layout, Unknown) or layout.arguments != ("torch.sparse_coo",) or len(arguments) < 2 or not isinstance(arguments[1], tuple):
        return Unknown("torch._utils._rebuild_sparse_tensor", arguments)
    return SparseView(*arguments[1][:3])


def _first(arguments: tuple[Any, ...]) -> Any:
    if not arguments:
        raise BadPickle("a tensor has arguments that torch does not write")
    return arguments[0]


def _of_type(arguments: tuple[Any, ...]) -> Any:
    """_rebuild_from_type_v2(function, type, arguments, state): a tensor with attributes."""
    if len(arguments) < 3 or not isinstance(arguments[0], Name) or not isinstance(arguments[2], tuple):
        raise BadPickle("a tensor has arguments that torch does not write")
    maker = _MAKERS.get(arguments[0].text)
    return Unknown(arguments[0].text, arguments[2]) if maker is None else maker(arguments[2])


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arguments[0]) if arguments and isinstance(arguments[0], (tuple, list)) else ()


def _empty_dict(_: tuple[Any, ...]) -> dict[Any, Any]:
    return {}


_MAKERS: dict[str, pickles.Maker] = {
    **pickles.PLAIN,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _typed_view,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": _size,
    "collections.defaultdict": _empty_dict,
    "collections.Counter": _empty_dict,
}


# ---- plain values


class _Plain:
    """Containers with tensors in them, in place of the machine's values."""

    def __init__(self) -> None:
        self.dropped: dict[str, int] = {}
        self._left = _MAX_VALUES

    def of(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            raise BadPickle("its values are nested too deep, or there are too many")
        if isinstance(value, (View, SparseView, pickles.Array)):
            return self._tensor(value)
        if isinstance(value, dict):
            return {key: self.of(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(inner, depth + 1) for inner in value]
        if isinstance(value, Unknown):
            return self._object(value, depth)
        if isinstance(value, (Name, Storage, pickles.DType)):
            return None
        return value

    def _tensor(self, value: View | SparseView | pickles.Array) -> Any:
        try:
            return torch.from_numpy(value.numpy()) if isinstance(value, pickles.Array) else value.tensor()
        except (BadPickle, TypeError) as error:
            if not isinstance(value, pickles.Array):
                raise
            return self._drop(f"numpy.ndarray ({error})")

    def _object(self, value: Unknown, depth: int) -> Any:
        """The tensors of an object; of a module under the names of its state dict. None where there are none."""
        state = value.state
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # of a class with slots
            state = state[1] if state[0] is None else state[0]
        if isinstance(state, dict) and isinstance(state.get("_modules"), dict) and isinstance(state.get("_parameters"), dict):
            found: Any = dict(self._module(value, "", depth))
        else:
            found = self.of({**value.pairs, **(state if isinstance(state, dict) else {})}, depth + 1)
            if value.name.startswith("__torch__."):
                found = {name: inner for name, inner in found.items() if isinstance(inner, (torch.Tensor, dict))}
                return flat(found)
        if next(_tensors(found), None) is not None or value.name.startswith("torch.jit._pickle."):
            return found
        return self._drop(value.name)

    def _module(self, module: Any, prefix: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors as `state_dict` gives them: parameters, buffers, then the modules inside."""
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            raise BadPickle("its modules are nested too deep, or there are too many")
        state = module.state if isinstance(module, Unknown) and isinstance(module.state, dict) else {}
        passing = state.get("_non_persistent_buffers_set")
        passing = set(passing.arguments[0]) if isinstance(passing, Unknown) and passing.arguments else passing or ()
        for kind in ("_parameters", "_buffers"):
            for name, value in _pairs(state.get(kind)):
                if isinstance(value, (View, SparseView, pickles.Array)) and not (kind == "_buffers" and name in passing):
                    yield f"{prefix}{name}", self._tensor(value)
        for name, inner in _pairs(state.get("_modules")):
            yield from self._module(inner, f"{prefix}{name}.", depth + 1)

    def _drop(self, what: str) -> None:
        self.dropped[what] = self.dropped.get(what, 0) + 1


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    value = value.pairs if isinstance(value, Unknown) else value
    return iter([(name, inner) for name, inner in value.items() if isinstance(name, str)] if isinstance(value, dict) else [])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _tensors(inner)


def flat(content: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested containers; the words that lead to them are joined by dots, lists are counted."""
    if isinstance(content, torch.Tensor):
        return {prefix or "tensor": content}
    pairs = content.items() if isinstance(content, Mapping) else enumerate(content) if isinstance(content, list) else ()
    found: dict[str, torch.Tensor] = {}
    for key, value in pairs:
        if isinstance(value, (torch.Tensor, Mapping, list)):
            found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found
