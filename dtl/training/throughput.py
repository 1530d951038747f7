"""The throughput of an epoch, and what limits it: how fast it went, how long it waited for data, and, when loading is the limit, what to change.

Nothing is guessed: each batch says what it took to make, in its process's wall and CPU time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch

from dtl.checkpoint.resume.state import TrainState
from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Runtime
from dtl.machine import num_cores, peak_bytes
from dtl.runs.tracker import Tracker
from dtl.text import counted
from dtl.training.dataloaders import DataLoaders
from dtl.training.phases import Phase

GIB = 2**30
# Less waiting than this is no limit; a shorter epoch measures the start of its loader processes.
LEAST_WAIT, LEAST_SECONDS, LEAST_BUSY = 0.2, 2.0, 0.6


@dataclass
class EpochSpeed:
    """Sums over this rank's steps of an epoch, in this start of the run."""

    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of it that the training stood still for its next batch."""
    images: int = 0
    """Of this rank, pads left out."""
    loading: float = 0.0
    """Wall seconds of all loader processes."""
    computing: float = 0.0
    """CPU seconds among them."""

    def add(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self.images += batch.num_real
            self.loading += batch.seconds[0]
            self.computing += batch.seconds[1]

    @property
    def wait(self) -> float:
        """Share of the time that waited for data, 0..1."""
        return min(1.0, self.waited / self.seconds) if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class EpochFacts:
    """What an epoch's line tells; the wait is that of the rank that waited longest, since all others wait for it."""

    images_per_second: float
    data_wait: float
    memory_gib: float
    """GPU memory of the fullest rank; on CPUs the largest process."""
    advice: str = ""
    """What to change, when loading is the limit."""


def gather(speed: EpochSpeed, runtime: Runtime, *, workers: int, image_size: int, short_side: float) -> EpochFacts:
    """All ranks together. `short_side`: median of the images' shorter side, as they are stored."""
    everyone = runtime.gather((*astuple(speed), _memory(runtime.device)))
    speeds = [EpochSpeed(*values[:-1]) for values in everyone]
    slowest = max(speeds, key=lambda one: one.wait)
    seconds = max(max(one.seconds for one in speeds), 1e-9)
    advice = advise(
        slowest,
        workers=workers,
        cores=max(1, num_cores() // max(1, runtime.launch.local_world_size)),
        on_cpu=runtime.device.type == "cpu",
        image_size=image_size,
        short_side=short_side,
    )
    return EpochFacts(sum(one.images for one in speeds) / seconds, slowest.wait, max(values[-1] for values in everyone), advice)


def advise(speed: EpochSpeed, *, workers: int, cores: int, on_cpu: bool, image_size: int, short_side: float) -> str:
    """One line, when the loader is what limits; empty otherwise. `cores`: of this rank's share of the machine."""
    if speed.wait < LEAST_WAIT or speed.seconds < LEAST_SECONDS or not speed.images:
        return ""
    busy = min(1.0, speed.loading / (speed.seconds * workers)) if workers else 1.0
    if busy < LEAST_BUSY:
        return ""
    each = speed.loading / speed.images
    measured = f"the loader is the limit ({speed.wait:.0%} of the time is waiting for it): an image takes {1000 * each:.1f} ms"
    measured += f", {counted(workers, 'loader process')} {busy:.0%} busy" if workers else " in the training process itself"
    if speed.computing < LEAST_BUSY * speed.loading:
        stalled = 1 - speed.computing / speed.loading
        more = max(1, 2 * workers)
        return f"{measured} and wait for the disk (or for a core) {stalled:.0%} of that; put the data on a local disk, or try --data.workers {more}"
    # As many as would keep up with a training that never waits.
    wanted = max(workers + 1, math.ceil(each * speed.images / max(speed.seconds - speed.waited, 1e-9)))
    most = max(1, cores - 1) if on_cpu else cores
    if workers < most:
        short = f", of {wanted} that would keep up" if wanted > most else ""
        return f"{measured}; --data.workers {min(wanted, most)} (this process has {counted(cores, 'core')}{short})"
    target = round(image_size * 256 / 224)
    if short_side > 1.25 * target:
        return (
            f"{measured} on {counted(cores, 'core')}, and {wanted} would be needed; the images are {short_side:.0f} pixels at the short side, "
            f"{target} would do: dtl pack SRC DST --short-side {target}"
        )
    return f"{measured} on {counted(cores, 'core')}, and {wanted} would be needed: more cores a process, or fewer augmentations"


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    return peak_bytes() / GIB


class EpochCount:
    """How many samples of the epoch the trainer has finished: `seen` slots of this rank, and `damaged` ones among them, at weight 0.

    Each rank counts its own. The sum over ranks goes into each checkpoint, and a resumed run continues from it.
    """

    def __init__(self, seen: int = 0, damaged: int = 0) -> None:
        self.seen, self.damaged = seen, damaged

    @classmethod
    def restored(cls, state: TrainState, runtime: Runtime) -> EpochCount:
        """The main process continues with the sum of all ranks."""
        return cls(state.phase.epoch_seen, state.phase.epoch_damaged) if runtime.is_main else cls()

    def add(self, batches: Iterable[Batch]) -> None:
        """A step that is done."""
        for batch in batches:
            self.seen += batch.num_real
            self.damaged += len(batch.bad)

    def store(self, state: TrainState, runtime: Runtime) -> None:
        """Called by all ranks together, before a checkpoint."""
        state.phase.epoch_seen, state.phase.epoch_damaged = self._sum(runtime)

    def log(self, phase: Phase, state: TrainState, *, speed: EpochSpeed, loaders: DataLoaders, runtime: Runtime, tracker: Tracker) -> None:
        """After the last step of an epoch, or of a phase within one (which may be made longer later); all ranks together."""
        epoch, step = phase.epoch_of(state.phase.step - 1)
        seen, damaged = self._sum(runtime)
        expected = loaders.plan(epoch).step_bounds(step)[1]
        facts = gather(speed, runtime, workers=loaders.workers, image_size=loaders.image_size, short_side=loaders.short_side)
        tracker.epoch(
            phase=phase.name,
            epoch=epoch,
            step=state.step,
            expected=expected,
            seen=seen,
            damaged=damaged,
            images_per_second=facts.images_per_second,
            data_wait=facts.data_wait,
            memory_gib=facts.memory_gib,
        )
        if facts.advice:
            tracker.advise(phase.name, facts.advice, step=state.step)
        if state.epoch_step == 0:
            self.seen = self.damaged = 0

    def _sum(self, runtime: Runtime) -> tuple[int, int]:
        seen, damaged = runtime.sum(torch.tensor([self.seen, self.damaged], dtype=torch.int64)).tolist()
        return int(seen), int(damaged)
