"""Image files, looked at before a decoder sees them: what would take more time or memory than its bytes and pixels are worth is refused.

Decoders do all that a file asks for: thousands of scans over the same pixels, text of a gigabyte, a tag that is read a thousand times. Here the
structure of a file is walked, in time proportional to its headers, and metadata that has nothing to do with pixels is left out for Pillow.
No torch in here.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from dtl.files import MAX_FILE_BYTES
from dtl.reading import MAX_CHANNELS

MAX_PIXELS = 178_956_970
"""The default of data.max_pixels: above it Pillow warns of a decompression bomb. Satellite tiles (10,980 x 10,980) and scans of A3 at 600 dpi are smaller."""
# The index keeps width and height as 16-bit numbers.
MAX_SIDE = 65_535
_MAX_HEADER_BYTES = 32 << 20
_MAX_SEGMENTS = 10_000
_MAX_SCANS = 100
"""Of a JPEG; encoders write up to 20."""
# Pixels that all scans of a JPEG may visit: eleven scans of the largest image, and more where there are bytes for them.
_VISITS, _VISITS_A_BYTE = 2_000_000_000, 1000
_MAX_SLOW_BYTES = 8 << 20
"""Of formats that Pillow decodes in Python: run-length BMP, PPM as text."""
_MAX_TILES = 1_000_000
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
_GIF_BLOCK = re.compile(rb"[!,;]")
_PPM_HEADER = re.compile(rb"P([1-6])((?:\s+|#[^\n\r]*)+)(\d+)((?:\s+|#[^\n\r]*)+)(\d+)(?:((?:\s+|#[^\n\r]*)+)(\d+))?\s")
_PNG_METADATA = frozenset((b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"))
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SOS, _EOI, _COMMENT, _ADOBE = 0xDA, 0xD9, 0xFE, 0xEE
_METADATA = frozenset(range(0xE1, 0xF0)) - {_ADOBE} | {_COMMENT}
_APP1 = 0xE1
_MAX_ARRAY_HEADER = 10_000
_JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
_ORIENTATION, _MAX_TAGS = 0x0112, 1000


@dataclass(frozen=True)
class Limits:
    """Of one image: data.max_pixels and data.max_file_bytes."""

    max_pixels: int = MAX_PIXELS
    max_file_bytes: int = MAX_FILE_BYTES


DEFAULT_LIMITS = Limits()


class DecodeError(Exception):
    """These bytes cannot be used as an image; the message is the reason."""


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """The one limit of an image's size: DecodeError for more than `max_pixels`, or a side longer than MAX_SIDE."""
    if width * height > max_pixels:
        raise DecodeError(f"{width} x {height} pixels, more than the {max_pixels:,} that are allowed (data.max_pixels)")
    if max(width, height) > MAX_SIDE:
        raise DecodeError(f"{width} x {height} pixels, a side longer than {MAX_SIDE:,}")


def lean(data: bytes, max_pixels: int = MAX_PIXELS) -> bytes:
    """The same image without its metadata, for Pillow. DecodeError where it asks for too much."""
    if data[:2] == b"\xff\xd8":
        return _without(data, check_jpeg(data, max_pixels), _METADATA)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _lean_png(data)
    if data[:4] == b"GIF8":
        return _lean_gif(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _check_webp(data, max_pixels)
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _Tiff(data, max_pixels).check()
    elif data[:2] == b"BM":
        if len(data) > _MAX_SLOW_BYTES and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
            raise DecodeError(f"a run-length BMP of {len(data):,} bytes, more than the {_MAX_SLOW_BYTES:,} that are allowed")
    elif data[:1] == b"P" and data[1:2] in b"123456" and data[1:2]:
        return _scaled_ppm(data)
    elif (kind := container_of(data)) is not None:
        sizes = [_jxl_size(data)] if kind == "JXL" else _item_sizes(data)
        for width, height in sizes:
            check_size(width, height, max_pixels)
            if width * height > max_pixels // 2:
                raise DecodeError(f"{width} x {height} pixels, more than the {max_pixels // 2:,} that are allowed for {kind} (half of data.max_pixels)")
    return data


# ---- JPEG


class ArrayHeader(NamedTuple):
    """Of a NumPy file that holds an image. `first`: its channels are the first axis, not the last."""

    height: int
    width: int
    channels: int
    first: bool
    dtype: np.dtype[Any]
    fortran: bool
    start: int


def array_header(data: bytes, max_pixels: int = MAX_PIXELS) -> ArrayHeader:
    """Of `.npy`: numbers [H, W], [H, W, C], or [C, H, W], whose first axis is shorter than the last. DecodeError where it is anything else, or not whole."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file, max_header_size=_MAX_ARRAY_HEADER)
    except (ValueError, KeyError, EOFError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise DecodeError(f"a damaged NumPy file: {' '.join(str(error).split())[:100]}") from None
    if dtype.kind not in "uif" or dtype.hasobject or dtype.itemsize > 8 or not shape or len(shape) not in (2, 3):
        raise DecodeError(f"a NumPy array {dtype} {list(shape)[:8]}, which is no image: numbers [H, W], [H, W, C] or [C, H, W] are")
    first = len(shape) == 3 and shape[0] < shape[2]
    channels, height, width = (1, *shape) if len(shape) == 2 else shape if first else (shape[2], shape[0], shape[1])
    check_size(width, height, max_pixels)
    if not 1 <= channels <= MAX_CHANNELS or min(width, height) < 1:
        raise DecodeError(f"a NumPy array {list(shape)}: images have 1 to {MAX_CHANNELS} channels")
    if len(data) != file.tell() + width * height * channels * dtype.itemsize:
        raise DecodeError(f"a NumPy file of {len(data):,} bytes, which is not what its header says")
    return ArrayHeader(height, width, channels, first, dtype, fortran, file.tell())


@dataclass(frozen=True)
class JpegHeader:
    """The segments before the first scan, (marker, first byte, end), and where that begins."""

    segments: list[tuple[int, int, int]]
    scan: int


def check_jpeg(data: bytes, max_pixels: int = MAX_PIXELS) -> JpegHeader:
    """DecodeError where a JPEG is too large, or has too many segments, scans or bytes of headers. What is damaged is left to the decoder."""
    segments: list[tuple[int, int, int]] = []
    frame: tuple[int, int, int, int] | None = None
    at = 2
    while (found := _JPEG_MARKER.search(data, at)) is not None:
        marker, start, at = data[found.end() - 1], found.start(), found.end()
        if marker in (_SOS, _EOI):
            break
        length = int.from_bytes(data[at : at + 2], "big")
        if marker in _SOF and frame is None:
            height, width = struct.unpack(">HH", data[at + 3 : at + 7].ljust(4, b"\0"))
            check_size(width, height, max_pixels)
            frame = marker, width, height, data[at + 7] if at + 7 < len(data) else 0
        at += max(length, 2)
        segments.append((marker, start, at))
        if len(segments) > _MAX_SEGMENTS:
            raise DecodeError(f"its header has more than {_MAX_SEGMENTS:,} segments")
    scan = len(data) if found is None else found.start()
    if scan > _MAX_HEADER_BYTES:
        raise DecodeError(f"its header has {scan:,} bytes, more than the {_MAX_HEADER_BYTES:,} that are allowed")
    if found is not None and marker == _SOS and frame is not None:
        kind, width, height, components = frame
        # One scan with everything in it is by far the most usual.
        if kind not in (0xC0, 0xC1) or data[at + 2 : at + 3] != bytes([components]):
            _check_scans(data, found.start(), width * height)
    return JpegHeader(segments, scan)


def _check_scans(data: bytes, at: int, pixels: int) -> None:
    scans = segments = 0
    while (found := _JPEG_MARKER.search(data, at)) is not None:
        marker, at = data[found.end() - 1], found.end()
        if marker == _EOI:
            break
        scans += marker == _SOS
        segments += 1
        if scans > _MAX_SCANS or segments > _MAX_SEGMENTS:
            raise DecodeError(f"it has more than {_MAX_SCANS} scans" if scans > _MAX_SCANS else f"it has more than {_MAX_SEGMENTS:,} segments")
        at += max(int.from_bytes(data[at : at + 2], "big"), 2)
    if scans * pixels > _VISITS + _VISITS_A_BYTE * len(data):
        raise DecodeError(f"it has {scans} scans of {pixels:,} pixels in {len(data):,} bytes, which no camera or encoder writes")


def exif_orientation(data: bytes) -> int:
    """1 to 8, as the EXIF of a JPEG, PNG or WebP says; 1 where it says nothing, and of other formats. What is damaged says nothing."""
    block = b""
    if data[:2] == b"\xff\xd8":
        for marker, start, end in check_jpeg(data, 1 << 32).segments:
            if marker == _APP1 and (at := data.find(b"Exif\0\0", start, start + 24)) >= 0:
                block = data[at + 6 : end]
                break
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        block = _chunk(data, 8, b"eXIf", png=True)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        block = _chunk(data, 12, b"EXIF", png=False)
    block = block.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if block[:2] == b"II" else "big"
    if block[:2] not in (b"II", b"MM"):
        return 1
    table = int.from_bytes(block[4:8], order)
    for entry in range(table + 2, table + 2 + 12 * min(int.from_bytes(block[table : table + 2], order), _MAX_TAGS), 12):
        if int.from_bytes(block[entry : entry + 2], order) == _ORIENTATION:
            size = {1: 1, 3: 2, 4: 4}.get(int.from_bytes(block[entry + 2 : entry + 4], order), 0)
            found = int.from_bytes(block[entry + 8 : entry + 8 + size], order)
            return found if 1 <= found <= 8 else 1
    return 1


def _chunk(data: bytes, at: int, wanted: bytes, *, png: bool) -> bytes:
    """The first chunk of this kind; empty where there is none."""
    for _ in range(_MAX_SEGMENTS):
        head = data[at : at + 8]
        if len(head) < 8 or head[4:] == b"IEND":
            break
        kind, length = (head[4:], int.from_bytes(head[:4], "big")) if png else (head[:4], int.from_bytes(head[4:], "little"))
        if kind == wanted:
            return data[at + 8 : at + 8 + length]
        at += 12 + length if png else 8 + length + length % 2
    return b""


def without_exif(data: bytes) -> bytes:
    """A JPEG without its EXIF: torchcodec applies the EXIF orientation, ImageFolder and the decoders here do not."""
    header = check_jpeg(data, 1 << 32)  # the caller has checked its size
    exif = [(marker, start, end) for marker, start, end in header.segments if marker == _APP1 and b"Exif" in data[start + 4 : start + 24]]
    return _without(data, JpegHeader(exif, header.scan), frozenset((_APP1,)))


def _without(data: bytes, header: JpegHeader, markers: frozenset[int]) -> bytes:
    pieces, at = [], 0
    for marker, start, end in header.segments:
        if marker in markers:
            pieces.append(data[at:start])
            at = min(end, header.scan)
    return data if at == 0 else b"".join([*pieces, data[at:]])


# ---- PNG, GIF, WebP


def _lean_png(data: bytes) -> bytes:
    pieces, kept, at, chunks = [], 0, 8, 0
    most = _MAX_SEGMENTS + len(data) // 1024
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if kind in _PNG_METADATA and end <= len(data):
            pieces.append(data[kept:at])
            kept = end
        chunks += 1
        if chunks > most:
            raise DecodeError(f"it has more than {most:,} chunks in {len(data):,} bytes")
        if kind == b"IEND":
            break
        at = end
    return data if kept == 0 else b"".join([*pieces, data[kept:]])


def _lean_gif(data: bytes) -> bytes:
    """Comments and the like before the first picture are left out; the transparent colour is kept."""
    if len(data) < 13:
        return data
    at = start = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    controls: list[bytes] = []
    while (found := _GIF_BLOCK.search(data, at)) is not None:
        at = found.start()
        if at - start > _MAX_HEADER_BYTES // 8:
            raise DecodeError(f"there are {at - start:,} bytes before its first picture, more than the {_MAX_HEADER_BYTES // 8:,} that are allowed")
        if data[at : at + 1] != b"!":
            break
        begun, label = at, data[at + 1 : at + 2]
        at += 2
        while at < len(data) and data[at] and at - start <= _MAX_HEADER_BYTES // 8:
            at += 1 + data[at]
        at += 1
        if label == b"\xf9" and at - begun <= 16:
            controls = [*controls[-7:], data[begun:at]]
    return data if found is None or at == start else b"".join([data[:start], *controls, data[found.start() :]])


def _check_webp(data: bytes, max_pixels: int) -> None:
    """Pillow makes room for the whole canvas, several times, when it opens the file: half as many pixels as of other formats."""
    kind = data[12:16]
    width = height = 0
    if kind == b"VP8X" and len(data) >= 30:
        width, height = 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    elif kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 " and len(data) >= 30:
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", data[26:30]))
    check_size(width, height, max_pixels)
    if width * height > max_pixels // 2:
        raise DecodeError(f"{width} x {height} pixels, more than the {max_pixels // 2:,} that are allowed for WebP (half of data.max_pixels)")


# ---- AVIF, HEIC, JPEG XL: whoever decodes them makes room for several copies of an image


def container_of(data: bytes) -> str | None:
    """AVIF, HEIF or JXL, by Pillow's names; None of any other."""
    if data[:2] == b"\xff\x0a" or data[:12] == _JXL_CONTAINER:
        return "JXL"
    if data[4:8] != b"ftyp":
        return None
    # The brand of pictures in general leaves it to those that it is compatible with.
    brand, brands = data[8:12], data[8 : max(12, min(int.from_bytes(data[:4], "big"), 256))]
    if brand in (b"avif", b"avis") or (brand in (b"mif1", b"msf1") and b"avif" in brands):
        return "AVIF"
    return "HEIF" if brand[:3] in (b"hei", b"hev", b"mif", b"msf") else None


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, first byte, end) of the boxes of an ISO media file, one after another."""
    for _ in range(_MAX_SEGMENTS):
        size, kind, start = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
        if at + 8 > end:
            return
        if size == 1:
            size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
        after = end if size == 0 else min(at + size, end)
        if after < start:
            return
        yield kind, start, after
        at = after
    raise DecodeError(f"it has more than {_MAX_SEGMENTS:,} boxes")


def _item_sizes(data: bytes) -> list[tuple[int, int]]:
    """(width, height) of all pictures in an AVIF or HEIC file; tiles and thumbnails are pictures too."""
    places = [(0, len(data))]
    for wanted in (b"meta", b"iprp", b"ipco", b"ispe"):
        skipped = 4 if wanted == b"meta" else 0  # its version
        places = [(start + skipped, end) for first, last in places for kind, start, end in _boxes(data, first, last) if kind == wanted]
    found = [(int.from_bytes(data[at + 4 : at + 8], "big"), int.from_bytes(data[at + 8 : at + 12], "big")) for at, _ in places]
    if not found:
        raise DecodeError(f"not an image (a damaged {container_of(data)}: its header says no size)")
    return found


def _jxl_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a JPEG XL image (ISO 18181-1, SizeHeader)."""
    start = 2
    if data[:12] == _JXL_CONTAINER:
        places = [at + (4 if kind == b"jxlp" else 0) for kind, at, _ in _boxes(data, 0, len(data)) if kind in (b"jxlc", b"jxlp")]
        if not places or data[places[0] : places[0] + 2] != b"\xff\x0a":
            raise DecodeError(f"not an image (a damaged {container_of(data)}: its header says no size)")
        start = places[0] + 2
    bits = int.from_bytes(data[start : start + 16], "little")

    def take(number: int) -> int:
        nonlocal bits
        value = bits & (1 << number) - 1
        bits >>= number
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    height = side()
    ratio = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[take(3)]
    return (height * ratio[0] // ratio[1] if ratio[0] else side()), height


# ---- TIFF


class _Tiff:
    """The tags of the first picture: together not more than the file holds, tiles not larger than an image may be."""

    _SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
    _INSIDE = frozenset((34665, 34853, 40965))  # EXIF, GPS and interoperability: tables of tags of their own

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self.data, self.max_pixels = data, max_pixels
        self.order = "<" if data[:1] == b"I" else ">"
        self.large = data[2:4] in (b"+\0", b"\0+")
        self._bytes, self._tables = 0, 0

    def check(self) -> None:
        found = self._table(self._number(8, 8) if self.large else self._number(4, 4))
        width, height = self._value(found, 256), self._value(found, 257)
        check_size(width, height, self.max_pixels)
        tile = self._value(found, 322), self._value(found, 323)
        if tile[0] * tile[1] > self.max_pixels:
            raise DecodeError(f"its tiles have {tile[0]} x {tile[1]} pixels, more than the {self.max_pixels:,} that are allowed")
        parts = max(found.get(273, (0, 0, 0))[1], found.get(324, (0, 0, 0))[1], 1)
        if parts > _MAX_TILES:
            raise DecodeError(f"it has {parts:,} strips or tiles, more than the {_MAX_TILES:,} that are allowed")
        if self._value(found, 284) == 2 and self._value(found, 277) > 1 and max(self._values(found, 258), default=1) > 8:
            # Pillow misreads it, without an error.
            raise DecodeError("its channels have more than 8 bits and lie in separate planes, which is not read: write them pixel by pixel")
        if self._value(found, 259) in (6, 7):  # JPEG inside
            scans = self.data.count(b"\xff\xda")
            stored = sum(self._values(found, 279)) + sum(self._values(found, 325))
            if stored > len(self.data) or scans * max(width * height // parts, tile[0] * tile[1]) > _VISITS + _VISITS_A_BYTE * len(self.data):
                raise DecodeError(f"it has {scans} JPEG scans of {width * height:,} pixels in {len(self.data):,} bytes, which no encoder writes")

    def _table(self, at: int) -> dict[int, tuple[int, int, int]]:
        """Tag -> (type, count, where its value begins)."""
        self._tables += 1
        start, width, inline = (at + 8, 20, 8) if self.large else (at + 2, 12, 4)
        found: dict[int, tuple[int, int, int]] = {}
        for entry in range(start, start + width * min(self._number(at, 8 if self.large else 2), 65_536), width):
            if entry + width > len(self.data):
                break
            tag, kind = self._number(entry, 2), self._number(entry + 2, 2)
            count = self._number(entry + 4, inline)
            size = count * (self._SIZES[kind] if kind < len(self._SIZES) else 0)
            place = entry + width - inline if size <= inline else self._number(entry + width - inline, inline)
            self._bytes += size if place + size <= len(self.data) else 0
            if self._bytes > len(self.data) + (1 << 20):
                raise DecodeError("its tags have more bytes than the file")
            found[tag] = kind, count, place
            if tag in self._INSIDE and self._tables < 8:
                self._table(self._value(found, tag))
        return found

    def _number(self, at: int, size: int) -> int:
        return int.from_bytes(self.data[at : at + size], "little" if self.order == "<" else "big")

    def _value(self, found: dict[int, tuple[int, int, int]], tag: int) -> int:
        return next(iter(self._values(found, tag)), 0)

    def _values(self, found: dict[int, tuple[int, int, int]], tag: int) -> list[int]:
        kind, count, at = found.get(tag, (0, 0, 0))
        size = {3: 2, 4: 4, 13: 4, 16: 8, 18: 8}.get(kind)
        if size is None or at + size > len(self.data):
            return []
        kept = self.data[at : at + size * min(count, _MAX_TILES)]
        return [int(value) for value in np.frombuffer(kept[: len(kept) // size * size], f"{self.order}u{size}")]


# ---- PPM


def _scaled_ppm(data: bytes) -> bytes:
    """Values up to another number than 255 or 65,535 become such: Pillow does it one by one, in Python."""
    header = _PPM_HEADER.match(data, 0, 1 << 16)
    if header is None:
        raise DecodeError("its header is damaged, or longer than 65,536 bytes")
    kind = int(header[1])
    if kind <= 3:
        if len(data) > _MAX_SLOW_BYTES:
            raise DecodeError(f"a plain-text PPM of {len(data):,} bytes, more than the {_MAX_SLOW_BYTES:,} that are allowed")
        return data
    if kind == 4 or header[7] is None:
        return data
    width, height, most = int(header[3][:8]), int(header[5][:8]), int(header[7][:8])
    wide = kind == 5 and most > 255  # Pillow makes 8 bits of colours with more
    if most == (65_535 if wide else 255) or not 0 < most < 65_536:
        return data
    values = np.frombuffer(data[header.end() :][: width * height * (1 if kind == 5 else 3) * (1 if most < 256 else 2)].ljust(1), np.uint8)
    largest = 65_535 if wide else 255
    if most > 255:
        values = values[: len(values) // 2 * 2].view(">u2")
    # As Pillow rounds it: half to even, of the same quotients.
    table = np.minimum(largest, np.rint(np.arange(65_536) / most * largest)).astype(">u2" if wide else np.uint8)
    return b"P%d\n%d %d\n%d\n" % (kind, width, height, largest) + table[values].tobytes()
