"""Buffers are used again, and never while somebody still looks at what is in them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dtl.config.models import AugmentConfig, DataConfig
from dtl.data.loading.batch import Batch, BatchBuffers, Encoded
from dtl.data.loading.loader import StepLoader
from dtl.data.loading.processes import PREFETCH
from dtl.data.open import ensure_packed
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import train_transform

STEPS = 24


def test_a_buffer_comes_back_with_the_last_view_of_it() -> None:
    buffers = BatchBuffers(2, micro_batch_size=2, image_size=4)
    first = buffers.take()
    assert first is not None
    buffers.view(first).fill_(7)
    images = buffers.images(first)
    assert images.shape == (2, 3, 4, 4)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert bool((images == 7).all())
    assert buffers.take() == 1
    assert buffers.take() is None
    part, array = images[1:], images.numpy()
    del images
    assert buffers.take() is None
    del part
    assert buffers.take() is None
    del array
    assert buffers.take() == first
    buffers.close()


def test_batches_that_outlive_their_pool_stay_whole() -> None:
    buffers = BatchBuffers(1, micro_batch_size=1, image_size=2)
    number = buffers.take()
    assert number is not None
    buffers.view(number).fill_(9)
    images = buffers.images(number)
    buffers.close()
    del buffers
    assert images.sum() == 9 * 12


def test_loader_processes_fill_few_buffers_and_overwrite_nothing_in_use(tmp_path: Path) -> None:
    shards = Shards.open(ensure_packed("digits", DataConfig(cache_dir=str(tmp_path)), split="val", progress=False, log=lambda line: None))

    def loader(workers: int) -> StepLoader:
        def plan(epoch: int) -> EpochPlan:
            return EpochPlan(shards.shard_sizes, seed=1, epoch=epoch, global_batch_size=16)

        layout = RankLayout.for_plan(plan(0), num_ranks=1, micro_batch_size=None)
        transform = train_transform(image_size=12, augment=AugmentConfig(preset="cifar"))
        return StepLoader(shards, transform, plans=plan, layout=layout, rank=0, image_size=12, seed=1, workers=workers)

    expected = [step[0].images.clone() for step in loader(0).steps(0, 0, STEPS)]
    addresses, kept = [], []
    for number, step in enumerate(loader(1).steps(0, 0, STEPS)):
        images = step[0].images
        assert torch.equal(images, expected[number])
        addresses.append(images.data_ptr())
        if number % 8 == 0:
            kept.append((number, images[:1] if number else images.numpy()[:1]))
    assert len(set(addresses)) <= PREFETCH + 3 + len(kept)
    for number, part in kept:
        assert np.array_equal(part, expected[number][:1])


def test_a_batch_of_its_own_memory_is_pickled_with_its_pixels() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    numbers = torch.tensor([3, 4])
    batch = Batch(images, numbers, torch.tensor([1.0, 0.0]), numbers, numbers, epoch=1, step=2)
    other = pickle.loads(pickle.dumps(batch))
    assert torch.equal(other.images, images)
    assert torch.equal(other.weights, batch.weights)
    assert (other.epoch, other.step, other.place) == (1, 2, None)


def test_a_device_is_given_no_jpeg_that_asks_for_too_much() -> None:
    out = io.BytesIO()
    Image.fromarray(np.arange(48 * 64 * 3, dtype=np.int64).astype(np.uint8).reshape(48, 64, 3)).save(out, "JPEG", progressive=True)
    data, jpegs = out.getvalue(), list[bytes]()
    encoded = Encoded(None, np.array([48]), np.array([64]))
    last = data.rindex(b"\xff\xda")
    assert not encoded.take(0, data[:last] + data[last:-2] * 200 + b"\xff\xd9", jpegs)
    assert not encoded.take(0, data, jpegs, 48 * 64 - 1)
    assert encoded.take(0, data, jpegs, 48 * 64)
    assert jpegs == [data]
