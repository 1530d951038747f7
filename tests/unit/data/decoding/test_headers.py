"""What an image file may ask for: bombs are refused before a decoder sees them, and no pixel of an honest image changes."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from dtl.config.models import DataConfig
from dtl.data.decoding import decode as decoding
from dtl.data.decoding import headers
from dtl.data.decoding.decode import DecodeError, decode, decode_with_pillow, probe
from dtl.data.decoding.headers import MAX_PIXELS, MAX_SIDE, check_jpeg, lean, without_exif
from dtl.reading import Reading

EIGHT_BITS = Reading((0.0, 255.0))  # what ImageFolder makes of 16 bits


def picture(height: int = 40, width: int = 56) -> Image.Image:
    rows, columns = np.indices((height, width))
    return Image.fromarray(np.stack([rows * 3, columns * 2, rows * columns % 251], axis=2).astype(np.uint8))


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    (image or picture()).save(out, kind, **options)
    return out.getvalue()


def pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def refused(data: bytes, reason: str, **options: int) -> None:
    begun = time.process_time()
    for read in (probe, decode):
        with pytest.raises(DecodeError, match=reason):
            read(data, **options)  # type: ignore[operator]
    assert time.process_time() - begun < 4


def test_the_limit_of_the_config_is_the_one_of_the_decoders() -> None:
    assert DataConfig().max_pixels == MAX_PIXELS


# ---- JPEG


def _scans(data: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan comes `count` times."""
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def test_a_jpeg_of_many_scans() -> None:
    progressive = encoded("JPEG", progressive=True)
    np.testing.assert_array_equal(decode(progressive), pillow(progressive))
    refused(_scans(progressive, 2000), "more than 100 scans")
    # Not progressive, but one scan for each component, and then again.
    huge = bytearray(_scans(progressive, 80))
    at = huge.index(b"\xff\xc2") + 5
    huge[at : at + 4] = struct.pack(">HH", 12_000, 12_000)
    refused(bytes(huge), r"8\d scans of 144,000,000 pixels in .* bytes, which no camera or encoder writes")


def test_a_jpeg_of_much_metadata() -> None:
    plain = encoded("JPEG")
    exif = segment(0xE1, b"Exif\0\0" + bytes(65_000))
    some = plain[:2] + exif * 100 + plain[2:]
    begun = time.process_time()
    np.testing.assert_array_equal(decode_with_pillow(some), pillow(plain))
    assert without_exif(some) == plain
    assert time.process_time() - begun < 2
    refused(plain[:2] + exif * 600 + plain[2:], "its header has 39,.* bytes, more than the 33,554,432 that are allowed")
    refused(plain[:2] + segment(0xFE, b"") * 20_000 + plain[2:], "more than 10,000 segments")
    filled = plain[:2] + b"\xff" * (1 << 24) + plain[2:]
    np.testing.assert_array_equal(decode(filled), pillow(plain))


def test_exif_with_tags_that_are_all_the_same_bytes() -> None:
    """Pillow reads them when it opens a JPEG, each a copy."""
    tags = b"".join(struct.pack("<HHII", 0x9000 + number, 7, 60_000, 8) for number in range(4000))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 4000) + tags
    plain = encoded("JPEG")
    np.testing.assert_array_equal(decode_with_pillow(plain[:2] + segment(0xE1, exif + bytes(10_000)) + plain[2:]), pillow(plain))


# ---- the others


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_png_text_and_profiles_do_not_count() -> None:
    plain = encoded("PNG")
    bomb = zlib.compress(bytes(1 << 26), 9)
    for kind, content in [(b"zTXt", b"k\0\0" + bomb), (b"iCCP", b"k\0\0" + bomb), (b"iTXt", b"k\0\1\0\0\0" + bomb), (b"tEXt", b"k\0" + bytes(1 << 20))]:
        with_it = plain[:33] + _chunk(kind, content) * 3 + plain[33:]
        assert lean(with_it) == plain
        np.testing.assert_array_equal(decode(with_it), pillow(plain))
    refused(plain[:33] + _chunk(b"tEXt", b"") * 50_000 + plain[33:], r"more than 10,\d+ chunks")


def test_gif_comments_do_not_count() -> None:
    image = picture().convert("P")
    plain = encoded("GIF", image, transparency=3)
    at = 13 + (3 << ((plain[10] & 7) + 1))
    comment = b"!\xfe" + (b"\xff" + bytes(255)) * 4000 + b"\0"
    with_it = plain[:at] + comment + plain[at:]
    assert len(lean(with_it)) <= len(plain)
    np.testing.assert_array_equal(decode(with_it), pillow(plain))
    refused(plain[:at] + comment * 5 + plain[at:], "bytes before its first picture")


@pytest.mark.parametrize("lossless", [True, False])
def test_a_webp_has_half_of_the_pixels(lossless: bool) -> None:
    data = encoded("WEBP", lossless=lossless)
    pixels = 40 * 56
    assert decode(data, max_pixels=2 * pixels).shape == (40, 56, 3)
    refused(data, r"for WebP \(half of data.max_pixels\)", max_pixels=2 * pixels - 2)
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + (12_999).to_bytes(3, "little") * 2
    huge = b"RIFF" + struct.pack("<I", len(data) + 10) + b"WEBP" + canvas + data[12:]
    refused(huge, "13000 x 13000 pixels, more than the 89,478,485 that are allowed for WebP")


def _tiff(entries: list[tuple[int, int, int, int]], after: bytes = b"") -> bytes:
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + bytes(4) + after


_SMALL = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, 64)]


def test_tiffs_that_ask_for_more_than_they_have() -> None:
    refused(_tiff([*_SMALL, *((40_000 + n, 7, 1 << 20, 100) for n in range(5000))], bytes(1 << 20)), "its tags have more bytes than the file")
    inner = struct.pack("<H", 5000) + b"".join(struct.pack("<HHII", 40_000 + n, 7, 1 << 20, 100) for n in range(5000))
    outer = _tiff([*_SMALL, (34665, 4, 1, 10 + 12 * 9 + 4)], inner + bytes(1 << 20))
    refused(outer, "its tags have more bytes than the file")
    refused(_tiff([*_SMALL, (322, 4, 1, 60_000), (323, 4, 1, 60_000)]), "its tiles have 60000 x 60000 pixels")
    refused(_tiff([(256, 4, 1, 50_000), (257, 4, 1, 50_000)]), "50000 x 50000 pixels, more than")
    refused(_tiff([*_SMALL, (273, 4, 2_000_000, 10)], bytes(9 << 20)), "2,000,000 strips or tiles")
    scans = [(256, 4, 1, 10_000), (257, 4, 1, 10_000), (259, 3, 1, 7), (273, 4, 1, 200), (279, 4, 1, 100)]
    refused(_tiff(scans, b"\xff\xda\0\x08" * 100), "100 JPEG scans of 100,000,000 pixels")


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_deflate"}, {"compression": "jpeg"}, {"compression": "tiff_lzw", "big_tiff": True}])
def test_honest_tiffs(options: dict[str, object]) -> None:
    data = encoded("TIFF", **options)
    np.testing.assert_array_equal(decode(data), pillow(data))


def test_slow_decoders_get_few_bytes() -> None:
    rle = bytearray(encoded("BMP", picture().convert("P")))
    rle[30] = 1
    refused(bytes(rle) + bytes(9 << 20), "a run-length BMP of .* bytes, more than")
    refused(b"P3\n2000 2000\n255\n" + b"1 " * (5 << 20), "a plain-text PPM of .* bytes, more than")
    refused(b"P5\n#" + b"x" * (1 << 20) + b"\n1 1\n255\n\0", "its header is damaged, or longer than 65,536 bytes")


@pytest.mark.parametrize(
    ("kind", "most", "bands"), [("P5", 100, 1), ("P6", 100, 3), ("P5", 1023, 1), ("P6", 4095, 3), ("P5", 65_535, 1), ("P6", 65_535, 3), ("P6", 255, 3)]
)
def test_ppm_of_another_range_has_pillows_pixels(kind: str, most: int, bands: int) -> None:
    values = np.random.default_rng(0).integers(0, most + 1, 12 * 9 * bands)
    data = f"{kind}\n# a comment\n12 9\n{most}\n".encode() + values.astype(">u2" if most > 255 else np.uint8).tobytes()
    np.testing.assert_array_equal(decode(data, reading=EIGHT_BITS), pillow(data))
    with pytest.raises(DecodeError):
        decode(data[:-1], reading=EIGHT_BITS)


# ---- large ones, and all


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "LA"])
def test_large_images_are_converted_in_stripes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture().convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 3)
    data = encoded("TIFF", image)
    whole = decode_with_pillow(data, reading=EIGHT_BITS)
    monkeypatch.setattr(decoding, "_LARGE", 0)
    monkeypatch.setattr(decoding, "_STRIPE", 7 * 56)
    np.testing.assert_array_equal(decode_with_pillow(data, reading=EIGHT_BITS), whole)
    np.testing.assert_array_equal(whole, pillow(data))


def test_more_pixels_than_pillow_allows_where_the_config_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(encoded("PNG"), max_pixels=2240).shape == (40, 56, 3)
    refused(encoded("PNG"), "40 pixels, more than the 2,239 that are allowed", max_pixels=2239)
    refused(encoded("JPEG"), "40 pixels, more than the 2,239 that are allowed", max_pixels=2239)


def test_no_real_image_is_refused(real_images: Path) -> None:
    files = [path for path in sorted(real_images.rglob("*")) if path.suffix in (".jpg", ".png")]
    assert len(files) > 100
    for path in files:
        data = path.read_bytes()
        lean(data)
        if data[:2] == b"\xff\xd8":
            assert check_jpeg(data).scan < len(data)
    for path in files[:: len(files) // 40]:
        np.testing.assert_array_equal(decode(path.read_bytes()), pillow(path.read_bytes()))


# ---- AVIF, HEIC, JPEG XL


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_an_avif_is_refused_by_the_sizes_in_its_header() -> None:
    data = encoded("AVIF")
    assert lean(data) == data
    for size, reason in (
        ((60_000, 60_000), "60000 x 60000 pixels, more than the 178,956,970"),
        ((20_000, 8_000), r"20000 x 8000 pixels, more than the 89,478,485 that are allowed for AVIF \(half of data.max_pixels\)"),
        ((70_000, 10), "a side longer than"),
    ):
        at = data.index(b"ispe") + 8
        refused(data[:at] + struct.pack(">II", *size) + data[at + 8 :], reason)
    refused(data.replace(b"ispe", b"free"), "a damaged AVIF: its header says no size")
    refused(data.replace(b"ipco", b"free"), "a damaged AVIF: its header says no size")
    many = struct.pack(">I4s", 8, b"free") * 10_001
    refused(data[:32] + many + data[32:], "more than 10,000 boxes")


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ([(1, 1), (8, 5), (1, 3)], (72, 72)),  # eights, square
        ([(1, 1), (1, 5), (0, 3), (4, 5)], (40, 16)),
        ([(0, 1), (0, 2), (256, 9), (0, 3), (0, 2), (291, 9)], (292, 257)),
        ([(0, 1), (2, 2), (131_072, 18), (5, 3)], (233_018, 131_073)),  # 16:9
        ([(0, 1), (3, 2), ((1 << 30) - 1, 30), (1, 3)], (1 << 30, 1 << 30)),
    ],
)
def test_the_size_of_a_jpeg_xl(fields: list[tuple[int, int]], size: tuple[int, int]) -> None:
    """(value, number of bits), the lowest bit first."""
    number = place = 0
    for value, width in fields:
        number, place = number | value << place, place + width
    stream = b"\xff\x0a" + number.to_bytes(16, "little")
    assert headers._jxl_size(stream) == size
    boxed = b"\0\0\0\x0cJXL \r\n\x87\n" + struct.pack(">I4s", 8, b"ftyp") + struct.pack(">I4s", 8 + len(stream), b"jxlc") + stream
    assert headers._jxl_size(boxed) == size
    if max(size) > MAX_SIDE:
        with pytest.raises(DecodeError, match=r"pixels, more than the 178,956,970 that are allowed"):
            lean(boxed)
    with pytest.raises(DecodeError, match="a damaged JXL: its header says no size"):
        lean(boxed[:20])
