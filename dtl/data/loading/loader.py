"""Batches of one rank: the plan gives the samples, stateless workers read, check, decode and augment them into one uint8 tensor.

Workers are stateless, without position, generator or epoch: each request names its samples. So any number of workers gives the same
batches, and a sample counts as seen when the trainer has finished it, not when it was prefetched.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dtl import keyed
from dtl.config.models import ImageSize, sides
from dtl.data.decoding.decode import NO_MEMORY, DecodeError, crop_jpeg, decode
from dtl.data.decoding.headers import MAX_PIXELS, check_size
from dtl.data.loading.batch import Batch, BatchBuffers, Encoded, Request, Transform
from dtl.data.loading.device import DeviceDecoder
from dtl.data.loading.processes import PREFETCH, end_processes, start_processes
from dtl.data.remote.prefetch import Prefetcher, prefetcher
from dtl.data.remote.schedule import ShardUses
from dtl.data.sampling.plan import EpochPlan, MicroBatch, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms.own import OwnFunction
from dtl.errors import DamagedSample, UserError
from dtl.reading import Reading


class BatchDataset:
    """A map-style dataset for torch's DataLoader: its "index" is a whole MicroBatch, its item a Batch."""

    def __init__(self, shards: Shards, transform: Transform, *, image_size: ImageSize, seed: int) -> None:
        self.shards, self.transform, self.image_size, self.seed = shards, transform, image_size, seed
        self._sides = sides(image_size)
        self._own = None if transform.function is None else OwnFunction(transform.function)
        self._buffers: BatchBuffers | None = None
        self.ships = False
        """JPEGs are not decoded here but by a DeviceDecoder."""
        self.views: tuple[int, ...] = ()
        """Epochs whose augmentations each sample gets, from one read and one decode; empty: the request's epoch."""

    def filling(self, buffers: BatchBuffers) -> BatchDataset:
        """A copy for loader processes that write images into `buffers`."""
        other: BatchDataset = copy.copy(self)
        other._buffers = buffers
        return other

    def __getitems__(self, request: MicroBatch) -> Batch:
        shards = self.shards
        started = time.perf_counter(), time.thread_time()
        shards.at(request.epoch, request.step)
        images, place = self._room(request)
        weights = torch.from_numpy(request.weights.copy())
        num_real = int((request.slots >= 0).sum())
        bad: list[tuple[int, DamagedSample]] = []
        distinct = request.samples[: max(num_real, 1)]
        widths, heights, turns = shards.shapes(distinct, exif=self.transform.reading.exif)
        keyed_by = distinct if request.draws is None else request.draws[: len(distinct)]
        views = [self.transform.draw(keyed_by, widths, heights, seed=self.seed, epoch=epoch) for epoch in self.views or (request.epoch,)]
        size = len(request.samples)
        failed = ""
        encoded, jpegs = Encoded(views[0], heights, widths) if self.ships else None, list[bytes]()
        for i, data in enumerate(shards.read(distinct)):
            damage = self._damage_before_decoding(int(distinct[i]), data)
            if damage is None:
                assert isinstance(data, bytes)
                if encoded is not None and encoded.take(i, data, jpegs, shards.limits.max_pixels, turn=int(turns[i])):
                    continue
                out = images[i::size]
                stored = Stored(data, int(heights[i]), int(widths[i]), int(turns[i]), shards.limits.max_pixels)
                if self._own is None:
                    damage = self._fill(int(distinct[i]), stored, views, i, out)
                else:
                    damage, failed = self._fill_by(self._own, int(distinct[i]), stored, int(keyed_by[i]), self.views or (request.epoch,), out)
                    if failed:
                        break
            if encoded is not None:
                encoded.decoded.append(i)
            if damage is not None:
                images[i::size] = 0
                weights[i] = 0.0
                bad.append((int(distinct[i]), damage))
        if encoded is not None:
            encoded.close(jpegs)
            images = images[encoded.decoded]
        elif len(distinct) < size:
            # A pad repeats a sample of its micro-batch, already decoded; its weight is 0.
            for view in torch.split(images, size):
                view[len(distinct) :] = view[torch.arange(size - len(distinct)) % len(distinct)]
        labels = shards.labels[request.samples].astype(np.int64)
        labels[(labels < 0) | (labels >= shards.num_classes)] = 0  # its weight is 0, but a loss refuses labels out of range
        return Batch(
            images=images,
            labels=torch.from_numpy(labels),
            weights=weights,
            samples=torch.from_numpy(request.samples),
            slots=torch.from_numpy(request.slots),
            epoch=request.epoch,
            step=request.step,
            bad=bad,
            seconds=(time.perf_counter() - started[0], time.thread_time() - started[1]),
            place=place,
            encoded=encoded,
            failed=failed,
        )

    def _room(self, request: MicroBatch) -> tuple[Tensor, tuple[int, int] | None]:
        """Memory for the images, and its (pool, buffer) if it is one of the buffers."""
        buffer = request.buffer if isinstance(request, Request) else None
        if self._buffers is not None and buffer is not None:
            return self._buffers.view(buffer), (self._buffers.number, buffer)
        shape = (max(1, len(self.views)) * len(request.samples), self.transform.reading.channels, *self._sides)
        return torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last), None

    def _damage_before_decoding(self, sample: int, data: bytes | DamagedSample) -> DamagedSample | None:
        """What is wrong with a sample, checked before it is decoded; None: nothing."""
        if isinstance(data, DamagedSample):
            return data
        shards = self.shards
        width, height = int(shards.widths[sample]), int(shards.heights[sample])
        try:
            check_size(width, height, shards.limits.max_pixels)  # before a rectangle of it is decoded, or a GPU is given it
        except DecodeError as error:
            return shards.damaged(sample, str(error))
        if not 0 <= int(shards.labels[sample]) < shards.num_classes:
            return shards.damaged(sample, f"label {int(shards.labels[sample])} is not one of {shards.num_classes} classes")
        return None

    def _fill(self, sample: int, stored: Stored, views: list[Any], i: int, out: Tensor) -> DamagedSample | None:
        """Sample `i` of the request into `out` [V, 3, H, W], a row a view."""
        try:
            if len(views) == 1:
                decode_into(out[0], stored, self.transform, views[0], i)
            else:
                decode_views_into(out, stored, self.transform, views, i)
        except DecodeError as error:
            return self.shards.damaged(sample, str(error))
        except MemoryError:
            return self.shards.unreachable(sample, f"{NO_MEMORY} ({stored.width} x {stored.height} pixels)")
        return None

    def _fill_by(self, own: OwnFunction, sample: int, stored: Stored, number: int, epochs: Sequence[int], out: Tensor) -> tuple[DamagedSample | None, str]:
        """The same by way of the user's own function, which may give another size. `number`: what the random choices are keyed by. Also what failed in it."""
        shards = self.shards
        try:
            image = stored.decoded(1, self.transform.reading)
            for row, epoch in zip(out, epochs, strict=True):
                changed = own(image, keyed.int_key(self.seed, epoch, number, "function"), shards.name(sample))
                draws = self.transform.draw(np.array([number]), np.array([changed.shape[1]]), np.array([changed.shape[0]]), seed=self.seed, epoch=epoch)
                self.transform.apply(changed, draws, 0, row)
        except DecodeError as error:
            return shards.damaged(sample, str(error)), ""
        except UserError as error:
            return None, str(error)
        except MemoryError:
            return shards.unreachable(sample, f"{NO_MEMORY} ({stored.width} x {stored.height} pixels)"), ""
        return None, ""


@dataclass(frozen=True)
class Stored:
    """The bytes of an image, and what the index has about it: its size and EXIF orientation, as it is to be seen."""

    data: bytes
    height: int
    width: int
    turn: int = 1
    max_pixels: int = MAX_PIXELS

    def decoded(self, reduction: int, reading: Reading) -> np.ndarray:
        """DecodeError also where it has another size."""
        image = decode(self.data, reduction, max_pixels=self.max_pixels, reading=reading, turn=self.turn)
        if image.shape[:2] not in ((self.height, self.width), (-(-self.height // reduction), -(-self.width // reduction))):
            raise DecodeError(f"{image.shape[1]} x {image.shape[0]} pixels, but {self.width} x {self.height} according to the index")
        return image


def decode_into(out: Tensor, stored: Stored, transform: Transform, draws: Any, i: int) -> None:
    """Decode sample `i` of `draws`, and write it into `out` uint8 [3, S, S]. Raises DecodeError."""
    region = transform.region(draws, i)
    crop = None
    if transform.reading.channels == 3:
        crop = crop_jpeg(stored.data, region, height=stored.height, width=stored.width, turn=stored.turn)
    if crop is not None:
        transform.apply_crop(crop, draws, i, out)
        return
    transform.apply(stored.decoded(region.reduction, transform.reading), draws, i, out)


def decode_views_into(out: Tensor, stored: Stored, transform: Transform, views: Sequence[Any], i: int) -> None:
    """The same for several draws, one row of `out` each. The image is decoded whole, once for each fraction of its size that is needed: two
    rectangles take longer than the image."""
    images: dict[int, np.ndarray] = {}
    for row, draws in zip(out, views, strict=True):
        reduction = transform.region(draws, i).reduction
        if reduction not in images:
            images[reduction] = stored.decoded(reduction, transform.reading)
        transform.apply(images[reduction], draws, i, row)


class StepLoader:
    """The batches of one rank for a number of steps of training or evaluation; each step is a list of micro-batches.

    `plans(epoch)` gives the plan of an epoch. Exhaust or close the iterator: loader processes must be gone before the interpreter ends (they
    ignore SIGTERM, so that a signal to the whole job leaves the trainer time to save).
    """

    def __init__(
        self,
        shards: Shards,
        transform: Transform,
        *,
        plans: Callable[[int], EpochPlan],
        layout: RankLayout,
        rank: int,
        image_size: ImageSize,
        seed: int,
        workers: int,
        pin_memory: bool = False,
        steps_per_epoch: int | None = None,
        dataset: Any = None,
        decode_on: torch.device | None = None,
        views: tuple[int, ...] = (),
    ) -> None:
        """`dataset` turns a MicroBatch into a Batch, in place of a BatchDataset of `shards` and `transform`. `decode_on`: the device that decodes
        JPEGs and then holds the images; None: the loader processes decode. `views`: see BatchDataset; not with `decode_on`."""
        assert not (views and decode_on is not None)
        self.plans, self.layout, self.rank, self.workers = plans, layout, rank, workers
        self.steps_per_epoch = steps_per_epoch  # debugging: only the first steps of each epoch
        self._dataset: Any = dataset or BatchDataset(shards, transform, image_size=image_size, seed=seed)
        if views:
            self._dataset.views = views
        self._pin_memory = pin_memory
        self._decoder = None
        if decode_on is not None and isinstance(self._dataset, BatchDataset):
            self._decoder = DeviceDecoder(self._dataset.transform, decode_on, shards.damaged)  # type: ignore[arg-type]
            self._dataset.ships = True

    def steps(self, first_epoch: int, first_step: int, num_steps: int) -> Iterator[list[Batch]]:
        """`num_steps` steps from step `first_step` of `first_epoch` on, across epochs. Starting anywhere costs the same."""
        ahead = self._follow(first_epoch, first_step, num_steps)
        buffers: BatchBuffers | None = None

        def start(options: dict[str, Any]) -> Iterator[Batch]:
            nonlocal buffers
            if buffers is not None:
                buffers.close()  # of processes that did not start
            buffers = self._make_buffers()
            loader: DataLoader[Batch] = DataLoader(
                self._dataset if buffers is None else self._dataset.filling(buffers),
                batch_sampler=_Requests(self, first_epoch, first_step, num_steps, buffers),  # type: ignore[arg-type]
                collate_fn=_as_it_is,  # type: ignore[arg-type]
                pin_memory=self._pin_memory,
                **options,
            )
            return iter(loader)

        with warnings.catch_warnings():
            # torch warns at every phase and evaluation. The logged share of time that waits for data shows whether there are too many.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loaded = start_processes(start, min(self.workers, max(1, num_steps * self.layout.accumulation_steps)) if self.workers else 0)
            batches = loaded if self._decoder is None else self._decoder.finished(loaded)
        try:
            for plan, step in self.walk(first_epoch, first_step, num_steps):
                if ahead is not None:
                    ahead.at(plan.epoch, step)
                batch = [next(batches) for _ in range(self.layout.accumulation_steps)]
                if failed := next((one.failed for one in batch if one.failed), ""):
                    raise UserError(failed)  # by the user's own function, in a loader process
                yield batch
        finally:
            if self._decoder is not None:
                batches.close()  # type: ignore[attr-defined]
            end_processes(loaded)
            del batches, loaded
            if buffers is not None:
                buffers.close()
            if ahead is not None:
                ahead.close()

    def _make_buffers(self) -> BatchBuffers | None:
        """Enough for all prefetched batches, the trainer's current step and the one before it."""
        if not self.workers or sys.platform != "linux" or not isinstance(self._dataset, BatchDataset) or self._dataset.ships:
            return None
        num = self.workers * PREFETCH + 2 * self.layout.accumulation_steps + 1
        rows = self.layout.micro_batch_size * max(1, len(self._dataset.views))
        return BatchBuffers(num, micro_batch_size=rows, image_size=self._dataset.image_size, channels=self._dataset.transform.reading.channels)

    def walk(self, first_epoch: int, first_step: int, num_steps: int) -> Iterator[tuple[EpochPlan, int]]:
        """(plan, step within the epoch) of each step."""
        epoch, step = first_epoch, first_step
        plan = self.plans(epoch)
        for _ in range(num_steps):
            while step >= (last := min(plan.num_steps, self.steps_per_epoch or plan.num_steps)):
                epoch, step = epoch + 1, step - last
                plan = self.plans(epoch)
            yield plan, step
            step += 1

    def uses(self, plan: EpochPlan) -> ShardUses:
        """When these loaders need which shard. `behind`: samples between the newest request and the trainer."""
        steps = -(-max(1, self.workers) * PREFETCH // self.layout.accumulation_steps) + 1
        return ShardUses.of(plan, behind=steps * plan.largest_step)

    def _follow(self, first_epoch: int, first_step: int, num_steps: int) -> Prefetcher | None:
        """Announce the coming steps to the cache of remote shards; one process of each node prefetches."""
        cache = self._dataset.shards.cache if isinstance(self._dataset, BatchDataset) else None
        if cache is None:
            return None
        plan = self.plans(first_epoch)
        uses = self.uses(plan)
        cache.follow(uses)
        epochs, step = divmod(first_step + num_steps, min(plan.num_steps, self.steps_per_epoch or plan.num_steps))
        until = uses.step_time(first_epoch + epochs, step)
        return prefetcher(cache, uses, first=(first_epoch, first_step), until=until)


class _Requests(Sequence[MicroBatch]):
    """The batch sampler: lives in the main process, computes each request from the plan as the workers ask for it."""

    def __init__(self, loader: StepLoader, first_epoch: int, first_step: int, num_steps: int, buffers: BatchBuffers | None) -> None:
        self.loader, self.first_epoch, self.first_step, self.num_steps = loader, first_epoch, first_step, num_steps
        self.buffers = buffers

    def __len__(self) -> int:
        return self.num_steps * self.loader.layout.accumulation_steps

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("requests are iterated, not indexed")

    def __iter__(self) -> Iterator[MicroBatch]:
        for plan, step in self.loader.walk(self.first_epoch, self.first_step, self.num_steps):
            for micro_batch in self.loader.layout.micro_batches(plan, step, self.loader.rank):
                yield micro_batch if self.buffers is None else Request(**vars(micro_batch), buffer=self.buffers.take())


def _as_it_is(batch: Batch) -> Batch:
    return batch
