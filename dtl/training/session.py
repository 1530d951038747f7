"""One start of a run on one rank: its process group, signals, watchdog, run folder, status.json and exit status.

`Session.__exit__` is the only place that knows how a run fails:

| what ended it                                    | status.json           | exit status |
|---|---|---|
| nothing: the model folder is written             | done                  | 0           |
| a signal or the deadline, before the first step  | stopped               | 75          |
| a signal or the deadline, after a checkpoint     | stopped               | 75          |
| UserError                                        | failed, "input: ..."  | 2           |
| a second Ctrl-C                                  | failed, "interrupted" | 130         |
| a lost rank, no progress, any other exception    | failed, "fault: ..."  | 1           |
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dtl.checkpoint.resume.state import TrainState
from dtl.checkpoint.resume.store import CheckpointStore
from dtl.config import Config
from dtl.credentials import redact, redacted_line
from dtl.distributed.deadline import Deadline
from dtl.distributed.determinism import deterministic_kernels
from dtl.distributed.runtime import Runtime, use_fast_kernels
from dtl.distributed.same_start import check_same_start
from dtl.distributed.signals import Stopped, StoppedBeforeFirstStep
from dtl.distributed.watchdog import Heartbeat, PeerLost, Watchdog
from dtl.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, Diverged, UserError
from dtl.runs.console import Console
from dtl.runs.folder import RunFolder, read_status
from dtl.runs.looks import SEARCH_END
from dtl.runs.tracker import Tracker
from dtl.text import to_stderr


@dataclass(frozen=True)
class Result:
    """How a run ended that did not fail."""

    folder: Path
    state: str
    """done, or stopped (by a signal or the deadline)."""
    stop_requested: bool = False
    """A signal has asked for a stop, perhaps too late for this run."""

    @property
    def exit_status(self) -> int:
        return EXIT_DONE if self.state == "done" else EXIT_STOPPED


class Session(contextlib.AbstractContextManager["Session"]):
    """All that one start of a run holds besides what it trains. A stop that was asked for leaves the `with` block without an exception."""

    def __init__(self, config: Config, name: str, *, started: float | None = None, pause: int | None = None) -> None:
        """`started` (by time.monotonic): the deadline counts from then on; by default from now on. `pause`: see `dtl.training.run.run`."""
        self.config, self.name, self.pause = config, name, pause
        self.folder = RunFolder(f"{config.run.dir}/{name}")
        self.heart = Heartbeat()
        self.deadline = Deadline(config.checkpoint.deadline_seconds, started=time.monotonic() if started is None else started)
        self.tracker: Tracker | None = None
        self.store = CheckpointStore(
            self.folder.path / "checkpoints",
            config.checkpoint,
            log=lambda line: self.console.print(line),
            before_write=self.folder.check_incarnation,
        )
        self._state = "done"

    @property
    def result(self) -> Result:
        return Result(self.folder.path, self._state, stop_requested=self.runtime.stop_signal is not None)

    def __enter__(self) -> Session:
        # What the imports made never dies: the collector need not walk it, and so does not copy its pages in every loader process.
        gc.collect()
        gc.freeze()
        run = self.config.run
        with contextlib.ExitStack() as stack:
            stack.enter_context(deterministic_kernels(run.deterministic or run.debug, strict=run.deterministic))
            self.runtime = stack.enter_context(
                Runtime(device=run.device, precision=self.config.precision, timeout_minutes=run.timeout_minutes, compression=run.gradient_compression)
            )
            self.console = Console(is_main=self.runtime.is_main)
            stack.enter_context(debug_mode(run.debug))
            self.runtime.signals.on_abort = lambda: self._write_failure(KeyboardInterrupt())
            stack.callback(self.folder.release)
            stack.push(self._fail)
            stack.enter_context(
                Watchdog(
                    self.heart,
                    rank=self.runtime.rank,
                    world_size=self.runtime.world_size,
                    name=self.runtime.token,
                    limit=60 * run.timeout_minutes,
                    log=_log,
                    end=self.lost,
                    processes=[place.process for place in self.runtime.places],
                )
            )
            self.runtime.leave_limits_to_watchdog()
            stack.push(self._stop)
            check_same_start(self.config, self.name, self.runtime)
            with self.runtime.together("run folder"):
                if self.runtime.is_main:
                    self.folder.acquire()
            self.folder.incarnation = self.runtime.agree(self.folder.incarnation)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        return bool(self._stack.__exit__(kind, error, trace))

    @property
    def _is_one_of_many(self) -> bool:
        return self.config.data.fold is not None or self.folder.path.parent.name.endswith(SEARCH_END)

    def before_first_step(self) -> contextlib.AbstractContextManager[None]:
        """Stages with no checkpoint to write: a stop breaks them off."""
        return self.runtime.before_first_step(self.deadline.due)

    def open_tracker(self, state: TrainState) -> Tracker:
        """From here on this start writes to the run folder, behind the checkpoint that it resumes."""
        config, tracking = self.config, self.config.tracking
        with self.runtime.together("run folder"):
            if self.runtime.is_main and config.run.resume == "never":
                self.folder.clear()
        with self.runtime.together("tracking"):
            self.tracker = Tracker(
                self.folder.path,
                is_main=self.runtime.is_main,
                wandb="off" if config.run.debug else tracking.wandb,
                tensorboard=tracking.tensorboard and not config.run.debug,
                config=redact(config.to_dict()),
                # A fold by itself is one of many in a project, and so is a trial.
                name=f"{self.folder.path.parent.name}/{self.name}" if self._is_one_of_many else self.name,
                wandb_id=state.wandb_id,
                console=self.console,
                resume_step=state.step,
                history_offset=state.history_offset,
                new_run=config.run.resume == "never",
                before_write=self.folder.check_incarnation,
            )
        return self.tracker

    def lost(self, line: str) -> None:
        """Why the run ends although no rank has raised anything: another rank is gone, or nothing moves any more."""
        _log(f"{line}; the same command resumes from the newest checkpoint")
        self._write_failure(RuntimeError(line))

    # ---- the end, from the inside out

    def _stop(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        """While all ranks still answer: a stop is no failure; and what is open is closed."""
        is_stop = isinstance(error, Stopped | StoppedBeforeFirstStep)
        self.heart.leaves = not is_stop  # a stop waits for the others once more
        try:
            if isinstance(error, StoppedBeforeFirstStep):
                self._stopped_early(str(error))
            elif isinstance(error, Stopped):
                self._stopped(error.why, error.step)
            elif error is not None and self.tracker is not None:
                if isinstance(error, Diverged):
                    error.stop_requested = self.runtime.stop_signal is not None
                    self.tracker.note("diverged", why=str(error))
                self.tracker.close("failed")
        finally:
            self.heart.leaves = True
            self.store.close()
        return is_stop

    def _fail(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if isinstance(error, PeerLost):
            if str(error):
                self.lost(str(error))
            sys.stderr.flush()
            os._exit(EXIT_FAULT)  # the usual way out would wait for the rank that is gone
        if error is not None:
            self._write_failure(error)
        return False

    def _stopped(self, why: str, step: int) -> None:
        assert self.tracker is not None
        if self.runtime.is_main:
            self.folder.write_status("stopped", why=why.removeprefix("a "), step=step)
        self.tracker.note(f"stopped by {why}", step=step)
        self.tracker.print(f"stopped by {why} at step {step}, after saving a checkpoint; the same command resumes from it")
        self.tracker.close("stopped")
        self._leave_stopped()

    def _stopped_early(self, why: str) -> None:
        """Before the first step: no checkpoint is written, and what an earlier start has written stays as it was."""
        if self.runtime.is_main:
            stage = self.heart.stage
            self._write_end("stopped", f"{why.removeprefix('a ')} before the first step", keep_earlier=self.config.run.resume == "never", stage=stage)
            kept = "packed and downloaded data is kept; run the same command again" if stage == "data" else "the same command starts it again"
            _log(f"stopped by {why} before the first step (stage {stage}): nothing to save yet; {kept}")
        self._leave_stopped()

    def _leave_stopped(self) -> None:
        self._state = "stopped"
        # The first rank that leaves with this status makes the launcher end the others: they must have nothing left to do.
        self.runtime.barrier()

    def _write_failure(self, error: BaseException) -> None:
        """status.json is what scripts read, also where launchers turn every exit status into 1."""
        if self.folder.incarnation == 0 or isinstance(error, SystemExit):
            return
        kind = "input" if isinstance(error, UserError) else "interrupted" if isinstance(error, KeyboardInterrupt) else "fault"
        keep_earlier = self.config.run.resume == "never" and not isinstance(error, UserError)
        try:
            self._write_end("failed", f"{kind}: {error}" if str(error) else kind, step=self.heart.step, keep_earlier=keep_earlier)
        except (OSError, UserError) as problem:
            _log(f"status.json could not be written: {problem}")

    def _write_end(self, state: str, why: str, *, step: int = 0, keep_earlier: bool, **more: Any) -> None:
        """How this start has ended. What an earlier one has finished stays in status.json.

        `keep_earlier`: with `run.resume: never` and the earlier run still whole nothing is written: a job's next round would resume that one.
        """
        before = read_status(self.folder.path)
        if keep_earlier and before.state != "unknown" and before.incarnation != self.folder.incarnation:
            return
        kept: dict[str, Any] = {"phases": before.phases} if before.phases else {}
        kept |= {} if before.model is None else {"model": before.model}
        kept |= {} if before.test is None else {"test": before.test}
        kept |= {} if before.progress is None else {"progress": asdict(before.progress)}
        self.folder.write_status(state, why=redacted_line(why), step=step or before.step, **kept, **more)


def _log(line: str) -> None:
    to_stderr(f"dtl: {line}")


# ---- run.debug


def debug_config(config: Config, name: str) -> tuple[Config, str]:
    """The same recipe with few samples, no workers, no tracker, one epoch a phase, in a run folder of its own that starts afresh."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError("run.debug is for one process; launch it with python dtl/train.py")
    values = config.to_dict()
    values["run"] |= {"name": f"{name}-debug", "resume": "never"}
    values["data"]["workers"] = 0
    values["tracking"] |= {"wandb": "off", "tensorboard": False, "log_every": 1}
    for phase in values["phases"].values():
        phase |= {"epochs": 1.0, "steps": None}
    return Config.model_validate(values), f"{name}-debug"


@contextlib.contextmanager
def debug_mode(wanted: bool) -> Iterator[None]:
    """Anomaly detection and no fast kernels while it lasts; mistakes keep their traceback."""
    if not wanted:
        yield
        return
    os.environ["DTL_DEBUG"] = "1"
    cudnn = torch.backends.cudnn
    precision, benchmark, tf32 = torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.allow_tf32
    use_fast_kernels(False)
    try:
        with torch.autograd.set_detect_anomaly(True):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.benchmark, cudnn.allow_tf32 = benchmark, tf32
