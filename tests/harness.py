"""Real runs of `dtl COMMAND` in processes that are forked from a warm server: 0.3 s a start instead of 8.

The server imports torch, accelerate and dtl once a test session and nothing else ever happens in it, so each process starts clean.
What the launchers themselves do is tested by a few real launches in tests/distributed/test_launchers.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from gpusim import simulation

from dtl.checks.resume import TIMES

# Python 3.11's fork server looks for what it should import on the default path only, and says nothing when it is not there.
_here = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(_here), str(_here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
_context = multiprocessing.get_context("forkserver")
default_device = "cpu"
"""What runs compute on: cpu, sim (simulated GPUs, tests/gpusim) or cuda. tests/conftest.py sets it: pytest --device."""
_servers: dict[str, multiprocessing.forkserver.ForkServer] = {}


def _server(of: str) -> multiprocessing.forkserver.ForkServer:
    """One for all runs on CPUs and GPUs, and one with simulated GPUs."""
    if of not in _servers:
        _servers[of] = multiprocessing.forkserver.ForkServer()
        _servers[of].set_forkserver_preload(["warm"])
        with mock.patch.dict(os.environ, simulation.environment() if of == "sim" else {}):
            _servers[of].ensure_running()
    return _servers[of]


@dataclass
class Job:
    """One launch: a process a rank."""

    processes: list[ForkServerProcess]
    folder: Path
    _started: float = field(default_factory=time.monotonic)

    def wait(self, timeout: float = 150.0) -> Job:
        """Until all ranks have ended. A rank that does not is killed, and the test fails."""
        deadline = self._started + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        stuck = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if stuck:
            self.kill()
            raise AssertionError(f"ranks {stuck} did not end within {timeout} s:\n{self.err()}")
        return self

    def kill(self, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)
        if number == signal.SIGKILL:
            for process in self.processes if rank is None else [self.processes[rank]]:
                process.join()

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def err(self, rank: int | None = None) -> str:
        return self._text("err", rank)

    def out(self, rank: int | None = None) -> str:
        return self._text("out", rank)

    def _text(self, kind: str, rank: int | None) -> str:
        ranks = range(len(self.processes)) if rank is None else [rank]
        return "".join((self.folder / f"{kind}-{r}").read_text(errors="replace") for r in ranks if (self.folder / f"{kind}-{r}").exists())

    def end(self) -> None:
        """Kill what still runs: each rank with the workers in its process group, stopped ones too."""
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()

    def check(self, code: int = 0) -> Job:
        assert self.codes == [code] * len(self.processes), f"exit codes {self.codes}:\n{self.err()}\n{self.out()}"
        return self


_jobs = 0
started: list[Job] = []
"""Those of this test; tests/conftest.py ends what a failed one leaves running."""


def start(
    arguments: Sequence[str],
    *,
    cwd: Path,
    world: int = 1,
    env: Mapping[str, str] | None = None,
    command: str = "train",
    threads: int = 1,
    by_rank: Mapping[int, Mapping[str, Any]] | None = None,
    device: str | None = None,
    packed: bool = True,
) -> Job:
    """`world` ranks of `dtl COMMAND ARGUMENTS`, or of COMMAND(*ARGUMENTS) where it is MODULE:FUNCTION; in `cwd`.

    `device`: that of the session, if it is not given. Ranks on CPUs speak over gloo, on GPUs over NCCL.
    `packed`: the built-in digits lie packed in the cache, which is empty else (a third of the CPU time of a short run). A cache that `env` names is left alone.
    `by_rank`: what single ranks have of their own: `arguments` beside the others', and `before`, MODULE:FUNCTION that is called first.
    """
    global _jobs
    _jobs += 1
    folder = cwd / f".job-{_jobs}"
    folder.mkdir(parents=True)
    device = device or default_device
    on_device = {"ACCELERATE_USE_CPU": str(device == "cpu").lower(), "SIMCUDA_DEVICES": str(max(2, world))}
    variables = {
        **on_device,
        "DTL_CACHE": str(cwd / "cache"),
        "WANDB_MODE": "disabled",
        "HF_HOME": str(cwd / "hf"),
        "OMP_NUM_THREADS": str(threads),
        **(env or {}),
    }
    if world > 1:
        variables |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    if packed and not (cwd / "cache").exists() and "DTL_CACHE" not in (env or {}):
        shutil.copytree(_packed_digits(), cwd / "cache")
    job = Job([], folder)
    started.append(job)
    for rank in range(world):
        ranked = {**variables, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})}
        own = (by_rank or {}).get(rank, {})
        words = [*arguments, *own.get("arguments", [])]
        process = _context.Process(target=_run, args=(command, words, str(cwd), str(folder), rank, ranked, threads, own.get("before")))
        with mock.patch.object(multiprocessing.forkserver, "connect_to_new_process", _server(device).connect_to_new_process):
            process.start()
        job.processes.append(process)
    return job


@functools.cache
def _packed_digits() -> Path:
    from dtl.config.models import DataConfig
    from dtl.data.open import ensure_packed

    cache = Path(tempfile.mkdtemp())
    for split in ("train", "val"):
        ensure_packed("digits", DataConfig(cache_dir=str(cache)), split=split, processes=1, progress=False, log=lambda line: None)
    return cache


def run(arguments: Sequence[str], *, cwd: Path, world: int = 1, code: int = 0, timeout: float = 150.0, **more: Any) -> Job:
    """`start`, wait, and check every rank's exit status."""
    return start(arguments, cwd=cwd, world=world, **more).wait(timeout).check(code)


def _run(command: str, arguments: list[str], cwd: str, folder: str, rank: int, variables: dict[str, str], threads: int, before: str | None) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.update(variables)
    for number, kind in ((1, "out"), (2, "err")):
        target = os.open(f"{folder}/{kind}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)

    import torch

    from dtl.cli import main

    torch.set_num_threads(threads)
    if before is not None:
        _named(before)()
    code = _named(command)(*arguments) if ":" in command else main([command, *arguments])
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _named(text: str) -> Callable[..., Any]:
    module, _, function = text.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def history(run: Path, *, times: bool = False) -> list[dict[str, Any]]:
    """history.jsonl; without `times`, only what two equal runs share."""
    events = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    if not times:
        events = [event for event in events if event.get("note") != "limit"]  # advice that follows from times
        for event in events:
            for key in TIMES:
                event.pop(key, None)
    return events


def kind() -> str:
    """What dtl calls the session's device."""
    return "cpu" if default_device == "cpu" else "cuda"


def the_line(job: Job, having: str = "") -> str:
    """The one line that says what is wrong, of those that have these words; no rank says anything more of it."""
    assert "Traceback" not in job.err(), job.err()
    lines = [line for line in job.err().splitlines() if line.startswith("dtl: ") and having in line]
    assert len(lines) == 1, job.err()
    return lines[0]


def steps_done(run: Path) -> int:
    """The last step that history tells of."""
    return max([event.get("step", 0) for event in history(run)], default=0) if (run / "history.jsonl").exists() else 0


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())  # type: ignore[no-any-return]


def wait_for(condition: Any, *, seconds: float = 60.0, what: str = "it", every: float = 0.02) -> Any:
    """Poll until `condition()` is true; its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(every)
    raise AssertionError(f"waited {seconds} s for {what}")
