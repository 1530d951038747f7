"""How much of a disk the cache may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_server import Server
from cached_shards import NUM, SIZE, cache_of, content, make, uses_of

from dtl.data.remote import cache_space as cache_room
from dtl.data.remote.cache_space import Demand, divide
from dtl.errors import UserError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "www") as running:
        make(tmp_path / "www", running.url)
        yield running


def test_shares_of_a_limit(server: Server, tmp_path: Path) -> None:
    train, val = cache_of(server, tmp_path), cache_of(server, tmp_path)
    val.folder = tmp_path / "another set"
    train_uses, val_uses = uses_of(window=20), uses_of(shuffle=False)
    assert train_uses.most_at_once(train.bytes, 0) == (2 * SIZE, 2)
    assert val_uses.most_at_once(val.bytes, 0) == (SIZE, 1)
    demands = [Demand("data.train", train, train_uses, 3), Demand("data.val", val, val_uses)]
    divide(demands, None)
    assert (train.limit, val.limit) == (None, None)
    divide(demands, 100 * SIZE)
    assert (train.limit, val.limit) == (NUM * SIZE, NUM * SIZE)
    needed = [demand.least()[0] for demand in demands]
    divide(demands, sum(needed))
    assert [train.limit, val.limit] == needed
    divide(demands, sum(needed) + 2 * SIZE)
    assert sum((train.limit or 0, val.limit or 0)) == sum(needed) + 2 * SIZE
    with pytest.raises(UserError) as caught:
        divide(demands, sum(needed) - 1)
    assert f"{needed[0] // SIZE} of 8 shards, {needed[0] / 1e6:.1f} MB, for a window of 20 shuffled samples" in str(caught.value)
    assert f"use --data.cache-gb {sum(needed) / 1e9:.5f} or more, or a smaller --data.window" in str(caught.value)


def test_parts_of_one_set_are_counted_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and val that was held out of it lie in the same files."""
    train, val = cache_of(server, tmp_path), cache_of(server, tmp_path)
    demands = [Demand("data.train", train, uses_of(window=20), 3), Demand("data.val", val, uses_of(shuffle=False))]
    needed = sum(demand.least()[0] for demand in demands)
    assert needed < (NUM - 1) * SIZE
    divide(demands, needed + SIZE)
    assert (train.limit, val.limit) == (needed + SIZE, needed + SIZE)
    divide(demands, NUM * SIZE)
    assert (train.limit, val.limit) == (NUM * SIZE, NUM * SIZE), "all of the set, once"
    with pytest.raises(UserError, match=f"use --data.cache-gb {needed / 1e9:.5f} or more"):
        divide(demands, needed - 1)

    class Usage:
        free = NUM * SIZE

    monkeypatch.setattr(cache_room.shutil, "disk_usage", lambda place: Usage)
    divide(demands, 2 * NUM * SIZE)
    assert (train.limit, val.limit) == (NUM * SIZE, NUM * SIZE)
    Usage.free -= 1
    with pytest.raises(UserError, match=r"data\.train: the shards need 0\.2 MB more"):
        divide(demands, 2 * NUM * SIZE)


def test_a_full_disk_is_told_with_the_numbers(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 3 * SIZE

    monkeypatch.setattr(cache_room.shutil, "disk_usage", lambda place: Usage)
    cache = cache_of(server, tmp_path)
    full = r"data.train: the shards need 0.2 MB more in the cache .*, but (its disk|the disk) has only 0.1 MB free; choose another disk"
    with pytest.raises(UserError, match=full) as caught:
        divide([Demand("data.train", cache, uses_of())], None)
    assert "--data.cache-gb (0.00002 or more)" in str(caught.value)
    for number in range(5):
        content(cache, number)
    divide([Demand("data.train", cache, uses_of())], None)
