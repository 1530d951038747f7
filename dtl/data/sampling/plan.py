"""Which sample sits at which position of which epoch, and which positions each rank takes at each step.

All of it is a pure function of (seed, epoch, shard sizes, window). So a resume needs one number, no state, no skipping and no communication,
and any number of ranks and workers sees the same global batches in the same order. `EpochPlan` orders the samples, `RankLayout` cuts each step
into the `MicroBatch`es of each rank.

Letters: N samples, S steps an epoch, G global batch size, R ranks, n slots (samples) of one step, m slots of one rank.
The idea of a position -> sample function is Grain's MapDataset; padding with weight 0 instead of repeating or dropping is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dtl.errors import UserError
from dtl.keyed import permutation

Int = npt.NDArray[np.int64]
PLAN_VERSION = 1
"""Raise it with every change that puts other samples at the positions of an epoch: here, in `balance.py` and in `dtl.keyed`. Checkpoints hold
it, and a run is not resumed in another order. The golden vectors in the tests notice such a change."""


@dataclass(frozen=True)
class EpochPlan:
    """The order of one epoch: `samples(positions)` and `step_samples(step)` give sample ids, 0 to N - 1, counted through the shards.

    `shard_sizes` int64 [number of shards]. Shards come in random order, positions are cut into windows of `window` samples, and each window is
    permuted: with N <= window that is a full shuffle. With `shuffle=False` samples come in the order of the shards (evaluation). An epoch has
    `num_steps` = ceil(N / G) steps of nearly equal size; with `drop_last` floor(N / G) steps of G samples.
    UserError where that is 0.
    """

    shard_sizes: Int
    seed: int
    epoch: int
    global_batch_size: int
    window: int = 65_536
    shuffle: bool = True
    drop_last: bool = False
    _windows: dict[int, Int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.global_batch_size >= 1
        assert self.window >= 1
        if self.num_steps == 0:
            raise UserError(
                f"an epoch has no steps: {self.num_samples} samples, global batch size {self.global_batch_size}"
                + (", and `last: drop` leaves out an incomplete batch" if self.drop_last and self.num_samples else "")
            )

    @cached_property
    def num_samples(self) -> int:
        return int(self.shard_sizes.sum())

    @cached_property
    def num_steps(self) -> int:
        if self.drop_last:
            return self.num_samples // self.global_batch_size
        return -(-self.num_samples // self.global_batch_size)

    @cached_property
    def num_positions(self) -> int:
        """Positions that the epoch visits: N, or the multiple of G that fits into it with `drop_last`."""
        return self.num_steps * self.global_batch_size if self.drop_last else self.num_samples

    @cached_property
    def largest_step(self) -> int:
        """Slots of the largest step: ceil(N / S). Steps differ by at most one slot."""
        return -(-self.num_positions // self.num_steps)

    def step_bounds(self, step: int) -> tuple[int, int]:
        """Positions [first, last) of step 0 <= step < num_steps; balanced, so that there is no tiny last batch."""
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        return step * self.num_positions // self.num_steps, (step + 1) * self.num_positions // self.num_steps

    def samples(self, positions: npt.ArrayLike) -> Int:
        """Sample ids at `positions`; O(window), whatever N is."""
        return self.draws(positions) % self.num_samples

    def times(self) -> Int:
        """[N] how often the whole epoch draws each sample: once. For checks; nothing else here is of length N."""
        return np.ones(self.num_samples, np.int64)

    def draws(self, positions: npt.ArrayLike) -> Int:
        """The keys of the augmentation at `positions`: the sample id, plus a multiple of N where samples come more than once."""
        positions = np.asarray(positions, dtype=np.int64)
        if not self.shuffle:
            return positions.copy()
        result = np.empty_like(positions)
        windows = positions // self.window
        for number in np.unique(windows):
            inside = windows == number
            result[inside] = self._window(int(number))[positions[inside] - number * self.window]
        return result

    def step_samples(self, step: int) -> Int:
        """Sample ids of the whole global batch of `step`, in slot order."""
        return self.samples(np.arange(*self.step_bounds(step)))

    @cached_property
    def _shard_order(self) -> Int:
        return permutation(len(self.shard_sizes), self.seed, self.epoch, "shards")

    @cached_property
    def _starts(self) -> tuple[Int, Int]:
        """First sample id of each shard, and first place of each shard in shard order (with the end appended)."""
        first_id = np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(np.int64)
        first_place = np.concatenate([[0], np.cumsum(self.shard_sizes[self._shard_order])]).astype(np.int64)
        return first_id, first_place

    def _window(self, number: int) -> Int:
        """Sample ids of one window in their final order; the last two windows are kept, since a step may cross a border."""
        if number not in self._windows:
            while len(self._windows) >= 2:
                self._windows.pop(next(iter(self._windows)))
            first = number * self.window
            length = min(self.num_samples, first + self.window) - first
            places = first + permutation(length, self.seed, self.epoch, "window", number)
            first_id, first_place = self._starts
            shard = np.searchsorted(first_place, places, side="right") - 1
            self._windows[number] = first_id[self._shard_order[shard]] + places - first_place[shard]
        return self._windows[number]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank passes forward at once: B slots, first the real samples, then pads (weight 0, slot -1).

    B is the same at every step, so a rank's share is padded where it is smaller.
    """

    epoch: int
    step: int
    """Step within the epoch, from 0."""
    samples: Int
    """[B] sample ids; a pad repeats a sample of its micro-batch."""
    slots: Int
    """[B] places in the global batch; -1 for a pad."""
    weights: npt.NDArray[np.float32]
    """[B] 1 for a real sample, 0 for a pad."""
    draws: Int | None = None
    """[B] keys of the augmentation; None: the sample ids."""


@dataclass(frozen=True)
class RankLayout:
    """How the slots (places in the global batch) of a step are cut into `num_ranks` shares, and each share into micro-batches.

    Every rank has `accumulation_steps` micro-batches of `micro_batch_size` slots at every step: DDP needs the same number on each rank. `unit` is
    1, or 2 where cuts must lie at even slots, so that the partners 2i and 2i+1 of mixup stay in one micro-batch.
    """

    num_ranks: int
    micro_batch_size: int
    accumulation_steps: int
    unit: int

    @classmethod
    def for_plan(cls, plan: EpochPlan, *, num_ranks: int, micro_batch_size: int | None, pairs: bool = False) -> RankLayout:
        """`micro_batch_size` None: a rank's whole share. A larger one than the share is cut down to it."""
        unit = 2 if pairs else 1
        units = -(-plan.largest_step // unit)
        share = -(-units // num_ranks)
        per_micro = share if micro_batch_size is None else max(1, min(share, micro_batch_size // unit))
        accumulation_steps = -(-share // per_micro)
        return cls(num_ranks, -(-share // accumulation_steps) * unit, accumulation_steps, unit)

    def slots(self, num_slots: int, rank: int) -> tuple[int, int]:
        """Slots [first, last) of `rank` in a step of `num_slots`; shares differ by at most one unit."""
        units = -(-num_slots // self.unit)
        first, last = units * rank // self.num_ranks, units * (rank + 1) // self.num_ranks
        return first * self.unit, min(last * self.unit, num_slots)

    def micro_batches(self, plan: EpochPlan, step: int, rank: int) -> Iterator[MicroBatch]:
        """The micro-batches of one rank at one step: always `accumulation_steps` of `micro_batch_size` slots."""
        low, high = plan.step_bounds(step)
        first, last = self.slots(high - low, rank)
        draws = plan.draws(np.arange(low + first, low + last))
        spare = plan.draws([low])  # for a micro-batch without any real sample
        for micro_step in range(self.accumulation_steps):
            start = micro_step * self.micro_batch_size
            real = draws[start : start + self.micro_batch_size]
            padding = self.micro_batch_size - len(real)
            padded = np.concatenate([real, np.resize(real if len(real) else spare, padding)]).astype(np.int64)
            yield MicroBatch(
                epoch=plan.epoch,
                step=step,
                samples=padded % plan.num_samples,
                slots=np.concatenate([first + start + np.arange(len(real)), np.full(padding, -1)]).astype(np.int64),
                weights=np.concatenate([np.ones(len(real)), np.zeros(padding)]).astype(np.float32),
                draws=padded,
            )
