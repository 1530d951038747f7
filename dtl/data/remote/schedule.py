"""When a run needs which shard: the plan, seen from the cache. Pure arithmetic, the same in every process that has the plan.

A shard is asked for from the first position of its first window to the last one of its last; between epochs not at all. So what a cache
should evict is known: the shard whose next use is furthest away (Belady 1966), and what it must hold at once is known before the
first step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl.data.sampling.plan import EpochPlan
from dtl.keyed import permutation

Int = npt.NDArray[np.int64]
# Further away than any use.
NEVER = np.iinfo(np.int64).max


@dataclass
class ShardUses:
    """The uses of S shards in every epoch, on one axis of time: epoch * N + position.

    `behind` positions before the one that is asked for may still be needed: other loader processes are working on them.
    """

    shard_sizes: Int
    seed: int
    window: int
    shuffle: bool
    everywhere: bool
    """Any sample may come at any time."""
    num_steps: int
    num_positions: int
    behind: int = 0
    _spans: dict[int, tuple[Int, Int]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, plan: EpochPlan, *, behind: int = 0) -> ShardUses:
        """Those of `plan`, whose own epoch does not count. Other plans than the plain one draw samples from wherever they lie."""
        everywhere = type(plan) is not EpochPlan
        sizes = np.array(plan.shard_sizes, np.int64)
        return cls(sizes, plan.seed, plan.window, plan.shuffle, everywhere, plan.num_steps, plan.num_positions, behind)

    def to_json(self) -> dict[str, Any]:
        """What makes the same uses in another process."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.init and item.name[0] != "_"} | {"shard_sizes": self.shard_sizes.tolist()}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> ShardUses:
        return cls(**{**facts, "shard_sizes": np.array(facts["shard_sizes"], np.int64)})

    @cached_property
    def num_samples(self) -> int:
        return int(self.shard_sizes.sum())

    def time(self, epoch: int, position: int) -> int:
        return epoch * self.num_samples + position

    def step_time(self, epoch: int, step: int) -> int:
        """The time of a step's first position."""
        return self.time(epoch, min(step, self.num_steps) * self.num_positions // self.num_steps)

    def spans(self, epoch: int) -> tuple[Int, Int]:
        """First and last (excluded) time at which each shard may be asked for in `epoch`, [S] each; NEVER where it is not."""
        found = self._spans.get(epoch)
        if found is None:
            first, last = self._positions(epoch)
            start = self.time(epoch, 0)
            unused = (self.shard_sizes == 0) | (first >= self.num_positions)
            last = np.minimum(last, self.num_positions)
            found = np.where(unused, NEVER, first + start), np.where(unused, NEVER, last + start)
            # Replaced whole: several threads may ask.
            self._spans = {**dict(list(self._spans.items())[-2:]), epoch: found}
        return found

    def next_use(self, time: int) -> Int:
        """[S] when each shard is asked for next, from `time` on; `time` itself for those in use now."""
        epoch = max(0, time) // self.num_samples
        first, last = self.spans(epoch)
        now = np.where((first != NEVER) & (last > time), np.maximum(first, time), NEVER)
        return np.where(now != NEVER, now, self.spans(epoch + 1)[0])

    def most_at_once(self, shard_bytes: Int, epoch: int) -> tuple[int, int]:
        """(bytes, number) of the shards in use at the worst moment of an epoch and of its border to the next, those `behind` included."""
        first, last = self.spans(epoch)
        used = np.flatnonzero((first != NEVER) & (shard_bytes > 0))
        times = np.concatenate([first[used], last[used] + self.behind])
        change = np.concatenate([shard_bytes[used], -shard_bytes[used]])
        order = np.lexsort((change > 0, times))  # at one time: first what ends, then what begins
        held, number = np.cumsum(change[order]), np.cumsum(np.sign(change[order]))
        worst = int(np.argmax(held)) if len(held) else 0
        within = (int(held[worst]), int(number[worst])) if len(held) else (0, 0)
        border = self.time(epoch + 1, 0)
        both = ((first != NEVER) & (last + self.behind > border)) | (self.spans(epoch + 1)[0] < border + self.behind)
        across = int(shard_bytes[both].sum()), int((shard_bytes[both] > 0).sum())
        return max(within, across)

    def order(self, time: int, until: int) -> Int:
        """Shards in the order in which they are needed from `time` on, each once, those first needed at `until` or later left out."""
        uses = self.next_use(time)
        order = np.argsort(uses, kind="stable")
        return order[uses[order] < until]

    def _positions(self, epoch: int) -> tuple[Int, Int]:
        num = len(self.shard_sizes)
        if self.everywhere:
            return np.zeros(num, np.int64), np.full(num, self.num_positions, np.int64)
        order = permutation(num, self.seed, epoch, "shards") if self.shuffle else np.arange(num)
        ends = np.cumsum(self.shard_sizes[order])
        starts = ends - self.shard_sizes[order]
        if self.shuffle:
            starts, ends = starts // self.window * self.window, -(-ends // self.window) * self.window
        first, last = np.empty(num, np.int64), np.empty(num, np.int64)
        first[order], last[order] = starts, ends
        return first, last


def victims(cached: Int, next_use: Int, shard_bytes: Int, *, after: int, room: int) -> list[int] | None:
    """Which of the `cached` shards to evict for `room` more bytes: those used last, only such as are not needed until `after`.

    None where that is not enough. `next_use` and `shard_bytes` are [S]; `room` <= 0 needs nothing.
    """
    chosen: list[int] = []
    if room <= 0:
        return chosen
    later = cached[next_use[cached] > after]
    for shard in later[np.argsort(-next_use[later], kind="stable")].tolist():
        chosen.append(shard)
        room -= int(shard_bytes[shard])
        if room <= 0:
            return chosen
    return None
