"""Image bytes to pixels: exactly those of torchvision's ImageFolder, `PIL.Image.open(f).convert("RGB")`.

So EXIF orientation is not applied, alpha is dropped, and the first frame of an animation is used: pretrained networks were trained on these
pixels. No torch here: the processes of `dtl pack` do not import it.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from dtl.data.decoding.headers import MAX_PIXELS, check_jpeg, check_size, lean
from dtl.data.decoding.headers import DecodeError as DecodeError

# What is recognised, by content; a file's name does not matter. PPM is here because ImageFolder reads it too.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
NO_MEMORY = "there is not enough memory to decode it"
"""What to report of a MemoryError here, which says nothing about the image."""
# Larger ones are converted in stripes, so that they do not take three times their memory.
_LARGE = 1 << 24
_STRIPE = 1 << 20


@dataclass(frozen=True)
class ImageHeader:
    """An image's header: size in pixels without EXIF orientation, `format` (one of FORMATS), Pillow's `mode` (RGB, L, P, CMYK ...)."""

    width: int
    height: int
    format: str
    mode: str


def probe(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Read the header only. Raises DecodeError if the bytes are not an image, or it is too large (`check_size`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(data, max_pixels) as image:
            # A phone's MPO is a JPEG with more pictures behind it; the first one counts.
            name = "JPEG" if image.format == "MPO" else str(image.format)
            return ImageHeader(width=image.width, height=image.height, format=name, mode=image.mode)


def decode(data: bytes, reduction: int = 1, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Pixels, uint8 [H, W, 3]. Raises DecodeError if the image is truncated, unknown, or too large (`check_size`); MemoryError says nothing about it.

    With a `reduction` of 2, 4 or 8 a JPEG comes at that fraction of its size, rounded up; everything else, CMYK too, is decoded at full size.
    """
    pixels = decode_jpeg(data, reduction, max_pixels=max_pixels)
    if pixels is None:
        pixels = decode_with_pillow(data, max_pixels)
        # What Pillow lets pass is reduced like any other, so that damage outside of a crop does not change the crop's pixels.
        reduced = decode_jpeg(data, reduction, strict=False, max_pixels=max_pixels) if reduction > 1 else None
        pixels = pixels if reduced is None else reduced
    return pixels


def decode_jpeg(data: bytes, reduction: int = 1, *, strict: bool = True, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8] | None:
    """Pixels [H, W, 3] of a JPEG that libjpeg decodes without a warning, or None: then use Pillow.

    simplejpeg 1.9 was bit-equal to Pillow 13 for gray and for every chroma subsampling, baseline and progressive, and for JPEGs stored
    as RGB; for CMYK it differed by 1, so Pillow decodes those. `strict` refuses whatever libjpeg warns about, such as stray bytes before
    a marker, which ImageFolder reads; such images exist in ImageNet, and Pillow's pixels are then the right ones.
    """
    if data[:2] != b"\xff\xd8":
        return None
    check_jpeg(data, max_pixels)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace in ("CMYK", "YCCK"):
            return None
        # libjpeg's smallest size that is not below these; without them, the whole image.
        least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)} if reduction > 1 else {}
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", strict=strict, **least)
        return pixels
    except ValueError as error:
        if "insufficient memory" in str(error).lower():
            raise MemoryError(NO_MEMORY) from None
        return None


def decode_with_pillow(data: bytes, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, 3] of any of FORMATS."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True: truncated images would decode without an error; set it to False")
    # Pillow warns of odd palettes and metadata; the pixels are the same as ImageFolder's, which is what counts.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(data, max_pixels) as image:
            try:
                return _pixels(image)
            # Broken files reach Pillow's plugins as any of these (struct.error, KeyError ... among them).
            except Exception as error:
                raise _failure(error) from error


def pixels_of(image: Image.Image, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, 3] of an image that Pillow has opened: the same as `decode` gives of its file. DecodeError if it is damaged or too large."""
    check_size(image.width, image.height, max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _pixels(image)
        except Exception as error:
            raise _failure(error) from error


def is_plain_jpeg(data: bytes, max_pixels: int = MAX_PIXELS) -> bool:
    """A JPEG with a complete header, in RGB, YCbCr or gray: what GPUs decode."""
    try:
        if data[:2] == b"\xff\xd8":
            check_jpeg(data, max_pixels)
        return data[:2] == b"\xff\xd8" and simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK")
    except (ValueError, DecodeError):
        return False


def _pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.width * image.height <= _LARGE:
        return np.asarray(image.convert("RGB"))
    image.load()
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIPE // image.width)
    for top in range(0, image.height, rows):
        stripe = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = np.asarray(stripe.convert("RGB"))
    return pixels


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise DecodeError("the file is empty (0 bytes)")
    data = lean(data, max_pixels)
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses twice as many, and has no other setting for it
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise DecodeError(f"not an image ({look(data)})") from None
    except Image.DecompressionBombError as error:
        raise DecodeError(f"too many pixels: {error}") from None
    except Exception as error:
        raise _failure(error) from error
    check_size(image.width, image.height, max_pixels)
    return image


def _failure(error: Exception) -> Exception:
    """What to raise for an error of a decoder."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text:
        return MemoryError(NO_MEMORY)
    return DecodeError(text or type(error).__name__)


def look(data: bytes) -> str:
    """What the bytes seem to be, for the message."""
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if start.startswith((b"<?xml", b"<svg")):
        return "XML or SVG"
    if data[4:8] == b"ftyp":
        return _media(data)
    for at, magic, name in _MAGIC:
        if data[at : at + len(magic)] == magic:
            return name
    if data[:2] == b"\xff\xd8" or data[:8] == b"\x89PNG\r\n\x1a\n":
        return "its header is damaged"
    printable = sum(9 <= byte <= 13 or 32 <= byte < 127 for byte in data[:256])
    return "text" if printable == len(data[:256]) else "unknown format"


def _media(data: bytes) -> str:
    """What the brand of an ISO media file says; that of pictures in general leaves it to those that it is compatible with."""
    brand, brands = data[8:12], data[8 : max(12, min(int.from_bytes(data[:4], "big"), 256))]
    if brand in (b"avif", b"avis") or (brand in (b"mif1", b"msf1") and b"avif" in brands):
        return f"AVIF{_CONVERT}"
    if brand[:3] in (b"hei", b"hev", b"mif", b"msf"):
        return f"HEIC{_CONVERT}"
    if brand == b"crx ":
        return f"a camera's raw image (CR3){_CONVERT}"
    return "a QuickTime video" if brand == b"qt  " else "an MP4 video"


_CONVERT = ", which has to be converted first"
_MAGIC = (
    (0, b"\0\0\0\x0cjP  ", f"JPEG 2000{_CONVERT}"),
    (0, b"\xff\x4f\xff\x51", f"JPEG 2000{_CONVERT}"),
    (0, b"\0\0\0\x0cJXL ", f"JPEG XL{_CONVERT}"),
    (0, b"\xff\x0a", f"JPEG XL{_CONVERT}"),
    (0, b"8BPS", f"a Photoshop file{_CONVERT}"),
    (0, b"\x76\x2f\x31\x01", f"OpenEXR{_CONVERT}"),
    (0, b"\0\0\1\0", f"an icon (ICO){_CONVERT}"),
    (0, b"qoif", f"QOI{_CONVERT}"),
    (0, b"FUJIFILMCCD-RAW", f"a camera's raw image (RAF){_CONVERT}"),
    (128, b"DICM", f"DICOM{_CONVERT}"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"PAR1", "Parquet"),
    (0, b"ARROW1", "Arrow"),
    (8, b"AVI ", "an AVI video"),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (0, b"%PDF", "a PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"Rar!", "a rar archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"version https://", "a Git LFS pointer"),
)


# ---- the crop's rectangle of a JPEG, if the native extra (`_jpeg_crop.c`) is built: the same pixels for less work
#
# If it is not built, is switched off (DTL_NATIVE=0) or does not support an image, `crop_jpeg` returns None, and the caller decodes the whole
# image. So a run is the same on machines with and without it.

SWITCH = "DTL_NATIVE"


class Region(NamedTuple):
    """A rectangle of an image that is decoded at 1 / `reduction` (1, 2, 4 or 8) of its size, in pixels of the reduced image."""

    reduction: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Native:
    """Whether the native extra is in use. `summary`: that, and why not; `fault`: it is installed, but cannot be used."""

    on: bool
    summary: str
    fault: bool = False


@functools.cache
def native() -> Native:
    """Checked once in each process, in less than 2 ms."""
    if os.environ.get(SWITCH, "1") == "0":
        return Native(False, f"each crop decodes the whole JPEG: {SWITCH}=0 switches the native extra off")
    try:
        _jpeg_crop = importlib.import_module("dtl.data.decoding._jpeg_crop")
    except ModuleNotFoundError:
        return Native(False, "each crop decodes the whole JPEG: the native extra is not built (docs/data.md, Speed)")
    except ImportError as error:
        return Native(False, f"each crop decodes the whole JPEG: the native extra cannot be loaded ({error})", fault=True)
    if not _agrees():
        return Native(False, "each crop decodes the whole JPEG: the native extra's libjpeg gives different pixels", fault=True)
    number = int(_jpeg_crop.LIBJPEG_TURBO)
    version = f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
    return Native(True, f"only the crop of a JPEG is decoded (native extra, libjpeg-turbo {version})")


def crop_jpeg(data: bytes, region: Region, *, height: int, width: int) -> npt.NDArray[np.uint8] | None:
    """Pixels [region.height, region.width, 3] of a JPEG of [height, width] pixels, or None: then decode and check the whole image.

    None also for other formats, for a JPEG that is damaged before the rectangle's end or cut off, and for one of another size.
    """
    return _crop(data, region, height, width) if data[:2] == b"\xff\xd8" and native().on else None


def _crop(data: bytes, region: Region, height: int, width: int) -> npt.NDArray[np.uint8] | None:
    from dtl.data.decoding import _jpeg_crop

    # Of an image smaller than a block, simplejpeg may choose another fraction that rounds to the same size.
    if region.reduction > 1 and min(height, width) < 8:
        return None
    out = np.empty((region.height, region.width, 3), np.uint8)
    done = _jpeg_crop.crop(data, height, width, region.reduction, region.top, region.left, region.height, region.width, out)
    return out if done else None


def _agrees() -> bool:
    """Compare with simplejpeg: another version of libjpeg may round in another way."""
    height, width = 75, 99
    rows, columns = np.indices((height, width))
    picture = np.stack([rows * 3, columns * 2, (rows * columns) % 251], axis=2).astype(np.uint8)
    for chroma in ("444", "422", "420"):
        data = simplejpeg.encode_jpeg(picture, 90, "RGB", chroma)
        for reduction in (1, 2, 4, 8):
            high, wide = -(-height // reduction), -(-width // reduction)
            whole = simplejpeg.decode_jpeg(data, "RGB", min_height=high, min_width=wide)
            top, left = high // 3, wide // 3
            region = Region(reduction, top, left, high // 2, wide // 2)
            part = _crop(data, region, height, width)
            if part is None or not np.array_equal(part, whole[top : top + region.height, left : left + region.width]):
                return False
    return True
