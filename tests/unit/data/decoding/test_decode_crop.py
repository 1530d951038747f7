"""The native extra gives the pixels of the whole image, bit for bit, finds the same damage, and may be missing."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from damage import put_image, rewrite_index
from PIL import Image
from tiny_images import encoded, image_folder, pixels

from dtl.config.models import AugmentConfig, Fit, ImageSize
from dtl.data.decoding import decode as decode_crop
from dtl.data.decoding.decode import Region, crop_jpeg, decode, decode_jpeg, native
from dtl.data.loading.loader import BatchDataset, Stored, decode_into
from dtl.data.packing.pack import pack
from dtl.data.sampling.plan import MicroBatch
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import eval_transform, train_transform
from dtl.reading import Reading

needs_native = pytest.mark.skipif(
    importlib.util.find_spec("dtl.data.decoding._jpeg_crop") is None,
    reason="the native extra is not built; it takes gcc and libjpeg-turbo's headers (Debian: libjpeg-dev), then pip install -e . once more",
)


@pytest.fixture(autouse=True)
def fresh_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(decode_crop.SWITCH, raising=False)
    native.cache_clear()


def switch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(decode_crop.SWITCH, "0")
    native.cache_clear()


def regions(height: int, width: int, reduction: int, rng: np.random.Generator, count: int) -> list[Region]:
    """The whole, the four corners' pixels, and some anywhere."""
    high, wide = -(-height // reduction), -(-width // reduction)
    found = [Region(reduction, 0, 0, high, wide)]
    found += [Region(reduction, top, left, 1, 1) for top in {0, high - 1} for left in {0, wide - 1}]
    for _ in range(count):
        h, w = int(rng.integers(1, high + 1)), int(rng.integers(1, wide + 1))
        found.append(Region(reduction, int(rng.integers(high - h + 1)), int(rng.integers(wide - w + 1)), h, w))
    return found


def assert_same(data: bytes, height: int, width: int, rng: np.random.Generator, *, reductions: tuple[int, ...] = (1, 2, 4, 8), count: int = 8) -> None:
    for reduction in reductions:
        whole = decode_jpeg(data, reduction)
        assert whole is not None
        for region in regions(height, width, reduction, rng, count):
            found = crop_jpeg(data, region, height=height, width=width)
            if found is None:
                assert reduction > 1, region
                assert min(height, width) < 8, region
                continue
            _, top, left, h, w = region
            np.testing.assert_array_equal(found, whole[top : top + h, left : left + w], err_msg=str(region))


SAMPLINGS = {"444": "4:4:4", "422": "4:2:2", "420": "4:2:0", "440": None, "411": None, "gray": None}


@needs_native
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("restart", [0, 1, 5])
def test_pixels_are_those_of_the_whole_image(sampling: str, restart: int) -> None:
    rng = np.random.default_rng(restart)
    sizes = [(1, 1), (8, 8), (16, 17), (9, 100), (100, 9), (64, 96), *((int(h), int(w)) for h, w in rng.integers(2, 150, (8, 2)))]
    for height, width in sizes:
        quality = int(rng.integers(5, 101))
        options = {"restart_marker_blocks": restart} if restart else {}
        if sampling == "gray":
            data = encoded(mode="L", height=height, width=width, quality=quality, **options)
        elif SAMPLINGS[sampling] is None:  # Pillow does not write these
            data = simplejpeg.encode_jpeg(pixels(height, width), quality, "RGB", sampling)
        else:
            data = encoded(height=height, width=width, quality=quality, subsampling=SAMPLINGS[sampling], **options)
        assert_same(data, height, width, rng)


@needs_native
def test_a_jpeg_stored_as_rgb() -> None:
    assert_same(encoded(keep_rgb=True, height=70, width=50), 70, 50, np.random.default_rng(0))


@needs_native
def test_real_images(real_images: Path) -> None:
    rng = np.random.default_rng(0)
    paths = sorted((real_images / "hymenoptera_data" / "val").glob("*/*.jpg"))[:12]
    assert paths
    taken = 0
    for path in paths:
        data = path.read_bytes()
        whole = decode(data)
        height, width = whole.shape[:2]
        if crop_jpeg(data, Region(1, 0, 0, height, width), height=height, width=width) is not None:
            taken += 1
            assert_same(data, height, width, rng, count=3)
    assert taken >= 6


def strange() -> dict[str, bytes]:
    """40 x 60 pixels, but for `another size`: images that have to be decoded whole."""
    plain = encoded(height=40, width=60)
    table, scan = plain.index(b"\xff\xc4"), plain.index(b"\xff\xda")
    frame = plain.index(b"\xff\xc0")
    odd_sampling = bytearray(plain)
    odd_sampling[frame + 11] = 0x31
    return {
        "progressive": encoded(height=40, width=60, progressive=True),
        "CMYK": encoded(height=40, width=60, mode="CMYK"),
        "PNG": encoded("PNG", height=40, width=60),
        "another size": encoded(height=40, width=61),
        "stray bytes before a table": plain[:table] + b"\x12\x34" + plain[table:],
        "no end": plain[:-2],
        "cut": plain[: (len(plain) + scan) // 2],
        "headers alone": plain[: scan + 2],
        "a second image begins inside": plain[:-200] + plain,
        "an odd sampling": bytes(odd_sampling),
        "two bytes": b"\xff\xd8",
        "text": b"no image",
        "nothing": b"",
    }


@needs_native
@pytest.mark.parametrize("name", strange())
@pytest.mark.parametrize("reduction", [1, 2])
def test_what_has_to_be_decoded_whole(name: str, reduction: int) -> None:
    # Its first rows, which lie before all of the damage.
    assert crop_jpeg(strange()[name], Region(reduction, 0, 0, 4, 8), height=40, width=60) is None


@needs_native
def test_damage_below_the_rectangle_changes_no_pixel_of_it_either_way() -> None:
    plain = encoded(height=160, width=96, quality=90)
    for damaged in (plain[:-300] + plain[-200:], plain[:-2] + b"\x31\x41\x59" * 9 + plain[-2:]):
        assert decode_jpeg(damaged) is None, "libjpeg warns about it"
        for reduction in (1, 2):
            region = Region(reduction, 3, 5, 16, 20)
            found = crop_jpeg(damaged, region, height=160, width=96)
            assert found is not None
            np.testing.assert_array_equal(found, decode(damaged, reduction)[3:19, 5:25])
        lowest = crop_jpeg(damaged, Region(1, 100, 0, 60, 96), height=160, width=96)
        if lowest is not None:
            np.testing.assert_array_equal(lowest, decode(damaged)[100:])


@needs_native
@pytest.mark.parametrize("region", [(1, 0, 0, 41, 8), (1, 39, 0, 2, 8), (1, 0, 55, 4, 6), (4, 0, 0, 11, 15), (8, 4, 7, 2, 1)])
def test_a_rectangle_that_leaves_the_image_is_not_decoded(region: tuple[int, ...]) -> None:
    assert crop_jpeg(encoded(height=40, width=60), Region(*region), height=40, width=60) is None


@needs_native
@pytest.mark.parametrize("wrong", [{"reduction": 3}, {"reduction": 0}, {"height": 0}, {"width": 0}, {"width": 7}, {"top": 70_000}, {"left": 2**32 - 4}])
def test_senseless_arguments_are_refused_before_anything_is_read(wrong: dict[str, int]) -> None:
    from dtl.data.decoding import _jpeg_crop

    given = {"image_height": 40, "image_width": 60, "reduction": 1, "top": 0, "left": 0, "height": 4, "width": 8} | wrong
    with pytest.raises(ValueError, match="a rectangle of at least one pixel"):
        _jpeg_crop.crop(encoded(height=40, width=60), *given.values(), np.empty((4, 8, 3), np.uint8))
    read_only = np.empty((4, 8, 3), np.uint8)
    read_only.flags.writeable = False
    with pytest.raises((BufferError, TypeError)):
        _jpeg_crop.crop(encoded(height=40, width=60), 40, 60, 1, 0, 0, 4, 8, read_only)


def fuzz(num: int, seed: int) -> int:
    """How many mutated images a rectangle came out of; a crash, or other pixels, fail."""
    script = Path(__file__).resolve().parents[3] / "fuzz_decode_crop.py"
    root = Path(__file__).resolve().parents[4]
    command = [sys.executable, str(script), str(num), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env={"PYTHONPATH": str(root), "PATH": ""})
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    return int(done.stdout)


@needs_native
def test_mutated_files_neither_crash_it_nor_give_other_pixels() -> None:
    assert fuzz(1500, 0) > 200


@needs_native
@pytest.mark.soak
def test_many_mutated_files() -> None:
    assert fuzz(60_000, 1) > 10_000


# ---- a run is the same with it and without


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of many kinds, one of them damaged in a way that its checksum does not tell, and one cut."""
    root = tmp_path_factory.mktemp("mixed")
    folder = image_folder(root / "images", {"a": 4, "b": 4})
    kinds = [{"subsampling": "4:4:4"}, {"subsampling": "4:2:0"}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}, {"restart_marker_blocks": 2}]
    for orientation in range(2, 9):
        kinds.append({"exif": (exif := Image.Exif())})
        exif[0x0112] = orientation
    for number, kind in enumerate(kinds):
        (folder / "b" / f"1{number:03d}.jpg").write_bytes(encoded(height=130 + number, width=150, seed=number, **kind))
    (folder / "a" / "2000.png").write_bytes(encoded("PNG", height=90, width=70))
    for seed in (21, 22):
        (folder / "a" / f"3{seed:03d}.jpg").write_bytes(encoded(height=140, width=140, seed=seed, quality=95))
    pack(folder, root / "shards", progress=False, processes=1)
    opened = Shards.open(root / "shards")
    large = [i for i in range(opened.num_samples) if opened.heights[i] == 140]
    good = encoded(height=140, width=140, seed=23, quality=80)
    cut = good[: len(good) // 2]
    put_image(root / "shards", large[0], cut)
    rewrite_index(root / "shards", large[0], sizes=len(cut), crcs=zlib.crc32(cut))
    put_image(root / "shards", large[1], good[:-200] + bytes(30) + good[-170:])
    return root / "shards"


def batches(folder: Path, *, training: bool, fit: Fit, size: ImageSize) -> list[tuple[np.ndarray, list[tuple[int, str]]]]:
    shards = Shards.open(folder)
    reading = Reading(exif=True)
    transform = (
        train_transform(image_size=size, augment=AugmentConfig(color_jitter=0.2), fit=fit, reading=reading)
        if training
        else eval_transform(image_size=size, fit=fit, reading=reading)
    )
    dataset = BatchDataset(shards, transform, image_size=size, seed=0)
    samples = np.arange(shards.num_samples)
    found = []
    for epoch in range(6 if training else 1):
        request = MicroBatch(epoch=epoch, step=0, samples=samples, slots=samples, weights=np.ones(len(samples), np.float32))
        batch = dataset.__getitems__(request)
        found.append((batch.images.numpy().copy(), [(sample, damage.reason) for sample, damage in batch.bad]))
    return found


@needs_native
@pytest.mark.parametrize(("fit", "size"), [("crop", 32), ("stretch", 32), ("pad", 32), ("crop", (24, 40)), ("stretch", (40, 24)), ("pad", (24, 40))])
@pytest.mark.parametrize("training", [True, False])
def test_batches_and_reports_are_the_same_with_and_without_it(shards: Path, training: bool, fit: Fit, size: ImageSize, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native().on
    taken = []
    real = decode_crop._crop
    monkeypatch.setattr(decode_crop, "_crop", lambda *given: taken.append(found := real(*given)) or found)
    with_it = batches(shards, training=training, fit=fit, size=size)
    if training or fit == "crop":  # else every image is needed whole
        assert sum(one is not None for one in taken) > len(with_it)
    switch_off(monkeypatch)
    taken.clear()
    without = batches(shards, training=training, fit=fit, size=size)
    assert not taken
    for (images, bad), (expected, expected_bad) in zip(with_it, without):
        np.testing.assert_array_equal(images, expected)
        assert bad == expected_bad
        assert len(bad) == 1, "the one that is cut, in whatever rectangle"


def test_without_it_the_summary_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, region = encoded(height=40, width=60), Region(1, 0, 0, 4, 8)
    import dtl.data.decoding

    # Its place on the disk is what is missing, as after an installation without a compiler.
    monkeypatch.setattr(dtl.data.decoding, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "dtl.data.decoding._jpeg_crop", raising=False)
    monkeypatch.delattr(dtl.data.decoding, "_jpeg_crop", raising=False)
    assert (native().on, native().fault) == (False, False)
    assert "is not built" in native().summary
    assert crop_jpeg(data, region, height=40, width=60) is None
    switch_off(monkeypatch)
    assert "DTL_NATIVE=0" in native().summary


class Differs:
    """A library that rounds in another way."""

    LIBJPEG_TURBO = 2_001_005

    @staticmethod
    def crop(*given: object) -> bool:
        out = given[-1]
        assert isinstance(out, np.ndarray)
        out[...] = 7
        return True


def test_a_library_with_other_pixels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import dtl.data.decoding

    monkeypatch.setitem(sys.modules, "dtl.data.decoding._jpeg_crop", Differs)  # type: ignore[arg-type]
    monkeypatch.setattr(dtl.data.decoding, "_jpeg_crop", Differs, raising=False)
    assert (native().on, native().fault) == (False, True)
    assert "different pixels" in native().summary
    assert crop_jpeg(encoded(height=40, width=60), Region(1, 0, 0, 4, 8), height=40, width=60) is None


def test_a_readable_jpeg_with_a_warning_is_reduced_like_any_other() -> None:
    data = encoded(height=64, width=80)
    stray = data[:-2] + b"\x31\x41\x59" * 9 + data[-2:]
    assert decode_jpeg(stray) is None
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (80, 64)
    np.testing.assert_array_equal(decode(stray, 2), decode(data, 2))


def test_crops_of_real_photos_are_those_of_image_folder_within_a_255th(real_images: Path) -> None:
    """Decoded, cut and resized as in training, against Pillow's crop and resize of what ImageFolder loads, the same boxes."""
    transform = train_transform(image_size=112, augment=AugmentConfig(horizontal_flip=False, reduced_decode=False))
    out = torch.empty((1, 3, 112, 112), dtype=torch.uint8)
    paths = sorted((real_images / "hymenoptera_data" / "train").glob("*/*.jpg"))[:40]
    assert paths
    for sample, path in enumerate(paths):
        data = path.read_bytes()
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        draws = transform.draw([sample], [image.width], [image.height], seed=0, epoch=0)
        decode_into(out[0], Stored(data, image.height, image.width), transform, draws, 0)
        _, top, left, height, width = transform.region(draws, 0)
        expected = image.crop((left, top, left + width, top + height)).resize((112, 112), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(expected).astype(int) - out[0].permute(1, 2, 0).numpy()).mean() < 1, path


class NoLibrary:
    """Finds the extra, but not what it is linked with: built on one machine, installed on another."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "dtl.data.decoding._jpeg_crop":
            raise ImportError("libjpeg.so.62: cannot open shared object file")


def test_an_extra_that_cannot_be_loaded_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import dtl.data.decoding

    monkeypatch.delitem(sys.modules, "dtl.data.decoding._jpeg_crop", raising=False)
    monkeypatch.delattr(dtl.data.decoding, "_jpeg_crop", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoLibrary(), *sys.meta_path])
    assert (native().on, native().fault) == (False, True)
    assert "libjpeg.so.62" in native().summary
    assert crop_jpeg(encoded(height=40, width=60), Region(1, 0, 0, 4, 8), height=40, width=60) is None
