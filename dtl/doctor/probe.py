"""Facts about this machine: each function returns plain values, in bounded time. The judge_* modules decide what they mean."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from dtl.doctor.judge_cluster import Interface

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "numpy", "pillow", "simplejpeg", "safetensors")
WRITE_MIB = 64
WRITE_SECONDS = 5.0


class Unanswered(Exception):
    """A probe that failed or took too long; the message is the reason."""


class Measurement:
    """`python -m dtl.doctor.measure KIND` in a process of its own, which is killed when its time is up."""

    def __init__(self, kind: str, given: Mapping[str, Any], *, seconds: float) -> None:
        self._seconds, self._kind = seconds, kind
        variables = dict(os.environ)
        root = str(Path(__file__).resolve().parents[2])
        variables["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [variables.get("PYTHONPATH")])])
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            variables.pop(name, None)
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-m", "dtl.doctor.measure", kind, json.dumps(dict(given))]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, env=variables, start_new_session=True)
        self._deadline = time.monotonic() + seconds

    def result(self) -> dict[str, Any]:
        """Its facts. Raises Unanswered."""
        try:
            self._process.wait(max(0.1, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            raise Unanswered(f"no answer within {self._seconds:.0f} s") from None
        finally:
            with self._out, self._err:
                out, err = self._text(self._out), self._text(self._err)
        if self._process.returncode != 0:
            last = [line for line in err.splitlines() if line.strip()] or [f"exit status {self._process.returncode}"]
            raise Unanswered(last[-1][:300])
        facts = json.loads(out.splitlines()[-1])
        assert isinstance(facts, dict)
        return facts

    def kill(self) -> None:
        """End it, whatever it does."""
        if self._process.poll() is not None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def close(self) -> None:
        self.kill()
        self._out.close()
        self._err.close()

    @staticmethod
    def _text(file: Any) -> str:
        file.seek(0)
        return str(file.read().decode(errors="replace"))


def answer_of(command: Sequence[str], *, seconds: float = 15.0) -> str:
    """The output of a program; empty if it is missing, fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def two_process_sum(backend: str, *, seconds: float = 60.0) -> tuple[list[dict[str, Any]] | None, float, str]:
    """(each rank's result, seconds, what went wrong) of an all-reduce over two processes."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dtl-doctor-") as folder:
        given = {"store": f"{folder}/store", "backend": backend, "seconds": seconds * 0.8}
        ranks: list[Measurement] = []
        try:
            ranks += [Measurement("reduce", {**given, "rank": rank}, seconds=seconds) for rank in range(2)]
            results = [rank.result() for rank in ranks]
        except Unanswered as error:
            return None, time.monotonic() - start, str(error)
        finally:
            for rank in ranks:
                rank.close()
    return results, time.monotonic() - start, ""


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def disk_of(folder: Path) -> dict[str, Any]:
    """free, total, filesystem, write_mib_s, problem: of the folder, or of the nearest parent that exists."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    facts: dict[str, Any] = {"free": 0, "total": 0, "filesystem": _filesystem(place), "write_mib_s": None, "problem": None}
    try:
        space = os.statvfs(place)
        facts |= {"free": space.f_bavail * space.f_frsize, "total": space.f_blocks * space.f_frsize}
        facts["write_mib_s"] = _write_speed(place, facts["free"])
    except OSError as error:
        facts["problem"] = error.strerror or str(error)
    return facts


def _write_speed(place: Path, free: int) -> float | None:
    if not place.is_dir():
        raise NotADirectoryError(20, "not a folder")
    block, written = os.urandom(2**20), 0
    with tempfile.TemporaryFile(dir=place, prefix=".dtl-doctor-") as file:
        start = time.perf_counter()
        while written < min(WRITE_MIB, free // 2**22) and time.perf_counter() - start < WRITE_SECONDS:
            file.write(block)
            written += 1
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
    return written / seconds if written else None


def _filesystem(place: Path) -> str:
    """The filesystem type of the longest mount point above `place`."""
    best, kind = "", "unknown"
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            fields = line.split()
            mount = fields[1].replace("\\040", " ")
            if (place == Path(mount) or Path(mount) in place.parents) and len(mount) >= len(best):
                best, kind = mount, fields[2]
    return kind


def shm() -> tuple[int | None, int | None]:
    """(free, total) bytes of /dev/shm."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError:
        return None, None
    return space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize


def open_files() -> tuple[int, int]:
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)


def interfaces() -> list[Interface]:
    """Network interfaces with their IPv4 addresses."""
    found = []
    with suppress(OSError):
        for _, name in socket.if_nameindex():
            up = True
            with suppress(OSError):
                up = Path(f"/sys/class/net/{name}/operstate").read_text().strip() != "down"
            found.append(Interface(name, _address(name), up))
    return found


def _address(interface: str) -> str | None:
    import fcntl
    import struct

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface[:15].encode()))  # SIOCGIFADDR
        return socket.inet_ntoa(answer[20:24])
    return None


def own_address() -> tuple[str, str | None]:
    """This host's name and the IPv4 address that it resolves to here."""
    name = socket.gethostname()
    try:
        return name, socket.gethostbyname(name)
    except OSError:
        return name, None


def reaches(host: str, port: int, *, seconds: float = 3.0) -> bool:
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return True
    except OSError:
        return False
