"""Signals that ask a run to stop. They are noted at any time; before the first step they also interrupt what a rank does by itself.

From the first step on the training loop looks at the note after each step and saves. Before it there is nothing to save, and a stage
may take hours (packing a folder of images, a download): there the handler raises `StageInterrupted` in the middle of it, though never between
two collectives, and `StopWatcher` passes the request to the other ranks. No torch in here.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LOOK_SECONDS = 1.0


class StageInterrupted(BaseException):
    """This rank's work before the first step was interrupted by a request to stop. As KeyboardInterrupt, nothing that catches errors catches it."""


class StoppedBeforeFirstStep(Exception):
    """All ranks stop before the first step, by what the message says."""


class Stopped(Exception):
    """All ranks stop by what `why` says, and the checkpoint of `step` is on the disk."""

    def __init__(self, why: str, *, step: int) -> None:
        super().__init__(f"stopped by {why} at step {step}")
        self.why, self.step = why, step


class Signals:
    """SIGTERM, SIGUSR1 and Ctrl-C of this process. `prints`: it prints that they came, for all ranks."""

    def __init__(self, *, prints: bool) -> None:
        self.received: int | None = None
        """The last one that asked for a stop."""
        self.why = "a signal"
        """What asked for it."""
        self.early = False
        """The first step is still to come."""
        self.on_abort: Callable[[], object] = lambda: None
        """Called when a second Ctrl-C ends the process."""
        self.requested = False
        """A stop was requested; known also while the main thread is deep in a collective, where no handler runs."""
        self._by_other_rank = False
        self._prints = prints
        self._breakable = False
        self._old_handlers: dict[int, Any] = {}
        self._old_wakeup: tuple[int, socket.socket] | None = None
        self._listener: threading.Thread | None = None

    def catch(self) -> None:
        """From here on they ask for a save and a clean end; a second Ctrl-C ends at once."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._on_signal)
        # Python runs its handlers between two steps of the main thread, which may be deep in a collective: a thread listens too.
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self._old_wakeup = (signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False), sender)
        self._listener = threading.Thread(target=self._listen, args=(receiver,), name="signals", daemon=True)
        self._listener.start()

    def release(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers.clear()
        if self._old_wakeup is not None:
            previous, sender = self._old_wakeup
            signal.set_wakeup_fd(previous)
            sender.shutdown(socket.SHUT_RDWR)  # not only close: a loader process may have inherited it
            sender.close()
            self._old_wakeup = None
        if self._listener is not None:
            # A thread that outlives us may hold the last reference to the process group: freed in it while the interpreter ends, gloo's
            # group makes the process abort (status -6) after a run that went well.
            self._listener.join()
            self._listener = None

    @property
    def origin(self) -> str:
        """Where the request to stop came from: the signal's name, or another rank."""
        return "a signal to another rank" if self.received is None or self._by_other_rank else signal.Signals(self.received).name

    def request_stop(self, why: str, *, by_other_rank: bool = False) -> None:
        """Ask this process to stop, as a signal would; from any thread."""
        self.why, self._by_other_rank = why, by_other_rank
        if self._old_handlers:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)  # wakes it where it sleeps, too
        else:
            self.received, self.requested = signal.SIGUSR1, True

    @property
    def stop_before_first_step(self) -> str | None:
        """What asks this rank to stop before the first step, if anything does."""
        return self.why if self.early and self.received is not None else None

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        """Work of this rank alone, with no collective in it: before the first step a request to stop raises StageInterrupted here."""
        self._breakable = self.early
        try:
            if self.stop_before_first_step is not None:  # it came before, or just now
                raise StageInterrupted
            yield
        finally:
            self._breakable = False

    def abort(self) -> None:
        """End this process now. A checkpoint that is being written stays unfinished, and does not count."""
        os.write(2, b"\ndtl: ended at once\n" if self._prints else b"")
        with contextlib.suppress(Exception):
            self.on_abort()
        for child in multiprocessing.active_children():
            child.kill()  # loader processes, which ignore gentler signals
        os._exit(130)

    def _listen(self, receiver: socket.socket) -> None:
        """Whatever the main thread is doing, the request is known, and a second Ctrl-C ends the process at once."""
        interrupts = 0
        with receiver:
            while numbers := receiver.recv(16):
                self.requested = self.requested or any(number in numbers for number in STOP_SIGNALS)
                interrupts += numbers.count(signal.SIGINT)
                if interrupts >= 2:
                    self.abort()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, number
        if self._breakable:
            self._breakable = False  # once: what cleans up after it is not interrupted
            raise StageInterrupted
        if first and self._prints:
            what = b"stopping" if self.early else b"stopping after this step"
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\ndtl: " + what + b"; Ctrl-C again ends at once\n")


class StopWatcher:
    """Beside the stages before the first step: passes a request to stop to the other ranks, obeys theirs, and looks at the clock.

    `announce()` reaches all ranks, `announced()`: whether one of them has done so; `due()`: why it is time to stop, or None.
    """

    def __init__(self, signals: Signals, *, announce: Callable[[], object], announced: Callable[[], bool], due: Callable[[], str | None]) -> None:
        self._signals, self._announce, self._announced, self._due = signals, announce, announced, due
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-watcher", daemon=True)

    def __enter__(self) -> None:
        self._signals.early = True
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._signals.early = False
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, with the rank that held it: the watchdog reports that
            while not self._over.wait(_LOOK_SECONDS):
                if self._signals.requested:
                    self._announce()
                    return
                if self._announced():
                    self._signals.request_stop("a signal", by_other_rank=True)
                    return
                if (why := self._due()) is not None:
                    self._signals.request_stop(why)
