"""Which rank do the others wait for? Each rank notes its stage in memory; a watchdog thread beside it publishes that, and reports a stall.

A stage is noted in a microsecond and touches no disk. Every 2 seconds the thread puts this rank's newest note into the store of the
rendezvous (its own connection, so that a stuck loop cannot keep it from it). Nobody reads it, until this rank's stage has lasted
too long: then all notes are read, once an interval, and the rank is named that is furthest behind, or that no longer writes.

All ranks pass through the same stages in the same order, so that the number of stages passed shows who is behind. No clocks of two
machines are compared: a note has its own age, and a silent rank is one whose notes do not change while we watch.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dtl.machine import pid_space, process_state

INTERVAL = 2.0
PATIENT = ("start", "data", "model")
"""Stages that may take hours on one rank (packing, a download): only a rank that falls silent ends the run in them."""
_RECORD = struct.Struct("<qqq16s")
_LOST = "lost another rank"
# What torch says when a peer is gone, over gloo and over NCCL.
_NETWORK = re.compile(r"gloo|nccl|connection|socket|peer|broken pipe|store|timed? ?out", re.IGNORECASE)
Log = Callable[[str], None]
T = TypeVar("T")


class RunningClock:
    """Seconds in which this process ran. `time.monotonic` goes on while a job is suspended (scontrol suspend, gang scheduling, Ctrl-Z); this one stands still.

    A thread beats every second. Between two beats the clock advances by a few seconds at most, however long they are apart, so that whoever wakes first
    sees no jump. `with` starts and ends the thread.
    """

    PERIOD, TOLERANCE = 1.0, 5.0
    """A busy machine delays a beat too; what is within the tolerance counts as running."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._state: tuple[float, float] | None = None  # the last beat, and the seconds of standstill before it; replaced as one
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="running clock", daemon=True)

    def __call__(self) -> float:
        state, now = self._state, self._now()
        return now if state is None else min(now, state[0] + self.PERIOD + self.TOLERANCE) - state[1]

    def __enter__(self) -> RunningClock:
        self._state = (self._now(), 0.0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def beat(self) -> None:
        """Count what the last beat is late by as standstill."""
        assert self._state is not None
        now, (last, still) = self._now(), self._state
        self._state = (now, still + max(0.0, now - last - self.PERIOD - self.TOLERANCE))

    def _beat(self) -> None:
        while not self._stop.wait(self.PERIOD):
            self.beat()


class PeerLost(Exception):
    """Another rank is gone. The message names it in the one rank that reports for all; it is empty in the others."""


class Heartbeat:
    """This rank's stage. `enter` is called by the training thread only, the rest by any thread."""

    def __init__(self) -> None:
        self.clock = RunningClock()
        self.stage, self.step, self.tick = "start", 0, 0
        self.since = self.clock()
        self.what: Callable[[], str] = str
        """What the stage works on, for instance its samples; called only in a stall, by another thread."""
        self.part: Callable[[], None] = lambda: None
        """From here on this rank waits for nobody, and nobody for it; set by who watches."""
        self._file = _stage_file()

    def enter(self, stage: str, step: int | None = None) -> None:
        self.stage = stage
        if step is not None:
            self.step = step
        self.tick += 1
        self.since = self.clock()
        if self._file is not None:
            _RECORD.pack_into(self._file, 0, self.tick, self.step, os.getpid(), stage.encode())


def _stage_file() -> mmap.mmap | None:
    """For tools that watch from outside (`dtl verify-resume`): $DTL_STAGES/rank-N holds the stage, in memory shared with them."""
    folder = os.environ.get("DTL_STAGES")
    if not folder:
        return None
    path = Path(folder) / f"rank-{os.environ.get('RANK') or 0}"
    with open(path, "wb+") as file:
        file.truncate(_RECORD.size)
        return mmap.mmap(file.fileno(), _RECORD.size)


def read_stage(path: Path) -> tuple[str, int, int, int]:
    """(stage, step, number of stages passed, pid) of a rank's file in $DTL_STAGES; an empty stage before the first."""
    try:
        tick, step, pid, stage = _RECORD.unpack(path.read_bytes())
    except (OSError, struct.error):
        return "", 0, 0, 0
    return stage.rstrip(b"\0").decode(), step, tick, pid


@dataclass
class Note:
    """What a rank last wrote of itself, and for how long it has written nothing new (as seen from here)."""

    rank: int
    count: int = -1
    host: str = ""
    pid: int = 0
    stage: str = "start"
    step: int = 0
    tick: int = -1
    age: float = 0.0
    what: str = ""
    ended: str | None = None
    silent: float = 0.0
    fate: str = ""
    """What this machine's kernel knows of it, where it runs here: "has ended", "is stopped"."""

    @property
    def gone(self) -> bool:
        """It ended, or is silent. One that ended because it lost another rank is not the culprit."""
        return self.ended != _LOST and (self.ended is not None or bool(self.fate) or self.silent > 2.5 * INTERVAL)

    def __str__(self) -> str:
        who = f"rank {self.rank}" + (f" (host {self.host}, pid {self.pid})" if self.host else "")
        if self.count < 0:
            return f"{who}, which has sent no heartbeat yet"
        if self.ended not in (None, _LOST):
            return f"{who}, which ended: {self.ended}" if self.ended else f"{who}, which ended"
        where = f"stage {self.stage} of step {self.step}" + (f", {self.what}" if self.what else "")
        if self.fate:
            return f"{who}, which {self.fate}; it was last in {where}"
        if self.silent > 2.5 * INTERVAL:
            return f"{who}, silent for {self.silent:.0f} s, last seen in {where}"
        return f"{who}, in {where}, for {self.age:.0f} s"


class Notes:
    """The notes of all ranks, in the store of the rendezvous."""

    def __init__(self, rank: int, world_size: int, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        from dtl.distributed.rendezvous import rendezvous_store  # imports torch, which a Heartbeat does not need

        self.rank, self.world_size, self._prefix, self._clock = rank, world_size, f"dtl/notes/{name}", clock
        self._store = rendezvous_store(10.0)
        self._worker: threading.Thread | None = None
        self._known = {other: Note(other) for other in range(world_size)}
        self._changed = dict.fromkeys(range(world_size), clock())
        self._count = 0
        self._machine = pid_space()

    def write(self, heart: Heartbeat, *, ended: str | None = None, what: str = "") -> None:
        """Raises RuntimeError when the rendezvous store cannot be reached, as `read` does."""
        self._count += 1
        note = {
            "count": self._count, "host": socket.gethostname(), "pid": os.getpid(), "machine": self._machine, "stage": heart.stage, "step": heart.step,
            "tick": heart.tick, "age": self._clock() - heart.since, "what": what, "ended": ended,
        }  # fmt: skip
        self._bounded(lambda: self._store.set(f"{self._prefix}/{self.rank}", json.dumps(note)))

    def read(self) -> list[Note]:
        """The newest note of each rank, by rank."""
        found: list[dict[str, Any]] = self._bounded(self._fetch)
        for note, values in zip(self._known.values(), found, strict=True):
            now = self._clock()
            machine = values.pop("machine", None)
            if values and values["count"] != note.count:
                self._changed[note.rank] = now
                note.__dict__.update(values)
            note.silent = now - self._changed[note.rank]
            note.fate = _fate(note.pid) if machine is not None and machine == self._machine and note.ended is None else ""
        return [Note(**vars(note)) for note in self._known.values()]

    def _fetch(self) -> list[dict[str, Any]]:
        keys = [f"{self._prefix}/{rank}" for rank in range(self.world_size)]
        return [json.loads(self._store.get(key)) if self._store.check([key]) else {} for key in keys]

    def _bounded(self, work: Callable[[], T], seconds: float = 5.0) -> T:
        """`work` in a thread: over a cable that was cut, a store's answer may be waited for without an end."""
        if self._worker is not None and self._worker.is_alive():
            raise RuntimeError("an earlier call is still waiting for the rendezvous store")
        results: list[T] = []
        errors: list[Exception] = []

        def do() -> None:
            try:
                results.append(work())
            except Exception as error:
                errors.append(error)

        self._worker = threading.Thread(target=do, daemon=True)
        self._worker.start()
        self._worker.join(seconds)
        if not results:
            raise RuntimeError("the rendezvous store cannot be reached") from (errors[0] if errors else None)
        return results[0]


def awaited(notes: list[Note]) -> list[Note]:
    """The ranks that the others wait for: those that are gone or silent, else those that have passed the fewest stages."""
    gone = [note for note in notes if note.gone]
    if gone:
        return gone
    first = min(note.tick for note in notes)
    behind = [note for note in notes if note.tick == first]
    return behind if len(behind) < len(notes) else []


def describe(notes: list[Note]) -> str:
    names = [str(note) for note in awaited(notes)]
    if not names:
        return f"all {len(notes)} ranks are in stage {notes[0].stage} of step {notes[0].step}, but their collective does not complete (network?)"
    return "waiting for " + "; ".join(names[:4]) + (f"; and {len(names) - 4} more ranks" if len(names) > 4 else "")


class Watchdog:
    """Watches this rank's stage beside the training loop; `with` starts and ends it.

    `limit`: seconds without any progress after which the run ends; it reports who is waited for after a sixth of that, and again later.
    `end`: called with the line that says why, just before the process ends with status 1; only by the rank that reports for all.
    """

    def __init__(self, heart: Heartbeat, *, rank: int, world_size: int, name: str, limit: float, log: Log, end: Log) -> None:
        self.heart, self.rank, self.limit, self._log, self._end = heart, rank, limit, log, end
        self._notes = Notes(rank, world_size, name, heart.clock) if world_size > 1 else None
        self._interval = min(INTERVAL, limit / 20)
        self._lock = threading.Lock()
        """Held while the notes are used."""
        self._stop = threading.Event()
        self._reported = 0.0
        self._what = _Lazily()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        heart.part = self.part

    def __enter__(self) -> Watchdog:
        self.heart.clock.__enter__()
        if self._notes is not None:
            self._notes.write(self.heart)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Raises PeerLost in place of an error of the network when another rank is gone."""
        line = self._lost() if isinstance(error, RuntimeError) and _NETWORK.search(str(error)) else None
        self._stop.set()
        self.heart.clock.__exit__()
        self._thread.join(15.0)
        self._leave(_LOST if line is not None else " ".join(str(error or "").split())[:500])
        if line is not None:
            self._wait_for_the_others()
            raise PeerLost(line) from error

    def part(self) -> None:
        """The ranks have done what they had to do together. Called before they close what joins them: the store may go with rank 0's group."""
        with self._lock:
            self._leave("")
            self._notes = None

    def _wait_for_the_others(self) -> None:
        """Rank 0 may take the store with it: the others must have had their look first, or they would take it for the one that is gone."""
        until = time.monotonic() + 3.5 * INTERVAL
        with suppress(RuntimeError):
            while self._notes is not None and self.rank == 0 and time.monotonic() < until:
                if all(note.ended is not None or note.gone for note in self._notes.read() if note.rank != 0):
                    return
                time.sleep(0.2)

    def _leave(self, why: str) -> None:
        if self._notes is not None:
            with suppress(RuntimeError):  # the store may be gone with the rank that held it
                self._notes.write(self.heart, ended=why, what=self._what(self.heart) if why == _LOST else "")

    def _lost(self) -> str | None:
        """After an error between ranks: which rank is gone, in a line for the rank that reports; "" for the others, None if none is gone."""
        if self._notes is None:
            return None
        until = time.monotonic() + 3.5 * INTERVAL
        while time.monotonic() < until:
            try:
                notes = self._notes.read()
            except RuntimeError:
                return "" if self.rank > 1 else "lost the main process (rank 0), or the network connection to it"
            gone = [note for note in notes if note.gone] or [note for note in notes if note.ended == _LOST]
            if gone:
                reporter = min((note.rank for note in notes if note.rank not in {other.rank for other in gone}), default=self.rank)
                return "lost " + "; ".join(str(note) for note in gone[:4]) if self.rank == reporter else ""
            time.sleep(0.2)
        return None

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            age = self.heart.clock() - self.heart.since
            stalled = age > self.limit / 6
            with self._lock:
                try:
                    if self._notes is not None:
                        self._notes.write(self.heart, what=self._what(self.heart) if stalled else "")
                    if stalled:
                        self._diagnose(age)
                    else:
                        self._reported = 0.0
                except RuntimeError:
                    self._unreachable(age)

    def _diagnose(self, age: float) -> None:
        notes = [Note(self.rank, 0, socket.gethostname(), os.getpid(), self.heart.stage, self.heart.step, 0, age, self._what(self.heart))]
        if self._notes is not None:
            notes = self._notes.read()
        behind = awaited(notes) if len(notes) > 1 else notes
        waiting = [note.rank for note in notes if note not in behind]
        reports = self.rank == min(waiting, default=0)
        text = describe(notes) if len(notes) > 1 else str(notes[0])
        silent = [note for note in behind if note.gone]
        if age > self.limit and (self.heart.stage not in PATIENT or silent):
            self._finish(f"no progress for {age:.0f} s (run.timeout_minutes): {text}", reports)
        elif reports and age > max(self.limit / 6, 2 * self._reported):
            # The first look cannot know who is silent: it has seen each rank once.
            if self._reported == 0.0 and age < self.limit / 6 + 3 * self._interval:
                return
            self._reported = age
            self._log(f"no progress for {age:.0f} s: {text}")

    def _unreachable(self, age: float) -> None:
        if age > self.limit:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            self._finish(
                f"no progress for {age:.0f} s (run.timeout_minutes), and the rendezvous store at {place} cannot be reached from rank {self.rank} "
                f"(host {socket.gethostname()}): rank 0 hangs, or the network is down",
                self.heart.stage != "load",  # else the others wait for this one
            )

    def _finish(self, line: str, reports: bool) -> None:
        self._leave(_LOST)
        if reports:
            self._end(line)
        # The first to leave makes the launcher end the others, and takes the store with it if it is rank 0: all must have had their look.
        time.sleep(max(3.0, 0.0 if reports else self.limit / 10))
        sys.stderr.flush()
        os._exit(1)


class _Lazily:
    """`heart.what()` in a thread of its own: where a disk hangs, asking it for a sample's name hangs too."""

    def __init__(self) -> None:
        self._tick, self._text = -1, ""

    def __call__(self, heart: Heartbeat) -> str:
        if self._tick != heart.tick:
            self._tick, self._text = heart.tick, ""
            asked = threading.Thread(target=self._ask, args=(heart, heart.tick), daemon=True)
            asked.start()
            asked.join(1.0)
        return self._text

    def _ask(self, heart: Heartbeat, tick: int) -> None:
        try:
            text = heart.what()
        except Exception:
            return  # only a detail of a message
        if tick == self._tick:
            self._text = text


def _fate(pid: int) -> str:
    """What has become of a process of this machine; empty while it runs."""
    state = process_state(pid)
    return "has ended" if state is None else {"T": "is stopped (SIGSTOP)", "t": "is stopped by a debugger"}.get(state, "")
