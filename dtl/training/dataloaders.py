"""The data of one rank: which plan, which layout and which loader each phase and each evaluation gets."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from socket import gethostname
from typing import Protocol

import numpy as np
import torch

from dtl import machine
from dtl.config.models import ImageSize, num_pixels
from dtl.data.loading.batch import Batch, Transform
from dtl.data.loading.loader import StepLoader
from dtl.data.loading.processes import PREFETCH
from dtl.data.loading.shared_memory import bytes_needed
from dtl.data.remote.cache_space import Demand
from dtl.data.sampling.balance import AnyBalance, plan_epoch
from dtl.data.sampling.class_members import ClassMembers
from dtl.data.sampling.plan import EpochPlan, MicroBatch, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.transforms import transforms
from dtl.distributed.runtime import Runtime
from dtl.text import counted
from dtl.training.phases import Phase


def rank_cores(runtime: Runtime, *, physical: bool = False) -> float:
    """The cores that this rank may use, those of its machine divided among the ranks there. All ranks together. `physical`: hyperthreads are not counted."""
    mine = machine.physical_cores(machine.own_cores()) if physical else machine.own_cores()
    everyone = runtime.gather((gethostname(), mine))
    others = [cores for rank, (host, cores) in enumerate(everyone) if host == gethostname() and rank != runtime.rank]
    return machine.core_share(mine, others)


def choose_workers(wanted: str | int, runtime: Runtime, cores: float, *, batch_bytes: int) -> int:
    """How many loader processes `data.workers` is on this rank; with auto at most half of the memory is for those of all ranks of the machine."""
    if isinstance(wanted, int):
        return wanted
    left = [one for one in machine.memory_left() if one is not None]
    memory = min(left) // (2 * max(1, runtime.launch.local_world_size)) if left else None
    return machine.loader_processes(cores, memory, on_cpu=runtime.device.type == "cpu", batch_bytes=batch_bytes)


class MicroBatchDataset(Protocol):
    """What a loader can read from in place of the images of the shards."""

    def __getitems__(self, request: MicroBatch) -> Batch: ...


@dataclass(frozen=True)
class View:
    """What becomes of an image at one size."""

    image_size: ImageSize
    train: transforms.Transform
    val: transforms.Transform


@dataclass
class DataLoaders:
    """Training and validation data of this rank. The shards are opened, the class maps checked."""

    train: Shards
    val: Shards
    train_transform: Transform
    val_transform: Transform
    rank: int
    world_size: int
    image_size: ImageSize
    global_batch_size: int
    micro_batch_size: int | None
    workers: int
    """Loader processes, as `data.workers` comes to on this rank."""
    seed: int
    window: int
    drop_last: bool = False
    balance: AnyBalance = "none"
    members: ClassMembers | None = None
    """Which samples each class has; needed with `balance`."""
    pin_memory: bool = False
    cores: float = 1.0
    """What this rank may use, `rank_cores`."""
    decode_on: torch.device | None = None
    """Where JPEGs are decoded; None: in the loader processes."""
    max_train_steps: int | None = None
    max_val_steps: int | None = None
    test: Shards | None = None
    evaluation_view: str = ""
    """One line about what evaluation sees of an image."""
    views: dict[str, View] = field(default_factory=dict)
    """By phase, where not all have one size; those of the phase that is trained, or else of the last one, are the transforms above."""
    cached: dict[str, MicroBatchDataset] = field(default_factory=dict, repr=False)
    """Features instead of images, by split, while a phase trains on them."""
    _plans: dict[int, EpochPlan] = field(default_factory=dict, repr=False)

    def use(self, phase: Phase) -> None:
        """From now on images have the size of this phase, in training and in evaluation."""
        if phase.name in self.views:
            view = self.views[phase.name]
            self.image_size, self.train_transform, self.val_transform = view.image_size, view.train, view.val

    def size_of(self, phase: Phase) -> ImageSize:
        return self.views[phase.name].image_size if phase.name in self.views else self.image_size

    @property
    def largest_size(self) -> ImageSize:
        """Of all phases."""
        return max([self.image_size, *(view.image_size for view in self.views.values())], key=num_pixels)

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.train_transform.reading.channels

    @property
    def classes(self) -> list[str]:
        return list(self.train.classes)

    @cached_property
    def short_side(self) -> float:
        """Median of the training images' shorter side, in pixels, of some thousand of them."""
        some = slice(None, None, max(1, self.train.num_samples // 4096))
        return float(np.median(np.minimum(self.train.widths[some], self.train.heights[some])))

    @property
    def class_counts(self) -> list[int]:
        return list(self.train.manifest.class_counts)

    @property
    def steps_per_epoch(self) -> int:
        steps = self.plan(0).num_steps
        return steps if self.max_train_steps is None else min(steps, self.max_train_steps)

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of a training epoch; the last two are kept, since a loader may work ahead over an epoch's end."""
        if epoch not in self._plans:
            while len(self._plans) >= 2:
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = plan_epoch(
                self.train.shard_sizes,
                balance=self.balance,
                members=self.members,
                seed=self.seed,
                epoch=epoch,
                global_batch_size=self.global_batch_size,
                window=self.window,
                drop_last=self.drop_last,
            )
        return self._plans[epoch]

    @property
    def batch_bytes(self) -> int:
        """The images of a micro-batch of training, on their way to the device."""
        layout = RankLayout.for_plan(self.plan(0), num_ranks=self.world_size, micro_batch_size=self.micro_batch_size)
        return self.channels * num_pixels(self.largest_size) * layout.micro_batch_size

    @property
    def shared_bytes(self) -> int:
        """What this rank's loader processes take of /dev/shm at most: validation's come while those of training wait, prefetched."""
        sizes = 0
        for shards, plan in ((self.train, self.plan(0)), (self.val, self._eval_plan(self.val))):
            layout = RankLayout.for_plan(plan, num_ranks=self.world_size, micro_batch_size=self.micro_batch_size, pairs=True)
            sizes += bytes_needed(
                micro_batch_size=layout.micro_batch_size,
                image_size=self.largest_size,
                accumulation_steps=layout.accumulation_steps,
                workers=self.workers,
                prefetch=PREFETCH,
                own_buffers=sys.platform == "linux" and self.decode_on is None,
                channels=self.channels,
                file_bytes=0 if self.decode_on is None else _file_bytes(shards),
            )
        return sizes

    def layout(self, phase: Phase) -> RankLayout:
        pairs = bool(phase.config.mixup or phase.config.cutmix)
        return RankLayout.for_plan(self.plan(0), num_ranks=self.world_size, micro_batch_size=self.micro_batch_size, pairs=pairs)

    def train_steps(self, phase: Phase, phase_step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step, from the phase's step `phase_step` to its end."""
        loader = self._loader("train", self.plan, self.layout(phase), limit=self.max_train_steps)
        epoch, step = phase.epoch_of(phase_step)
        return loader.steps(epoch, step, phase.num_steps - phase_step)

    def val_steps(self) -> Iterator[list[Batch]]:
        return self._eval_steps("val", self.val)

    def test_steps(self) -> Iterator[list[Batch]]:
        assert self.test is not None
        return self._eval_steps("test", self.test)

    def clean_batches(self, size: int, most: int) -> tuple[int, Iterator[list[Batch]]]:
        """Training images as evaluation sees them, about `most` of them, shuffled in a fixed order, in batches of at most `size`: how many batches all ranks
        have together, and this rank's stretch of them. A batch is the same at any number of ranks."""
        plan = EpochPlan(self.train.shard_sizes, seed=self.seed, epoch=0, global_batch_size=size, window=self.window)
        layout = RankLayout.for_plan(plan, num_ranks=1, micro_batch_size=None)
        num = min(plan.num_steps, -(-most // size))
        first, last = num * self.rank // self.world_size, num * (self.rank + 1) // self.world_size
        loader = self._loader("train", lambda epoch: plan, layout, limit=None, clean=True)
        return num, loader.steps(0, first, last - first) if last > first else _nothing()

    def _eval_steps(self, split: str, shards: Shards) -> Iterator[list[Batch]]:
        loader, _, num_steps = self._eval_loader(split, shards)
        return loader.steps(0, 0, num_steps)

    def _eval_loader(self, split: str, shards: Shards) -> tuple[StepLoader, EpochPlan, int]:
        plan = self._eval_plan(shards)
        layout = RankLayout.for_plan(plan, num_ranks=self.world_size, micro_batch_size=self.micro_batch_size)
        loader = self._loader(split, lambda epoch: plan, layout, limit=None)
        num_steps = plan.num_steps if self.max_val_steps is None else min(plan.num_steps, self.max_val_steps)
        return loader, plan, num_steps

    def cache_demands(self, phases: Sequence[Phase]) -> list[Demand]:
        """What the cache must hold of remote shards, for `dtl.data.remote.cache_space`; nothing for local ones."""
        found = []
        if self.train.cache is not None:
            loaders = [self._loader("train", self.plan, self.layout(phase), limit=self.max_train_steps) for phase in phases]
            uses = max((loader.uses(self.plan(0)) for loader in loaders), key=lambda uses: uses.behind)
            epochs = sum(-(-phase.num_steps // phase.steps_per_epoch) for phase in phases)
            found.append(Demand("data.train", self.train.cache, uses, epochs))
        for split, shards in (("val", self.val), ("test", self.test)):
            if shards is not None and shards.cache is not None:
                loader, plan, _ = self._eval_loader(split, shards)
                found.append(Demand(f"data.{split}", shards.cache, loader.uses(plan)))
        return found

    def _eval_plan(self, shards: Shards) -> EpochPlan:
        return EpochPlan(shards.shard_sizes, seed=self.seed, epoch=0, global_batch_size=self.global_batch_size, shuffle=False)

    def step_samples(self, phase: Phase, phase_step: int) -> np.ndarray:
        """Sample ids of the whole global batch, [n] in slot order."""
        epoch, step = phase.epoch_of(phase_step)
        return self.plan(epoch).step_samples(step)

    def step_labels(self, phase: Phase, phase_step: int) -> np.ndarray:
        labels = np.array(self.train.labels[self.step_samples(phase, phase_step)])
        labels[(labels < 0) | (labels >= self.train.num_classes)] = 0  # as the loader gives them, at weight 0
        return labels

    def step_size(self, phase: Phase, phase_step: int) -> int:
        epoch, step = phase.epoch_of(phase_step)
        first, last = self.plan(epoch).step_bounds(step)
        return last - first

    def sample_names(self, phase: Phase, phase_step: int, *, limit: int) -> list[str]:
        """Original paths (or keys) of the first samples of a global batch, for messages."""
        samples = self.step_samples(phase, phase_step)[:limit]
        return [self.train.path(int(sample)) or self.train.damaged(int(sample), "").key for sample in samples]

    def batch_name(self, phase: Phase, phase_step: int) -> str:
        """This rank's share of a global batch, for messages: how many samples, and the first one's key and shard (read from the disk)."""
        samples = self.step_samples(phase, phase_step)
        mine = samples[len(samples) * self.rank // self.world_size :][: max(1, len(samples) // self.world_size)]
        damaged = self.train.damaged(int(mine[0]), "")
        return f"{counted(len(mine), 'sample')} starting at {damaged.key} of {damaged.shard}"

    def _loader(self, split: str, plans, layout: RankLayout, *, limit: int | None, clean: bool = False) -> StepLoader:  # type: ignore[no-untyped-def]
        """`clean`: as evaluation sees them, and all of them for every rank."""
        cached = None if clean else self.cached.get(split)
        return StepLoader(
            {"train": self.train, "val": self.val, "test": self.test or self.val}[split],
            self.train_transform if split == "train" and not clean else self.val_transform,
            plans=plans,
            layout=layout,
            rank=0 if clean else self.rank,
            image_size=self.image_size,
            seed=self.seed,
            workers=0 if cached is not None else self.workers,
            pin_memory=self.pin_memory,
            decode_on=self.decode_on,
            steps_per_epoch=limit,
            dataset=cached,
        )


def _nothing() -> Iterator[list[Batch]]:
    yield from ()


def _file_bytes(shards: Shards) -> int:
    """Half more than the mean of some thousand: a batch may have larger ones."""
    return int(1.5 * np.mean(shards.sizes[:: max(1, shards.num_samples // 4096)]))
