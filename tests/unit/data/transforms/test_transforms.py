"""dtl.data.transforms.transforms: torchvision's pixels, from numbers that belong to the sample alone."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtl.config.models import AugmentConfig, Fit, sides
from dtl.data.decoding.decode import decode
from dtl.data.transforms.geometry import FittedCrop, RandomResizedCrop
from dtl.data.transforms.transforms import EVALUATION_VERSION, TRANSFORM_VERSION, Draws, Transform, eval_transform, jitter_strengths, train_transform
from dtl.errors import UserError

EVERYTHING = AugmentConfig(rotation=15, color_jitter=(0.4, 0.4, 0.4, 0.1), vertical_flip=0.5, grayscale=0.3, erasing=0.5, randaugment=(2, 9))
TRANSFORMS = {
    "imagenet": train_transform(image_size=48, augment=AugmentConfig()),
    "cifar": train_transform(image_size=32, augment=AugmentConfig(preset="cifar")),
    "light": train_transform(image_size=40, augment=AugmentConfig(preset="light")),
    "none": train_transform(image_size=40, augment=AugmentConfig(preset="none")),
    "everything": train_transform(image_size=48, augment=EVERYTHING, interpolation="bicubic"),
    "trivial": train_transform(image_size=48, augment=AugmentConfig(trivial=True)),
    "eval": eval_transform(image_size=40),
    "square": eval_transform(image_size=32, crop_ratio=1.0, square=True),
    "stretch": eval_transform(image_size=40, fit="stretch"),
    "pad": eval_transform(image_size=40, fit="pad"),
    "imagenet, stretch": train_transform(image_size=48, augment=AugmentConfig(), fit="stretch"),
    "imagenet, pad": train_transform(image_size=48, augment=AugmentConfig(), fit="pad"),
    "light, pad": train_transform(image_size=40, augment=AugmentConfig(preset="light"), fit="pad"),
    "cifar, pad": train_transform(image_size=32, augment=AugmentConfig(preset="cifar"), fit="pad"),
    "oblong imagenet": train_transform(image_size=(48, 80), augment=EVERYTHING),
    "oblong imagenet, pad": train_transform(image_size=(48, 80), augment=AugmentConfig(), fit="pad"),
    "oblong light, stretch": train_transform(image_size=(80, 40), augment=AugmentConfig(preset="light"), fit="stretch"),
    "oblong cifar": train_transform(image_size=(24, 40), augment=AugmentConfig(preset="cifar")),
    "oblong eval": eval_transform(image_size=(24, 40)),
    "cifar, stretch": train_transform(image_size=32, augment=AugmentConfig(preset="cifar"), fit="stretch"),
}
SHAPES = [(60, 80), (80, 60), (33, 33), (200, 50), (8, 8), (41, 97), (300, 401)]


def _image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise on them, so that neither blur nor a shift could go unseen."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + k) * np.cos(y / 7 - k) * 90 + 128 for k in range(3)]
    return np.clip(np.stack(waves, axis=2) + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)


def _apply(transform: Transform, samples: list[int], images: list[np.ndarray], *, channels_last: bool = True) -> torch.Tensor:
    draws = transform.draw(samples, [i.shape[1] for i in images], [i.shape[0] for i in images], seed=3, epoch=5)
    out = torch.full((len(images), 3, *sides(transform.image_size)), 77, dtype=torch.uint8)
    if channels_last:
        out = out.contiguous(memory_format=torch.channels_last)
    for i, image in enumerate(images):
        transform.apply(image, draws, i, out[i])
    return out


@pytest.mark.parametrize("name", TRANSFORMS)
def test_pixels_belong_to_the_sample_alone(name: str) -> None:
    transform = TRANSFORMS[name]
    samples = [7, 1_000_000_007, 0, 12, 5, 99, 3]
    images = [_image(*shape, seed=s) for s, shape in zip(samples, SHAPES)]
    whole = _apply(transform, samples, images)
    backwards = _apply(transform, samples[::-1], images[::-1], channels_last=False)
    assert torch.equal(whole, backwards.flip(0))
    for i, (sample, image) in enumerate(zip(samples, images)):
        assert torch.equal(whole[i], _apply(pickle.loads(pickle.dumps(transform)), [sample], [image])[0])


def test_pixels_are_the_same_in_another_process_with_other_threads() -> None:
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(int(sys.argv[2]));"
        "import test_transforms as t, zlib;"
        "print([zlib.crc32(t._apply(t.TRANSFORMS[n], [4, 9], [t._image(300, 401), t._image(70, 50)]).contiguous().numpy())"
        " for n in ('imagenet', 'everything', 'trivial')], 'torchvision' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    answers = {subprocess.run([*command, n], check=True, capture_output=True, text=True).stdout for n in ("1", "2")}
    assert len(answers) == 1
    assert answers.pop().strip().endswith("False"), "torchvision costs a worker four seconds; nothing here may import it"


@pytest.mark.parametrize("preset", ["imagenet", "cifar", "light"])
def test_epoch_seed_and_sample_change_the_draws(preset: str) -> None:
    transform = train_transform(image_size=64, augment=AugmentConfig(preset=preset))
    size = np.full(32, 200)
    seen = set()
    for seed, epoch, first in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 32)]:
        draws = transform.draw(np.arange(first, first + 32), size, size, seed=seed, epoch=epoch)
        seen.add((draws.placement.boxes.tobytes(), draws.placement.offsets.tobytes(), draws.horizontal_flip.tobytes()))
    assert len(seen) == 4


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_random_resized_crop_is_torchvisions_resized_crop(interpolation: str) -> None:
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

    transform = train_transform(image_size=56, augment=AugmentConfig(), interpolation=interpolation)
    samples = list(range(24))
    images = [_image(*SHAPES[s % len(SHAPES)], seed=s) for s in samples]
    draws = transform.draw(samples, [i.shape[1] for i in images], [i.shape[0] for i in images], seed=3, epoch=5)
    for channels_last in (True, False):
        ours = _apply(transform, samples, images, channels_last=channels_last)
        for s, image in zip(samples, images):
            box = draws.placement.boxes[s].tolist()
            planes = torch.from_numpy(image).permute(2, 0, 1)
            theirs = functional.resized_crop(planes, *box, [56, 56], interpolation=v2.InterpolationMode(interpolation), antialias=True)
            assert torch.equal(ours[s], theirs.flip(-1) if draws.horizontal_flip[s] else theirs)
    assert 0 < draws.horizontal_flip.sum() < 24


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "resize_size"), [(40, None), (32, 37), (33, 38), (48, 48), (60, 50)])
def test_evaluation_is_torchvisions_resize_and_center_crop(interpolation: str, size: int, resize_size: int | None) -> None:
    from torchvision.transforms import v2

    transform = eval_transform(image_size=size, resize_size=resize_size, interpolation=interpolation)
    mode = v2.InterpolationMode(interpolation)
    reference = v2.Compose([v2.Resize(resize_size or round(size / 0.875), interpolation=mode, antialias=True), v2.CenterCrop(size)])
    for shape in [*SHAPES, (1, 1), (1, 7), (7, 1), (46, 46), (45, 61), (16, 256), (3, 40)]:
        image = _image(*shape)
        ours = _apply(transform, [0], [image])[0]
        assert torch.equal(ours, reference(torch.from_numpy(image).permute(2, 0, 1))), shape


@pytest.mark.parametrize("size", [(24, 60), (60, 24), (33, 40)])
def test_an_oblong_evaluation_covers_its_output_and_cuts_the_middle(size: tuple[int, int]) -> None:
    """As timm's centre crop does it: the image keeps its proportions, and the smallest resize that covers output / crop ratio is cut."""
    from torchvision.transforms.v2 import functional

    for shape in [*SHAPES, (1, 1), (45, 61), (24, 60)]:  # of a longer one a stripe is resized: see MAX_ASPECT
        image = _image(*shape)
        planes = torch.from_numpy(image).permute(2, 0, 1)
        scale = max(round(target / 0.8) / side for target, side in zip(size, shape))
        resized = functional.resize(planes, [int(side * scale + 1e-6) for side in shape], antialias=True)
        ours = _apply(eval_transform(image_size=size, crop_ratio=0.8), [0], [image])[0]
        assert torch.equal(ours, functional.center_crop(resized, list(size))), shape


def test_crops_for_an_oblong_output_have_its_proportions() -> None:
    transform = train_transform(image_size=(40, 120), augment=AugmentConfig())
    boxes = transform.draw(np.arange(500), np.full(500, 900), np.full(500, 600), seed=0, epoch=0).placement.boxes
    aspects = boxes[:, 3] / boxes[:, 2] / 3
    assert 0.74 < aspects.min() < 0.8
    assert 1.25 < aspects.max() < 1.36


@pytest.mark.parametrize("interpolation", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_pixels_are_within_rounding_of_pillows(interpolation: Image.Resampling) -> None:
    name = interpolation.name.lower()
    transform = train_transform(image_size=56, augment=AugmentConfig(horizontal_flip=False), interpolation=name)
    for sample, shape in enumerate(SHAPES):
        image = _image(*shape)
        top, left, height, width = transform.draw([sample], [shape[1]], [shape[0]], seed=3, epoch=5).placement.boxes[0].tolist()
        crop = Image.fromarray(image).crop((left, top, left + width, top + height)).resize((56, 56), interpolation)
        difference = np.abs(np.asarray(crop).astype(int) - _apply(transform, [sample], [image])[0].permute(1, 2, 0).numpy())
        assert difference.mean() < 1, "of 255 levels"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (1, 7), (7, 1), (45, 61), (16, 256), (3, 400)])
def test_pad_is_pillows_pad_and_stretch_its_resize(interpolation: str, shape: tuple[int, int]) -> None:
    """Size, place and colour exactly; the pixels of the image itself as torchvision's resize gives them, which are within rounding of Pillow's."""
    from PIL import ImageOps
    from torchvision.transforms.v2 import InterpolationMode, functional

    image, fill, mode = _image(*shape), (124, 116, 104), InterpolationMode(interpolation)
    for size in (40, 33, (24, 60), (61, 32)):
        high, wide = sides(size)
        stretched = _apply(eval_transform(image_size=size, interpolation=interpolation, fit="stretch"), [0], [image])[0]
        planes = torch.from_numpy(image).permute(2, 0, 1)
        assert torch.equal(stretched, functional.resize(planes, [high, wide], interpolation=mode, antialias=True))

        padded = _apply(eval_transform(image_size=size, interpolation=interpolation, fit="pad"), [0], [image])[0]
        holds = min(shape) * min(high, wide) >= max(shape)  # Pillow cannot make a picture of no height
        white = ImageOps.pad(Image.fromarray(np.full_like(image, 255)), (wide, high), color=(0, 0, 0)) if holds else None
        if white is not None:
            rows, columns = np.nonzero(np.asarray(white)[..., 0])
            box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
            inner = functional.resize(planes, [box[0].stop - box[0].start, box[1].stop - box[1].start], interpolation=mode, antialias=True)
            expected = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1).repeat(1, high, wide)
            expected[:, box[0], box[1]] = inner
            assert torch.equal(padded, expected)


@pytest.mark.parametrize("shape", [(60, 80), (40, 400), (400, 40), (33, 33)])
def test_crops_of_a_padded_image_hold_it_or_lie_inside(shape: tuple[int, int]) -> None:
    samples = np.arange(3000)
    sizes = np.tile(np.array(shape), (3000, 1))
    geometry = FittedCrop(48, padded=True, reduced=False)
    placement = geometry.draw(samples, sizes[:, 1], sizes[:, 0], seed=1, epoch=2)
    assert (placement.boxes[:, :2] >= 0).all()
    assert (placement.boxes[:, 2:] >= 1).all()
    assert (placement.boxes[:, :2] + placement.boxes[:, 2:] <= sizes).all()
    for axis in (0, 1):
        whole = placement.boxes[:, 2 + axis] == shape[axis]
        fills = (placement.offsets[:, axis] == 0) & (np.abs(placement.resized[:, axis] - 48) <= 1)
        assert (whole | fills).all()
    if min(shape) < max(shape):
        assert (placement.boxes[:, 2:] == sizes).all(axis=1).any(), "some crops hold the whole image"
    shares = placement.seen(sizes[:, 1], sizes[:, 0], 48)
    assert ((shares > 0) & (shares <= 1 + 1e-9)).all()


def test_crops_of_a_stretched_image_are_drawn_in_the_square() -> None:
    """In shares of the sides a wide image's crops are those of a square one."""
    samples = np.arange(2000)
    wide, square = (FittedCrop(48, padded=False, reduced=False).draw(samples, np.full(2000, w), np.full(2000, 1000), seed=1, epoch=2) for w in (4000, 1000))
    assert np.abs(wide.boxes / [1000, 4000, 1000, 4000] - square.boxes / 1000).max() < 0.002
    assert (wide.resized == 48).all()
    assert (wide.offsets == 0).all()
    share = square.boxes[:, 2] * square.boxes[:, 3] / 1e6
    assert 0.07 < share.min() < 0.1
    assert 0.9 < share.max() <= 1
    usual = RandomResizedCrop(48, reduced=False).draw(samples, np.full(2000, 1000), np.full(2000, 1000), seed=1, epoch=2).boxes
    assert abs(share.mean() - (usual[:, 2] * usual[:, 3] / 1e6).mean()) < 0.02


@pytest.mark.parametrize(
    ("fit", "sizes", "line"),
    [
        ("crop", [(1920, 1080)], "warning: evaluation sees 43 % of the median image (centre crop, 1920x1080); --data.fit pad sees all of it"),
        (
            "crop",
            [(500, 500), (600, 500), (4000, 10)],
            "warning: evaluation sees 64 % of the median image (centre crop, 600x500); --data.fit pad sees all of it",
        ),
        ("crop", [(500, 500)], "evaluation sees 77 % of the median image (centre crop, 500x500); --data.fit pad sees all of it"),
        ("stretch", [(1920, 1080)], "evaluation sees the whole image, stretched to a square (median image 1920x1080)"),
        ("pad", [(1920, 1080)], "evaluation sees the whole image, padded to a square (median image 1920x1080)"),
    ],
)
def test_what_evaluation_sees(fit: Fit, sizes: list[tuple[int, int]], line: str) -> None:
    widths, heights = np.array(sizes).T
    assert eval_transform(image_size=224, fit=fit).what_is_seen(widths, heights) == line


def test_what_an_oblong_evaluation_sees() -> None:
    assert (
        eval_transform(image_size=(160, 320), fit="pad").what_is_seen(np.array([640]), np.array([480])).endswith("padded to [160, 320] (median image 640x480)")
    )
    assert eval_transform(image_size=(160, 320), crop_ratio=1.0).what_is_seen(np.array([640]), np.array([320])).startswith("evaluation sees 100 %")


def test_real_photos_have_the_pixels_of_torchvisions_image_pipeline(real_images: Path) -> None:
    from torchvision.transforms import v2

    reference = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    files = sorted((real_images / "hymenoptera_data/val/ants").glob("*.jpg"))[:12]
    assert files
    for file in files:
        image = Image.open(file).convert("RGB")
        ours = _apply(eval_transform(image_size=224), [0], [np.asarray(image)])[0].permute(1, 2, 0).numpy()
        assert np.abs(ours.astype(int) - np.asarray(reference(image))).mean() < 1


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 3), (8, 8), (3, 20_000), (20_000, 3), (17, 16)])
def test_odd_sizes_work(name: str, shape: tuple[int, int]) -> None:
    samples = list(range(6))
    image = np.full((*shape, 3), 200, np.uint8)
    out = _apply(TRANSFORMS[name], samples, [image] * 6)
    if name in ("imagenet", "light", "none", "eval", "square"):
        assert (out == 200).all(), "a plain picture stays plain: nothing outside it was read"


def test_a_read_only_image_and_a_view_are_fine() -> None:
    image = _image(48, 48)
    image.flags.writeable = False
    for name, transform in TRANSFORMS.items():
        expected = _apply(transform, [5], [image.copy()])
        assert torch.equal(_apply(transform, [5], [image]), expected), name
        padded = np.zeros((50, 60, 3), np.uint8)
        padded[1:49, 2:50] = image
        assert torch.equal(_apply(transform, [5], [padded[1:49, 2:50]]), expected), name


def _reduction_costs(data: bytes, size: int, sample: int) -> tuple[int, float]:
    """(reduction, mean absolute difference to the same box of the whole image, of 255 levels)"""
    transform = train_transform(image_size=size, augment=AugmentConfig())
    whole = decode(data)
    draws = transform.draw([sample], [whole.shape[1]], [whole.shape[0]], seed=3, epoch=5)
    factor = transform.reduction(draws, 0)
    out = torch.zeros((2, 3, size, size), dtype=torch.uint8)
    transform.apply(whole, draws, 0, out[0])
    transform.apply(decode(data, factor), draws, 0, out[1])
    return factor, float((out[0].float() - out[1].float()).abs().mean())


@pytest.mark.parametrize("subsampling", [0, 2])
def test_reduced_jpegs_give_nearly_the_pixels_of_whole_ones(subsampling: int) -> None:
    waves = Image.fromarray(_image(120, 160)).resize((801, 603), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    waves.save(buffer, "JPEG", quality=95, subsampling=subsampling)
    found = [_reduction_costs(buffer.getvalue(), 48, sample) for sample in range(24)]
    assert {factor for factor, _ in found} >= {4, 8}
    assert all(difference == 0 for factor, difference in found if factor == 1)
    assert np.mean([difference for _, difference in found]) < 1.5


def test_reduced_photos_give_nearly_the_pixels_of_whole_ones(real_images: Path) -> None:
    files = sorted((real_images / "hymenoptera_data/val/ants").glob("*.jpg"))[:40]
    assert files
    found = [_reduction_costs(file.read_bytes(), 64, sample) for sample, file in enumerate(files)]
    reduced = [difference for factor, difference in found if factor > 1]
    assert len(reduced) > 20
    assert np.mean(reduced) < 2


def test_no_other_geometry_reduces() -> None:
    for name in ("cifar", "light", "none", "eval", "square"):
        draws = TRANSFORMS[name].draw([0], [4000], [3000], seed=0, epoch=0)
        assert TRANSFORMS[name].reduction(draws, 0) == 1


def test_cifar_shifts_the_square_with_zeros() -> None:
    transform = train_transform(image_size=32, augment=AugmentConfig(preset="cifar", horizontal_flip=False))
    image = np.full((32, 32, 3), 9, np.uint8)
    count = 300
    draws = transform.draw(range(count), [32] * count, [32] * count, seed=0, epoch=0)
    assert set(draws.placement.offsets.ravel().tolist()) == set(range(-4, 5))
    out = _apply(transform, list(range(40)), [image] * 40)
    offsets = transform.draw(range(40), [32] * 40, [32] * 40, seed=3, epoch=5).placement.offsets
    for pixels, (top, left) in zip(out, offsets.tolist()):
        expected = torch.zeros(40, 40, dtype=torch.uint8)
        expected[4:36, 4:36] = 9
        assert torch.equal(pixels[0], expected[4 + top : 36 + top, 4 + left : 36 + left])


@pytest.mark.parametrize("preset", ["cifar", "light", "imagenet"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_flips_mirror_the_unflipped(preset: str, channels_last: bool) -> None:
    def pixels(horizontal: bool, vertical: float) -> torch.Tensor:
        augment = AugmentConfig(preset=preset, horizontal_flip=horizontal, vertical_flip=vertical)
        return _apply(train_transform(image_size=32, augment=augment), samples, images, channels_last=channels_last)

    samples, images = list(range(16)), [_image(40, 50, seed=s) for s in range(16)]
    plain, mirrored, turned = pixels(False, 0), pixels(True, 0), pixels(False, 1)
    flipped = train_transform(image_size=32, augment=AugmentConfig()).draw(samples, [50] * 16, [40] * 16, seed=3, epoch=5).horizontal_flip
    assert 0 < flipped.sum() < 16
    for i in samples:
        assert torch.equal(mirrored[i], plain[i].flip(-1) if flipped[i] else plain[i])
    assert torch.equal(turned, plain.flip(-2))


def test_probabilities_are_what_they_say() -> None:
    augment = AugmentConfig(vertical_flip=0.2, grayscale=0.3, erasing=0.4, rotation=20, color_jitter=0.5)
    transform = train_transform(image_size=64, augment=augment)
    count = 10_000
    draws = transform.draw(np.arange(count), np.full(count, 90), np.full(count, 90), seed=1, epoch=0)
    assert draws.grayscale is not None
    assert draws.erase is not None
    assert draws.angles is not None
    assert draws.jitter is not None
    assert abs(draws.vertical_flip.mean() - 0.2) < 0.02
    assert abs(draws.grayscale.mean() - 0.3) < 0.02
    assert abs((draws.erase[:, 2] > 0).mean() - 0.4) < 0.02
    assert -20 <= draws.angles.min() < -19.5 < 19.5 < draws.angles.max() <= 20
    assert 0.5 <= draws.jitter[:, :3].min() < 0.51 < 1.49 < draws.jitter[:, :3].max() <= 1.5
    assert (draws.jitter[:, 3] == 0).all()
    assert draws.jitter_order is not None
    assert len({tuple(row) for row in draws.jitter_order.tolist()}) == 24
    hit = draws.erase[draws.erase[:, 2] > 0]
    share = hit[:, 2] * hit[:, 3] / 64**2
    assert 0.015 < share.min() < 0.03
    assert 0.3 < share.max() < 0.35
    assert (hit[:, 0] + hit[:, 2] <= 64).all()


def test_erasing_fills_one_rectangle_with_the_mean() -> None:
    transform = train_transform(image_size=64, augment=AugmentConfig(preset="none", erasing=1.0), erase_fill=(1, 2, 3))
    out = _apply(transform, [0, 1, 2], [np.full((64, 64, 3), 200, np.uint8)] * 3)
    erased = out[:, 0] == 1
    assert ((out[:, 1] == 2) == erased).all()
    assert ((out[:, 2] == 3) == erased).all()
    assert erased.any(dim=2).any(dim=1).all()
    draws = transform.draw([0, 1, 2], [64] * 3, [64] * 3, seed=3, epoch=5)
    assert draws.erase is not None
    assert erased.sum(dim=(1, 2)).tolist() == (draws.erase[:, 2] * draws.erase[:, 3]).tolist()


def test_an_image_of_another_size_than_indexed_is_refused() -> None:
    transform = eval_transform(image_size=8)
    draws = transform.draw([0], [20], [10], seed=0, epoch=0)
    out = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"decoded to \(20, 10, 3\), but \(10, 20, 3\) according to the index"):
        transform.apply(np.zeros((20, 10, 3), np.uint8), draws, 0, out)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_description_is_json_and_tells_transforms_apart(name: str) -> None:
    text = json.dumps(TRANSFORMS[name].describe(), sort_keys=True)
    assert json.loads(text)["evaluation_version"] == 1
    assert json.loads(text).get("version") == (None if TRANSFORMS[name].augment is None else 2)
    others = {json.dumps(t.describe(), sort_keys=True) for key, t in TRANSFORMS.items() if key != name}
    assert text not in others


def test_one_jitter_strength_is_that_of_brightness_contrast_and_saturation() -> None:
    assert jitter_strengths(AugmentConfig(color_jitter=0.4)) == (0.4, 0.4, 0.4, 0.0)
    assert jitter_strengths(AugmentConfig(color_jitter=(0.1, 0.2, 0.3, 0.05))) == (0.1, 0.2, 0.3, 0.05)


def test_bad_sizes_are_refused() -> None:
    for arguments, message in [
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 8, "crop_ratio": 0.0}, "crop_ratio is 0.0"),
        ({"image_size": 8, "interpolation": "lanczos"}, "interpolation is 'lanczos'; it must be one of bilinear, bicubic"),
        ({"image_size": 8, "resize_size": 0}, "resize_size is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            eval_transform(**arguments)


def test_golden_draws() -> None:
    """Other numbers here mean that resumed runs see other pixels: raise TRANSFORM_VERSION, then put the new ones in."""
    assert TRANSFORM_VERSION == 2
    settings = {"rotation": 15, "color_jitter": 0.4, "vertical_flip": 0.5, "grayscale": 0.5, "erasing": 1.0, "trivial": True}

    def draw(preset: str, *, reduced: bool = True) -> Draws:
        augment = AugmentConfig(preset=preset, reduced_decode=reduced, **settings)  # type: ignore[arg-type]
        return train_transform(image_size=64, augment=augment).draw([0, 1, 2**40], [500, 300, 64], [375, 400, 64], seed=1, epoch=2)

    assert draw("imagenet", reduced=False).placement.boxes.tolist() == [[57, 139, 315, 340], [15, 1, 333, 298], [9, 10, 40, 51]]
    assert draw("imagenet").placement.boxes.tolist() == [[56, 140, 316, 340], [16, 0, 332, 300], [9, 10, 40, 51]]
    assert draw("light").placement.offsets.tolist() == [[1, 9], [8, 9], [9, 3]]
    assert draw("cifar").placement.offsets.tolist() == [[8, 6], [6, 8], [7, 2]]
    draws = draw("none")
    assert draws.horizontal_flip.tolist() == [False, False, False]
    assert draws.vertical_flip.tolist() == [False, True, False]
    for values, expected in [
        (draws.operations, [[13], [3], [9]]),
        (draws.erase, [[3, 35, 18, 16], [2, 23, 57, 20], [21, 15, 12, 28]]),
        (draws.grayscale, [False, False, True]),
        (draws.jitter_order, [[2, 3, 1, 0], [2, 1, 0, 3], [1, 0, 3, 2]]),
    ]:
        assert values is not None
        assert values.tolist() == expected
    assert draws.angles == pytest.approx([10.90742, 4.920119, 2.243034], abs=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_resize_straight_into_the_batch_gives_the_pixels_of_interpolate(interpolation: str) -> None:
    transform = train_transform(image_size=24, augment=AugmentConfig(horizontal_flip=False), interpolation=interpolation)
    batch = torch.empty((6, 3, 24, 24), dtype=torch.uint8, memory_format=torch.channels_last)
    planes = torch.empty((6, 3, 24, 24), dtype=torch.uint8)
    for sample, shape in enumerate([(60, 80), (25, 24), (24, 200), (300, 31), (12, 12), (24, 24)]):
        image = _image(*shape)
        draws = transform.draw([sample], [shape[1]], [shape[0]], seed=0, epoch=0)
        _, top, left, height, width = transform.region(draws, 0)
        transform.apply(image, draws, 0, batch[sample])
        transform.apply(image, draws, 0, planes[sample])
        crop = torch.from_numpy(image[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
        expected = crop
        if (height, width) != (24, 24):
            expected = torch.nn.functional.interpolate(crop, size=(24, 24), mode=interpolation, align_corners=False, antialias=True)
        assert torch.equal(batch[sample], expected[0])
        assert torch.equal(planes[sample], expected[0])


def test_golden_evaluation() -> None:
    """Other numbers here mean that model folders see other pixels: raise EVALUATION_VERSION, then put the new ones in."""
    assert EVALUATION_VERSION == 1
    found = []
    for transform in (eval_transform(image_size=24), eval_transform(image_size=24, crop_ratio=0.8), eval_transform(image_size=24, square=True)):
        placement = transform.draw([0, 1, 2], [37, 50, 2000], [50, 31, 30], seed=1, epoch=2).placement
        found.append((placement.boxes.tolist(), placement.resized.tolist(), placement.offsets.tolist()))
    assert found == [
        ([[0, 0, 50, 37], [0, 0, 31, 50], [0, 760, 30, 480]], [[36, 27], [27, 43], [27, 432]], [[6, 2], [2, 10], [2, 204]]),
        ([[0, 0, 50, 37], [0, 0, 31, 50], [0, 760, 30, 480]], [[40, 30], [30, 48], [30, 480]], [[8, 3], [3, 12], [3, 228]]),
        ([[0, 0, 50, 37], [0, 0, 31, 50], [0, 0, 30, 2000]], [[24, 24], [24, 24], [24, 24]], [[0, 0], [0, 0], [0, 0]]),
    ]


def test_turns_are_exact_and_all_positions_are_equally_likely() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    positions = [np.rot90(mirrored, turns) for mirrored in (image, image[:, ::-1]) for turns in range(4)]
    numbers = np.arange(4000)
    for preset, flip, expected in (("none", None, 8), ("none", False, 4), ("cifar", None, 8)):
        augment = AugmentConfig(preset=preset, turns=True, horizontal_flip=flip)  # type: ignore[arg-type]
        transform = train_transform(image_size=16, augment=augment, crop_ratio=1.0)
        draws = transform.draw(numbers, np.full(4000, 16), np.full(4000, 16), seed=0, epoch=0)
        seen = np.zeros(8, np.int64)
        out = torch.empty(3, 16, 16, dtype=torch.uint8)
        for i in range(0 if preset == "cifar" else 400):
            transform.apply(image, draws, i, out)
            seen[[bool((out.permute(1, 2, 0).numpy() == position).all()) for position in positions].index(True)] += 1
        assert draws.turns is not None
        counts = np.bincount(4 * draws.horizontal_flip + draws.turns, minlength=8)
        assert (abs(counts[:expected] - 4000 / expected) < 4 * (4000 / expected) ** 0.5).all(), counts
        assert counts[expected:].sum() == 0
        assert preset == "cifar" or (seen > 0).sum() == expected
    with pytest.raises(UserError, match=r"data.augment.turns needs a square data.image_size: turned by 90 degrees, 16 x 24 pixels are not the same"):
        train_transform(image_size=(16, 24), augment=AugmentConfig(turns=True))
