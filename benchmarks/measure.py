"""What every benchmark here needs: clocks, medians with their spread, the machine, and a dated file for the results."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "webdataset", "timm", "accelerate")


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some repetitions."""

    median: float
    low: float
    high: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def show(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def with_interval(values: Sequence[float], digits: int = 0) -> str:
    """Median and its 95 % confidence interval, by order statistics."""
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
    low, high = ordered[max(0, int(len(values) / 2 - half))], ordered[min(len(values) - 1, math.ceil(len(values) / 2 + half))]
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def cpu_seconds() -> float:
    """CPU time of this process, its living children and those that have ended, user and system."""
    me = psutil.Process()
    own = me.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in me.children(recursive=True):
        try:
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        except psutil.Error:  # it ended between the two calls
            continue
    return total


@dataclass(frozen=True)
class Spent:
    """What a command took, all its processes together, and what it printed."""

    seconds: float
    cpu_seconds: float
    memory_mib: float
    """The highest sum of proportional set sizes that was seen, twice a second."""
    output: str


def spent(command: Sequence[str], folder: Path, *, threads: int) -> Spent:
    """A command of this checkout, in `folder` with an empty cache; SystemExit with its last lines where it fails. Alone: all children that end count."""
    began, cpu, peak = time.monotonic(), _of_children(), 0
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "DTL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # on which a command compiles this checkout, but nothing that is installed, each time
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=errors) as process:
            while process.poll() is None:
                peak = max(peak, _proportional(process.pid))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)  # the kernel counts pages for it: not for nothing
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{errors.read()[-3000:]}")
        return Spent(time.monotonic() - began, _of_children() - cpu, peak / 2**20, out.read())


def _of_children() -> float:
    """CPU seconds of all children that have ended."""
    use = resource.getrusage(resource.RUSAGE_CHILDREN)
    return use.ru_utime + use.ru_stime


def _proportional(pid: int) -> int:
    """Bytes of a process and its children."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for process in (me := psutil.Process(pid), *me.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


def interleaved(ways: dict[str, Callable[[], Any]], rounds: int, *, say: Callable[[str], None] = print) -> dict[str, list[Any]]:
    """Each way once, then each again: what disturbs the machine for a while disturbs all of them. One unmeasured round is the caller's."""
    results: dict[str, list[Any]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            results[name].append(way())
            say(f"round {number + 1}/{rounds} {name}: {results[name][-1]}")
    return results


def machine() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _gpus(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


def show_machine(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['date']}: {facts['cores']} cores {facts['cpu']}, {facts['memory_gib']} GiB, {', '.join(facts['gpu']) or 'no GPU'}; "
        f"Python {facts['python']}, {versions}; load {facts['load_average'][0]} at the start, {os.getloadavg()[0]:.1f} at the end"
    )


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the options that all benchmarks share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=3, help="interleaved repetitions")
    made.add_argument("--out", type=Path, help="write FILE.md and FILE.json; results kept in the repository lie in benchmarks/results")
    return made


def report(title: str, lines: list[str], data: Any, facts: dict[str, Any], out: Path | None) -> None:
    text = "\n".join([f"# {title}", "", show_machine(facts), "", *lines, ""])
    print("\n" + text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".md").write_text(text, encoding="utf-8")
        facts = {**facts, "load_average_at_end": round(os.getloadavg()[0], 1)}
        out.with_suffix(".json").write_text(json.dumps({"machine": facts, "results": data}, indent=1) + "\n", encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]


def data_folder() -> Path:
    """The folder with hymenoptera_data, from the environment."""
    given = os.environ.get("DTL_DATA")
    if not given:
        raise SystemExit("set DTL_DATA to the folder that holds hymenoptera_data")
    return Path(given)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def _gpus() -> list[str]:
    try:
        import torch
    except ImportError:
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
