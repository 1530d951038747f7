"""Open shards of one process: a bounded number, read at places without a position of their own."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

MAX_OPEN_SHARDS = 128


def pread_all(number: int, size: int, start: int) -> bytes:
    data = os.pread(number, size, start)
    if len(data) == size or not data:
        return data
    parts = [data]  # a signal or a network file system may cut a read short of the file's end
    got = len(data)
    while got < size:
        data = os.pread(number, size - got, start + got)
        if not data:
            break
        parts.append(data)
        got += len(data)
    return b"".join(parts)


class OpenFiles:
    """File numbers of the shards read last. A forked child opens its own: it shares neither the lock nor the numbers."""

    def __init__(self) -> None:
        self._reset()

    def lock(self) -> threading.Lock:
        if self._pid != os.getpid():
            self._reset()  # the parent's numbers stay open in it; ours are copies, closed with the process
        return self._lock

    def number(self, shard: int, opened: Callable[[int], int]) -> int:
        """Under the lock only: another thread could close the number."""
        if shard in self._numbers:
            self._numbers.move_to_end(shard)
            return self._numbers[shard]
        while len(self._numbers) >= MAX_OPEN_SHARDS:
            os.close(self._numbers.popitem(last=False)[1])
        self._numbers[shard] = opened(shard)
        return self._numbers[shard]

    def drop_removed(self) -> None:
        """Close the files that were removed from their folder: open, they would still fill the disk."""
        for shard in [shard for shard, number in self._numbers.items() if os.fstat(number).st_nlink == 0]:
            os.close(self._numbers.pop(shard))

    def _reset(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._numbers: OrderedDict[int, int] = OrderedDict()

    def __del__(self) -> None:
        if self._pid == os.getpid():
            for number in self._numbers.values():
                os.close(number)
