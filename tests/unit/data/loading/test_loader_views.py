"""Several views of a sample from one reading and decoding: the very pixels that each of their epochs alone would give."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtl.config.models import AugmentConfig, DataConfig
from dtl.data.decoding.decode import SWITCH, native
from dtl.data.loading import loader as loading
from dtl.data.loading.batch import Batch
from dtl.data.loading.loader import StepLoader
from dtl.data.open import ensure_packed
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import train_transform

SIZE, VIEWS = 24, (3, 4, 5, 6)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """JPEGs of many sizes, for which some crops are decoded at a fraction; PNGs; and a JPEG that ends in its middle."""
    source, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for number in range(22):
        folder = source / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        height, width = rng.integers(20, 260, size=2)
        picture = Image.fromarray(rng.integers(0, 256, size=(height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)).resize((int(width), int(height)))
        written = io.BytesIO()
        picture.save(written, "PNG" if number % 5 == 4 else "JPEG", quality=90)
        (folder / f"{number}.{'png' if number % 5 == 4 else 'jpg'}").write_bytes(written.getvalue())
    packed = ensure_packed(str(source), DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache"))), split="train", progress=False, log=lambda line: None)
    return Shards.open(packed)


def batches(shards: Shards, preset: str, *, workers: int, epoch: int, views: tuple[int, ...] = ()) -> list[Batch]:
    plan = EpochPlan(shards.shard_sizes, seed=1, epoch=epoch, global_batch_size=8, shuffle=False)
    transform = train_transform(image_size=SIZE, augment=AugmentConfig(preset=preset, rotation=5, erasing=0.5))  # type: ignore[arg-type]
    layout = RankLayout.for_plan(plan, num_ranks=1, micro_batch_size=8)
    made = StepLoader(shards, transform, plans=lambda _: plan, layout=layout, rank=0, image_size=SIZE, seed=1, workers=workers, views=views)
    return [batch for step in made.steps(epoch, 0, plan.num_steps) for batch in step]


@pytest.mark.parametrize("preset", ["imagenet", "light"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("extra", ["1", "0"])
def test_views_are_what_their_epochs_give(shards: Shards, preset: str, workers: int, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, extra)
    native.cache_clear()
    together = batches(shards, preset, workers=workers, epoch=VIEWS[0], views=VIEWS)
    alone = [batches(shards, preset, workers=workers, epoch=epoch) for epoch in VIEWS]
    native.cache_clear()
    assert len(together) == 3, "each with a pad or two"
    for step, batch in enumerate(together):
        assert batch.images.shape == (len(VIEWS) * 8, 3, SIZE, SIZE)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for view, images in enumerate(batch.images.split(8)):
            assert torch.equal(images, alone[view][step].images)
            assert torch.equal(batch.samples, alone[view][step].samples)
            assert torch.equal(batch.weights, alone[view][step].weights)
    assert not torch.equal(together[0].images[:8], together[0].images[8:16])


def test_an_image_is_decoded_once_for_each_fraction_of_its_size(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, int]] = []

    def decode(data: bytes, reduction: int = 1, **limits: int) -> np.ndarray:
        seen.append((bytes(data), reduction))
        return real(data, reduction)

    real = loading.decode
    monkeypatch.setattr(loading, "decode", decode)
    batches(shards, "imagenet", workers=0, epoch=0, views=VIEWS)
    assert len({data for data, _ in seen}) == shards.num_samples
    assert len(seen) == len(set(seen)), "no image twice at one size"
    assert len(seen) < 2 * shards.num_samples


def test_a_damaged_sample_is_black_in_all_views(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = shards.read(np.array([2]))[0]
    real = loading.decode
    monkeypatch.setattr(loading, "decode", lambda data, reduction=1, **limits: real(data[: len(data) // 2] if data == broken else data, reduction, **limits))
    first, *_ = batches(shards, "light", workers=0, epoch=0, views=VIEWS)
    assert [sample for sample, _ in first.bad] == [2]
    assert first.weights.tolist() == [float(slot >= 0 and slot != 2) for slot in first.slots.tolist()]
    rows = first.images.unflatten(0, (len(VIEWS), 8))
    assert not rows[:, 2].any()
    assert rows[:, 1].flatten(1).any(dim=1).all()
