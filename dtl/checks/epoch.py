"""The samples that an epoch's loaders deliver, for any number of simulated ranks: counted, and hashed in the order of the plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl.config.models import ImageSize
from dtl.data.loading.batch import Batch, Transform
from dtl.data.loading.loader import StepLoader
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.shards.index import Shards


@dataclass(frozen=True)
class EpochProof:
    """What all ranks together received, from the first requested step to the end of the epoch."""

    num_samples: int
    """In the whole split."""
    num_steps: int
    """Steps that were run, on every rank."""
    expected: int
    """Samples that these steps should deliver: the whole split from step 0 on, unless the last ones are dropped."""
    seen: int
    """Samples that were delivered, damaged ones included."""
    duplicated: int
    """Surplus deliveries: beyond once for each sample, or beyond its class's quota with data.balance."""
    missing: int
    distinct: int
    """Different samples delivered; fewer than `seen` if data.balance repeats some."""
    damaged: tuple[str, ...]
    """One line for each damaged sample; its weight is 0."""
    order_hash: str
    """Hash of the sequence of global batches: the sample ids of each step, in the order of their slots."""
    pixel_hash: str | None
    """Hash of the augmented pixels, in the same order."""

    @property
    def is_exact(self) -> bool:
        return self.seen == self.expected and not self.duplicated and not self.missing and not self.damaged


def prove_epoch(
    shards: Shards,
    transform: Transform,
    *,
    plan: EpochPlan,
    num_ranks: int,
    micro_batch_size: int | None,
    workers: int,
    first_step: int,
    image_size: ImageSize,
    pixels: bool,
    advance: Callable[[int], None],
) -> EpochProof:
    """Run each rank's loader to the end of the epoch, one rank after another; `advance(n)` is called for each n samples.

    Takes 8 bytes for each sample (16 with `pixels`), and 16 for each of the split.
    """
    start = plan.step_bounds(first_step)[0]
    found = _Found(start, plan.num_positions - start, pixels)
    layout = RankLayout.for_plan(plan, num_ranks=num_ranks, micro_batch_size=micro_batch_size)
    for rank in range(num_ranks):
        loader = StepLoader(shards, transform, plans=lambda epoch: plan, layout=layout, rank=rank, image_size=image_size, seed=plan.seed, workers=workers)
        for step, batches in enumerate(loader.steps(plan.epoch, first_step, plan.num_steps - first_step), start=first_step):
            for batch in batches:
                advance(found.take(batch, plan.step_bounds(step)))
    return found.result(shards.num_samples, plan, first_step)


class _Found:
    """What was delivered, by position in the epoch; -1 for a position without a sample."""

    def __init__(self, start: int, length: int, pixels: bool) -> None:
        self.start = start
        self.samples = np.full(length, -1, np.int64)
        self.pixels = np.zeros(length, np.uint64) if pixels else None
        self.too_often, self.seen = 0, 0
        self.damaged: list[tuple[int, str]] = []

    def take(self, batch: Batch, bounds: tuple[int, int]) -> int:
        slots = batch.slots.numpy()
        real = np.flatnonzero(slots >= 0)
        positions = bounds[0] + slots[real] - self.start
        assert (slots[real] < bounds[1] - bounds[0]).all(), "a slot beyond its step"
        # A position that is delivered twice, whatever its sample, is a surplus sample.
        self.too_often += int((self.samples[positions] >= 0).sum())
        self.samples[positions] = batch.samples.numpy()[real]
        if self.pixels is not None:
            self.pixels[positions] = [_hash(batch.images[place]) for place in real]
        bad = {sample for sample, _ in batch.bad}
        counted = batch.weights.numpy()[real] > 0
        assert all(counted[i] or int(sample) in bad for i, sample in enumerate(batch.samples.numpy()[real])), "weight 0 without a reason"
        self.damaged += [(sample, str(damage)) for sample, damage in batch.bad]
        self.seen += len(real)
        return len(real)

    def result(self, num_samples: int, plan: EpochPlan, first_step: int) -> EpochProof:
        seen = np.bincount(self.samples[self.samples >= 0], minlength=num_samples)
        whole = first_step == 0 and not plan.drop_last
        # From step 0 on each sample has its number of times, whatever order the plan gives them; from a later step on, or where the last
        # are dropped, the plan gives those that are left.
        left = plan.times() if whole else np.bincount(plan.samples(np.arange(self.start, plan.num_positions)), minlength=num_samples)
        return EpochProof(
            num_samples=num_samples,
            num_steps=plan.num_steps - first_step,
            expected=int(left.sum()),
            seen=self.seen,
            duplicated=self.too_often + int(np.maximum(seen - left, 0).sum()),
            missing=int(np.maximum(left - seen, 0).sum()),
            distinct=int((seen > 0).sum()),
            damaged=tuple(line for _, line in sorted(set(self.damaged))),
            order_hash=self._digest(self.samples, plan, first_step),
            pixel_hash=None if self.pixels is None else self._digest(self.pixels, plan, first_step),
        )

    def _digest(self, values: npt.NDArray[Any], plan: EpochPlan, first_step: int) -> str:
        """Hash of the values, with the sizes of the steps between them."""
        digest = hashlib.sha256()
        for step in range(first_step, plan.num_steps):
            low, high = plan.step_bounds(step)
            digest.update(f"{high - low}:".encode())
            digest.update(np.ascontiguousarray(values[low - self.start : high - self.start]).astype("<u8").data)
        return digest.hexdigest()[:32]


def _hash(image: Any) -> int:
    return int.from_bytes(hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=8).digest(), "big")
