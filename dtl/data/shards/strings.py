"""Many strings without an object for each: one block of bytes and its offsets, in memory or mapped from a file."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dtl.errors import UserError
from dtl.files import open_regular, write_whole

_MAGIC = b"DTLSTR01"
_HEADER = struct.Struct("<8sQ")


class StringTable:
    """`table[i]` is a string; a path that is not UTF-8 survives (as `os.fsdecode` writes it).

    `offsets` is int64 [n + 1], `data` uint8 [offsets[n]]: about 8 bytes a string over its own length. File: magic, n, offsets, data.
    """

    def __init__(self, offsets: npt.NDArray[np.int64], data: npt.NDArray[np.uint8]) -> None:
        self.offsets, self.data = offsets, data

    @classmethod
    def build(cls, strings: Iterable[str]) -> StringTable:
        ends, data = array("q", [0]), bytearray()
        for string in strings:
            data += os.fsencode(string)
            ends.append(len(data))
        return cls(np.frombuffer(ends, np.int64), np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8))

    @classmethod
    def read(cls, path: Path) -> StringTable:
        """Map a file written by `write`."""
        with open_regular(path) as file:
            head, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
            if len(head) < _HEADER.size or head[:8] != _MAGIC:
                raise UserError(f"{path} is not a table of names written by dtl")
            count = _HEADER.unpack(head)[1]
            start = _HEADER.size + 8 * (count + 1)
            if size < start:
                raise UserError(f"{path} is truncated: {size} bytes")
            offsets: npt.NDArray[np.int64] = np.memmap(file, "<i8", "r", _HEADER.size, (count + 1,))
            if offsets[0] != 0 or size != start + int(offsets[-1]):
                raise UserError(f"{path} has {size} bytes where {start + int(offsets[-1])} are expected")
            data = np.memmap(file, np.uint8, "r", start, (int(offsets[-1]),)) if offsets[-1] else np.zeros(0, np.uint8)
        return cls(offsets, data)

    def write(self, path: Path) -> None:
        parts = (_HEADER.pack(_MAGIC, len(self)), np.ascontiguousarray(self.offsets, "<i8").data, np.ascontiguousarray(self.data).data)
        write_whole(path, lambda file: file.writelines(parts))

    @classmethod
    def join(cls, tables: Iterable[StringTable]) -> StringTable:
        """All strings of `tables`, one table after another. Each is copied before the next is asked for: a mapped one costs an open file."""
        offsets, data, start = [np.zeros(1, np.int64)], [np.zeros(0, np.uint8)], 0
        for table in tables:
            offsets.append(np.add(table.offsets[1:], start))
            data.append(np.array(table.data))
            start += len(table.data)
        return cls(np.concatenate(offsets), np.concatenate(data))

    def take(self, numbers: npt.NDArray[np.integer]) -> StringTable:
        """The strings at these positions, in this order."""
        lengths = np.diff(self.offsets)
        if len(lengths) and lengths.min() < 0:
            raise UserError("a table of names is damaged: its offsets do not increase")
        lengths = lengths[numbers]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        data = np.empty(int(offsets[-1]), np.uint8)
        for new, old in enumerate(numbers):
            data[offsets[new] : offsets[new + 1]] = self.data[self.offsets[old] : self.offsets[old + 1]]
        return StringTable(offsets, data)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> str:
        return os.fsdecode(self.data[int(self.offsets[number]) : int(self.offsets[number + 1])].tobytes())
