"""Prefetching: one process of each node walks the plan and has shards ready before a loader process asks for them.

A fresh python that knows nothing of the training (so no fork of a process with threads, and no share of its time), as in `dtl.data.workers`.
Its input is the cache and the plan, then a line for each step that the training takes; when its input ends, so does it. Without it
loader processes fetch what they need by themselves: it is never waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from typing import IO

from dtl import credentials
from dtl.data.remote.cache import ShardCache
from dtl.data.remote.fetch import Unfetched
from dtl.data.remote.schedule import ShardUses
from dtl.errors import UserError
from dtl.machine import end_process, end_with_parent, fresh_python
from dtl.text import to_stderr

# Downloads at a time: one connection rarely fills a line.
PARALLEL = 4


def prefetcher(cache: ShardCache, uses: ShardUses, *, first: tuple[int, int], until: int) -> Prefetcher | None:
    """A helper for the stretch from step `first` (epoch, step) to time `until`; None where another process has one, or nothing is to be
    fetched: all shards are here, and none is ever evicted.
    """
    if not cache.leads:
        return None
    cache.at(*first)
    keeps_all = cache.limit is None or cache.limit >= cache.num_bytes
    missing = set(uses.order(cache.now, until).tolist()) - set(cache.here().tolist())
    if keeps_all and not any(cache.holds(number) for number in missing):
        return None
    return Prefetcher(cache, uses, until=until)


class Prefetcher:
    """The helper process, seen from the training. `close` ends it at once."""

    def __init__(self, cache: ShardCache, uses: ShardUses, *, until: int) -> None:
        """`until`: the time (of `uses`) at which nothing more is needed."""
        command = fresh_python("dtl.data.remote.prefetch", "serve")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=credentials.environment())
        self._send(json.dumps({"cache": cache.to_json(), "uses": uses.to_json(), "until": until}).encode() + b"\n")

    def at(self, epoch: int, step: int) -> None:
        """The step that the training takes now."""
        self._send(f"{epoch} {step}\n".encode())

    def close(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        end_process(self._process)

    def _send(self, data: bytes) -> None:
        if self._process.stdin is None or self._process.stdin.closed:
            return
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError:
            self._process.stdin.close()
            to_stderr(f"dtl: prefetching of shards stopped (exit status {self._process.wait()}); they are now downloaded when they are needed")


def serve() -> None:
    """The helper's life."""
    source = sys.stdin.buffer
    facts = json.loads(source.readline())
    cache, uses, until = ShardCache.from_json(facts["cache"]), ShardUses.from_json(facts["uses"]), int(facts["until"])
    cache.follow(uses)
    ahead = _Ahead(cache, uses, until)
    threading.Thread(target=_listen, args=(source, ahead), daemon=True).start()
    # The input stays open as long as loader processes of a killed trainer do.
    end_with_parent(os.getppid(), status=0, seconds=0.2)
    workers = [threading.Thread(target=ahead.work, daemon=True) for _ in range(PARALLEL)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # All done, or nothing more can be done; the training may still have lines to send.
    threading.Event().wait()


def _listen(source: IO[bytes], ahead: _Ahead) -> None:
    for line in source:
        epoch, step = line.split()
        ahead.at(int(epoch), int(step))
    os._exit(0)  # partial downloads stay, and are resumed


class _Ahead:
    """What the threads share: the time of the training, and who fetches what."""

    def __init__(self, cache: ShardCache, uses: ShardUses, until: int) -> None:
        self.cache, self.uses, self.until = cache, uses, until
        self._moved = threading.Condition()
        self._taken: set[int] = set()
        self._failed: set[int] = set()

    def at(self, epoch: int, step: int) -> None:
        with self._moved:
            self.cache.at(epoch, step)
            self._moved.notify_all()

    def work(self) -> None:
        while True:
            with self._moved:
                number = self._next()
                if number is None:
                    # Others may evict or fetch shards meanwhile.
                    self._moved.wait(1.0)
                    continue
                self._taken.add(number)
            try:
                fits = self.cache.fetch(number, ahead=True)
            except Unfetched:
                fits = True
                self._failed.add(number)  # reported by the process that needs it
            except (OSError, UserError) as error:
                to_stderr(f"dtl: prefetching of shards stopped: {error}")
                os._exit(1)
            with self._moved:
                self._taken.discard(number)
                if not fits:
                    self._moved.wait(1.0)

    def _next(self) -> int | None:
        """The shard that is needed first, of those that nobody has or fetches."""
        here = set(self.cache.here().tolist())
        for number in self.uses.order(self.cache.now, self.until).tolist():
            if self.cache.holds(number) and number not in here and number not in self._taken and number not in self._failed:
                return int(number)
        return None
