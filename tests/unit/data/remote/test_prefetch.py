"""The process that fetches shards ahead of training."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_server import Server
from cached_shards import SIZE, cache_of, make, used, uses_of

from dtl.data.remote.prefetch import Prefetcher


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "www") as running:
        make(tmp_path / "www", running.url)
        yield running


def test_the_helper_fetches_in_the_order_of_the_plan_and_ends_with_its_input(server: Server, tmp_path: Path) -> None:
    cache = cache_of(server, tmp_path, cache_gb=6 * SIZE / 1e9)
    uses = uses_of()
    order = uses.order(0, uses.time(1, 0)).tolist()
    helper = Prefetcher(cache, uses, until=uses.time(1, 0))
    try:
        _until(lambda: len(cache.here()) == 6)
        time.sleep(0.2)
        assert sorted(cache.here().tolist()) == sorted(order[:6]), "what does not fit waits"
        helper.at(0, 2)
        _until(lambda: sorted(cache.here().tolist()) == sorted(order[2:]))
        assert used(cache) <= 6 * SIZE
    finally:
        helper.close()
    assert helper._process.returncode is not None
    helper.at(0, 3)  # nobody listens any more, which is no error
    gc.collect()


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
