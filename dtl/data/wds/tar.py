"""A strict reader of tars from other tools: ustar, v7, GNU and PAX, in one pass over every byte.

Python's tarfile, and webdataset on top of it, end in silence at a damaged header, and at a cut between two members. Here whatever is
not a complete tar is an error with its offset: header checksums, sizes, the two zero blocks at the end, and nothing behind them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import BinaryIO

from dtl.data.decoding.decode import look
from dtl.errors import UserError
from dtl.files import open_regular

BLOCK = 512
_READ_BYTES = 2**20
# A name or a set of PAX records longer than this is damage, not a name.
_MAX_EXTENSION_BYTES = 2**20

_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gzip -dc"),
    (b"BZh", "bzip2", "bzip2 -dc"),
    (b"\xfd7zXZ\x00", "xz", "xz -dc"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc"),
)
_REGULAR = (b"0", b"\0", b"7")
_OTHER = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}


class DamagedTar(Exception):
    """Not a complete tar: `offset` is where that shows, `reason` what was found."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"at byte {offset}: {reason}")
        self.offset, self.reason = offset, reason


@dataclass(frozen=True)
class Member:
    """One regular file: `offset` is its first byte in the tar. `data` is None where it was not asked for."""

    name: str
    offset: int
    size: int
    data: bytes | None


class TarFile:
    """One tar, read once from its start. After `members` is exhausted, `sha256` and `num_bytes` are those of the whole file.

    `name` is what messages call it. `unpacked`: the file is decompressed while it is read, to at most so many bytes. `quick`: what is not wanted
    is skipped, and no sha256 is made.
    """

    def __init__(self, file: BinaryIO, name: str | None = None, *, unpacked: int | None = None, quick: bool = False) -> None:
        self.name = os.fsdecode(file.name) if name is None else name
        self._file, self._digest, self._quick = file, hashlib.sha256(), quick
        self._unpacked = unpacked is not None
        self._size = os.fstat(file.fileno()).st_size if unpacked is None else unpacked
        self._at = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        return self._at

    def members(self, wanted: Callable[[str, int], bool]) -> Iterator[Member]:
        """Regular files in their order, with the bytes of those that are `wanted` by name and size. Raises DamagedTar; UserError for links."""
        name: str | None = None  # of the member that follows, from a PAX or GNU header
        size: int | None = None
        if self._size == 0:
            raise DamagedTar(0, "the file is empty (0 bytes)")
        while True:
            start, block = self._at, self._read(BLOCK, "a header")
            if not any(block):
                self._end(start)
                return
            header = _Header.parse(block, start)
            if header.kind in (b"x", b"g", b"L", b"K"):
                self._check_fits(header.size, start, "a header's extension", limit=_MAX_EXTENSION_BYTES)
                content = self._read(_padded(header.size), "a header's extension")[: header.size]
                if header.kind == b"L":
                    name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif header.kind == b"x":
                    records = _pax_records(content, start)
                    name, size = records.get("path", name), _pax_size(records, start)
                continue
            this = header.name if name is None else name
            length = header.size if size is None else size
            name = size = None
            if header.kind in (b"5", b"V") or (header.kind in _REGULAR and this.endswith("/")):
                self._skip(_padded(length) if header.kind != b"5" else 0)
                continue
            if header.kind not in _REGULAR:
                what = _OTHER.get(header.kind, f"of type {header.kind!r}")
                raise UserError(
                    f"{self.name}: member {this} at byte {start} is {what}, not a regular file; "
                    "write the tar again with `tar --dereference --hard-dereference`, or pack the images with `dtl pack`"
                )
            self._check_fits(length, start, f"member {this}")
            if wanted(this, length):
                data = self._read(_padded(length), f"member {this}")[:length]
                yield Member(this, self._at - _padded(length), length, data)
            else:
                self._skip(_padded(length))
                yield Member(this, self._at - _padded(length), length, None)

    def _read(self, size: int, what: str) -> bytes:
        data = self._file.read(size)
        if not self._quick:
            self._digest.update(data)
        if len(data) < size:
            if what == "a header" and not data:
                raise DamagedTar(self._at, "the tar ends without two zero blocks: it is truncated between two members")
            raise DamagedTar(self._at, f"the file ends {size - len(data)} bytes before the end of {what}: it is truncated")
        self._at += size
        return data

    def _skip(self, size: int) -> None:
        if self._quick and not self._unpacked:
            self._at = self._file.seek(size, os.SEEK_CUR)
            return
        while size:
            size -= len(self._read(min(size, _READ_BYTES), "a member"))

    def _check_fits(self, size: int, start: int, what: str, *, limit: int | None = None) -> None:
        if limit is not None and size > limit:
            raise DamagedTar(start, f"{what} has {size:,} bytes according to its header: the header is damaged")
        missing = self._at + _padded(size) - self._size
        if missing > 0 and self._unpacked:
            raise UserError(f"{self.name} unpacks to more than {self._size / 2**30:.0f} GiB, far more than it holds; unpack it, and give the folder")
        if missing > 0:
            raise DamagedTar(start, f"{what} has {size:,} bytes according to its header, but the file ends {missing:,} bytes earlier: it is truncated")

    def _end(self, start: int) -> None:
        """After the first zero block: a second one, and only zeros behind it."""
        if self._unpacked:
            self._read(BLOCK, "the second zero block")
        elif self._size - self._at < BLOCK:
            raise DamagedTar(start, "the tar ends after one zero block instead of two: it is truncated")
        while rest := min(_READ_BYTES, self._size - self._at):
            at = self._at
            data = self._file.read(rest) if self._unpacked else self._read(rest, "the padding")
            if self._unpacked:
                self._at += len(data)
                if not data:
                    return
            if data.count(0) != len(data):
                where = at + len(data) - len(data.lstrip(b"\0"))
                raise DamagedTar(where, "there is data after the end of the tar: a part was overwritten with zeros, or the file holds several tars")


@dataclass(frozen=True)
class _Header:
    name: str
    size: int
    kind: bytes

    @classmethod
    def parse(cls, block: bytes, start: int) -> _Header:
        stored = _number(block[148:156])
        unsigned = sum(block[:148]) + sum(block[156:]) + 8 * 32
        signed = unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if stored not in (unsigned, signed):
            found = f" (it looks like {look(block)})" if start == 0 and look(block) != "unknown format" else ""
            raise DamagedTar(start, f"not a tar header{found}: its checksum is wrong")
        size = _number(block[124:136])
        if size is None or size < 0:
            raise DamagedTar(start, "the header has no readable size")
        name = block[:100].split(b"\0")[0]
        # GNU's old format keeps times where POSIX keeps the first part of a long name.
        if block[257:263] == b"ustar\0" and block[345]:
            name = block[345:500].split(b"\0")[0] + b"/" + name
        return cls(name.decode("utf-8", "surrogateescape"), size, block[156:157])


def _number(field: bytes) -> int | None:
    """Octal digits, or base 256 for what octal cannot hold."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.split(b"\0")[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if all(48 <= byte < 56 for byte in digits) else None


def _pax_records(content: bytes, start: int) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n`, one after another."""
    records, rest = {}, content
    while rest.strip(b"\0"):
        digits, _, _ = rest.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = rest[:length]
        key, equals, value = record[len(digits) + 1 :].partition(b"=")
        if len(record) < max(length, 5) or not equals or not record.endswith(b"\n"):
            raise DamagedTar(start, "the PAX header is damaged")
        records[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        rest = rest[length:]
    if any(key.startswith("GNU.sparse") for key in records):
        raise DamagedTar(start, "a sparse file, whose bytes are not all in the tar; write the tar again without --sparse")
    return records


def _pax_size(records: dict[str, str], start: int) -> int | None:
    size = records.get("size")
    if size is not None and not size.isdecimal():
        raise DamagedTar(start, "the PAX header is damaged")
    return None if size is None else int(size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def refuse_compressed(path: Path, name: str | None = None) -> None:
    """UserError with the command that unpacks `path`, where it is a compressed tar. `name`: of a remote one, for messages."""
    with open_regular(path) as file:
        start = file.read(8)
    for magic, kind, command in _COMPRESSED:
        if start.startswith(magic):
            if name is not None:
                raise UserError(
                    f"{name} is compressed ({kind}), so single images cannot be read from it: "
                    f"decompress it on the server, or with a command: 'pipe:curl -fsSL ADDRESS | {command}'"
                )
            plain = path.with_name(path.name.split(".tar")[0].removesuffix(".tgz") + ".tar")
            plain = plain if plain != path else path.with_name(f"plain-{path.name}")
            raise UserError(
                f"{path} is compressed ({kind}), so single images cannot be read from it: "
                f"decompress it with `{command} {quote(str(path))} > {quote(str(plain))}` and index that"
            )
