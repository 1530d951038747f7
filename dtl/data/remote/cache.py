"""Remote shards on this node's disk: each fetched once for all its processes, checked, complete or absent.

FOLDER/SHA256.tar             a shard, of the manifest's size and sha256
FOLDER/SHA256.HOST.part       one on its way; it counts with its full size. After a kill the next download continues from it.
FOLDER/SHA256.HOST.lock       held (flock) by the process that fetches it, so it goes with that process
FOLDER/SHA256.failed          why it could not be fetched, for those who waited for that and for the samples that come next; SHA256 of a server's
                              address: that it did not answer

Files are opened, not kept: one that is evicted while another process reads it stays readable there, and is fetched again when next needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from dtl.data.remote.address import cache_place, is_remote, kind_of, shown
from dtl.data.remote.fetch import Unfetched, fetch, open_for_fetch, options_of_helper
from dtl.data.remote.schedule import ShardUses, victims
from dtl.data.shards.manifest import Manifest
from dtl.errors import UserError
from dtl.files import flock, fsync_folder, open_lock, write_whole
from dtl.text import to_stderr
from dtl.untrusted import Record, Text, as_utf8, is_sha256

if TYPE_CHECKING:
    from dtl.config.models import DataConfig

# How long a failure counts for others: as long as the longest pause between two attempts of one process, so that a server that is away gets no
# more requests from many than from one (the shard's lock lets one of them ask at a time). A command that begins later asks for itself.
_FAILED_SECONDS = 30.0
_WAIT_SECONDS = 0.05
_NAME_LENGTH = 32


class _Failure(Record):
    max_bytes = 1 << 16
    reason: Text
    changed: bool


class ShardCache:
    """The remote ones of a manifest's shards, by their number in it. Pickles as plain values; nothing is opened or made by making one."""

    def __init__(self, folder: Path, options: DataConfig, *, urls: Sequence[str | None], digests: Sequence[str], sizes: Sequence[int]) -> None:
        """`urls` are None for shards that are local; `sizes` in bytes. `digests` become names of files, so they must be hexadecimal."""
        if not all(map(is_sha256, digests)):
            raise UserError(f"{folder}: a shard's sha256 is not a SHA-256 (64 hexadecimal digits)")
        # Acts for its node: cleans up, and fetches ahead along the plan.
        self.leads = True
        # Once a server has not answered, its other shards fail at once: for `dtl verify`, which goes on after a failure. A run ends with the first.
        self.gives_up_on_servers = False
        self.options, self.folder = options, folder
        self.urls, self.digests = list(urls), list(digests)
        self.bytes = np.array([size if url else 0 for url, size in zip(urls, sizes)], np.int64)
        self.limit = limit_in_bytes(options)
        self._since = time.time()
        self.uses: ShardUses | None = None
        self._asked = 0
        self._made = False
        self._verified: set[int] = set()

    def to_json(self) -> dict[str, Any]:
        """What makes the same cache in another process; `uses` aside."""
        return {
            "folder": str(self.folder),
            "options": self.options.model_dump(mode="json"),
            "urls": self.urls,
            "digests": self.digests,
            "sizes": self.bytes.tolist(),
            "limit": self.limit,
            "asked": self._asked,
            "since": self._since,
        }

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> ShardCache:
        options = options_of_helper(facts["options"])
        cache = cls(Path(facts["folder"]), options, urls=facts["urls"], digests=facts["digests"], sizes=facts["sizes"])
        cache.limit, cache._asked, cache._since = facts["limit"], facts["asked"], facts["since"]
        return cache

    @property
    def num_bytes(self) -> int:
        return int(self.bytes.sum())

    def holds(self, number: int) -> bool:
        """Whether the shard is this cache's business."""
        return self.urls[number] is not None

    # ---- the plan

    def follow(self, uses: ShardUses | None) -> None:
        """What decides which shards are evicted; without it those that were fetched first."""
        self.uses = uses

    def at(self, epoch: int, step: int) -> None:
        """The step whose samples are asked for from now on, in this process."""
        if self.uses is not None:
            self._asked = self.uses.step_time(epoch, step)

    @property
    def now(self) -> int:
        """The earliest time whose shards may still be needed."""
        return max(0, self._asked - (self.uses.behind if self.uses else 0))

    # ---- reading

    def open(self, number: int) -> int:
        """A file number for reading the shard, which is fetched first if it is not there. Raises Unfetched; OSError for trouble with the disk."""
        while True:
            path = self.path(number)
            try:
                found = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                self.fetch(number)
                continue
            if os.fstat(found).st_size == self.bytes[number] and self._is_right(number, found):
                return found
            os.close(found)
            path.unlink(missing_ok=True)  # it was truncated or replaced

    def _is_right(self, number: int, found: int) -> bool:
        """In a cache that others write, each process compares a shard's hash when it first opens it; in one's own it was compared as it came."""
        if not self.options.cache_shared or number in self._verified:
            return True
        digest, at = hashlib.sha256(), 0
        while block := os.pread(found, 2**20, at):
            digest.update(block)
            at += len(block)
        if digest.hexdigest() != self.digests[number]:
            return False
        self._verified.add(number)
        return True

    def local(self, number: int) -> Path:
        """The shard's file, fetched first if it is not there. Raises Unfetched."""
        os.close(self.open(number))
        return self.path(number)

    def path(self, number: int) -> Path:
        return self.folder / f"{self._name(number)}.tar"

    def here(self) -> np.ndarray:
        """Numbers of the shards that are there."""
        try:
            tars, _ = self._entries("")
        except FileNotFoundError:
            tars = []
        return np.array(sorted(tars), np.int64)

    # ---- fetching

    def fetch(self, number: int, *, ahead: bool = False) -> bool:
        """Have the shard on the disk. `ahead` of its use: False where nothing can be evicted for it now. Raises Unfetched."""
        self._make()
        url, name, final = self.urls[number], self._name(number), self.path(number)
        assert url is not None
        with self._shard_lock(name) as locked:
            if final.exists():
                return True
            self._refuse_failed(name)
            if self.gives_up_on_servers:
                self._refuse_failed(_of_server(url), f"{shown(url)} was not tried: ")
            # Without locks another process may fetch the same shard: each then writes a file of its own.
            part = self._part(name) if locked else self._part(f"{name}.{os.getpid()}")
            if not self._reserve(number, part, ahead=ahead):
                return False
            try:
                with open_for_fetch(part) as file:
                    fetch(url, file, options=self.options, size=int(self.bytes[number]), sha256=self.digests[number])
                    os.fsync(file.fileno())
            except Unfetched as error:
                part.unlink(missing_ok=True)
                self._note_failed(name, error)
                if error.away:
                    self._note_failed(_of_server(url), error)
                raise
            except BaseException as error:
                if not locked or isinstance(error, OSError):  # of the disk, which may be full
                    part.unlink(missing_ok=True)
                raise  # a part to resume from has the plain name
            with self._folder_lock():  # who counts what is there (_reserve) would find neither name, if it changed meanwhile
                part.replace(final)
            fsync_folder(self.folder)
            return True

    def adopt(self, number: int, file: Path) -> None:
        """Take a complete, checked file as the shard; it must lie on the same disk."""
        self._make()
        file.replace(self.path(number))

    def clean(self) -> None:
        """What killed processes of this node left: locks and notes; parts only where they are of no shard of the set."""
        with contextlib.suppress(FileNotFoundError):
            for entry in list(os.scandir(self.folder)):
                name, kind = entry.name.split(".")[0], entry.name.rpartition(".")[2]
                ours = kind in ("part", "lock") and f".{_host()}." in entry.name and not (kind == "part" and name in self._numbers)
                if kind in ("failed", "no-locks") or (ours and not self._live(name)):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(entry.path)

    # ---- room

    def _reserve(self, number: int, part: Path, *, ahead: bool) -> bool:
        """Make room and take it, by the part's existence. False where only shards that are needed sooner could go.

        Without locks nothing is evicted, since others cannot be asked whether they use it. UserError where that leaves no room.
        """
        while True:
            with self._folder_lock() as locked:
                tars, parts = self._entries(self._name(number))
                room = sum(int(self.bytes[n]) for n in (*tars, *parts)) + int(self.bytes[number]) - self._limit()
                if room > 0 and not locked:
                    raise UserError(
                        f"the cache {self.folder} is on a file system without locks, so no shard can be evicted from it; "
                        "choose a local disk with --data.cache-dir, or keep all shards (leave out --data.cache-gb)"
                    )
                for other in [n for n in parts if not self._live(self._name(n))]:
                    if room > 0:
                        self._part(self._name(other)).unlink(missing_ok=True)
                        parts.remove(other)
                        room -= int(self.bytes[other])
                chosen = self._victims(tars, number, room, ahead=ahead)
                if chosen is not None:
                    for old in chosen:
                        self.path(old).unlink(missing_ok=True)
                    open_for_fetch(part).close()
                    return True
            if ahead:
                return False
            if not parts:
                raise Unfetched(f"{shown(self.urls[number] or '')}: the cache {self.folder} has no room for this shard; use a larger --data.cache-gb")
            time.sleep(_WAIT_SECONDS)  # until those on their way have come, and can be evicted

    def _victims(self, tars: list[int], number: int, room: int, *, ahead: bool) -> list[int] | None:
        cached = np.array(tars, np.int64)
        if self.uses is None:
            ages = np.array([-self.path(n).stat().st_mtime_ns for n in tars], np.int64)
            next_use = np.zeros(len(self.urls), np.int64)
            next_use[cached] = ages - (ages.min() if len(ages) else 0) + 1
            return victims(cached, next_use, self.bytes, after=0, room=room)
        next_use = self.uses.next_use(self.now)
        after = int(next_use[number]) if ahead else min(int(next_use[number]), self._asked)
        return victims(cached, next_use, self.bytes, after=after, room=room)

    def _limit(self) -> int:
        return self.limit if self.limit is not None else self.num_bytes

    def _entries(self, but: str) -> tuple[list[int], list[int]]:
        """Shards that are there, and those on their way (to this node), without `but`."""
        tars: list[int] = []
        parts: list[int] = []
        for entry in os.scandir(self.folder):
            name, _, kind = entry.name.partition(".")
            if name in self._numbers and name != but and kind in ("tar", f"{_host()}.part"):
                (tars if kind == "tar" else parts).append(self._numbers[name])
        return tars, parts

    # ---- names, locks, failures

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {self._name(number): number for number, url in enumerate(self.urls) if url is not None}

    def _name(self, number: int) -> str:
        return self.digests[number][:_NAME_LENGTH]

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}.{_host()}.part"

    def _make(self) -> None:
        if not self._made:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"the cache {self.folder} cannot be created: {error.strerror}; choose another one (data.cache_dir or $DTL_CACHE)") from None
            self._made = True

    @contextlib.contextmanager
    def _shard_lock(self, name: str) -> Iterator[bool]:
        """Alone in fetching this shard; False without locks. The lock's file is removed while it is held, so whoever waited for it looks again."""
        path = self.folder / f"{name}.{_host()}.lock"
        while True:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            locked = flock(number) == "held"
            with contextlib.suppress(FileNotFoundError):
                if not locked or os.stat(path).st_ino == os.fstat(number).st_ino:
                    break
            os.close(number)
        if not locked:
            self._warn_of_no_locks()
        try:
            yield locked
        finally:
            path.unlink(missing_ok=True)
            os.close(number)

    @contextlib.contextmanager
    def _folder_lock(self) -> Iterator[bool]:
        """Alone in making room; False without locks."""
        with open_lock(self.folder / f".{_host()}.room") as file:
            yield flock(file) == "held"

    def _live(self, name: str) -> bool:
        """Whether a process of this node is fetching this shard, or may be."""
        try:
            number = os.open(self.folder / f"{name}.{_host()}.lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return flock(number, wait=False) != "held"
        finally:
            os.close(number)

    def _warn_of_no_locks(self) -> None:
        """One line a run and node, not one of each loader process: `clean` at the start takes the mark away."""
        with contextlib.suppress(FileExistsError):
            (self.folder / f".{_host()}.no-locks").touch(exist_ok=False)
            to_stderr(f"the cache {self.folder} is on a file system without locks: a shard may be downloaded twice, and none is evicted")

    def _refuse_failed(self, name: str, why: str = "") -> None:
        path = self.folder / f"{name}.failed"
        try:
            noted = path.stat().st_mtime
            if noted < self._since or time.time() - noted >= _FAILED_SECONDS:
                return
            failure = _Failure.read(path)
        except (OSError, UserError):
            return
        raise Unfetched(why + failure.reason, changed=failure.changed)

    def _note_failed(self, name: str, error: Unfetched) -> None:
        text = json.dumps({"reason": as_utf8(str(error)), "changed": error.changed})
        with contextlib.suppress(OSError):
            write_whole(self.folder / f"{name}.failed", lambda file: file.write(text.encode()), sync=False)


def limit_in_bytes(options: DataConfig) -> int | None:
    """The most that the shards of one run take in the cache; None: all of them are kept."""
    return None if options.cache_gb is None else int(options.cache_gb * 1e9)


def open_cache(manifest: Manifest, folder: Path, options: DataConfig | None = None) -> ShardCache | None:
    """The cache of a manifest's remote shards, the same for every index of the same shards; None where all are local.

    UserError for commands that the user has not allowed.
    """
    if not any(is_remote(shard.url) for shard in manifest.shards):
        return None
    options = options or options_of_helper({})
    _refuse_commands(manifest, folder, options)
    digest = hashlib.sha256("".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()
    place = cache_place(options.cache_dir, shared=options.cache_shared, own=False)
    return ShardCache(
        place / "remote" / digest[:20],
        options,
        urls=[shard.url if is_remote(shard.url) else None for shard in manifest.shards],
        digests=[shard.sha256 for shard in manifest.shards],
        sizes=[shard.bytes for shard in manifest.shards],
    )


def _refuse_commands(manifest: Manifest, folder: Path, options: DataConfig) -> None:
    """UserError where a manifest would run commands that the user's own config does not know."""
    found = next((shard.url for shard in manifest.shards if kind_of(shard.url) == "pipe"), None)
    if found is not None and not options.allow_pipe:
        raise UserError(
            f"the manifest in {folder} reads shards with shell commands ({found[:120]}), and commands are run only from your own config: "
            "if you trust this folder, allow it with --data.allow-pipe true"
        )


def _of_server(url: str) -> str:
    """The name of the note that a server does not answer."""
    parts = urlsplit(url)
    return hashlib.sha256(f"{parts.scheme}://{parts.netloc}".encode()).hexdigest()[:_NAME_LENGTH]


def _host() -> str:
    return socket.gethostname().replace(".", "-")
