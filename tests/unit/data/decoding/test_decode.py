"""Pixels are those of torchvision's ImageFolder (`PIL.Image.open(f).convert("RGB")`), bit for bit, and damage is said."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageFile
from tiny_images import encoded, pixels

from dtl.data.decoding import decode as decode_module
from dtl.data.decoding.decode import DecodeError, ImageHeader, decode, decode_jpeg, is_plain_jpeg, probe
from dtl.data.decoding.headers import MAX_PIXELS, MAX_SIDE, check_size, without_exif
from dtl.reading import Reading


def as_image_folder_reads(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


EIGHT_BITS = Reading((0.0, 255.0))  # what ImageFolder makes of 16 bits and of floats
SIZES = [(1, 1), (7, 13), (16, 16), (33, 65), (2, 3), (1, 50)]


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_is_bit_equal_to_pillow(subsampling: str, progressive: bool, quality: int) -> None:
    for height, width in SIZES:
        data = encoded(height=height, width=width, subsampling=subsampling, progressive=progressive, quality=quality)
        np.testing.assert_array_equal(decode(data), as_image_folder_reads(data))
        assert decode_jpeg(data) is not None, "the fast decoder takes every ordinary JPEG"


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_jpegs_come_at_exactly_the_fraction_asked_for_and_others_whole(reduction: int) -> None:
    for height, width in [*SIZES, (150, 203), (64, 96)]:
        found = decode(encoded(height=height, width=width), reduction)
        assert found.shape == (-(-height // reduction), -(-width // reduction), 3)
    for data in (encoded(mode="CMYK"), encoded("PNG")):
        np.testing.assert_array_equal(decode(data, reduction), decode(data))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_jpeg(mode: str, progressive: bool) -> None:
    data = encoded(mode=mode, progressive=progressive)
    np.testing.assert_array_equal(decode(data), as_image_folder_reads(data))
    assert probe(data).mode == mode


def test_jpeg_stored_as_rgb_and_exif_orientation_not_applied() -> None:
    data = encoded(keep_rgb=True)
    np.testing.assert_array_equal(decode(data), as_image_folder_reads(data))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = encoded(height=24, width=32, exif=exif)
    assert decode(turned).shape == (24, 32, 3)
    assert (probe(turned).height, probe(turned).width) == (24, 32)


OTHERS = {
    "png": ("PNG", "RGB", {}),
    "png gray": ("PNG", "L", {}),
    "png gray alpha": ("PNG", "LA", {}),
    "png palette": ("PNG", "P", {}),
    "png palette transparent": ("PNG", "P", {"transparency": 3}),
    "png palette transparent bytes": ("PNG", "P", {"transparency": bytes(range(256))}),
    "png alpha": ("PNG", "RGBA", {}),
    "png one bit": ("PNG", "1", {}),
    "webp": ("WEBP", "RGB", {"quality": 80}),
    "webp lossless alpha": ("WEBP", "RGBA", {"lossless": True}),
    "bmp": ("BMP", "RGB", {}),
    "bmp palette": ("BMP", "P", {}),
    "gif": ("GIF", "P", {}),
    "tiff": ("TIFF", "RGB", {}),
    "tiff cmyk": ("TIFF", "CMYK", {}),
    "tiff lzw": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "ppm": ("PPM", "RGB", {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats(name: str) -> None:
    kind, mode, options = OTHERS[name]
    image = Image.fromarray(pixels()).convert("RGB").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    data = buffer.getvalue()
    found = decode(data)
    np.testing.assert_array_equal(found, as_image_folder_reads_quietly(data))
    assert found.dtype == np.uint8
    assert probe(data).format == kind
    assert (probe(data).height, probe(data).width) == found.shape[:2]


def as_image_folder_reads_quietly(data: bytes) -> np.ndarray:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return as_image_folder_reads(data)


def test_sixteen_bit_gray_png() -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257).save(buffer, "PNG")
    data = buffer.getvalue()
    assert probe(data) == ImageHeader(width=32, height=24, format="PNG", mode="I;16", wide=True)
    np.testing.assert_array_equal(decode(data, reading=EIGHT_BITS), as_image_folder_reads(data))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.fromarray(pixels(seed=seed)) for seed in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    data = buffer.getvalue()
    np.testing.assert_array_equal(decode(data), as_image_folder_reads(data))


def test_multi_picture_jpeg_is_a_jpeg() -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels()).save(buffer, "MPO", save_all=True, append_images=[Image.fromarray(pixels(seed=1))])
    data = buffer.getvalue()
    assert probe(data).format == "JPEG"
    np.testing.assert_array_equal(decode(data), as_image_folder_reads(data))


def test_stray_bytes_before_a_marker_decode_as_pillow_does() -> None:
    data = encoded()
    table = data.index(b"\xff\xc4")
    stray = data[:table] + b"\x12\x34" + data[table:]
    assert decode_jpeg(stray) is None, "strict decoding refuses it"
    np.testing.assert_array_equal(decode(stray), as_image_folder_reads(stray))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "TIFF"])
def test_truncated_image_is_an_error(kind: str) -> None:
    data = encoded(kind, height=64, width=64)
    for part in (0.3, 0.6, 0.9):
        with pytest.raises(DecodeError):
            decode(data[: int(len(data) * part)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a text", "not an image \\(text\\)"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"%PDF-1.4 xxxx", "a PDF"),
        (b"<?xml version='1.0'?><svg/>", "XML or SVG"),
        (bytes(range(256)), "unknown format"),
        (b"\xff\xd8\xff\xe0", "."),
    ],
)
def test_what_is_no_image(data: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        decode(data)
    with pytest.raises(DecodeError, match=message):
        probe(data)


def _huge_png(width: int, height: int) -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (70_000, 10)])
def test_an_image_too_large_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    with pytest.raises(DecodeError, match=r"pixels|side longer"):
        decode(_huge_png(width, height))


def test_huge_jpeg_header() -> None:
    data = bytearray(encoded(height=16, width=16))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (60_000).to_bytes(2, "big") * 2
    with pytest.raises(DecodeError, match=r"^60000 x 60000 pixels, more than the 178,956,970 that are allowed .data.max_pixels.$"):
        decode(bytes(data))


def test_the_limits_themselves_are_allowed() -> None:
    check_size(MAX_SIDE, MAX_PIXELS // MAX_SIDE)
    check_size(1, MAX_SIDE)
    for width, height in [(MAX_SIDE, MAX_PIXELS // MAX_SIDE + 1), (MAX_SIDE + 1, 1), (1, MAX_SIDE + 1)]:
        with pytest.raises(DecodeError, match=rf"^{width} x {height} pixels, "):
            check_size(width, height)


def test_what_a_gpu_decodes() -> None:
    assert is_plain_jpeg(encoded(height=16, width=16))
    cmyk = io.BytesIO()
    Image.fromarray(pixels(16, 16)).convert("CMYK").save(cmyk, "JPEG")
    for other in (cmyk.getvalue(), encoded("PNG"), encoded(height=16, width=16)[:30], b""):
        assert not is_plain_jpeg(other)


def test_exif_is_left_out_and_nothing_else() -> None:
    plain, turned = io.BytesIO(), io.BytesIO()
    picture = Image.fromarray(pixels(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(plain, "JPEG", comment=b"Exif", icc_profile=b"profile")
    picture.save(turned, "JPEG", comment=b"Exif", icc_profile=b"profile", exif=exif)
    assert len(turned.getvalue()) > len(plain.getvalue())
    assert without_exif(turned.getvalue()) == without_exif(plain.getvalue()) == plain.getvalue()
    for end in range(len(turned.getvalue())):  # torn files are the decoder's to judge
        assert len(without_exif(turned.getvalue()[:end])) <= end


def test_a_switched_on_truncation_of_pillow_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        decode(encoded("PNG"))


def test_no_torch_is_needed() -> None:
    code = "import sys, dtl.data.decoding.decode, dtl.data.packing.pack, dtl.data.packing.tasks; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
    assert decode_module.FORMATS[0] == "JPEG"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51\0", "JPEG 2000"),
        (b"\0\0\0\x18ftypisom", "MP4"),
        (b"\0\0\0\x14ftypqt  ", "QuickTime"),
        (b"\0\0\0\x18ftypcrx ", "CR3"),
        (bytes(128) + b"DICM", "DICOM"),
        (b"8BPS\0\1" + bytes(20), "Photoshop"),
        (b"PAR1\x15", "Parquet"),
    ],
)
def test_what_is_no_image_here_is_named_by_its_first_bytes(data: bytes, name: str) -> None:
    with pytest.raises(DecodeError, match=rf"^not an image \(.*{name}"):
        probe(data + bytes(300))


@pytest.mark.parametrize(
    ("data", "name", "module", "package"),
    [
        (b"\xff\x0a\0", "JPEG XL", "pillow_jxl", "pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", "pillow_jxl", "pillow-jxl-plugin"),
        (b"\0\0\0\x18ftypheix", "HEIC", "pillow_heif", "pillow-heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC", "pillow_heif", "pillow-heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "AVIF", "pillow_avif", "pillow-avif-plugin"),
    ],
)
def test_what_needs_a_plugin_names_the_package(data: bytes, name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("PIL.features.check", lambda feature: False)
    decode_module._load_plugin.cache_clear()
    with pytest.raises(DecodeError, match=rf"^not an image that can be read here: {name}, which needs the package {package} \(pip install {package}\)$"):
        probe(data + bytes(300))
    decode_module._load_plugin.cache_clear()
