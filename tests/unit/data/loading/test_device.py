"""JPEGs decoded on the device give the loader processes' pixels, but for the rounding of another decoder and resize. On a GPU where there is one."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dtl.config.models import AugmentConfig
from dtl.data.loading import device as loading_device
from dtl.data.loading.batch import Batch
from dtl.data.loading.device import DeviceDecoder, _coarse, place_on_device, ready
from dtl.data.loading.loader import BatchDataset, StepLoader
from dtl.data.packing.pack import pack
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import Transform, eval_transform, train_transform
from dtl.errors import UserError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = 48
SIZES = [(61, 90), (300, 200), (50, 50), (48, 48), (47, 200), (210, 330), (64, 40)]


def picture(number: int) -> Image.Image:
    """Smooth, so that another rounding stays another rounding."""
    height, width = SIZES[number % len(SIZES)]
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [128 + 100 * np.sin(rows / (9 + number) + phase) * np.cos(columns / 13) for phase in (0, 1, 2)]
    return Image.fromarray(np.stack(waves, axis=2).astype(np.uint8))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """JPEGs of all kinds, PNGs among them."""
    folder = tmp_path_factory.mktemp("images")
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("RGB", "jpg", {"quality": 95}), ("RGB", "jpg", {"progressive": True, "quality": 95}), ("L", "jpg", {}), ("CMYK", "jpg", {}), ("RGB", "png", {}),
    ]  # fmt: skip
    for number in range(35):
        mode, suffix, options = kinds[number % len(kinds)]
        place = folder / "images" / f"class_{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        if suffix == "jpg":
            exif = Image.Exif()
            exif[0x0112] = 1 + number % 8  # orientation, as of cameras: nobody here turns an image by it
            options = {**options, "exif": exif}
        picture(number).convert(mode).save(place / f"{number:03d}.{suffix}", **options)
    pack(folder / "images", folder / "packed", processes=1, progress=False)
    return Shards.open(folder / "packed")


def steps(shards: Shards, transform: Transform, *, device: bool, workers: int = 0, micro: int | None = None, world: int = 1, rank: int = 0) -> list[Batch]:
    def plan(epoch: int) -> EpochPlan:
        return EpochPlan(shards.shard_sizes, seed=3, epoch=epoch, global_batch_size=12)

    layout = RankLayout.for_plan(plan(0), num_ranks=world, micro_batch_size=micro)
    loader = StepLoader(
        shards, transform, plans=plan, layout=layout, rank=rank, image_size=transform.image_size, seed=3, workers=workers, decode_on=DEVICE if device else None
    )
    return [batch for batches in loader.steps(0, 0, 4) for batch in batches]


def compare(ours: Batch, theirs: Batch) -> None:
    for name in ("labels", "weights", "samples", "slots"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.images.device.type == DEVICE.type
    assert ours.images.is_contiguous(memory_format=torch.channels_last)
    difference = (ours.images.cpu().int() - theirs.images.int()).abs().float()
    assert difference.mean() < 0.5, difference.mean()  # of 255
    assert difference.mean(dim=(1, 2, 3)).max() < 2, "one image is another picture"


TRANSFORMS = {
    "imagenet": train_transform(image_size=SIZE, augment=AugmentConfig(preset="imagenet", vertical_flip=0.5, reduced_decode=False)),
    "light": train_transform(image_size=SIZE, augment=AugmentConfig(preset="light")),
    "light, turns": train_transform(image_size=SIZE, augment=AugmentConfig(preset="light", turns=True)),
    "cifar, erasing": train_transform(image_size=SIZE, augment=AugmentConfig(preset="cifar", erasing=0.7)),
    "evaluation": eval_transform(image_size=SIZE),
    "evaluation, bicubic": eval_transform(image_size=SIZE, interpolation="bicubic", crop_ratio=1.0),
    "evaluation, stretch": eval_transform(image_size=SIZE, fit="stretch"),
    "evaluation, oblong": eval_transform(image_size=(SIZE, 2 * SIZE)),
    "imagenet, oblong, pad": train_transform(image_size=(SIZE, 2 * SIZE), augment=AugmentConfig(preset="imagenet", reduced_decode=False), fit="pad"),
    "evaluation, pad": eval_transform(image_size=SIZE, fit="pad"),
    "imagenet, pad": train_transform(image_size=SIZE, augment=AugmentConfig(preset="imagenet", vertical_flip=0.5, reduced_decode=False), fit="pad"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_pixels_are_those_of_the_loader_processes(shards: Shards, name: str) -> None:
    ours, theirs = (steps(shards, TRANSFORMS[name], device=device) for device in (True, False))
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs):
        compare(mine, other)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_very_large_images_to_very_small_ones(interpolation: str) -> None:
    """CUDA's antialiasing refuses more than some 90 pixels a pixel (bicubic: 45): they are averaged first."""
    rows, columns = np.mgrid[0:1200, 0:2400]
    whole = np.stack([128 + 100 * np.sin(rows / (90 + 50 * phase)) * np.cos(columns / 130) for phase in range(3)], axis=2).astype(np.uint8)
    transform = eval_transform(image_size=8, interpolation=interpolation, crop_ratio=1.0)
    draws = transform.draw(np.array([0]), np.array([2400]), np.array([1200]), seed=0, epoch=0)
    ours, theirs = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    transform.apply(whole, draws, 0, theirs)
    seen = torch.from_numpy(whole).permute(2, 0, 1).to(DEVICE)
    out = ours.to(DEVICE)
    place_on_device(seen, draws, 0, out, transform)
    assert theirs.float().std() > 10
    assert (out.cpu().int() - theirs.int()).abs().max() <= 2
    assert max(now / 8 for now in _coarse(seen[None].float(), (8, 8)).shape[2:]) <= 32


@pytest.mark.parametrize(("world", "workers", "micro"), [(1, 2, None), (1, 1, 5), (2, 2, None), (3, 0, 2)])
def test_ranks_workers_and_micro_batches_with_their_pads(shards: Shards, world: int, workers: int, micro: int | None) -> None:
    transform = TRANSFORMS["imagenet"]
    for rank in range(world):
        ours, theirs = (steps(shards, transform, device=device, workers=workers, micro=micro, world=world, rank=rank) for device in (True, False))
        for mine, other in zip(ours, theirs, strict=True):
            compare(mine, other)


def test_a_jpeg_that_no_decoder_takes_is_named_and_counts_for_nothing(shards: Shards) -> None:
    """nvJPEG gives nothing of a batch in which one image fails: the others must come all the same."""
    transform = TRANSFORMS["evaluation"]
    (batch, *_), (expected, *_) = (batches_as_shipped(shards, transform), steps(shards, transform, device=True))
    encoded = batch.encoded
    assert encoded is not None
    assert encoded.decoded, "no image of this batch is decoded by the loader processes"
    broken, mistaken = encoded.rows[1], encoded.rows[2]
    ends = np.cumsum(encoded.sizes)
    encoded.data[int(ends[0]) + 20 : int(ends[1])] = 0  # a JPEG's first bytes, and nothing behind them
    encoded.heights[mistaken] += 1
    samples = batch.samples[batch.slots >= 0].tolist()
    (done,) = DeviceDecoder(transform, DEVICE, shards.damaged).finished(iter([batch]))
    assert [sample for sample, _ in done.bad] == [samples[broken], samples[mistaken]]
    assert "according to the index" in str(done.bad[1][1])
    assert done.weights[: len(samples)].tolist() == [float(row not in (broken, mistaken)) for row in range(len(samples))]
    for row in range(len(samples)):
        assert torch.equal(done.images[row], torch.zeros_like(done.images[row]) if row in (broken, mistaken) else expected.images[row])


def batches_as_shipped(shards: Shards, transform: Transform) -> list[Batch]:
    dataset = BatchDataset(shards, transform, image_size=SIZE, seed=3)
    dataset.ships = True
    plan = EpochPlan(shards.shard_sizes, seed=3, epoch=0, global_batch_size=12)
    layout = RankLayout.for_plan(plan, num_ranks=1, micro_batch_size=None)
    return [dataset.__getitems__(request) for request in layout.micro_batches(plan, 0, 0)]


@pytest.mark.parametrize("knob", [{"rotation": 10}, {"color_jitter": 0.4}, {"grayscale": 0.1}, {"trivial": True}, {"function": "own_functions:noisy"}])
def test_what_the_device_cannot_do_is_refused_by_name(knob: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"data\.augment\.{next(iter(knob))} needs data\.decode workers"):
        ready(train_transform(image_size=SIZE, augment=AugmentConfig(**knob)), DEVICE)


def test_a_missing_torchcodec_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
    with pytest.raises(UserError, match=r"pip install 'torchcodec>=0.16'"):
        ready(TRANSFORMS["evaluation"], DEVICE)


def test_a_decoder_that_decodes_nothing_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Any, **options: Any) -> Any:
        raise RuntimeError("nvJPEG is\nnot there")

    monkeypatch.setattr("torchcodec.decoders.decode_jpeg", broken)
    with pytest.raises(UserError, match=r"cannot decode on \w+.* \(nvJPEG is not there\); use --data\.decode workers"):
        ready(TRANSFORMS["evaluation"], DEVICE)


def test_the_decoding_thread_is_on_the_device_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads start on GPU 0, and each rank would leave a context there.
    found: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append((device, threading.current_thread().name.partition("_")[0])))
    monkeypatch.setattr(loading_device, "_stream", lambda device: "a stream")
    monkeypatch.setattr(loading_device, "ready", lambda transform, device: None)
    monkeypatch.setattr(DeviceDecoder, "_finish_marked", lambda self, batch: (batch, None))
    decoder = DeviceDecoder(eval_transform(image_size=SIZE), torch.device("cuda:1"), lambda sample, reason: None)  # type: ignore[arg-type, return-value]
    assert list(decoder.finished(iter(["a batch"]))) == ["a batch"]  # type: ignore[list-item, comparison-overlap]
    assert found == [(1, "device-decode")]
