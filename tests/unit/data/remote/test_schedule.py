"""What a cache gives up, and what it must hold: against the plan itself, and against the best that any cache could do."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtl.data.remote.schedule import NEVER, ShardUses, victims
from dtl.data.sampling.plan import EpochPlan


def plan_of(sizes: list[int], window: int, *, batch: int = 4, shuffle: bool = True, epoch: int = 0, drop: bool = False) -> EpochPlan:
    return EpochPlan(np.array(sizes), seed=3, epoch=epoch, global_batch_size=batch, window=window, shuffle=shuffle, drop_last=drop)


def shards_at(sizes: list[int], window: int, shuffle: bool, epoch: int, drop: bool) -> list[int]:
    """The shard that each position of the epoch asks for."""
    plan = plan_of(sizes, window, shuffle=shuffle, epoch=epoch, drop=drop)
    return (np.searchsorted(np.cumsum(sizes), plan.samples(np.arange(plan.num_positions)), side="right")).tolist()


sets = st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) >= 4)


@given(sets, st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 3))
def test_a_shard_is_asked_for_within_its_span_only(sizes: list[int], window: int, shuffle: bool, drop: bool, epoch: int) -> None:
    uses = ShardUses.of(plan_of(sizes, window, shuffle=shuffle, drop=drop))
    first, last = uses.spans(epoch)
    asked = shards_at(sizes, window, shuffle, epoch, drop)
    for position, shard in enumerate(asked):
        assert first[shard] <= uses.time(epoch, position) < last[shard]
        assert uses.next_use(uses.time(epoch, position))[shard] == uses.time(epoch, position)
    windows = range(0, len(asked), window if shuffle else 1)
    for shard, size in enumerate(sizes):
        held = [w for w in windows if shard in asked[w : w + (window if shuffle else 1)]]
        if size and held and not drop:
            assert (first[shard], uses.time(epoch, 0) + held[0]) == (uses.time(epoch, held[0]),) * 2, "the span begins with its first window"
        if not size:
            assert first[shard] == NEVER


@given(sets, st.integers(1, 12), st.booleans(), st.integers(0, 20))
def test_the_next_use_is_the_next_use(sizes: list[int], window: int, shuffle: bool, start: int) -> None:
    """Of a shard that is not in use now: the first position of the first window that asks for it, in this epoch or the next."""
    num = sum(sizes)
    start = start % num
    uses = ShardUses.of(plan_of(sizes, window, shuffle=shuffle))
    asked = [*shards_at(sizes, window, shuffle, 0, False), *shards_at(sizes, window, shuffle, 1, False)]
    step = window if shuffle else 1
    bounds = [*range(0, num, step), *range(num, 2 * num, step), 2 * num]
    found = uses.next_use(start)
    for shard, size in enumerate(sizes):
        if not size:
            continue
        expected = next(max(a, start) for a, b in itertools.pairwise(bounds) if b > start and shard in asked[a:b])
        assert found[shard] == expected


@given(sets, st.integers(1, 12), st.booleans(), st.integers(0, 6), st.data())
def test_what_is_in_use_together_fits_into_what_is_asked_for(sizes: list[int], window: int, shuffle: bool, behind: int, data: st.DataObject) -> None:
    shard_bytes = np.array(data.draw(st.lists(st.integers(1, 50), min_size=len(sizes), max_size=len(sizes))))
    uses = ShardUses.of(plan_of(sizes, window, shuffle=shuffle), behind=behind)
    asked = [*shards_at(sizes, window, shuffle, 0, False), *shards_at(sizes, window, shuffle, 1, False)]
    most, number = uses.most_at_once(shard_bytes, 0)
    for now in range(sum(sizes)):
        held = set(asked[max(0, now - behind) : now + 1])
        assert shard_bytes[list(held)].sum() <= most
        assert len(held) <= number or shard_bytes[list(held)].sum() < most
    assert most <= shard_bytes.sum()


def test_balanced_sampling_needs_everything() -> None:
    class Other(EpochPlan):
        pass

    uses = ShardUses.of(Other(np.array([5, 5, 5]), seed=0, epoch=0, global_batch_size=4, window=2))
    assert uses.most_at_once(np.array([1, 2, 3]), 0) == (6, 3)


# --- Belady


def fewest_fetches(needs: list[frozenset[int]], room: int) -> int:
    """By trying everything: how many fetches any cache of `room` shards needs to have each set of `needs` at its time."""

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(needs):
            return 0
        missing = needs[at] - held
        every = held | needs[at]
        spare = sorted(every - needs[at])
        keep = min(len(spare), room - len(needs[at]))
        return len(missing) + min(best(at + 1, needs[at] | frozenset(some)) for some in itertools.combinations(spare, keep))

    return best(0, frozenset())


def fetches_of_ours(uses: ShardUses, times: list[int], needs: list[frozenset[int]], room: int) -> int:
    held: set[int] = set()
    count = 0
    ones = np.ones(len(uses.shard_sizes), np.int64)
    for now, need in zip(times, needs):
        for shard in sorted(need - held):
            out = victims(np.array(sorted(held), np.int64), uses.next_use(now), ones, after=now, room=len(held) + 1 - room)
            assert out is not None
            held -= set(out)
            held.add(shard)
            count += 1
        assert need <= held
    return count


@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2), st.booleans())
def test_no_cache_fetches_less(num_shards: int, size: int, window: int, more: int, shuffle: bool) -> None:
    sizes = [size] * num_shards
    uses = ShardUses.of(plan_of(sizes, window, batch=1, shuffle=shuffle))
    step = window if shuffle else 1
    times, needs = [], []
    for epoch in range(3):
        asked = shards_at(sizes, window, shuffle, epoch, False)
        for start in range(0, len(asked), step):
            times.append(uses.time(epoch, start))
            needs.append(frozenset(asked[start : start + step]))
    room = min(num_shards, max(len(need) for need in needs) + more)
    # Nobody knows what comes after the last epoch: the best is over what both know.
    ours = fetches_of_ours(uses, times, needs, room)
    assert ours == fewest_fetches(needs, room)


def test_a_small_share_is_still_worth_keeping_from_one_epoch_to_the_next() -> None:
    """Least recently used would fetch each shard in each epoch."""
    sizes = [4] * 20
    uses = ShardUses.of(plan_of(sizes, 8))
    times, needs = [], []
    for epoch in range(10):
        asked = shards_at(sizes, 8, True, epoch, False)
        for start in range(0, 80, 8):
            times.append(uses.time(epoch, start))
            needs.append(frozenset(asked[start : start + 8]))
    assert fetches_of_ours(uses, times, needs, 20) == 20
    assert 100 < fetches_of_ours(uses, times, needs, 10) < 130


@pytest.mark.parametrize(("room", "after", "expected"), [(0, 5, []), (-3, 5, []), (1, 5, [2]), (10, 5, [2]), (11, 5, [2, 0]), (31, 5, None), (1, 90, None)])
def test_victims(room: int, after: int, expected: list[int] | None) -> None:
    next_use, shard_bytes = np.array([50, 5, 90, 3, NEVER]), np.array([20, 20, 10, 20, 20])
    assert victims(np.array([0, 1, 2, 3]), next_use, shard_bytes, after=after, room=room) == expected
