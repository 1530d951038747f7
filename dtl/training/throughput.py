"""What a run logs about its steps: loss and speed, and at an epoch's end the throughput and what limits it.

When loading is the limit, the advice says what to change. Nothing is guessed: each batch says what it took to make, in its process's wall and CPU time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import torch

from dtl.checkpoint.resume.state import TrainState
from dtl.config.models import ImageSize, sides
from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Runtime
from dtl.machine import peak_bytes
from dtl.optim.batch_size import advise_batch
from dtl.runs.tracker import Tracker
from dtl.text import counted
from dtl.training.active import ActivePhase
from dtl.training.dataloaders import DataLoaders
from dtl.training.phases import Phase
from dtl.training.session import Session
from dtl.training.step import Window, diverged

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


def gather(speed: EpochSpeed, runtime: Runtime, *, workers: int, cores: float, image_size: ImageSize, short_side: float) -> EpochFacts:
    """All ranks together. `short_side`: median of the images' shorter side, as they are stored."""
    everyone = runtime.gather((*astuple(speed), _memory(runtime.device)))
    speeds = [EpochSpeed(*values[:-1]) for values in everyone]
    slowest = max(speeds, key=lambda one: one.wait)
    seconds = max(max(one.seconds for one in speeds), 1e-9)
    advice = advise(
        slowest,
        workers=workers,
        cores=max(1, math.ceil(cores)),
        on_cpu=runtime.device.type == "cpu",
        image_size=image_size,
        short_side=short_side,
    )
    return EpochFacts(sum(one.images for one in speeds) / seconds, slowest.wait, max(values[-1] for values in everyone), advice)


def first_line(speeds: Sequence[EpochSpeed], *, workers: int, cores: float, on_cpu: bool) -> str:
    """What loading and training reach, over all ranks."""
    loaded = sum(max(1, workers) * speed.images / max(speed.loading, 1e-9) for speed in speeds)
    trained = sum(speed.images for speed in speeds) / max(max(speed.seconds - speed.waited for speed in speeds), 1e-9)
    how = f"{counted(workers, 'loader process')} per rank" if workers else "the training process itself"
    wait = max(speed.wait for speed in speeds)
    return (
        f"data: {how} ({counted(round(cores, 1), 'core')} per rank) can prepare {loaded:,.0f} images/s, training takes {trained:,.0f} images/s; "
        f"the {'CPU' if on_cpu else 'GPU'} waits {wait:.0%} of the time for data"
    )


def advise(speed: EpochSpeed, *, workers: int, cores: int, on_cpu: bool, image_size: ImageSize, short_side: float) -> str:
    """One line, when the loader is what limits; empty otherwise. `cores`: of this rank's share of the machine."""
    if speed.wait < LEAST_WAIT or speed.seconds < LEAST_SECONDS or not speed.images:
        return ""
    busy = min(1.0, speed.loading / (speed.seconds * workers)) if workers else 1.0
    if busy < LEAST_BUSY:
        return ""
    each = speed.loading / speed.images
    measured = f"data loading is the bottleneck ({speed.wait:.0%} of the time is spent waiting for it): an image takes {1000 * each:.1f} ms"
    measured += f", {counted(workers, 'loader process')} {busy:.0%} busy" if workers else " in the training process itself"
    if speed.computing < LEAST_BUSY * speed.loading:
        stalled = 1 - speed.computing / speed.loading
        more = max(1, 2 * workers)
        return f"{measured}, waiting for the disk (or for a free core) {stalled:.0%} of that time; put the data on a local disk, or try --data.workers {more}"
    # As many as would keep up with a training that never waits.
    wanted = max(workers + 1, math.ceil(each * speed.images / max(speed.seconds - speed.waited, 1e-9)))
    most = max(1, cores - 1) if on_cpu else cores
    if workers < most:
        short = f"; {wanted} workers would be needed" if wanted > most else ""
        return f"{measured}; --data.workers {min(wanted, most)} (this process has {counted(cores, 'core')}{short})"
    target = round(max(sides(image_size)) * 256 / 224)
    if short_side > 1.25 * target:
        return (
            f"{measured} on {counted(cores, 'core')}, and {wanted} would be needed; the images are {short_side:.0f} pixels on the short side, "
            f"{target} would do: dtl pack SRC DST --short-side {target}"
        )
    return f"{measured} on {counted(cores, 'core')}, and {wanted} would be needed: use more cores per process, or fewer augmentations"


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    return peak_bytes() / GIB


@dataclass
class _Line:
    """A line about some steps, but for their losses."""

    window: Window
    epoch: int
    step: int
    lr: float
    stall: float


class StepLog:
    """What a run writes down about its steps: a line every so many, a line at an epoch's end, and the seconds of a phase."""

    def __init__(self, session: Session, tracker: Tracker, loaders: DataLoaders, state: TrainState) -> None:
        self.runtime, self.deadline, self.tracker, self.loaders, self.state = session.runtime, session.deadline, tracker, loaders, state
        self.window = Window()
        """Sums since the last line."""
        self._count, self._speed = EpochCount(), EpochSpeed()
        self._first: EpochSpeed | None = None
        """Of this start's first seconds, after the first line: that one has the start of the loader processes in it."""
        self._reported = False
        self._logged_stall = 0.0
        self._late: _Line | None = None
        """On a GPU, the line whose losses are on their way."""
        self._clock = time.monotonic()

    @property
    def reads_late(self) -> bool:
        """Whether a log line waits for the next one: the device computes what the host has queued, while the host goes on."""
        return self.runtime.device.type != "cpu"

    def begin(self) -> None:
        """A phase begins."""
        self.window, self._count = Window(), EpochCount()

    def restore(self) -> None:
        """A phase continues from a checkpoint, which `state` was read from; the main process continues with the sums of all ranks."""
        phase = self.state.phase
        self.window = Window(phase.window_loss if self.runtime.is_main else 0.0, phase.window_weight)
        self._count = EpochCount.restored(self.state, self.runtime)

    def store(self) -> None:
        """Into `state`, what a checkpoint keeps of it. Called by all ranks together."""
        (self.state.phase.window_loss,) = self.runtime.sum_floats(self.window.sum())
        self.state.phase.window_weight = self.window.weight_sum
        self._count.store(self.state, self.runtime)
        self.tracker.sync()
        self.state.history_offset = self.tracker.history_offset
        self.state.wandb_id = self.tracker.wandb_id

    # ---- the clock

    def start_clock(self) -> None:
        self._clock = time.monotonic()

    def spend(self, phase: Phase) -> None:
        """The seconds since the last time count for the phase."""
        now = time.monotonic()
        self.state.results.seconds[phase.name] = self.state.results.seconds.get(phase.name, 0.0) + now - self._clock
        self._clock = now

    def waited(self, seconds: float) -> None:
        """For a step's data."""
        self.window.data_seconds += seconds
        for speed in self._speeds:
            speed.waited += seconds

    def count(self, batches: Iterable[Batch], num_images: int, seconds: float) -> None:
        """A step is done: this rank's `batches`, of `num_images` over all ranks."""
        self._count.add(batches)
        for speed in self._speeds:
            speed.add(batches)
        self.window.num_images += num_images
        self._took(seconds, self.window)

    def _took(self, seconds: float, window: Window) -> None:
        self.deadline.saw_step(seconds)
        window.seconds += seconds
        for speed in self._speeds:
            speed.seconds += seconds
        self.state.phase.train_seconds += seconds

    @property
    def _speeds(self) -> list[EpochSpeed]:
        return [self._speed] if self._first is None else [self._speed, self._first]

    # ---- lines

    def step(self, active: ActivePhase, lr: float, *, stall_seconds: float) -> None:
        """The line about the steps since the last one. `stall_seconds`: how long this start has stood still for saving so far.

        On a GPU the losses come with the next line, or with the next evaluation, checkpoint or end of an epoch: by then they have been copied to the
        host, which need not wait until the device has done all that is queued. Nothing comes before it in history.
        """
        phase = active.phase
        epoch, stall = phase.epoch_of(self.state.phase.step - 1)[0], round(stall_seconds - self._logged_stall, 4)
        line = _Line(self.window, epoch, self.state.step, lr, stall)
        self._logged_stall = stall_seconds
        if self.reads_late:
            line.window.start_reading()
            self.window = Window()
            self._write_late_line(active)
            self._late = line
        else:
            self._write_line(line, active)
            self.window = Window()
        self.spend(phase)
        if not self._reported and not self.loaders.cached:
            self._report(phase)

    def _write_late_line(self, active: ActivePhase) -> None:
        if self._late is not None:
            line, self._late = self._late, None
            self._write_line(line, active)

    def _write_line(self, line: _Line, active: ActivePhase) -> None:
        total = self._total_loss(active, line.window)
        window, seconds = line.window, max(line.window.seconds, 1e-9)
        self.tracker.train(
            phase=active.phase.name,
            epoch=line.epoch,
            step=line.step,
            loss=total / max(window.weight_sum, 1e-12),
            lr=line.lr,
            images_per_second=window.num_images / seconds,
            data_wait=min(1.0, window.data_seconds / seconds),
            checkpoint_stall_seconds=line.stall,
        )
        self.state.phase.epoch_loss += total
        self.state.phase.epoch_weight += window.weight_sum

    def _report(self, phase: Phase) -> None:
        """Once in a start, after some seconds: how fast images are prepared and trained on, and what to change. All ranks together."""
        if self._first is None:
            self._first = EpochSpeed()
            return
        loaders, runtime = self.loaders, self.runtime
        speeds = [EpochSpeed(*values) for values in runtime.gather(astuple(self._first))]
        if max(speed.seconds for speed in speeds) < LEAST_SECONDS:
            return
        facts = gather(self._first, runtime, workers=loaders.workers, cores=loaders.cores, image_size=loaders.image_size, short_side=loaders.short_side)
        self.tracker.print(first_line(speeds, workers=loaders.workers, cores=loaders.cores, on_cpu=runtime.device.type == "cpu"))
        if facts.advice:
            self.tracker.advise(phase.name, facts.advice, step=self.state.step)
        if runtime.device.type == "cuda":
            images, total = loaders.layout(phase).micro_batch_size, torch.cuda.get_device_properties(runtime.device).total_memory
            most = loaders.train.num_samples // 10  # steps in an epoch
            if loaders.layout(phase).accumulation_steps == 1:
                line = advise_batch(images, runtime.world_size, used=round(facts.memory_gib * GIB), total=total, most=most)
                if line:
                    self.tracker.print(line)
        self._first, self._reported = None, True

    def epoch(self, active: ActivePhase) -> None:
        """The line at the end of an epoch, or of a phase within one. Called by all ranks together."""
        phase, state = active.phase, self.state
        total = self.check_loss(active)
        self._count.log(phase, state, speed=self._speed, loaders=self.loaders, runtime=self.runtime, tracker=self.tracker)
        self._speed = EpochSpeed()
        if state.epoch_step == 0:
            # The window that is open may reach into the next epoch, which does not count what is in it now.
            state.phase.epoch_loss, state.phase.epoch_weight = -total, -self.window.weight_sum

    def check_loss(self, active: ActivePhase) -> float:
        """Note the mean training loss of the epoch so far; end the run if a loss since the last line is not finite.

        Called by all ranks together; returns the sum of the losses since the last line.
        """
        self._write_late_line(active)
        phase, total = self.state.phase, self._total_loss(active, self.window)
        weight = phase.epoch_weight + self.window.weight_sum
        if weight > 0:  # just after an epoch's end its own mean stays
            phase.train_loss = (phase.epoch_loss + total) / weight
        return total

    def _total_loss(self, active: ActivePhase, window: Window) -> float:
        """The sum of a window's losses over all ranks; ends the run when it is not finite. The host may wait for the device here."""
        asked = time.monotonic()
        mine = window.sum()
        self._took(time.monotonic() - asked, window)  # the steps themselves, where the host had run ahead of a GPU
        total, num_bad = self.runtime.sum_floats(mine, window.bad_step >= 0)
        if num_bad or total != total:
            raise diverged(active, self.loaders, self.state, [step for step in self.runtime.gather(window.bad_step) if step >= 0])
        return float(total)


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
        facts = gather(speed, runtime, workers=loaders.workers, cores=loaders.cores, image_size=loaders.image_size, short_side=loaders.short_side)
        tracker.epoch(
            phase=phase.name,
            epoch=epoch,
            step=state.step,
            expected=expected,
            seen=seen,
            damaged=damaged,
            loss=state.phase.train_loss,
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
