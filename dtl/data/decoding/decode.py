"""Image bytes to pixels: those of torchvision's ImageFolder, `PIL.Image.open(f).convert("RGB")`, but for what that reads wrongly.

What has more than 8 bits is scaled by one range for all images, which would else be white or black; transparent images are composed on white, and images
stand as their EXIF orientation says: see `Reading`. The first frame of an animation is used. No torch here: the processes of `dtl pack` do not import it.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError, features

from dtl.data.decoding.headers import MAX_PIXELS, array_header, check_jpeg, check_size, container_of, exif_orientation, lean
from dtl.data.decoding.headers import DecodeError as DecodeError
from dtl.reading import AS_BEFORE, BACKGROUND, MAX_CHANNELS, Reading

# What is recognised, by content; a file's name does not matter. PPM is here because ImageFolder reads it too.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "HEIF", "JXL", "NPY")
_ALWAYS = FORMATS[:7]
# Of those that Pillow may need a plugin for: its module and its package.
_PLUGINS = {"AVIF": ("pillow_avif", "pillow-avif-plugin"), "HEIF": ("pillow_heif", "pillow-heif"), "JXL": ("pillow_jxl", "pillow-jxl-plugin")}
T = TypeVar("T")
_ANY_VALUES = Reading(range=(0.0, 1.0))
_NPY = b"\x93NUMPY"
NO_MEMORY = "there is not enough memory to decode it"
"""What to report of a MemoryError here, which says nothing about the image."""
# Larger ones are converted in stripes, so that they do not take three times their memory.
_LARGE = 1 << 24
_STRIPE = 1 << 20


@dataclass(frozen=True)
class ImageHeader:
    """An image's header: size in pixels as stored, `format` (one of FORMATS), Pillow's `mode` (RGB, L, P, CMYK ...)."""

    width: int
    height: int
    format: str
    mode: str
    orientation: int = 1
    """How it is to be turned: EXIF's numbers, 1 to 8."""
    wide: bool = False
    """Its values have more than 8 bits."""

    @property
    def turned_size(self) -> tuple[int, int]:
        """(width, height) as it is to be seen."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def probe(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Read the header only. Raises DecodeError if the bytes are not an image, or it is too large (`check_size`)."""
    if data[:6] == _NPY:
        array = array_header(data, max_pixels)
        return ImageHeader(array.width, array.height, "NPY", f"{array.dtype} x {array.channels}", wide=array.dtype != np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(data, max_pixels) as image:
            # A phone's MPO is a JPEG with more pictures behind it; the first one counts.
            name = "JPEG" if image.format == "MPO" else str(image.format)
            return ImageHeader(image.width, image.height, name, image.mode, _orientation(image, data), image.mode in _WIDE or bool(_raw_modes(image)))


def decode(data: bytes, reduction: int = 1, *, max_pixels: int = MAX_PIXELS, reading: Reading = AS_BEFORE, turn: int | None = None) -> npt.NDArray[np.uint8]:
    """Pixels, uint8 [H, W, C], of the channels of `reading`. Raises DecodeError if the image is truncated, unknown, or too large (`check_size`);
    MemoryError says nothing about it.

    With a `reduction` of 2, 4 or 8 a JPEG comes at that fraction of its size, rounded up; everything else, CMYK too, is decoded at full size.
    `turn`: the orientation that the index has; None: the file's own, where `reading` applies it.
    """
    if reading.channels != 3 or data[:6] == _NPY:
        return _decode_channels(data, reduction, max_pixels, reading, turn)
    pixels = decode_jpeg(data, reduction, max_pixels=max_pixels)
    if pixels is None:
        pixels = decode_with_pillow(data, max_pixels, reading)
        # What Pillow lets pass is reduced like any other, so that damage outside of a crop does not change the crop's pixels.
        reduced = decode_jpeg(data, reduction, strict=False, max_pixels=max_pixels) if reduction > 1 else None
        pixels = pixels if reduced is None else reduced
    if turn is None:
        turn = 1 if not reading.exif else exif_orientation(data) if container_of(data) is None else probe(data, max_pixels).orientation
    return turned(pixels, turn)


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


def decode_with_pillow(data: bytes, max_pixels: int = MAX_PIXELS, reading: Reading = AS_BEFORE) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, 3] of any of FORMATS, not turned."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True: truncated images would decode without an error; set it to False")
    return _opened(data, max_pixels, lambda image: _pixels(image, reading, lambda: _open(data, max_pixels)))


def pixels_of(image: Image.Image, *, max_pixels: int = MAX_PIXELS, reading: Reading = AS_BEFORE) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, 3] of an image that Pillow has opened: the same as `decode` gives of its file. DecodeError if it is damaged or too large."""
    check_size(image.width, image.height, max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = _pixels(image, reading, None)
            turn = image.getexif().get(0x0112, 1) if reading.exif else 1
        except DecodeError:
            raise
        except Exception as error:
            raise _failure(error) from error
    return turned(pixels, turn if turn in range(1, 9) else 1)


def size_of_decoded(data: bytes, max_pixels: int = MAX_PIXELS, *, turn: int = 1) -> tuple[int, int]:
    """(height, width) of the pixels; DecodeError where they cannot be had. Whatever channels and values they have."""
    if data[:6] == _NPY:
        header = probe(data, max_pixels)
        return header.height, header.width
    height, width, _ = decode(data, max_pixels=max_pixels, reading=_ANY_VALUES, turn=turn).shape
    return height, width


def bounds_of(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[float, float]:
    """The least and the greatest value of an image of more than 8 bits, but for the 1 in 10,000 at each end that may be dead or hot pixels of a sensor."""
    if data[:6] == _NPY:
        found = _array(data, max_pixels).ravel()
    else:
        found = _opened(data, max_pixels, lambda image: _without_alpha(image, lambda: _open(data, max_pixels), max_pixels)).ravel()
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        found = found[np.isfinite(found)]
        if not len(found):
            raise DecodeError("none of its values is a finite number")
    left_out = len(found) // _OUTLIERS
    ends = np.partition(found, (left_out, len(found) - 1 - left_out))
    return float(ends[left_out]), float(ends[len(found) - 1 - left_out])


def _opened(data: bytes, max_pixels: int, work: Callable[[Image.Image], T]) -> T:
    """What `work` makes of the file, opened by Pillow. DecodeError where it is damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(data, max_pixels) as image:
            try:
                return work(image)
            except DecodeError:
                raise
            # Broken files reach Pillow's plugins as any of these (struct.error, KeyError ... among them).
            except Exception as error:
                raise _failure(error) from error


# ---- another number of channels than three


def _decode_channels(data: bytes, reduction: int, max_pixels: int, reading: Reading, turn: int | None) -> npt.NDArray[np.uint8]:
    if data[:6] == _NPY:
        return _eight_bits(_of(_array(data, max_pixels), reading.channels), reading)
    if reading.channels == 1:
        colours = decode(data, reduction, max_pixels=max_pixels, reading=replace(reading, channels=3), turn=turn)
        return np.asarray(Image.fromarray(colours).convert("L"))[..., None]
    values = _opened(data, max_pixels, lambda image: _of(_pages(image, lambda: _open(data, max_pixels), max_pixels), reading.channels))
    if turn is None:
        turn = 1 if not reading.exif else probe(data, max_pixels).orientation
    return turned(_eight_bits(values, reading), turn)


def _of(values: npt.NDArray[Any], channels: int) -> npt.NDArray[Any]:
    if values.shape[2] != channels:
        raise DecodeError(f"it has {values.shape[2]} channels, and data.channels is {channels}")
    return values


def _eight_bits(values: npt.NDArray[Any], reading: Reading) -> npt.NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return values
    if reading.range is None:
        raise DecodeError(f"its values are {values.dtype}, and there is no range for them: data.range [LOW, HIGH]")
    return _scaled(values, reading.range)


def _array(data: bytes, max_pixels: int) -> npt.NDArray[Any]:
    """Values [H, W, C] of a NumPy file."""
    header = array_header(data, max_pixels)
    shape = (header.channels, header.height, header.width) if header.first else (header.height, header.width, header.channels)
    values = np.frombuffer(data, header.dtype, offset=header.start).reshape(shape, order="F" if header.fortran else "C")
    return np.ascontiguousarray(np.moveaxis(values, 0, 2) if header.first else values)


def _pages(image: Image.Image, again: Callable[[], Image.Image], max_pixels: int) -> npt.NDArray[Any]:
    """Values [H, W, C]: the pages of a TIFF one behind the other, else the channels of the image as they are."""
    found: list[npt.NDArray[Any]] = []
    pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    if pages > MAX_CHANNELS or pages * image.width * image.height > max_pixels:
        raise DecodeError(
            f"it has {pages} pages of {image.width} x {image.height} pixels, more than the {MAX_CHANNELS} or the data.max_pixels that are allowed"
        )
    for page in range(pages):
        if pages > 1:
            image.seek(page)
        values = _wide_values(image, again) if pages == 1 or image.mode in _WIDE else None
        if values is None:
            plain = image if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") else image.convert("RGB")
            values = np.asarray(plain).reshape(plain.height, plain.width, -1)
        if found and (values.shape != found[0].shape or values.dtype != found[0].dtype):
            raise DecodeError("its pages differ in size or kind")
        found.append(values)
    return found[0] if pages == 1 else np.concatenate(found, axis=2)


def _without_alpha(image: Image.Image, again: Callable[[], Image.Image], max_pixels: int) -> npt.NDArray[Any]:
    """`_pages`; where they are no channels of one image, the first."""
    if getattr(image, "n_frames", 1) > 1:
        try:
            return _pages(image, again, max_pixels)
        except DecodeError:
            image.seek(0)
    values = _wide_values(image, again)
    assert values is not None
    return values[..., : _COLOURS.get(values.shape[2], values.shape[2])]


# ---- orientation


def turned(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """An image [H, W, C] as its EXIF orientation (1 to 8) says; of 5 to 8 height and width change places."""
    if orientation == 1:
        return pixels
    pixels = pixels[:: -1 if orientation in UPSIDE_DOWN else 1, :: -1 if orientation in MIRRORED else 1]
    return np.ascontiguousarray(pixels.transpose(1, 0, 2) if orientation >= 5 else pixels)


def stored_region(region: Region, orientation: int, *, height: int, width: int) -> Region:
    """Where in the stored image the rectangle lies that is `region` of the turned one, of [height, width] pixels at full size."""
    factor, top, left, high, wide = region
    height, width = -(-height // factor), -(-width // factor)
    if orientation >= 5:
        top, left, high, wide, height, width = left, top, wide, high, width, height
    top = height - top - high if orientation in UPSIDE_DOWN else top
    return Region(factor, top, width - left - wide if orientation in MIRRORED else left, high, wide)


UPSIDE_DOWN, MIRRORED = (3, 4, 6, 7), (2, 3, 7, 8)
"""Of which orientations rows or columns are stored in reverse; then, from 5 on, rows are columns."""


def is_plain_jpeg(data: bytes, max_pixels: int = MAX_PIXELS) -> bool:
    """A JPEG with a complete header, in RGB, YCbCr or gray: what GPUs decode."""
    try:
        if data[:2] == b"\xff\xd8":
            check_jpeg(data, max_pixels)
        return data[:2] == b"\xff\xd8" and simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK")
    except (ValueError, DecodeError):
        return False


def _pixels(image: Image.Image, reading: Reading, again: Callable[[], Image.Image] | None) -> npt.NDArray[np.uint8]:
    """`again` opens the file once more."""
    if reading.range is None and image.mode in _WIDE:
        raise DecodeError(
            f"its values have more than 8 bits (mode {image.mode}), and there is no range for them: name the values that become black and white "
            "(data.range [LOW, HIGH]), or pack the training images again"
        )
    values = None if reading.range is None else _wide_values(image, again)
    convert = _composed if reading.alpha else _as_rgb
    image.load()
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = image.height if image.width * image.height <= _LARGE else max(1, _STRIPE // image.width)
    for top in range(0, image.height, rows):
        if values is None:
            stripe = image if rows == image.height else image.crop((0, top, image.width, min(top + rows, image.height)))
        else:
            assert reading.range is not None
            stripe = _of_8_bits(values[top : top + rows], reading.range)
        pixels[top : top + rows] = np.asarray(convert(stripe))
    return pixels


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        from PIL import ImageCms

        transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        return ImageCms.applyTransform(image, transform) or image
    return image.convert("RGB")


def _composed(image: Image.Image) -> Image.Image:
    """In RGB, on white where it is transparent."""
    if not image.has_transparency_data:
        return _as_rgb(image)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (BACKGROUND,) * 4), image).convert("RGB")


# ---- more than 8 bits

_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_OUTLIERS = 10_000
_COLOURS = {2: 1, 4: 3}  # channels -> those that are no alpha
# Pillow has no mode of 16 bits a colour: it keeps the upper byte of each. The name of the other order of bytes makes it keep the lower one.
_LOWER = {
    f"{mode};16{order}": f"{mode};16{'B' if order == 'L' or (order == 'N' and sys.byteorder == 'little') else 'L'}"
    for mode in ("RGB", "RGBA")
    for order in "BLN"
}


def _raw_modes(image: Image.Image) -> set[str]:
    """How the colours lie in the file, where they have 16 bits and the mode is one of 8."""
    found = {tile.args if isinstance(tile.args, str) else str(tile.args[0]) for tile in getattr(image, "tile", ()) if tile.args}
    return set() if image.mode in _WIDE else {mode for mode in found if ";16" in mode}


def _wide_values(image: Image.Image, again: Callable[[], Image.Image] | None) -> npt.NDArray[Any] | None:
    """Values [H, W, 1] or, of colours of 16 bits, [H, W, C], of an image of more than 8 bits, which is not loaded yet; None of any other."""
    if image.mode in _WIDE:
        return np.asarray(image)[..., None]
    modes = _raw_modes(image)
    if not modes or again is None:
        return None
    (mode,) = modes if len(modes) == 1 else ("several",)
    if mode == "LA;16B":  # as four bytes a pixel
        with _with_raw_mode(again(), "RGBA") as raw:
            return np.asarray(raw).view(">u2")
    if mode not in _LOWER:
        raise DecodeError(f"its 16 bits a channel are stored in a way that is not read ({image.format}, {mode}): write it as RGB, or as gray")
    with _with_raw_mode(again(), _LOWER[mode]) as lower:
        values: npt.NDArray[np.uint16] = np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
        return values


def _with_raw_mode(image: Image.Image, mode: str) -> Image.Image:
    opened: Any = image
    opened.tile = [tile._replace(args=mode if isinstance(tile.args, str) else (mode, *tile.args[1:])) for tile in opened.tile]
    return image


def _scaled(values: npt.NDArray[Any], bounds: tuple[float, float]) -> npt.NDArray[np.uint8]:
    low, high = bounds
    scaled = np.asarray(values, np.float64) - low
    scaled *= 255 / (high - low) if high > low else 0.0
    with np.errstate(invalid="ignore"):
        found: npt.NDArray[np.uint8] = np.nan_to_num(np.clip(np.rint(scaled), 0, 255)).astype(np.uint8)
    return found


def _of_8_bits(values: npt.NDArray[Any], bounds: tuple[float, float]) -> Image.Image:
    """[H, W, C], 1 to 4 channels; the last of 2 and 4 is alpha, whose upper byte counts."""
    channels = values.shape[2]
    colours = _COLOURS.get(channels, channels)
    parts = [_scaled(values[..., :colours], bounds)]
    if colours < channels:
        parts.append((values[..., colours:] >> 8).astype(np.uint8))
    pixels = np.concatenate(parts, axis=2)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise DecodeError("the file is empty (0 bytes)")
    kind = container_of(data)
    if kind is not None:
        _load_plugin(kind)
    data = lean(data, max_pixels)
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses twice as many, and has no other setting for it
    try:
        image = Image.open(io.BytesIO(data), formats=_ALWAYS if kind is None else (kind,))
    except UnidentifiedImageError:
        raise DecodeError(f"not an image ({look(data)})") from None
    except Image.DecompressionBombError as error:
        raise DecodeError(f"too many pixels: {error}") from None
    except Exception as error:
        raise _failure(error) from error
    check_size(image.width, image.height, max_pixels)
    return image


@functools.cache
def _load_plugin(kind: str) -> None:
    """DecodeError, with the package to install, where Pillow cannot read AVIF, HEIF or JXL here."""
    if kind == "AVIF" and features.check("avif"):
        Image.init()
        return
    module, package = _PLUGINS[kind]
    try:
        plugin = importlib.import_module(module)
    except ImportError:
        raise DecodeError(f"not an image that can be read here: {_NAMES.get(kind, kind)}, which needs the package {package} (pip install {package})") from None
    if kind == "HEIF":
        plugin.register_heif_opener(thumbnails=False)
    if kind == "JXL":
        plugin.JpegXLImagePlugin.DECODE_THREADS = 0  # loader processes are one thread each


_NAMES = {"HEIF": "HEIC", "JXL": "JPEG XL"}


def _orientation(image: Image.Image, data: bytes) -> int:
    """1 to 8. HEIC and JPEG XL are turned by their decoders, TIFF by Pillow."""
    if image.format == "AVIF" or getattr(image, "jpeg", False):  # a JPEG inside of JPEG XL is not
        found = image.getexif().get(0x0112, 1)
        return found if found in range(1, 9) else 1
    return exif_orientation(data)


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
    """What the brand of an ISO media file says."""
    brand = data[8:12]
    if (kind := container_of(data)) is not None:
        return f"a damaged {_NAMES.get(kind, kind)}"
    if brand == b"crx ":
        return f"a camera's raw image (CR3){_CONVERT}"
    return "a QuickTime video" if brand == b"qt  " else "an MP4 video"


_CONVERT = ", which has to be converted first"
_MAGIC = (
    (0, b"\0\0\0\x0cjP  ", f"JPEG 2000{_CONVERT}"),
    (0, b"\xff\x4f\xff\x51", f"JPEG 2000{_CONVERT}"),
    (0, b"\0\0\0\x0cJXL ", "a damaged JPEG XL"),
    (0, b"\xff\x0a", "a damaged JPEG XL"),
    (0, b"8BPS", f"a Photoshop file{_CONVERT}"),
    (0, b"\x76\x2f\x31\x01", f"OpenEXR{_CONVERT}"),
    (0, b"\0\0\1\0", f"an icon (ICO){_CONVERT}"),
    (0, b"qoif", f"QOI{_CONVERT}"),
    (0, b"FUJIFILMCCD-RAW", f"a camera's raw image (RAF){_CONVERT}"),
    (128, b"DICM", f"DICOM{_CONVERT}"),
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


def crop_jpeg(data: bytes, region: Region, *, height: int, width: int, turn: int = 1) -> npt.NDArray[np.uint8] | None:
    """Pixels [region.height, region.width, 3] of a JPEG of [height, width] pixels, or None: then decode and check the whole image.

    None also for other formats, for a JPEG that is damaged before the rectangle's end or cut off, and for one of another size. Region and size are
    those of the image as its orientation `turn` has it.
    """
    if data[:2] != b"\xff\xd8" or not native().on:
        return None
    if turn > 1:
        region = stored_region(region, turn, height=height, width=width)
        height, width = (width, height) if turn >= 5 else (height, width)
    crop = _crop(data, region, height, width)
    return None if crop is None else turned(crop, turn)


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
