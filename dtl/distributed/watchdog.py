"""Which rank do the others wait for? Each rank notes its stage in memory; a watchdog thread beside it publishes that, and reports a stall.

A stage is noted in a microsecond and touches no disk. Every 2 seconds the thread puts this rank's newest note into the store of the
rendezvous (its own connection, so that a stuck loop cannot keep it from it). Nobody reads it, until this rank's stage has lasted
too long: then two ranks read all notes, once an interval, and the rank is named that is furthest behind, or that no longer writes.

A rank that is lost is known at once: its process has ended, as the ranks of its machine see, or an error has ended it, as it has noted itself.
Whoever knows first puts the verdict into one key of the store, which every rank reads at each interval. That matters on GPUs: there the host waits
for its device, behind an all-reduce that never ends, and neither NCCL nor gloo tells it anything. A silent rank is not a lost one (a slow disk, SIGSTOP,
a cut cable): it ends the run at the time limit only.

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
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dtl.errors import UserError
from dtl.machine import Process, pid_space, process_state

INTERVAL = 2.0
PATIENT = ("start", "data", "model")
"""Stages that may take hours on one rank (packing, a download): only a rank that falls silent ends the run in them."""
_RECORD = struct.Struct("<qqq16s")
_SECONDS_TO_LEAVE = 60.0
"""For a rank whose peers have left by an error that it has met as well."""
_LOST = "lost another rank"
_NO_MAIN = "lost the main process (rank 0), or the network connection to it"
# What torch says when a peer is gone, over gloo and over NCCL.
_NETWORK = re.compile(r"gloo|nccl|connection|socket|peer|broken pipe|store|timed? ?out", re.IGNORECASE)
_READERS = 2
"""The first so many ranks read all notes in a stall; the others only where these do not: each note read by each rank would be N * N."""
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
        self.leaves = False
        """This rank is on its way out, and waits for nobody."""
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
    agreed: bool = False
    """It ended by what all ranks end by, a UserError: they leave on their own, some later than others (loader processes of a slow disk)."""
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


@dataclass(frozen=True)
class Loss:
    """Why the run ends, as the first rank has put it that knew."""

    line: str
    reporter: int
    """The rank that prints it, and writes it down."""


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

    def write(self, heart: Heartbeat, *, ended: str | None = None, agreed: bool = False, what: str = "") -> Loss | None:
        """This rank's note, for the verdict if there is one. Raises RuntimeError when the rendezvous store cannot be reached, as `read` does."""
        self._count += 1
        note = {
            "count": self._count, "host": socket.gethostname(), "pid": os.getpid(), "machine": self._machine, "stage": heart.stage, "step": heart.step,
            "tick": heart.tick, "age": self._clock() - heart.since, "what": what, "ended": ended, "agreed": agreed,
        }  # fmt: skip
        return self._bounded(lambda: self._set(json.dumps(note)))

    def read(self, ranks: Collection[int] | None = None) -> list[Note]:
        """The newest note of each rank, by rank; `ranks`: of these only."""
        wanted = [note for rank, note in self._known.items() if ranks is None or rank in ranks]
        found: list[dict[str, Any]] = self._bounded(lambda: self._fetch([note.rank for note in wanted]))
        for note, values in zip(wanted, found, strict=True):
            now = self._clock()
            machine = values.pop("machine", None)
            if values and values["count"] != note.count:
                self._changed[note.rank] = now
                note.__dict__.update(values)
            note.silent = now - self._changed[note.rank]
            note.fate = _fate(note.pid) if machine is not None and machine == self._machine and note.ended is None else ""
        return [Note(**vars(note)) for note in wanted]

    def loss(self) -> Loss | None:
        """The verdict, if there is one."""
        return self._bounded(self._loss)

    def declare(self, loss: Loss) -> Loss:
        """Make it the verdict, unless there is one: that counts for all."""
        found: bytes = self._bounded(lambda: self._store.compare_set(f"{self._prefix}/loss", "", json.dumps(vars(loss))))
        return Loss(**json.loads(found))

    def _set(self, note: str) -> Loss | None:
        self._store.set(f"{self._prefix}/{self.rank}", note)
        return self._loss()

    def _loss(self) -> Loss | None:
        key = f"{self._prefix}/loss"
        return Loss(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _fetch(self, ranks: Sequence[int]) -> list[dict[str, Any]]:
        keys = [f"{self._prefix}/{rank}" for rank in ranks]
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
    behind = awaited(notes)
    if not behind:
        return f"all {len(notes)} ranks are in stage {notes[0].stage} of step {notes[0].step}, but their collective does not complete (network?)"
    return f"waiting for {_names(behind)}"


def _names(notes: list[Note]) -> str:
    return "; ".join(str(note) for note in notes[:4]) + (f"; and {len(notes) - 4} more ranks" if len(notes) > 4 else "")


class Watchdog:
    """Watches this rank's stage beside the training loop; `with` starts and ends it.

    `limit`: seconds without any progress after which the run ends; it reports who is waited for after a sixth of that, and again later.
    `end`: called with the line that says why, just before the process ends with status 1; only by the rank that reports for all.
    `processes`: those of the ranks, by rank.
    """

    def __init__(
        self,
        heart: Heartbeat,
        *,
        rank: int,
        world_size: int,
        name: str,
        limit: float,
        log: Log,
        end: Log,
        processes: Sequence[Process] = (),
    ) -> None:
        self.heart, self.rank, self.limit, self._log, self._end = heart, rank, limit, log, end
        self._notes = Notes(rank, world_size, name, heart.clock) if world_size > 1 else None
        self._here = {other: process for other, process in enumerate(processes) if other != rank and process.is_here}
        self._world = range(world_size)
        self._interval = min(INTERVAL, limit / 20)
        self._lock = threading.Lock()
        """Held while the notes are used."""
        self._stop = threading.Event()
        self._reported = 0.0
        self._ended: frozenset[int] = frozenset()
        """Ranks of this machine that had ended at the last look."""
        self._looks, self._refusals = 0, 0
        """For how many looks in a row there has been a verdict, and no store."""
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
        self.heart.leaves = True
        line = self._lost() if isinstance(error, RuntimeError) and _NETWORK.search(str(error)) else None
        self._stop.set()
        self.heart.clock.__exit__()
        self._thread.join(15.0)
        self._leave(_LOST if line is not None else " ".join(str(error or "").split())[:500], None if line is not None else error)
        if line is not None:
            self._wait_for_the_others()
            raise PeerLost(line) from error

    def part(self) -> None:
        """The ranks have done what they had to do together. Called before they close what joins them: the store may go with rank 0's group."""
        with self._lock:
            self._leave("")
            self._notes = None

    def _wait_for_the_others(self) -> None:
        """Rank 0 may take the store with it: the others must have had their look first, or they would take it for the one that is gone.

        Who has no error of its own, because it waits for rank 0 alone, looks twice, and after three intervals (`_is_held`).
        """
        until = time.monotonic() + 6 * INTERVAL
        with suppress(RuntimeError):
            while self._notes is not None and self.rank == 0 and time.monotonic() < until:
                if all(note.ended is not None or note.gone for note in self._notes.read() if note.rank != 0):
                    return
                time.sleep(0.2)

    def _leave(self, why: str, error: BaseException | None = None) -> None:
        """Note the end of this rank; by an `error` of its own it ends the others too."""
        if self._notes is not None:
            agreed = isinstance(error, UserError)
            with suppress(RuntimeError):  # the store may be gone with the rank that held it
                self._notes.write(self.heart, ended=why, agreed=agreed, what=self._what(self.heart) if why == _LOST else "")
                if error is not None and not agreed:
                    self._notes.declare(self._loss_of(self._notes.read([self.rank])))

    def _lost(self) -> str | None:
        """After an error between ranks: which rank is gone, in a line for the rank that reports; "" for the others, None if none is gone."""
        if self._notes is None:
            return None
        began = time.monotonic()
        while (age := time.monotonic() - began) < 3.5 * INTERVAL:
            try:
                loss = self._notes.loss()
                if loss is None and (gone := self._gone(everyone=self.rank < _READERS or age > INTERVAL)):
                    loss = self._notes.declare(self._loss_of(gone))
            except RuntimeError:
                if not self._reports_without_store():
                    return ""
                if self._here.keys() - self._ended_here():
                    time.sleep(3.0)  # ranks of this machine must have had their look: who has left before it would be one that is lost, too
                return _NO_MAIN
            if loss is not None:
                return loss.line if loss.reporter == self.rank else ""
            time.sleep(0.2)
        return None

    def _gone(self, *, everyone: bool) -> list[Note]:
        """The ranks that are gone, after an error between ranks: those of this machine whose process has ended, or what all notes tell."""
        assert self._notes is not None
        ended = self._ended_here()
        notes = self._notes.read(None if everyone else ended)
        return [note for note in notes if note.gone] or [note for note in notes if note.ended == _LOST]

    def _ended_here(self) -> frozenset[int]:
        return frozenset(rank for rank, process in self._here.items() if process.has_ended)

    def _loss_of(self, notes: list[Note]) -> Loss:
        gone = {note.rank for note in notes}
        return Loss(f"lost {_names(notes)}", min((rank for rank in self._world if rank not in gone), default=self.rank))

    def _watch(self) -> None:
        pause = self._interval / 20
        while pause < self._interval and not self._stop.wait(pause):  # a rank that dies in its first seconds was not in stage start of step 0
            pause *= 2
            with self._lock, suppress(RuntimeError):
                if self._notes is not None:
                    self._notes.write(self.heart)
        while not self._stop.wait(self._interval):
            age = self.heart.clock() - self.heart.since
            stalled = age > self.limit / 6
            with self._lock:
                try:
                    if self._notes is not None:
                        loss = self._notes.write(self.heart, what=self._what(self.heart) if stalled else "")
                        self._refusals = 0
                        self._look_for_a_loss(age, loss)
                    if stalled:
                        self._diagnose(age)
                    else:
                        self._reported = 0.0
                except RuntimeError:
                    self._unreachable(age)

    def _look_for_a_loss(self, age: float, loss: Loss | None) -> None:
        """Whatever is seen is seen twice: a rank that leaves as all others do is not lost, nor is this one for a moment without progress."""
        assert self._notes is not None
        ended = self._ended_here()
        if loss is None and (certain := ended & self._ended):
            notes = [note for note in self._notes.read(certain) if not note.agreed or age > _SECONDS_TO_LEAVE]
            if notes:
                loss = self._notes.declare(self._loss_of([note for note in notes if note.gone] or notes))
        self._ended = ended
        self._looks = 0 if loss is None else self._looks + 1
        if loss is not None and self._looks > 1 and self._is_held(age):
            self._finish(loss)

    def _is_held(self, age: float) -> bool:
        """This rank gets no further, and has not begun to leave."""
        return age > 3 * self._interval and not self.heart.leaves

    def _diagnose(self, age: float) -> None:
        notes = [Note(self.rank, 0, socket.gethostname(), os.getpid(), self.heart.stage, self.heart.step, 0, age, self._what(self.heart))]
        is_reader = self.rank < _READERS
        if self._notes is not None:
            if not is_reader and age < self.limit:
                return
            notes = self._notes.read()
        behind = awaited(notes) if len(notes) > 1 else notes
        waiting = [note.rank for note in notes if note not in behind]
        text = describe(notes) if len(notes) > 1 else str(notes[0])
        silent = [note for note in behind if note.gone]
        # Who does not read all the time learns the verdict from those who do; if they are gone, it has to look some times to see who is silent.
        if age > self.limit + (0.0 if is_reader else 5 * self._interval) and (self.heart.stage not in PATIENT or silent):
            loss = Loss(f"no progress for {age:.0f} s (run.timeout_minutes): {text}", min(waiting, default=0))
            self._finish(loss if self._notes is None else self._notes.declare(loss), self.limit / 10)
        elif self.rank == _spokesman(notes, waiting) and age > max(self.limit / 6, 2 * self._reported):
            # The first look cannot know who is silent: it has seen each rank once.
            if self._reported == 0.0 and age < self.limit / 6 + 3 * self._interval:
                return
            self._reported = age
            self._log(f"no progress for {age:.0f} s: {text}")

    def _unreachable(self, age: float) -> None:
        self._refusals = self._refusals + 1 if self._notes is not None and _store_is_closed() else 0
        if self._refusals > 1 and self._is_held(age):
            self._finish(Loss(_NO_MAIN, self.rank if self._reports_without_store() else -1))
        if age > self.limit:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            line = (
                f"no progress for {age:.0f} s (run.timeout_minutes), and the rendezvous store at {place} cannot be reached from rank {self.rank} "
                f"(host {socket.gethostname()}): rank 0 hangs, or the network is down"
            )
            # Who waits in its loader is the one that the others wait for.
            self._finish(Loss(line, self.rank if self.heart.stage != "load" else -1), self.limit / 10)

    def _reports_without_store(self) -> bool:
        """Nobody can be asked: the first rank behind rank 0 whose process has not ended, as far as can be seen from here."""
        ended = self._ended_here()
        return self.rank == min((rank for rank in self._world if rank > 0 and rank not in ended), default=0) or self.rank == 0

    def _finish(self, loss: Loss, seconds: float = 0.0) -> None:
        """`seconds`: how long to stay where another rank reports."""
        self._leave(_LOST)
        if loss.reporter == self.rank:
            self._end(loss.line)
        # The first to leave makes the launcher end the others, and takes the store with it if it is rank 0: all must have had their look.
        time.sleep(max(3.0, 0.0 if loss.reporter == self.rank else seconds))
        self._wait_for_the_others()
        sys.stderr.flush()
        os._exit(1)


def _spokesman(notes: list[Note], waiting: list[int]) -> int:
    """Who says for whom all wait: of the ranks that read the notes one that waits itself, or one that can still speak."""
    readers = [note for note in notes if note.rank < _READERS]
    return min([note.rank for note in readers if note.rank in waiting] or [note.rank for note in readers if not note.gone], default=0)


def _store_is_closed() -> bool:
    """Nobody listens where the store was: the process that held it has ended. A machine that does not answer at all tells nothing."""
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=2.0).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


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
