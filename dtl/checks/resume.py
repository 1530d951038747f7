"""Kill a run again and again, and compare what comes out with a run that nobody disturbed.

Kills come at seeded random moments, aimed at stages that each rank writes to $DTL_STAGES (memory shared with the watcher): inside a
save, while a checkpoint is being written, in evaluation, at a phase's boundary, while packing, in loading, forward and backward, or
after a random time. All ranks are killed at once with SIGKILL, as Slurm, an empty battery or the kernel do it.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dtl.distributed.watchdog import read_stage
from dtl.errors import UserError
from dtl.text import to_stderr

TIMES = ("images_per_second", "data_wait", "memory_gib", "seconds", "checkpoint_stall_seconds")
"""Fields of history that two equal runs do not share."""
KINDS = ("data", "writing", "evaluate", "phase", "save", "any time", "forward", "backward", "collective", "load", "any time", "writing", "finish")
KILLS_A_RUN = 10


class Running(Protocol):
    """One start of `dtl train` on all its ranks."""

    def is_alive(self) -> bool: ...

    def kill(self) -> None:
        """SIGKILL to all ranks at once; returns when they are gone."""

    def codes(self) -> list[int | None]: ...

    def text(self) -> str: ...


Start = Callable[[Sequence[str], dict[str, str]], Running]
"""Starts `dtl train ARGUMENTS` with these environment variables."""


@dataclass
class Killed:
    """Where one kill hit."""

    stage: str
    step: int
    writing: bool
    """A checkpoint was half written."""


@dataclass
class Result:
    kills: list[Killed] = field(default_factory=list)
    runs: int = 0
    steps: int = 0
    events: int = 0
    slots: int = 0
    differences: list[str] = field(default_factory=list)

    def where(self) -> str:
        counts = Counter("writing a checkpoint" if kill.writing else kill.stage or "starting" for kill in self.kills)
        return ", ".join(f"{name} {count}" for name, count in counts.most_common())


@dataclass
class _Run:
    """A run folder of its own, with what its starts have written."""

    folder: Path
    start: Start
    arguments: Sequence[str]
    fresh_cache: bool
    torn: set[str] = field(default_factory=set)

    @property
    def path(self) -> Path:
        return self.folder / "runs" / "run"

    @property
    def stages(self) -> Path:
        return self.folder / "stages"

    def begin(self) -> Running:
        for name in ("stages", "trace"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for old in self.stages.iterdir():
            old.unlink()
        variables = {"DTL_STAGES": str(self.stages), "DTL_TRACE": str(self.folder / "trace")}
        if self.fresh_cache:
            variables["DTL_CACHE"] = str(self.folder / "cache")
        self.torn = set(self._half_written())  # by kills before
        return self.start([*self.arguments, "--run.dir", str(self.folder / "runs"), "--run.name", "run", "--tracking.wandb", "off"], variables)

    def to_the_end(self, timeout: float) -> float:
        """One uninterrupted start; the seconds that it took."""
        started = time.monotonic()
        running = self.begin()
        while running.is_alive():
            if time.monotonic() - started > timeout:
                running.kill()
                raise _failed(running, f"a start of the run did not end within {timeout:.0f} s")
            time.sleep(0.02)
        if any(running.codes()):
            raise _failed(running, f"a start of the run ended with status {running.codes()}")
        return time.monotonic() - started

    def is_writing(self) -> bool:
        return not self.torn.issuperset(self._half_written())

    def _half_written(self) -> list[str]:
        return [path.name for path in (self.path / "checkpoints").glob(".writing-*")]

    def kill_one(self, aim: str, delay: float, *, step: int, rank: int, timeout: float) -> Killed | None:
        """One start, killed where `aim` says, not before `step`; None when it came to its end before."""
        running = self.begin()
        stage_file, deadline = self.stages / f"rank-{rank}", time.monotonic() + (delay if aim == "any time" else timeout)
        while running.is_alive() and time.monotonic() < deadline:
            stage, at, _, _ = read_stage(stage_file)
            if (aim == "writing" and self.is_writing() and at >= step) or (stage == aim != "any time" and (at >= step or aim == "data")):
                time.sleep(delay % 0.004)
                break
            time.sleep(0.0003)
        if not running.is_alive():
            if any(running.codes()):
                raise _failed(running, f"a start of the run ended by itself with status {running.codes()}")
            return None
        running.kill()
        stage, step, _, _ = read_stage(stage_file)
        return Killed(stage, step, self.is_writing())


def _failed(running: Running, why: str) -> UserError:
    """The error to raise, after the last lines that the run has printed."""
    for line in running.text()[-3000:].splitlines():
        to_stderr(line)
    return UserError(f"{why}; its last lines are above")


def check(
    start: Start,
    arguments: Sequence[str],
    folder: Path,
    *,
    kills: int,
    world: int,
    seed: int = 0,
    fresh_cache: bool = False,
    timeout: float = 3600.0,
    log: Callable[[str], None] = lambda line: None,
) -> Result:
    """Reference run, then runs that are killed `kills` times together, each compared with the reference.

    `fresh_cache`: each run packs its data anew, so that kills hit packing too.
    """
    chance, result = random.Random(seed), Result()
    reference = _Run(folder / "reference", start, arguments, fresh_cache)
    seconds = reference.to_the_end(timeout)
    log(f"uninterrupted: {seconds:.1f} s")
    expected = outcome(reference.path)
    result.steps = int(expected["step"])
    aims = _aims(chance)
    while len(result.kills) < kills:
        run = _Run(folder / f"killed-{result.runs}", start, arguments, fresh_cache)
        finished = False
        for _ in range(KILLS_A_RUN):
            if finished or len(result.kills) == kills:
                break
            aim = next(aims)
            delay = chance.uniform(0.0, seconds)
            step = chance.randrange(max(1, 3 * result.steps // 4))
            killed = run.kill_one(aim, delay, step=step, rank=chance.randrange(world), timeout=2 * seconds + 60)
            finished = killed is None
            if killed is not None:
                result.kills.append(killed)
                half = ", during a checkpoint write" if killed.writing else ""
                log(f"kill {len(result.kills)} of {kills}: in {killed.stage or 'start'} of step {killed.step}{half}")
        if not finished:
            run.to_the_end(timeout)
        result.runs += 1
        result.differences += [f"{run.path}: {line}" for line in compare(reference, run, result)]
    return result


def _aims(chance: random.Random) -> Iterator[str]:
    """Each kind in turn; after the first round in a random order."""
    kinds = list(KINDS)
    while True:
        yield from kinds
        chance.shuffle(kinds)


def outcome(run: Path) -> dict[str, Any]:
    """What two equal runs share: weights, history without times, the end."""
    events = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    events = [event for event in events if event.get("note") != "limit"]  # advice that follows from times
    status = json.loads((run / "status.json").read_text())
    return {
        "state": status["state"],
        "step": status["step"],
        "weights": hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "history": [{key: value for key, value in event.items() if key not in TIMES} for event in events],
    }


def compare(reference: _Run, run: _Run, result: Result) -> list[str]:
    """Differences between an interrupted run and the reference, in words."""
    from dtl.runs.trace import read_trace

    expected, got = outcome(reference.path), outcome(run.path)
    differences = [f"{name} {got[name]!r}, not {expected[name]!r}" for name in ("state", "step") if got[name] != expected[name]]
    if got["weights"] != expected["weights"]:
        differences.append(f"the weights differ from those of the uninterrupted run (sha256 {got['weights'][:12]}, not {expected['weights'][:12]})")
    if got["history"] != expected["history"]:
        differences.append(_first_difference(expected["history"], got["history"]))
    result.events += len(got["history"])
    wanted, seen = read_trace(reference.folder / "trace"), read_trace(run.folder / "trace")
    for step in sorted(wanted.keys() | seen.keys()):
        if wanted.get(step) != seen.get(step):
            differences.append(f"step {step} was trained on different samples, or on different augmentations of them")
            break
        result.slots += len(wanted[step])
    return differences


def _first_difference(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> str:
    for number, (one, other) in enumerate(zip(expected, got), start=1):
        if one != other:
            return f"line {number} of history.jsonl is {json.dumps(other)}, not {json.dumps(one)}"
    return f"history.jsonl has {len(got)} lines, not {len(expected)}"
