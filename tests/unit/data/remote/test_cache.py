"""The cache of remote shards: one download under many processes, a limit that is kept, kills at any instant, failures told once."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_server import Server
from cached_shards import NUM, SAMPLES, SIZE, cache_of, content, make, used, uses_of
from harness import wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtl.config.models import DataConfig
from dtl.data.remote import cache as shard_cache
from dtl.data.remote.cache import ShardCache, open_cache
from dtl.data.remote.fetch import Unfetched
from dtl.data.sampling.plan import EpochPlan
from dtl.errors import UserError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "www") as running:
        make(tmp_path / "www", running.url)
        yield running


def test_fetched_once_and_read_as_it_is(server: Server, tmp_path: Path) -> None:
    for cache in (cache_of(server, tmp_path), pickle.loads(pickle.dumps(cache_of(server, tmp_path)))):
        for number in range(NUM):
            assert content(cache, number) == (tmp_path / f"www/s-{number}.tar").read_bytes()
    assert len(server.requests) == NUM
    assert sorted(cache.here().tolist()) == list(range(NUM))
    assert sorted(path.suffix for path in cache.folder.iterdir() if path.suffix != ".room") == [".tar"] * NUM


def _read_all(cache: ShardCache, answers: Any) -> None:
    answers.put([hashlib.sha256(content(cache, number)).hexdigest() == cache.digests[number] for number in range(NUM)])


def test_many_processes_fetch_each_shard_once(server: Server, tmp_path: Path) -> None:
    server.seconds_per_block = 0.002
    context = multiprocessing.get_context("fork")
    cache, answers = cache_of(server, tmp_path), context.Queue()
    processes = [context.Process(target=_read_all, args=(cache, answers)) for _ in range(6)]
    for process in processes:
        process.start()
    for _ in processes:
        assert all(answers.get(timeout=60))
    for process in processes:
        process.join()
    assert set(server.downloads().values()) == {1}
    assert len(server.requests) == NUM


def test_a_kill_leaves_nothing_that_is_in_the_way(server: Server, tmp_path: Path) -> None:
    server.seconds_per_block = 0.05
    cache = cache_of(server, tmp_path)
    process = multiprocessing.get_context("fork").Process(target=cache.fetch, args=(3,))
    process.start()
    wait_for(lambda: any(path.stat().st_size for path in cache.folder.glob("*.part")), what="the first bytes")
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert [path.suffix for path in cache.folder.glob("[0-9a-f]*")].count(".tar") == 0, "a part never has the name of the whole"
    cache.clean()
    assert {path.suffix for path in cache.folder.glob("[0-9a-f]*")} == {".part"}
    server.seconds_per_block = 0.0
    assert content(cache, 3) == (tmp_path / "www/s-3.tar").read_bytes()
    assert server.requests[-1][1] > 0, "it went on from the part"


def test_a_cut_file_in_the_cache_is_fetched_again(server: Server, tmp_path: Path) -> None:
    cache = cache_of(server, tmp_path)
    content(cache, 0)
    os.truncate(cache.path(0), 100)
    assert content(cache, 0) == (tmp_path / "www/s-0.tar").read_bytes()


def test_in_a_shared_cache_a_shard_that_somebody_exchanged_is_fetched_again(server: Server, tmp_path: Path) -> None:
    content(cache_of(server, tmp_path), 0)
    whole = (tmp_path / "www/s-0.tar").read_bytes()
    cache = cache_of(server, tmp_path)
    cache.path(0).write_bytes(bytes(len(whole)))
    assert content(cache, 0) == bytes(len(whole))  # one's own is not hashed again
    cache.options = cache.options.model_copy(update={"cache_shared": True})
    assert content(cache, 0) == whole


def test_a_failure_is_told_for_a_while_without_asking_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.always["s-1.tar"] = "500"
    cache = cache_of(server, tmp_path)
    for _ in range(3):
        with pytest.raises(Unfetched, match=r"s-1.tar cannot be downloaded: HTTP 500 Internal Server Error \(2 attempts\)"):
            cache.open(1)
    assert len(server.requests) == 2
    server.always.clear()
    monkeypatch.setattr(shard_cache, "_FAILED_SECONDS", 0.0)
    content(cache, 1)
    cache.clean()
    assert not list(cache.folder.glob("*.failed"))


def test_a_command_that_begins_later_asks_for_itself(server: Server, tmp_path: Path) -> None:
    """A failure counts within a command, also in the helpers that it starts; when the server is back, the next command has its shard at once."""
    server.always["s-1.tar"] = "500"
    cache = cache_of(server, tmp_path)
    with pytest.raises(Unfetched):
        cache.open(1)
    asked = len(server.requests)
    for helper in (ShardCache.from_json(cache.to_json()), pickle.loads(pickle.dumps(cache))):
        with pytest.raises(Unfetched, match=r"HTTP 500 Internal Server Error \(2 attempts\)"):
            helper.open(1)
    assert len(server.requests) == asked
    server.always.clear()
    assert content(cache_of(server, tmp_path), 1) == (tmp_path / "www/s-1.tar").read_bytes()


# --- the limit


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, NUM), st.sampled_from([5, 10, 15, 30]), st.booleans())
def test_the_limit_is_kept_and_the_fewest_are_fetched(tmp_path_factory: pytest.TempPathFactory, room: int, window: int, shuffle: bool) -> None:
    """Walk two epochs as one loader would; files are real, the downloads come from the disk."""
    tmp_path = tmp_path_factory.mktemp("walk")
    uses = uses_of(window=window, shuffle=shuffle)
    least = max(uses.most_at_once(np.full(NUM, SIZE), epoch)[1] for epoch in range(2))
    room = max(room, least)
    manifest = make(tmp_path / "www", f"file://{tmp_path}/www")
    cache = open_cache(manifest, tmp_path, DataConfig(cache_dir=str(tmp_path / "cache"), cache_gb=room * SIZE / 1e9))
    assert cache is not None
    cache.follow(uses)
    fetched = 0
    held: set[int] = set()
    for epoch in range(2):
        plan = EpochPlan(np.full(NUM, SAMPLES), seed=1, epoch=epoch, global_batch_size=5, window=window, shuffle=shuffle)
        uses_by_step = replace(uses, num_steps=plan.num_steps)
        cache.follow(uses_by_step)
        for step in range(plan.num_steps):
            cache.at(epoch, step)
            for shard in sorted(set((plan.step_samples(step) // SAMPLES).tolist())):
                fetched += shard not in cache.here()
                os.close(cache.open(shard))
                held.add(shard)
                assert used(cache) <= room * SIZE
    assert held == set(range(NUM))
    assert fetched <= NUM + (NUM - room) + least, "at most what does not fit is fetched twice"
    assert fetched == NUM or room < NUM


def test_a_shard_that_comes_while_another_process_counts_is_counted(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing that goes on while a file changes its name may have neither name."""
    cache = cache_of(server, tmp_path, cache_gb=SIZE / 1e9)
    here, may_come, real_fetch = threading.Event(), threading.Event(), shard_cache.fetch

    def held(*arguments: Any, **options: Any) -> None:
        real_fetch(*arguments, **options)
        here.set()
        may_come.wait(20)

    monkeypatch.setattr(shard_cache, "fetch", held)
    first = threading.Thread(target=cache.fetch, args=[0])
    first.start()
    assert here.wait(20)

    def entries(self: ShardCache, but: str) -> tuple[list[int], list[int]]:
        _, before = real_entries(self, but)
        may_come.set()
        first.join(0.5)
        tars, parts = real_entries(self, but)
        return [number for number in tars if number not in before], parts

    real_entries = ShardCache._entries
    with monkeypatch.context() as patch:
        patch.setattr(ShardCache, "_entries", entries)
        assert not cache.fetch(1, ahead=True), "the other shard has its place"
    first.join()
    assert cache.here().tolist() == [0]


def test_what_is_open_stays_readable(server: Server, tmp_path: Path) -> None:
    cache = cache_of(server, tmp_path, cache_gb=2 * SIZE / 1e9)
    numbers = {number: cache.open(number) for number in range(NUM)}
    assert used(cache) <= 2 * SIZE
    for number, found in numbers.items():
        assert os.pread(found, SIZE, 0) == (tmp_path / f"www/s-{number}.tar").read_bytes()
        os.close(found)
    assert len(cache.here()) == 2


def test_fetching_ahead_never_takes_what_is_needed_sooner(server: Server, tmp_path: Path) -> None:
    cache = cache_of(server, tmp_path, cache_gb=3 * SIZE / 1e9)
    uses = uses_of()
    cache.follow(uses)
    order = uses.order(0, uses.time(1, 0)).tolist()
    assert [cache.fetch(number, ahead=True) for number in order] == [True] * 3 + [False] * (NUM - 3)
    assert sorted(cache.here().tolist()) == sorted(order[:3])
    cache.at(0, 1)
    assert cache.fetch(order[3], ahead=True), "the first one is done with"
    assert sorted(cache.here().tolist()) == sorted(order[1:4])
    content(cache, order[7])  # somebody looks at another one, for a report
    assert used(cache) <= 3 * SIZE
    assert order[1] in cache.here()


def test_stale_parts_give_way(server: Server, tmp_path: Path) -> None:
    cache = cache_of(server, tmp_path, cache_gb=SIZE / 1e9)
    cache.follow(uses_of())
    content(cache, 0)
    cache.path(0).unlink()
    cache._part(cache._name(5)).write_bytes(b"left by a killed process")
    content(cache, 0)
    assert not list(cache.folder.glob("*.part"))


# --- told before the first step


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], reason: int) -> None:
    """All shards can be kept there, with one line that says so; none is evicted for another."""
    monkeypatch.setattr("dtl.files.fcntl.flock", no_locks(reason))
    cache = cache_of(server, tmp_path)
    for again in (False, True):
        for number in range(8):
            assert len(content(cache, number)) == SIZE
        assert capfd.readouterr().err.count("is on a file system without locks: a shard may be downloaded twice, and none is evicted") == (not again)
    other = cache_of(server, tmp_path)
    assert len(content(other, 3)) == SIZE
    assert "without locks" not in capfd.readouterr().err, "one line a run, not one of each process"
    assert sorted(path.suffix for path in cache.folder.iterdir() if path.name[0] != ".") == [".tar"] * 8
    other.clean()
    content(other, 3)
    (tmp_path / "small").mkdir()
    small = cache_of(server, tmp_path / "small", cache_gb=2 * SIZE / 1e9)
    content(small, 0), content(small, 1)
    with pytest.raises(UserError, match=r"no shard can be evicted from it; choose a local disk with --data.cache-dir, or keep all shards"):
        content(small, 2)
    assert sorted(small.here()) == [0, 1]


def test_two_processes_fetch_one_shard_without_locks(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each writes a part of its own, so neither spoils the other's, nor removes it."""
    monkeypatch.setattr("dtl.files.fcntl.flock", no_locks(errno.ENOLCK))
    first, second = cache_of(server, tmp_path), cache_of(server, tmp_path)
    real, real_pid = shard_cache.fetch, os.getpid
    parts: list[str] = []

    def meanwhile(url: str, file: Any, **options: Any) -> None:
        parts.append(os.readlink(f"/proc/self/fd/{file.fileno()}"))
        if len(parts) == 1:
            monkeypatch.setattr(os, "getpid", lambda: 1)
            second.clean()
            content(second, 0)
            monkeypatch.setattr(os, "getpid", real_pid)
            assert Path(parts[0]).exists()
        real(url, file, **options)

    monkeypatch.setattr(shard_cache, "fetch", meanwhile)
    assert len(content(first, 0)) == SIZE
    assert len(set(parts)) == 2


def no_locks(reason: int) -> Callable[..., None]:
    def refuse(*arguments: Any) -> None:
        raise OSError(reason, os.strerror(reason))

    return refuse
