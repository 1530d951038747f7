"""How many samples of the epoch under way the trainer has finished: what was trained on, not what was loaded or planned.

Each rank counts its own; the sum over ranks goes into each checkpoint, so that an epoch that was stopped is counted on where it stood.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dtl.checkpoint.resume.state import TrainState
from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Runtime
from dtl.runs.tracker import Tracker
from dtl.training.dataloaders import DataLoaders
from dtl.training.phases import Phase
from dtl.training.throughput import EpochSpeed, gather

_KEY = "epoch_count"


class EpochCount:
    """`seen` slots of this rank that were trained on, and `damaged` ones among them, at weight 0."""

    def __init__(self, seen: int = 0, damaged: int = 0) -> None:
        self.seen, self.damaged = seen, damaged

    @classmethod
    def restored(cls, state: TrainState, runtime: Runtime) -> EpochCount:
        """The main process goes on with the sum of all ranks."""
        seen, damaged = state.extra.get(_KEY, (0, 0)) if runtime.is_main else (0, 0)
        return cls(seen, damaged)

    def take(self, batches: Iterable[Batch]) -> None:
        """A step that is done."""
        for batch in batches:
            self.seen += batch.num_real
            self.damaged += len(batch.bad)

    def store(self, state: TrainState, runtime: Runtime) -> None:
        """Called by all ranks together, before a checkpoint."""
        state.extra[_KEY] = list(self._sum(runtime))

    def tell(self, phase: Phase, state: TrainState, *, speed: EpochSpeed, loaders: DataLoaders, runtime: Runtime, tracker: Tracker) -> None:
        """After the last step of an epoch, or of a phase within one (which may be made longer later); all ranks together."""
        epoch, step = phase.epoch_of(state.phase_step - 1)
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
