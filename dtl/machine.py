"""This machine and its processes: cores, boot, memory, children that end with their parent. No torch in here."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_ROOT = str(Path(__file__).resolve().parents[1])
T = TypeVar("T")
PARENT = os.getppid()
"""The process that started this one, taken before PyTorch is imported, which takes seconds in which it may be lost."""


class NoAnswer(TimeoutError):
    """What was waited for did not end in its time."""


def within(seconds: float, action: Callable[[], T]) -> T:
    """What `action` gives or raises, or NoAnswer: what may wait for ever, on a disk or on a server, is left behind in a thread that ends with the process."""
    done: list[T] = []
    failed: list[BaseException] = []

    def act() -> None:
        try:
            done.append(action())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=act, name="within", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise NoAnswer(f"no answer within {seconds:g} s")
    return done[0]


def own_cores() -> frozenset[int]:
    """The cores that this process may use, by its affinity (Slurm, taskset)."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def core_quota() -> float:
    """How many cores' time this process's container may use (cgroup v2), which may be a fraction; infinite without a limit."""
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            return int(quota) / int(period)
    return math.inf


def core_share(mine: frozenset[int] | None = None, others: Sequence[frozenset[int]] = (), quota: float | None = None) -> float:
    """Cores that this process may use: its affinity and the quota of its container. `others`: the affinities of processes of this machine that compute
    at the same time. A core is divided among all that may use it, and so is the quota."""
    mine, quota = own_cores() if mine is None else mine, core_quota() if quota is None else quota
    return min(sum(1 / (1 + sum(core in other for other in others)) for core in mine), quota / (1 + len(others)))


def memory_left() -> tuple[int | None, int | None]:
    """Bytes that are available on this machine, and within the limit of the container or job (cgroup v2); None where the system does not report it."""
    available = limit = None
    with suppress(OSError, StopIteration, ValueError):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        available = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text()) - int(Path("/sys/fs/cgroup/memory.current").read_text())
    return available, limit


MOST_LOADERS, LOADER_BYTES, LOADER_BATCHES = 16, 300 * 2**20, 3
"""The most loader processes of a rank that nobody asked for (each evaluation starts its own), what each takes of memory, and its batches beside that."""


def loader_processes(cores: float, memory: int | None, *, on_cpu: bool, batch_bytes: int) -> int:
    """`data.workers: auto` of a rank with `cores`, and `memory` for its loader processes (None: unknown). `batch_bytes`: one micro-batch's images.

    On a GPU one core is for the training process. On a CPU the network itself takes the cores: a quarter of them, two if there are that many."""
    number = max(min(2.0, cores), cores / 4) if on_cpu else cores - 1
    if memory is not None:
        number = min(number, memory / (LOADER_BYTES + LOADER_BATCHES * batch_bytes))
    return max(1, min(MOST_LOADERS, int(number)))


def num_cores() -> int:
    """`core_share` as a number of processes worth starting: at least 1."""
    return max(1, math.ceil(core_share()))


def physical_cores(cores: frozenset[int]) -> frozenset[int]:
    """The cores of this machine that these numbers stand for: the two hyperthreads of a core are one."""
    return frozenset(map(_first_thread, cores))


@functools.cache
def _first_thread(core: int) -> int:
    try:
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
        return int(re.split("[-,]", siblings)[0])
    except (OSError, ValueError):
        return core


def peak_bytes() -> int:
    """The most memory that this process has had. Not Linux's ru_maxrss, which begins with the peak of whoever started it."""
    if sys.platform == "linux":
        with suppress(OSError):  # no /proc
            _, _, found = Path("/proc/self/status").read_text().partition("VmHWM:")
            if found:  # gVisor's kernel leaves it out
                return 1024 * int(found.split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Tell glibc to use freed memory again instead of giving it back and asking anew for each large activation, whose pages the kernel
    must zero: that took half the time of MobileNetV2's forward pass over 32 images of 224 pixels. The peak of this process stays about the same
    (gaps in the heap add some percent); a process that is forked from it should call `give_back_freed_memory`."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Give what is free in this process's heap back to the kernel. A forked process has its parent's activations in there: as soon as the parent uses that
    memory again, it would be there twice, and be copied page by page."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "can't start new thread", "failed to map segment from shared object", "bad_alloc")


def why_no_memory(error: BaseException) -> str | None:
    """What to print of an error that says that this process got no more memory; None for any other."""
    text = str(error).lower()
    if not isinstance(error, MemoryError) and not any(word in text for word in _NO_MEMORY):
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return "there is not enough memory: use a smaller batch size, fewer workers, or a machine (or Slurm's --mem) with more"
    return f"there is not enough memory: ulimit -v allows a process {soft / 2**30:.1f} GiB of address space; raise it (ulimit -v unlimited)"


# ---- which process is which


@functools.cache
def pid_space() -> str | None:
    """Names what pids are valid in: this boot of this kernel, this host name, this pid namespace. None where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def process_state(pid: int) -> str | None:
    """The state letter of a process of this machine (R, S, D, T, t ...; proc(5)); None when there is no such process, or only its zombie."""
    values = _stat(pid)
    return None if values is None or values[0] in "ZX" else values[0]


@dataclass(frozen=True)
class Process:
    """A process, as the others of a launch know it. It can be asked after on its own machine only."""

    pid: int
    start: str | None
    space: str | None

    @classmethod
    def this(cls) -> Process:
        return cls(os.getpid(), process_start(os.getpid()), pid_space())

    @property
    def is_here(self) -> bool:
        return self.space is not None and self.space == pid_space()

    @property
    def has_ended(self) -> bool:
        """Known to have ended: never guessed from another machine, and another process that has got its pid is not it."""
        return self.is_here and process_start(self.pid) != self.start


def process_start(pid: int) -> str | None:
    """When a living process was started, in ticks since boot; None when there is no such process (or only its zombie)."""
    values = _stat(pid)
    return None if values is None or values[0] in "ZX" else values[19]


def _stat(pid: int) -> list[str] | None:
    try:
        # The name in parentheses may hold anything, so count from its end: state is field 3, starttime field 22 (proc(5)).
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


# ---- children


def end_with_parent(parent: int, *, status: int = 1, seconds: float = 1.0) -> None:
    """End this process, from a thread that looks every `seconds`, once its parent is no longer `parent`."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os._exit(status)

    threading.Thread(target=watch, daemon=True).start()


def fresh_python(module: str, function: str, *arguments: str) -> list[str]:
    """The command of a new Python process that calls `module.function(*arguments)` and imports nothing of its parent's."""
    return [sys.executable, "-c", f"import sys; sys.path.append({_ROOT!r}); from {module} import {function}; {function}(*{arguments!r})"]


def end_process(process: subprocess.Popen[Any], *, patience: float = 5.0) -> None:
    """Ask a child to end, and kill it after `patience` seconds."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
