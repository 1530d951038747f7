"""The training loop: phases in order, steps in order, and after each step what is due, always in the order log, evaluate, save.

A run may be killed at any instant: everything that decides what comes next is in `TrainState`, counted when a step is finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dtl.checkpoint.resume.resume import checkpoint_state
from dtl.checkpoint.resume.state import PhaseProgress, TrainState
from dtl.checkpoint.resume.store import Checkpoint, CheckpointStore
from dtl.config import Config
from dtl.data.loading.batch import Batch
from dtl.data.remote.address import default_cache_dir
from dtl.distributed.deadline import Deadline
from dtl.distributed.runtime import Exchange, Flags, Runtime
from dtl.distributed.signals import Stopped
from dtl.distributed.watchdog import Heartbeat
from dtl.errors import UserError
from dtl.models.build import Network
from dtl.models.network import Normalise
from dtl.models.strict_load import strict_load
from dtl.runs.bad_samples import BadSamples
from dtl.runs.trace import open_trace
from dtl.runs.tracker import Tracker
from dtl.training import micro_batch
from dtl.training.active import ActivePhase, copy_to_host, enter, leave, phase_lines, set_head
from dtl.training.dataloaders import DataLoaders
from dtl.training.evaluate import evaluate
from dtl.training.features import PhaseFeatures
from dtl.training.phases import Phase, judge, note_result
from dtl.training.step import Stepper, Window, diverged, step_weight
from dtl.training.throughput import EpochCount, EpochSpeed

# Evaluations of a tiny data set may follow each other within a second: not each of them is worth a checkpoint.
SECONDS_BETWEEN_SAVES = 15.0


@dataclass
class Trainer:
    """All that one run needs; `run()` takes it to its end."""

    runtime: Runtime
    network: Network
    phases: list[Phase]
    loaders: DataLoaders
    state: TrainState
    store: CheckpointStore
    tracker: Tracker
    bad_samples: BadSamples
    config: Config
    channels_last: bool
    """How images lie in memory."""
    heart: Heartbeat
    """Gets every stage, for whoever waits for this rank."""
    deadline: Deadline
    stall_seconds: float = 0.0
    """How long the loop stood still for saving, in this start."""

    def __post_init__(self) -> None:
        self._normalise = Normalise(self.network.preprocessing, self.runtime.device, channels_last=self.channels_last)
        cache_dir = None if self.config.run.debug else Path(self.config.data.cache_dir or default_cache_dir()).expanduser()
        self._features = PhaseFeatures(self.runtime, self.network, self.loaders, self._normalise, self.config.run.seed, cache_dir, self.tracker.print)
        self._fit_memory = self.config.data.micro_batch_size == "auto"
        """Halve the micro-batch until it fits."""
        self._best: dict[str, Tensor] = {}
        self._counted, self._speed = EpochCount(), EpochSpeed()
        self._trace = open_trace(self.runtime.rank)
        self._logged_stall, self._saved_step = 0.0, -1
        self._window = Window()
        self._last_save = self._clock = self._step_started = time.monotonic()

    # ---- the run

    def run(self, checkpoint: Checkpoint | None) -> None:
        """All phases from where `state` stands; `checkpoint` is what it was read from. Raises Stopped after a signal."""
        for phase in self.phases[self.state.phase.index :]:
            if phase.index > self.state.phase.index or not self.state.phase.name:
                self._begin(phase)
            self.heart.enter("phase", self.state.step)
            set_head(self.network, phase, init=self.config.model.init, seed=self.config.run.seed)
            if checkpoint is not None:
                strict_load(self.network.module, checkpoint.tensors("model"), str(checkpoint.path))
            active = self._enter(phase)
            if checkpoint is not None:
                self._restore(active, checkpoint)
                checkpoint = None
            self._train(active)
            self._finish(active)
            del active  # its optimizer, gradients and average make room for the next phase's

    def _begin(self, phase: Phase) -> None:
        self.state.phase = PhaseProgress(phase.name, phase.index)
        self.state.step = phase.first_step if phase.index == 0 else self.state.step
        self._best = {}
        self._counted = EpochCount()
        self._window = Window()

    def _enter(self, phase: Phase) -> ActivePhase:
        active = self._enter_once(phase)
        if self._fit_memory and micro_batch.fit(active, self.loaders, self.runtime, normalise=self._normalise, state=self.state, log=self.tracker.print):
            # Smaller micro-batches may be a reason to synchronise norms.
            leave(active, self.runtime)
            del active
            return self._enter_once(phase)
        return active

    def _enter_once(self, phase: Phase) -> ActivePhase:
        if self._fit_memory:
            self.loaders.micro_batch_size = self.state.phase.micro_batch_size  # what fitted in an earlier start
        active = enter(
            self.network,
            phase,
            self.runtime,
            class_counts=self.loaders.class_counts,
            classes=self.loaders.classes,
            freeze_norm=self.config.model.freeze_norm,
            micro_batch_size=self.loaders.layout(phase).micro_batch_size,
            image_size=self.config.data.image_size,
            sync_bn=self.config.model.sync_bn,
            compile_network=self.config.model.compile,
            choose_cut=lambda trainable: self._features.choose_cut(phase, trainable),
            log=self.tracker.print,
        )
        for line in phase_lines(active, self.runtime):
            self.tracker.print(line)
        done = self.state.step - self.state.phase.step
        self.tracker.start_phase(phase.name, first_step=done, num_steps=phase.num_steps, step=self.state.step)
        return active

    def _restore(self, active: ActivePhase, checkpoint: Checkpoint) -> None:
        active.restore(checkpoint, self.runtime)
        if self.runtime.is_main and "best" in checkpoint.groups:
            self._best = checkpoint.tensors("best")
        self._window = Window(self.state.phase.window_loss if self.runtime.is_main else 0.0, self.state.phase.window_weight)
        self._counted = EpochCount.restored(self.state, self.runtime)

    # ---- one phase

    def _train(self, active: ActivePhase) -> None:
        phase, state = active.phase, self.state
        stepper = Stepper(active, self.runtime, normalise=self._normalise, seed=self.config.run.seed, heart=self.heart)
        self._clock = time.monotonic()
        if not self._features.fill(active, self._before_feature_step):
            self._stop(active)
        if state.phase.pending_eval:
            self._evaluate(active)
        if state.phase.step >= phase.num_steps or state.phase.ended:
            return
        with closing(self.loaders.train_steps(phase, state.phase.step)) as stream:  # type: ignore[type-var]
            while state.phase.step < phase.num_steps and not state.phase.ended:
                batches = self._next(phase, stream)
                exchange = self._exchange(batches, save=self._save_due_by_clock())
                phase_step = state.phase.step
                num_images = self.loaders.step_size(phase, phase_step)
                weight = step_weight(active, self.loaders, phase_step, num_images)
                try:
                    lr = stepper.step(batches, step=state.step, phase_step=phase_step, normaliser=weight, window=self._window)
                except micro_batch.PERHAPS_FULL as error:
                    micro_batch.explain(error, self.loaders, phase)
                    raise
                flags = self._settle(exchange, "train", batches)
                if self._trace is not None:
                    self._trace.record(state.step + 1, batches)
                self._counted.add(batches)
                self._speed.add(batches)
                self._count(phase, num_images)
                self._after_step(active, lr, save_by_clock=flags.save)
                if flags.stop or (self.runtime.world_size == 1 and self._stop_due()):
                    self._stop(active)

    def _next(self, phase: Phase, stream: Any) -> list[Batch]:
        """This rank's micro-batches of the next step."""
        self._step_started = time.monotonic()
        phase_step = self.state.phase.step
        self.heart.what = lambda: self.loaders.batch_name(phase, phase_step)
        self.heart.enter("load", self.state.step + 1)
        batches: list[Batch] = next(stream)
        waited = time.monotonic() - self._step_started
        self._window.data_seconds += waited
        self._speed.waited += waited
        return batches

    def _stop_due(self) -> bool:
        return self.runtime.stop_signal is not None or (self.runtime.is_main and self.deadline.due() is not None)

    def _exchange(self, batches: list[Batch], *, save: bool = False) -> Exchange:
        """All-reduce this rank's flags of a step while it is computed; `_settle` waits for the result. Nothing of a step counts before that,
        and a rank that is asked to stop may well finish the step first."""
        return self.runtime.exchange(Flags(stop=self._stop_due(), failed=any(batch.bad for batch in batches), save=save))

    def _settle(self, exchange: Exchange, split: str, batches: list[Batch]) -> Flags:
        """The flags of all ranks. Damaged samples, which had weight 0 in the step, are written to bad_samples.jsonl, or end the run."""
        self.heart.enter("collective")
        flags = exchange.result()
        if flags.failed:
            self.bad_samples.take(split, batches)
        return flags

    def _count(self, phase: Phase, num_images: int) -> None:
        state = self.state
        state.step += 1
        state.phase.step += 1
        state.epoch, state.epoch_step = phase.epoch_of(state.phase.step)
        self._window.num_images += num_images
        state.phase.num_images += num_images
        self._took(time.monotonic() - self._step_started)

    def _took(self, seconds: float) -> None:
        self.deadline.saw_step(seconds)
        self._window.seconds += seconds
        self._speed.seconds += seconds
        self.state.phase.train_seconds += seconds

    def _after_step(self, active: ActivePhase, lr: float, *, save_by_clock: bool) -> None:
        phase, state, every_steps = active.phase, self.state, self.config.checkpoint.every_steps
        last = state.phase.step == phase.num_steps
        if state.step % self.config.tracking.log_every == 0 or last:
            self._log(active, lr)
        if last or state.epoch_step == 0:
            self._log_epoch(phase)
        evaluated = phase.eval_due(state.phase.step)
        if evaluated:
            state.phase.pending_eval = True
            self._evaluate(active)
            last = last or state.phase.ended
        waited = self.runtime.agree(time.monotonic() - self._last_save >= SECONDS_BETWEEN_SAVES) if evaluated else False
        every = every_steps is not None and state.step % every_steps == 0
        if last or waited or every or save_by_clock:
            self._save(active)

    def _log_epoch(self, phase: Phase) -> None:
        self._counted.log(phase, self.state, speed=self._speed, loaders=self.loaders, runtime=self.runtime, tracker=self.tracker)
        self._speed = EpochSpeed()

    def _log(self, active: ActivePhase, lr: float) -> None:
        loss = self._mean_loss(active)
        window, phase = self._window, active.phase
        seconds = max(window.seconds, 1e-9)
        self.tracker.train(
            phase=phase.name,
            epoch=phase.epoch_of(self.state.phase.step - 1)[0],
            step=self.state.step,
            loss=loss,
            lr=lr,
            images_per_second=window.num_images / seconds,
            data_wait=min(1.0, window.data_seconds / seconds),
            checkpoint_stall_seconds=round(self.stall_seconds - self._logged_stall, 4),
        )
        self._logged_stall = self.stall_seconds
        self.state.phase.train_loss = loss
        self._spend(phase)
        self._window = Window()

    def _mean_loss(self, active: ActivePhase) -> float:
        """Mean loss of the window over all ranks; ends the run when it is not finite. The host waits for the device here."""
        window, asked = self._window, time.monotonic()
        mine = window.sum()
        self._took(time.monotonic() - asked)  # the steps themselves, where the host had run ahead of a GPU
        total, num_bad = self.runtime.sum_floats(mine, window.bad_step >= 0)
        loss = total / max(window.weight_sum, 1e-12)
        if num_bad or loss != loss:
            raise diverged(active, self.loaders, self.state, [step for step in self.runtime.gather(window.bad_step) if step >= 0])
        return loss

    def _spend(self, phase: Phase) -> None:
        now = time.monotonic()
        self.state.results.seconds[phase.name] = self.state.results.seconds.get(phase.name, 0.0) + now - self._clock
        self._clock = now

    # ---- evaluation

    def _evaluate(self, active: ActivePhase) -> None:
        """Validation metrics of the weights that the phase would leave behind (the moving average where there is one)."""
        self.heart.enter("evaluate", self.state.step)
        if self._window.weight_sum:
            self._mean_loss(active)
        phase, state = active.phase, self.state
        active.sync_buffers(self.runtime)
        with active.ema.swapped(active.module) if active.ema is not None else nullcontext():
            sums = evaluate(
                active.evaluated,
                self.loaders.val_steps(),
                self.runtime,
                task=phase.task,
                num_outputs=phase.num_outputs,
                loss=active.eval_loss,
                normalise=self._normalise,
                agree=self._agree_on_val_step,
            )
            if sums is not None:
                self._judge(active, sums.result())
        if sums is None:
            self._stop(active)
        state.phase.pending_eval = False
        self._spend(phase)

    def _agree_on_val_step(self, batches: list[Batch]) -> Callable[[], bool]:
        exchange = self._exchange(batches)

        def stop() -> bool:
            flags = self._settle(exchange, "val", batches)
            self.heart.enter("evaluate")
            return flags.stop

        return stop

    def _before_feature_step(self, batches: list[Batch]) -> bool:
        self.heart.enter("features", self.state.step)
        return self._settle(self._exchange(batches), "train", batches).stop

    def _judge(self, active: ActivePhase, metrics: dict[str, Any]) -> None:
        """Log the evaluation, keep the weights if they are the best so far, and see whether the phase has reached its end early."""
        phase, state, monitor = active.phase, self.state, self.config.checkpoint.monitor
        epoch = phase.epoch_of(max(0, state.phase.step - 1))[0]
        self.tracker.val(phase=phase.name, epoch=epoch, step=state.step, **metrics)
        judgement = judge(metrics, phase, state, monitor=monitor)
        if judgement.gain and self.runtime.is_main and phase.config.keep == "best":
            self._best = copy_to_host(active.module, self._best)
        if self.runtime.agree(judgement.end is not None) and state.phase.step < phase.num_steps:
            state.phase.ended = True
            self.tracker.note("early stop", step=state.step, phase=phase.name, why=judgement.end)
            self.tracker.print(f"phase {phase.name} ends early at step {state.step}: {judgement.end}")

    # ---- saving, stopping, finishing

    def _save_due_by_clock(self) -> bool:
        minutes = self.config.checkpoint.every_minutes
        return self.runtime.is_main and minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def _save(self, active: ActivePhase, *, wait: bool = False) -> None:
        self.heart.enter("save", self.state.step)
        if self._window.weight_sum:
            self._mean_loss(active)  # a diverged run must not replace a good checkpoint
        self._spend(active.phase)
        active.sync_buffers(self.runtime)
        (self.state.phase.window_loss,) = self.runtime.sum_floats(self._window.sum())
        self.state.phase.window_weight = self._window.weight_sum
        self._counted.store(self.state, self.runtime)
        self.tracker.sync()
        self.state.history_offset = self.tracker.history_offset
        self.state.wandb_id = self.tracker.wandb_id
        self.state.bad_samples = self.bad_samples.entries
        with self.runtime.together("checkpoint"):
            if self.runtime.is_main:
                groups, facts = active.checkpoint_tensors(self.runtime)
                if self._best:
                    groups["best"] = self._best
                facts |= checkpoint_state(self.config, self.state, self.runtime)
                self.stall_seconds += self.store.save(self.state.step, groups, facts, wait=wait)
        self.deadline.saw_save(self.store.save_seconds)
        self._last_save = time.monotonic()
        self._saved_step = self.state.step

    def _stop(self, active: ActivePhase) -> None:
        """Save, wait until it is on the disk, and leave together."""
        why = self.runtime.agree("a signal" if self.runtime.stop_signal is not None else self.deadline.due() or "a signal")
        if self._saved_step == self.state.step:  # it is being written already, or has just been
            self.heart.enter("save")
            with self.runtime.together("checkpoint"):
                self.store.flush()
        if not self.runtime.agree(self.store.saved_step == self.state.step):
            self._save(active, wait=True)
        if not self.runtime.agree(self.store.saved_step == self.state.step):
            raise UserError(
                f"stopped by {why} at step {self.state.step}, but its checkpoint could not be written; the newest whole one is step {self.store.saved_step}"
            )
        raise Stopped(why, step=self.state.step)

    def _finish(self, active: ActivePhase) -> None:
        """Leave the phase's weights in the network: those of its best evaluation, of its moving average, or the last."""
        phase, state = active.phase, self.state
        self.heart.enter("phase", state.step)
        active.sync_buffers(self.runtime)
        if state.phase.ended and state.epoch_step:
            self._log_epoch(phase)
        module = active.module
        if phase.config.keep == "best":
            if self.runtime.is_main and self._best:
                module.load_state_dict(self._best)
            self.runtime.sync_tensors([*module.parameters(), *module.buffers()])
        elif active.ema is not None:
            active.ema.copy_to(module)
        leave(active, self.runtime)
        self.loaders.cached = {}
        self.tracker.end_phase()
        note_result(phase, state)

    def numbers(self) -> list[dict[str, Any]]:
        """One row a finished phase, for the closing table and status.json."""
        return list(self.state.results.phases)
