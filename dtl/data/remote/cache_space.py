"""Is there room for the shards of a run, on the disk and under its limit? Checked before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtl.data.remote.cache import ShardCache
from dtl.data.remote.schedule import ShardUses
from dtl.errors import UserError

# Epochs differ a little in which shards meet; of very many shards not each epoch is worth its sorting.
_SHARDS_LOOKED_AT = 2_000_000


@dataclass(frozen=True)
class Demand:
    """One split whose shards are remote. `epochs`: how many the run has of it."""

    what: str
    cache: ShardCache
    uses: ShardUses
    epochs: int = 1

    def least(self) -> tuple[int, int]:
        """(bytes, shards) that it has in use at its worst moment."""
        epochs = max(1, min(self.epochs, _SHARDS_LOOKED_AT // max(1, len(self.cache.bytes))))
        return max(self.uses.most_at_once(self.cache.bytes, epoch) for epoch in range(epochs))


def divide(demands: Sequence[Demand], limit: int | None) -> None:
    """Give each split its share of `limit` bytes (None: keep all). UserError where a share, or the disk, would be too small.

    All of them get what they need at once; what is left goes to the smaller sets first, which then are fetched only once. Parts of one set (train and
    val, held out of it) read the same files: they have one share, and their files are counted once.
    """
    sets: dict[tuple[Path, tuple[str, ...]], list[Demand]] = {}
    for demand in demands:
        sets.setdefault((demand.cache.folder, tuple(demand.cache.digests)), []).append(demand)
    needs = {demand.what: demand.least() for demand in demands}
    needed = {key: min(sum(needs[part.what][0] for part in parts), parts[0].cache.num_bytes) for key, parts in sets.items()}
    if limit is not None:
        least = sum(needed.values())
        if least > limit:
            parts = "; ".join(f"{d.what}: {needs[d.what][1]} of {len(d.cache.urls)} shards, {_gb(needs[d.what][0])}, {_why(d)}" for d in demands)
            raise UserError(
                f"data.cache_gb {limit / 1e9:g} ({_gb(limit)}) is too small for the remote shards that are in use at the same time ({parts}): "
                f"use --data.cache-gb {_up(least)} or more{_or_smaller(demands)}"
            )
        spare = limit - least
        for key in sorted(sets, key=lambda key: sets[key][0].cache.num_bytes):
            more = min(spare, sets[key][0].cache.num_bytes - needed[key])
            spare -= more
            for part in sets[key]:
                part.cache.limit = needed[key] + more
    for key, several in sets.items():
        _check_disk(several[0], needed[key])


def _check_disk(demand: Demand, needed: int) -> None:
    cache = demand.cache
    here = int(cache.bytes[cache.here()].sum())
    wanted = cache.num_bytes if cache.limit is None else min(cache.num_bytes, cache.limit)
    place = next(folder for folder in (cache.folder, *cache.folder.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if wanted - here > free:
        least = f" ({_up(needed)} or more)" if needed - here <= free else ""
        raise UserError(
            f"{demand.what}: the shards need {_gb(wanted - here)} more in the cache {cache.folder}, but the disk has only {_gb(free)} free; "
            f"choose another disk with --data.cache-dir, or keep fewer shards at a time with --data.cache-gb{least}"
        )


def _why(demand: Demand) -> str:
    uses = demand.uses
    if uses.everywhere:
        return "because balanced sampling draws from all shards at any time"
    if not uses.shuffle:
        return "including what is read ahead"
    return f"for a window of {min(uses.window, uses.num_samples):,} shuffled samples and the start of the next one"


def _or_smaller(demands: Sequence[Demand]) -> str:
    return ", or a smaller --data.window" if any(d.uses.shuffle and not d.uses.everywhere for d in demands) else ""


def _gb(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def _up(number: int) -> str:
    """As a value for cache_gb, not less than the number."""
    digits = 2 if number >= 1e9 else 6
    return f"{-(-number * 10**digits // 10**9) / 10**digits:f}".rstrip("0").rstrip(".")
