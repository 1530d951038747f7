"""Each row of the table in docs/data.md, against Pillow; values of more than 8 bits; transparency; the eight orientations."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features
from tiny_images import encoded, pixels
from wide_images import saved, wide_png, wide_tiff

from dtl.data.decoding.decode import DecodeError, bounds_of, crop_jpeg, decode, native, pixels_of, probe, stored_region, turned
from dtl.data.decoding.decode import Region as Region
from dtl.reading import Reading

LOW, HIGH = 500.0, 60_000.0
NOW = Reading((LOW, HIGH), exif=True, alpha=True)
RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 65_536, (24, 32, 4)).astype(np.uint16)
PAGE = (Path(__file__).resolve().parents[4] / "docs/data.md").read_text()
ROWS = re.findall(r"^\| (JPEG|PNG|TIFF|WebP|GIF|BMP|PPM|AVIF|HEIC|JPEG XL) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE)
PLUGINS = {"HEIC": "pillow_heif", "JPEG XL": "pillow_jxl"}
PILLOWS = {"HEIC": "HEIF", "JPEG XL": "JXL"}
CASES = [(kind, mode, done) for kind, modes, done in ROWS for mode in modes.split(", ")]


def file_of(kind: str, mode: str) -> bytes:
    """A file of one row."""
    gray = WIDE[..., 0]
    match kind, mode.removesuffix("+"):
        case ("PNG", "I;16" | "RGB;16" | "LA;16" | "RGBA;16"):
            return wide_png(WIDE[..., : {"I;16": 1, "LA;16": 2, "RGB;16": 3, "RGBA;16": 4}[mode]])
        case ("TIFF", "RGB;16" | "RGBA;16"):
            return wide_tiff(WIDE[..., : 3 if mode == "RGB;16" else 4])
        case ("TIFF", "I;16B"):
            return saved(gray.astype(">u2"), "TIFF")
        case (_, "I;16"):
            return saved(gray, kind)
        case ("PPM", "I"):
            return b"P5\n32 24\n65535\n" + gray.astype(">u2").tobytes()
        case (_, "I"):
            return saved(gray.astype(np.int32), kind)
        case (_, "F"):
            return saved(gray.astype(np.float32), kind)
        case (_, "P") if mode.endswith("+"):
            return encoded(kind, mode="P", transparency=3 if kind == "GIF" else bytes(range(256)))
        case (_, "L" | "RGB" as plain) if mode.endswith("+"):
            image = Image.fromarray(pixels()).convert(plain)
            return encoded(kind, mode=plain, transparency=image.getpixel((3, 4)))
        case (_, "PA"):
            image = Image.fromarray(RNG.integers(0, 256, (24, 32, 4)).astype(np.uint8)).convert("LA").convert("PA")
            buffer = io.BytesIO()
            image.save(buffer, kind)
            return buffer.getvalue()
        case (_, "LA" | "RGBA"):
            return saved(RNG.integers(0, 256, (24, 32, 4)).astype(np.uint8), kind, mode, **({"lossless": True} if kind == "WebP" else {}))
        case _:
            return encoded(kind, mode=mode)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def converted(data: bytes) -> np.ndarray:
    return np.asarray(opened(data).convert("RGB"))


def composed(image: Image.Image) -> np.ndarray:
    image = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def lab(data: bytes) -> np.ndarray:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(opened(data), *profiles, outputMode="RGB"))


def scaled(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint((values.astype(np.float64) - LOW) * (255 / (HIGH - LOW))), 0, 255).astype(np.uint8)


def scaled_of(data: bytes) -> np.ndarray:
    image = opened(data)
    values = WIDE[..., :3] if image.mode == "RGB" else np.asarray(image)[..., None].repeat(3, axis=2)
    return scaled(values)


def scaled_and_composed(data: bytes) -> np.ndarray:
    alpha = 1 if data[25] == 4 and data[1:4] == b"PNG" else 3
    eight = np.concatenate([scaled(WIDE[..., :alpha]), (WIDE[..., alpha:][..., :1] >> 8).astype(np.uint8)], axis=2)
    return composed(Image.fromarray(eight))


DONE: dict[str, Callable[[bytes], np.ndarray]] = {
    "as Pillow converts it to RGB": converted,
    "composed on white": lambda data: composed(opened(data)),
    "from CIELAB to sRGB, as Pillow's ImageCms converts it": lab,
    "scaled by data.range": scaled_of,
    "scaled by data.range, composed on white": scaled_and_composed,
}


def test_the_table_has_its_rows() -> None:
    assert len(CASES) > 50
    values = WIDE[..., :3]
    for row, array in (("uint8 [H, W, 3] | as it is", values.astype(np.uint8)), ("other numbers | scaled by data.range", values)):
        assert f"| NumPy (`.npy`) | {row} |" in PAGE
        np.testing.assert_array_equal(decode(npy(array), reading=NOW), array if array.dtype == np.uint8 else scaled(array))
    assert {done for _, _, done in CASES} == set(DONE)


@pytest.mark.parametrize(("kind", "mode", "done"), CASES)
def test_each_row_of_the_table(kind: str, mode: str, done: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if kind in PILLOWS:
        plugin = pytest.importorskip(PLUGINS[kind], reason=f"Pillow reads {kind} only with a plugin, which is not installed (.ci/run installs it at its end)")
        if kind == "HEIC":
            plugin.register_heif_opener()
    data = file_of(PILLOWS.get(kind, kind), mode)
    header, plain = probe(data), mode.removesuffix("+")
    assert header.format == PILLOWS.get(kind, kind.upper())
    if ";16" not in mode and not (kind == "GIF" or plain == "I"):
        assert header.mode == plain
    assert header.wide == done.startswith("scaled")
    np.testing.assert_array_equal(decode(data, reading=NOW), DONE[done](data))


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_colours_of_16_bits_keep_all_of_them(order: str, deflated: bool) -> None:
    values = WIDE[..., :3]
    for data in (wide_png(values), wide_tiff(values, order=order, deflated=deflated)):
        found = decode(data, reading=Reading((256.0, 511.0)))
        np.testing.assert_array_equal(found, np.clip(values.astype(int) - 256, 0, 255))
        np.testing.assert_array_equal(decode(data), values >> 8)  # a model of before: the upper byte, as Pillow reads them
    with pytest.raises(DecodeError, match="separate planes"):
        decode(wide_tiff(values, order=order, deflated=deflated, planes=True), reading=NOW)


def test_gray_of_16_bits_without_a_range_is_refused_and_0_to_255_is_what_it_was() -> None:
    data = wide_png(WIDE[..., :1])
    with pytest.raises(DecodeError, match=r"data\.range"):
        decode(data)
    np.testing.assert_array_equal(decode(data, reading=Reading((0.0, 255.0))), np.minimum(WIDE[..., :1], 255).repeat(3, axis=2))


def test_the_bounds_leave_out_hot_pixels_and_what_is_no_number() -> None:
    sensor = RNG.integers(100, 4096, (200, 100)).astype(np.uint16)
    sensor[0, 0], sensor[5, 5], sensor[7, 7], sensor[8, 8] = 65_535, 0, 100, 4095
    assert bounds_of(wide_png(sensor))[1] < 65_535
    assert bounds_of(wide_png(sensor[:40, :40])) == (0, 65_535), "of few pixels each counts"
    floats = RNG.random((20, 20)).astype(np.float32)
    floats[0, :2] = np.nan, np.inf
    assert bounds_of(saved(floats, "TIFF")) == (np.nanmin(floats), floats[np.isfinite(floats)].max())
    assert decode(saved(floats, "TIFF"), reading=Reading((0.0, 1.0)))[0, :2, 0].tolist() == [0, 255]
    assert not decode(saved(np.full((3, 3), 7, np.uint16), "PNG"), reading=Reading((7.0, 7.0))).any()
    with pytest.raises(DecodeError, match="finite"):
        bounds_of(saved(np.full((3, 3), np.nan, np.float32), "TIFF"))
    alpha = WIDE[:50].copy()
    alpha[..., :3] = 1000
    assert bounds_of(wide_png(alpha)) == (1000, 1000), "transparency is no brightness"


def test_large_images_are_the_same_in_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [file_of(kind, mode) for kind, mode, _ in CASES if kind in ("PNG", "TIFF")]
    whole = [decode(data, reading=NOW) for data in files]
    monkeypatch.setattr("dtl.data.decoding.decode._LARGE", 10)
    monkeypatch.setattr("dtl.data.decoding.decode._STRIPE", 100)
    for data, expected in zip(files, whole, strict=True):
        np.testing.assert_array_equal(decode(data, reading=NOW), expected)


# ---- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "TIFF", "AVIF"])
def test_all_eight_orientations_are_pillows(kind: str, orientation: int) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WebP" else {}
    data = encoded(kind, height=21, width=34, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(opened(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data, reading=NOW), expected)
    np.testing.assert_array_equal(pixels_of(opened(data), reading=NOW), expected)
    header = probe(data)
    assert header.turned_size == (expected.shape[1], expected.shape[0])
    assert kind == "TIFF" or header.orientation == orientation
    if kind != "TIFF":  # Pillow turns those by itself
        np.testing.assert_array_equal(decode(data), converted(data))
    np.testing.assert_array_equal(decode(data, reading=NOW, turn=1), decode(data))


@pytest.mark.parametrize("bad", [b"", b"II", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01\0\0\0\x09\0\0\0", b"MM\0*\0\0\0\x08\0"])
def test_damaged_exif_says_nothing(bad: bytes) -> None:
    assert probe(encoded(exif=b"Exif\0\0" + bad)).orientation == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reduction", [1, 2, 8])
def test_a_rectangle_of_the_turned_image_is_found_in_the_stored_one(orientation: int, reduction: int) -> None:
    data = encoded(height=107, width=150)
    stored = decode(data, reduction)
    whole = turned(stored, orientation)
    height, width = (150, 107) if orientation >= 5 else (107, 150)
    for _ in range(10):
        top, left = RNG.integers(0, whole.shape[0] - 3), RNG.integers(0, whole.shape[1] - 3)
        high, wide = RNG.integers(1, whole.shape[0] - top + 1), RNG.integers(1, whole.shape[1] - left + 1)
        region = Region(reduction, int(top), int(left), int(high), int(wide))
        _, t, le, h, w = stored_region(region, orientation, height=height, width=width)
        expected = whole[top : top + high, left : left + wide]
        np.testing.assert_array_equal(turned(stored[t : t + h, le : le + w], orientation), expected)
        if native().on:
            crop = crop_jpeg(data, region, height=height, width=width, turn=orientation)
            assert crop is not None
            np.testing.assert_array_equal(crop, expected)


# ---- other numbers of channels


def npy(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def stack(*pages: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    first, *others = (Image.fromarray(page) for page in pages)
    first.save(buffer, "TIFF", save_all=True, append_images=others)
    return buffer.getvalue()


def test_arrays_and_pages_are_channels() -> None:
    eight = RNG.integers(0, 256, (20, 30, 5)).astype(np.uint8)
    five = Reading((LOW, HIGH), channels=5)
    for values in (eight, np.asfortranarray(eight), np.ascontiguousarray(eight.transpose(2, 0, 1))):
        np.testing.assert_array_equal(decode(npy(values), reading=five), eight)
        assert (probe(npy(values)).width, probe(npy(values)).height, probe(npy(values)).wide) == (30, 20, False)
    np.testing.assert_array_equal(decode(npy(eight[..., 0]), reading=Reading(channels=1)), eight[..., :1])
    np.testing.assert_array_equal(decode(npy(eight[..., :3])), eight[..., :3])
    np.testing.assert_array_equal(decode(stack(*(eight[..., channel] for channel in range(5))), reading=five), eight)
    for kind in ("<u2", ">u2", "<i4", "<f4", "<f8"):
        values = WIDE.astype(kind)
        np.testing.assert_array_equal(decode(npy(values), reading=Reading((LOW, HIGH), channels=4)), scaled(WIDE))
        assert probe(npy(values)).wide
        assert bounds_of(npy(values)) == (WIDE.min(), WIDE.max())
    pages = stack(*(WIDE[..., channel] for channel in range(4)))
    np.testing.assert_array_equal(decode(pages, reading=Reading((LOW, HIGH), channels=4)), scaled(WIDE))
    np.testing.assert_array_equal(decode(pages, reading=NOW), scaled(WIDE[..., :1]).repeat(3, axis=2), "the first page counts")
    assert bounds_of(pages) == (WIDE.min(), WIDE.max())
    assert bounds_of(stack(WIDE[..., 0], WIDE[:5, :5, 0])) == (WIDE[..., 0].min(), WIDE[..., 0].max()), "no channels of one image"


def test_gray_and_alpha_as_channels() -> None:
    data = saved(RNG.integers(0, 256, (24, 32, 4)).astype(np.uint8), "PNG", "RGBA")
    np.testing.assert_array_equal(decode(data, reading=Reading(alpha=True, channels=4)), np.asarray(opened(data)))
    gray = np.asarray(Image.fromarray(composed(opened(data))).convert("L"))
    np.testing.assert_array_equal(decode(data, reading=Reading(alpha=True, channels=1)), gray[..., None])
    np.testing.assert_array_equal(decode(wide_png(WIDE), reading=Reading((LOW, HIGH), channels=4)), scaled(WIDE))
    jpeg = encoded("JPEG", mode="L", height=40, width=60)
    np.testing.assert_array_equal(decode(jpeg, reading=Reading(channels=1))[..., 0], np.asarray(opened(jpeg)))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded("PNG", mode="RGBA", height=24, width=32, exif=exif), reading=Reading(exif=True, channels=4)).shape == (32, 24, 4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.zeros((66, 66, 65), np.uint8)), "images have 1 to 64 channels"),
        (npy(np.zeros((4, 4), "<U3")), "which is no image"),
        (npy(np.zeros((4, 4), bool)), "which is no image"),
        (npy(np.zeros((4, 4), complex)), "which is no image"),
        (npy(np.zeros((2, 2, 2, 2), np.uint8)), "which is no image"),
        (npy(np.array([[None]]), allow_pickle=True), "which is no image"),
        (npy(np.zeros((4, 4), [("a", "u1")])), "which is no image"),
        (npy(np.zeros((0, 4, 3), np.uint8)), "images have 1 to 64 channels"),
        (npy(np.zeros((40, 40), np.uint8))[:-1], "which is not what its header says"),
        (npy(np.zeros((40, 40), np.uint8)) + b"x", "which is not what its header says"),
        (npy(np.zeros((40, 40), np.uint8)).replace(b"(40, 40)", b"(99999,9)"), "a side longer than|a damaged NumPy file"),
        (npy(np.zeros((40, 40), np.uint8))[:30], "a damaged NumPy file"),
        (b"\x93NUMPY\x09\0" + bytes(100), "a damaged NumPy file"),
        (b"\x93NUMPY\x02\0\xff\xff\xff\x7f" + bytes(100), "a damaged NumPy file"),
        (stack(*(np.zeros((4, 4), np.uint8) for _ in range(65))), "it has 65 pages of 4 x 4 pixels"),
        (encoded("PNG"), "it has 3 channels, and data.channels is 5"),
        (npy(np.zeros((9, 9, 5), np.uint16)), r"its values are uint16, and there is no range for them: data\.range"),
    ],
)
def test_what_is_no_image_of_so_many_channels_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode(data, reading=Reading(channels=5))
