"""Image files whose values have more than 8 bits, which Pillow does not write: PNG and TIFF of 16 bits a colour."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


def wide_png(values: np.ndarray) -> bytes:
    """uint16 [H, W] or [H, W, 1 to 4]."""
    values = values[..., None] if values.ndim == 2 else values
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def wide_tiff(values: np.ndarray, *, order: str = "<", deflated: bool = False, planes: bool = False) -> bytes:
    """uint16 [H, W, 3 or 4], the fourth channel alpha; little-endian or big-endian, pixel by pixel or in separate planes."""
    height, width, channels = values.shape
    stored = values.astype(f"{order}u2")
    strips = [stored[..., channel].tobytes() for channel in range(channels)] if planes else [stored.tobytes()]
    strips = [zlib.compress(strip) for strip in strips] if deflated else strips
    out = bytearray(b"II*\0" if order == "<" else b"MM\0*") + bytes(4)
    places = []
    for strip in strips:
        places.append(len(out))
        out += strip + bytes(len(strip) % 2)
    tags: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [16] * channels), 259: ("H", [8 if deflated else 1]), 262: ("H", [2]), 273: ("I", places),
        277: ("H", [channels]), 278: ("I", [height]), 279: ("I", [len(strip) for strip in strips]), 284: ("H", [2 if planes else 1]),
        **({338: ("H", [2])} if channels == 4 else {}),
    }  # fmt: skip
    entries = b""
    for tag, (kind, numbers) in tags.items():
        value = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(value) > 4:
            value, out = struct.pack(f"{order}I", len(out)), out + value
        entries += struct.pack(f"{order}HHI", tag, 3 if kind == "H" else 4, len(numbers)) + value.ljust(4, b"\0")
    out[4:8] = struct.pack(f"{order}I", len(out))
    return bytes(out + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


def saved(values: np.ndarray, kind: str, mode: str | None = None, **options: Any) -> bytes:
    """As Pillow writes it."""
    buffer = io.BytesIO()
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()
