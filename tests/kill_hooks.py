"""Runs that end themselves with SIGKILL at one moment, by `before` of the harness."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from dtl import files


def in_thinning() -> None:
    """While the second checkpoint is being deleted: it is renamed, and half of it is gone."""
    real, seen = files.remove, [0]

    def remove(path: Path) -> None:
        # The store deletes while it trains, too: what counts is what it deletes once the model is there.
        if path.name.startswith(".deleting-") and (path.parent.parent / "model/model.json").exists():
            seen[0] += 1
            if seen[0] == 2:
                next(path.iterdir()).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        real(path)

    files.remove = remove


def before_thinning() -> None:
    """The run is marked done, and nothing is deleted yet."""
    from dtl.checkpoint.resume.store import CheckpointStore

    def thin(self: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    CheckpointStore.thin = thin  # type: ignore[method-assign]


def before_the_model() -> None:
    """The last checkpoint is on the disk, and the model folder is not."""
    from dtl.training import publish

    def save(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    publish._save_model = save


def in_the_test() -> None:
    """In the middle of the evaluation on the test set, before its second step."""
    from dtl.training.loop import Trainer

    real, seen = Trainer._agree_on_eval_step, [0]

    def step(self: Any, split: str, batches: Any) -> Any:
        seen[0] += split == "test"
        if seen[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, split, batches)

    Trainer._agree_on_eval_step = step  # type: ignore[method-assign]


def in_the_second_fold() -> None:
    """In the fourth step of the second run of this process."""
    from dtl.training.loop import Trainer

    real_train, real_step, runs = Trainer.train, Trainer._after_step, [0]

    def train(self: Any, checkpoint: Any) -> None:
        runs[0] += 1
        real_train(self, checkpoint)

    def after_step(self: Any, *given: Any, **named: Any) -> None:
        real_step(self, *given, **named)
        if runs[0] == 2 and self.state.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.train, Trainer._after_step = train, after_step  # type: ignore[method-assign]


def in_the_entering_evaluation(number: int = signal.SIGKILL) -> None:
    """In the evaluation before a phase's first step, before its second step."""
    from dtl.training.loop import Trainer

    real, seen = Trainer._agree_on_eval_step, [0]

    def step(self: Any, split: str, batches: Any) -> Any:
        seen[0] += self.state.phase.pending_eval and self.state.phase.step == 0
        if seen[0] == 2:
            os.kill(os.getpid(), number)
        return real(self, split, batches)

    Trainer._agree_on_eval_step = step  # type: ignore[method-assign]


def stopped_in_the_entering_evaluation() -> None:
    in_the_entering_evaluation(signal.SIGTERM)


def before_the_first_step_of_the_second_phase(number: int = signal.SIGKILL) -> None:
    """After that evaluation."""
    from dtl.training.loop import Trainer

    real = Trainer._next

    def load(self: Any, phase: Any, stream: Any) -> Any:
        if phase.index == 1 and self.state.phase.step == 0:
            os.kill(os.getpid(), number)
        return real(self, phase, stream)

    Trainer._next = load  # type: ignore[method-assign]


def in_a_blend(number: int = signal.SIGKILL) -> None:
    """In the evaluation of the fifth point between start and end, before its first step."""
    from dtl.training.loop import Trainer

    real = Trainer._evaluate

    def evaluate(self: Any, active: Any, *, blend: float | None = None) -> None:
        if blend == 0.5:
            os.kill(os.getpid(), number)
        real(self, active, blend=blend)

    Trainer._evaluate = evaluate  # type: ignore[method-assign]


def stopped_in_a_blend() -> None:
    in_a_blend(signal.SIGTERM)


def stopped_between_points() -> None:
    """While the statistics of the second point are estimated."""
    from dtl.training import loop

    real, seen = loop.estimate_statistics, [0]

    def estimate(*given: Any, **named: Any) -> bool:
        seen[0] += 1
        if seen[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **named)

    loop.estimate_statistics = estimate


def at_a_step() -> None:
    """After step KILL_AT, before anything that is due then."""
    from dtl.training.loop import Trainer

    real = Trainer._after_step

    def after_step(self: Any, *given: Any, **more: Any) -> None:
        if self.state.step == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, *given, **more)

    Trainer._after_step = after_step  # type: ignore[method-assign]


def in_the_audit() -> None:
    """What an audit does to the first split is listed, and the part that is left of it is not there."""
    from dtl.data import audited

    def write_part(*given: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    audited.write_part = write_part


def in_the_ledger() -> None:
    """The run folder's ledger of the start before is gone, and the new one is not there."""
    from dtl.training import run

    def write_ledger(splits: Any, path: Path) -> None:
        path.unlink(missing_ok=True)
        os.kill(os.getpid(), signal.SIGKILL)

    run.write_ledger = write_ledger
