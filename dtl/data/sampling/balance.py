"""Class-balanced epochs, exact and resumable like all others: position -> draw is a pure function of (seed, epoch, labels, window).

An epoch keeps its length, N draws. Class c gets a fixed quota q_c of them, in proportion to 1 (`uniform`) or to the root of its size
(`sqrt`); fractions go to the largest remainders. Each class has one endless stream of its samples: keyed permutation after keyed
permutation, and epoch e takes the places e * q_c to (e + 1) * q_c of it. So all samples of a class are drawn before any of them is drawn
again, also from one epoch to the next: at any epoch's end the samples of a class have been drawn equally often, or one differs by one.

Within an epoch each window of about `window` positions has its share of each quota (to one draw), in keyed order. Nothing here is of
length N but the mapped file of `ClassMembers`: O(K + window) for K classes, wherever the epoch is entered.

The permutations of a class are computed place by place, by swap-or-not (Hoang, Morris, Rogaway 2012, "An enciphering scheme based on a
card shuffle"), since a class may be too large to sort.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from dtl.data.sampling.class_members import ClassMembers
from dtl.data.sampling.plan import EpochPlan, Int
from dtl.data.shards.index import Shards
from dtl.keyed import keys, permutation

Balance = Literal["sqrt", "uniform"]
AnyBalance = Literal["none", "sqrt", "uniform"]
# Of swap-or-not. Each moves a place with probability 1/2 to anywhere, so after these 2^-40 of the order is left.
_ROUNDS = 40


def class_members(shards: Shards, balance: AnyBalance, *, cache_dir: str | Path | None = None, shared: bool = False) -> ClassMembers | None:
    """What `plan_epoch` needs for this balance; None for `none`."""
    return None if balance == "none" else ClassMembers.of_shards(shards, cache_dir=cache_dir, shared=shared)


def plan_epoch(
    shard_sizes: Int,
    *,
    balance: AnyBalance,
    members: ClassMembers | None,
    seed: int,
    epoch: int,
    global_batch_size: int,
    window: int = 65_536,
    drop_last: bool = False,
) -> EpochPlan:
    """The shuffled plan of one epoch, see `EpochPlan`; `members` (`class_members`) is needed unless `balance` is none."""
    if balance == "none":
        return EpochPlan(shard_sizes, seed, epoch, global_batch_size, window, drop_last=drop_last)
    assert members is not None
    return BalancedPlan(shard_sizes, seed, epoch, global_batch_size, window, drop_last=drop_last, balance=balance, members=members)


def quotas(counts: npt.ArrayLike, balance: Balance) -> Int:
    """[K] draws of each class in an epoch of sum(counts) draws; none for a class without samples. Exact integers throughout."""
    sizes = [int(count) for count in np.asarray(counts)]
    weights = [(1 if balance == "uniform" else math.isqrt(size << 64)) if size else 0 for size in sizes]
    num_draws, total = sum(sizes), sum(weights)
    shares = [divmod(num_draws * weight, total) for weight in weights]
    left = num_draws - sum(whole for whole, _ in shares)
    largest = sorted(range(len(sizes)), key=lambda number: (-shares[number][1], number))[:left]
    result = np.array([whole for whole, _ in shares], np.int64)
    result[largest] += 1
    return result


def permuted(places: Int, sizes: Int, streams: npt.NDArray[np.uint64]) -> Int:
    """Where each of `places` goes in the permutation of 0 ... size - 1 that its stream's key names; all arrays [n]."""
    different, which = np.unique(streams, return_inverse=True)
    at, size = places.astype(np.uint64), sizes.astype(np.uint64)
    for number in range(_ROUNDS):
        key = keys(different, "swap", number)[which]
        other = key % size + size - at
        other = np.where(other >= size, other - size, other)
        swap = keys(np.maximum(at, other) ^ key, "swap or not") >> np.uint64(63)
        at = np.where(swap == 1, other, at)
    return at.astype(np.int64)


@dataclass(frozen=True)
class _Window:
    """A stretch of an epoch's positions: [n] places in `ClassMembers.members`, and the pass through its class that each belongs to."""

    first: int
    members: Int
    passes: Int

    @property
    def end(self) -> int:
        return self.first + len(self.members)


@dataclass(frozen=True, kw_only=True)
class BalancedPlan(EpochPlan):
    """An epoch of N draws in which classes come by quota instead of by size; else as `EpochPlan`."""

    balance: Balance
    members: ClassMembers
    _mixed: dict[int, _Window] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def quotas(self) -> Int:
        return quotas(self.members.counts, self.balance)

    def draws(self, positions: npt.ArrayLike) -> Int:
        """A draw is sample + N * p where this is the sample's draw number p over all epochs: `draw % N` is the sample."""
        positions = np.asarray(positions, np.int64)
        result = np.empty_like(positions)
        todo = np.ones(positions.shape, bool)
        while todo.any():
            window = self._window_at(int(positions[todo][0]))
            inside = (positions >= window.first) & (positions < window.end)
            within = positions[inside] - window.first
            result[inside] = self._draws(window.members[within], window.passes[within])
            todo &= ~inside
        return result

    def times(self) -> Int:
        """[N] how often the whole epoch draws each sample, computed class by class, without the windows."""
        counts = self.quotas
        classes = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts) + self.epoch * counts[classes]
        draws = self._draws(*self._stream(classes, places, self.members.counts[classes]))
        return np.bincount(draws % self.num_samples, minlength=self.num_samples).astype(np.int64)

    @cached_property
    def _num_windows(self) -> int:
        return -(-self.num_samples // self.window)

    @cached_property
    def _offsets(self) -> Int:
        """[K] where in its quota each class starts to count windows: so a rare class may come in any of them."""
        return (keys(np.arange(len(self.quotas)), self.seed, self.epoch, "balance offsets") % np.uint64(self._num_windows)).astype(np.int64)

    def _taken(self, number: int) -> Int:
        """[K] draws of each class before window `number`."""
        taken: Int = (self.quotas * number + self._offsets) // self._num_windows
        return taken

    def _window_at(self, position: int) -> _Window:
        """The window that holds `position`; the last two are kept."""
        for window in self._mixed.values():
            if window.first <= position < window.end:
                return window
        low, high = 0, self._num_windows
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if int(self._taken(middle).sum()) <= position else (low, middle)
        while len(self._mixed) >= 2:
            self._mixed.pop(next(iter(self._mixed)))
        self._mixed[low] = self._window_number(low)
        return self._mixed[low]

    def _window_number(self, number: int) -> _Window:
        before = self._taken(number)
        counts = self._taken(number + 1) - before
        classes = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
        places = self.epoch * self.quotas[classes] + before[classes] + within
        members, passes = self._stream(classes, places, self.members.counts[classes])
        order = permutation(len(classes), self.seed, self.epoch, "balanced window", number)
        return _Window(int(before.sum()), members[order], passes[order])

    def _stream(self, classes: Int, places: Int, sizes: Int) -> tuple[Int, Int]:
        """Which of all `members`, in which pass through its class, is at these places of the classes' endless streams."""
        passes, places = np.divmod(places, sizes)
        streams = keys(keys(classes, self.seed, "balance") ^ passes.astype(np.uint64), "pass")
        return self.members.starts[classes] + permuted(places, sizes, streams), passes

    def _draws(self, members: Int, passes: Int) -> Int:
        """Looked up only when asked for: the members are a mapped file, and may be far apart in it."""
        samples: Int = self.members.members[members].astype(np.int64)
        draws: Int = samples + self.num_samples * (passes % (2**62 // self.num_samples))
        return draws
