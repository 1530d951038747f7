"""The training loop: phases in order, steps in order, and after each step what is due, always in the order log, evaluate, save.

A run may be killed at any instant: everything that decides what comes next is in `TrainState`, counted when a step is finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dtl.checkpoint.resume.resume import checkpoint_state
from dtl.checkpoint.resume.state import PhaseProgress, TrainState
from dtl.checkpoint.resume.store import Checkpoint
from dtl.data.groups import find_groups
from dtl.data.loading.batch import Batch
from dtl.data.remote.address import private_cache
from dtl.data.shards.index import Shards
from dtl.data.twins import Twins
from dtl.distributed.determinism import name_operators
from dtl.distributed.runtime import Exchange, Flags
from dtl.distributed.signals import Stopped
from dtl.errors import UserError
from dtl.intervals import Bootstrap, Interval, accuracy_interval
from dtl.models.build import Network
from dtl.models.init import head_init
from dtl.models.network import Normalise
from dtl.models.norms import moved_norms
from dtl.models.strict_load import strict_load
from dtl.optim.losses import build_loss
from dtl.runs.bad_samples import BadSamples
from dtl.runs.predictions import TWINS_NAME, ImagePredictions
from dtl.runs.trace import open_trace
from dtl.training import micro_batch
from dtl.training.active import ActivePhase, between, enter, leave, phase_lines, set_head
from dtl.training.dataloaders import DataLoaders
from dtl.training.evaluate import STATISTICS_BATCH, STATISTICS_IMAGES, ForwardPass, PredictionRows, estimate_statistics, evaluate
from dtl.training.features import PhaseFeatures
from dtl.training.keep import ImageResults, PairedError
from dtl.training.metrics import Monitored, monitored_in
from dtl.training.phases import Judgement, Phase, judge, note_kept, note_result
from dtl.training.session import Session
from dtl.training.step import Stepper, check_weights, solve_head, step_weight
from dtl.training.throughput import StepLog

if TYPE_CHECKING:
    from dtl.runs.profile import StepProfiler

# Evaluations of a tiny data set may follow each other within a second: not each of them is worth a checkpoint.
SECONDS_BETWEEN_SAVES = 15.0
PAUSED = "the search"
"""Why a run stops that is paused."""
BLENDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the way from a phase's start to its end, as WiSE-FT's authors look at them. Each costs one evaluation."""


class Trainer:
    """Takes a network through the phases of a run, from where `state` stands; `train` does it."""

    def __init__(
        self,
        session: Session,
        network: Network,
        normalise: Normalise,
        loaders: DataLoaders,
        phases: list[Phase],
        state: TrainState,
        *,
        head_is_loaded: bool = False,
    ) -> None:
        """`normalise` gives the network its input from the loaders' images. `head_is_loaded`: the head has pretrained weights too. From here on this
        start writes to the run folder."""
        self.session, self.config, self.runtime, self.heart = session, session.config, session.runtime, session.heart
        self.network, self.normalise, self.loaders, self.phases, self.state = network, normalise, loaders, phases, state
        self.tracker = session.open_tracker(state)
        self.predictions: ImagePredictions | None = None
        """In the main process, at a run's end: what its weights predict for each validation image."""
        self.test: dict[str, Any] | None = None
        """At a run's end: the metrics of its weights on the test set."""
        self._bad_samples = BadSamples(session.folder.path / "bad_samples.jsonl", self.runtime, self.config.data, known=state.bad_samples)
        self._log = StepLog(session, self.tracker, loaders, state)
        self._saver = Saver(session, self._log, self._bad_samples, state)
        data = self.config.data
        cache_dir = None if self.config.run.debug else private_cache(data.cache_dir, shared=data.cache_shared)
        twins = self._twins()
        self._features = PhaseFeatures(self.runtime, network, loaders, normalise, self.config.run.seed, cache_dir, self.heart, self.tracker.print, twins)
        self._head_is_loaded = head_is_loaded
        self._val_groups = self._groups(loaders.val, self.config.data.val)
        self._trace = open_trace(self.runtime.rank)
        self._move_bar = session.console.move if session.console.has_bar else None

    def train(self, checkpoint: Checkpoint | None) -> None:
        """All phases that are left; `checkpoint` is what `state` was read from. Raises Stopped after a signal."""
        for phase in self.phases[self.state.phase.index :]:
            self.loaders.use(phase)
            begins = phase.index > self.state.phase.index or not self.state.phase.name
            if begins:
                self._begin(phase)
            self.heart.enter("phase", self.state.step)
            is_new = set_head(self.network, phase, init=head_init(self.config), seed=self.config.run.seed)
            if begins and phase.config.keep == "one_se":
                # Weights that know the labels may be better than all that the phase makes of them; a new head's are not worth a look.
                self.state.phase.pending_eval = not is_new and (phase.index > 0 or self._head_is_loaded)
            if checkpoint is not None:
                strict_load(self.network.module, checkpoint.tensors("model"), str(checkpoint.path))
            active = self._enter(phase)
            if begins:
                active.remember_start(self.runtime)
            if checkpoint is not None:
                active.restore(checkpoint, self.runtime)
                self._log.restore()
                checkpoint = None
            self._train(active)
            if phase.config.after == "blend":
                self._blend(active)
            self._finish(active)
            del active  # its optimizer, gradients and average make room for the next phase's
        if self.loaders.test is not None:
            self._measure_test()

    def _twins(self) -> Twins | None:
        """In the main process."""
        if not self.runtime.is_main:
            return None
        train, val, test = self.loaders.train, self.loaders.val, self.loaders.test
        twins = Twins(self.session.folder.path / TWINS_NAME, {"train": train, "val": val, **({} if test is None else {"test": test})})
        twins.told = self.state.step > 0 and twins.line() != ""
        return twins

    # ---- a phase

    def _begin(self, phase: Phase) -> None:
        self.state.phase = PhaseProgress(phase.name, phase.index)
        self.state.step = phase.first_step if phase.index == 0 else self.state.step
        self._log.begin()

    def _enter(self, phase: Phase) -> ActivePhase:
        active = self._enter_fitting(phase)
        if self.config.run.deterministic:
            operators = micro_batch.unstable_operators(active, self.loaders, self.runtime, normalise=self.normalise)
            for line in name_operators(operators, phase.name, self.runtime.device.type):
                self.tracker.print(line)
        return active

    def _enter_fitting(self, phase: Phase) -> ActivePhase:
        if self.config.data.micro_batch_size != "auto":
            return self._enter_once(phase)
        self.loaders.micro_batch_size = self.state.phase.micro_batch_size  # what fitted in an earlier start
        active = self._enter_once(phase)
        if micro_batch.fit(active, self.loaders, self.runtime, normalise=self.normalise, state=self.state, log=self.tracker.print):
            # Smaller micro-batches may be a reason to synchronise norms.
            leave(active, self.runtime)
            del active
            self.loaders.micro_batch_size = self.state.phase.micro_batch_size
            return self._enter_once(phase)
        return active

    def _enter_once(self, phase: Phase) -> ActivePhase:
        active = enter(
            self.network,
            phase,
            self.runtime,
            class_counts=self.loaders.class_counts,
            classes=self.loaders.classes,
            freeze_norm=self.config.model.freeze_norm,
            micro_batch_size=self.loaders.layout(phase).micro_batch_size,
            image_size=self.loaders.image_size,
            sync_bn=self.config.model.sync_bn,
            compile_network=self.config.model.compile,
            choose_cut=lambda trainable: self._features.choose_cut(phase, trainable),
            log=self.tracker.print,
        )
        for line in phase_lines(active, self.runtime, self.loaders.image_size if self.loaders.views else None):
            self.tracker.print(line)
        done = self.state.step - self.state.phase.step
        self.tracker.start_phase(phase.name, first_step=done, num_steps=phase.num_steps, step=self.state.step)
        return active

    def _train(self, active: ActivePhase) -> None:
        phase, state = active.phase, self.state
        stepper = Stepper(active, self.runtime, normalise=self.normalise, seed=self.config.run.seed, heart=self.heart)
        self._log.start_clock()
        if not self._features.fill(active, self._before_feature_step):
            self._saver.stop(active)
        if state.phase.pending_eval:
            self._evaluate(active)
            self._pause(active)
        if state.phase.step >= phase.num_steps or state.phase.ended:
            return
        if phase.config.optimizer == "solve":
            self._solve(active)
            return
        with closing(self.loaders.train_steps(phase, state.phase.step)) as stream, self._profiled(phase) as profiler:  # type: ignore[type-var]
            while state.phase.step < phase.num_steps and not state.phase.ended:
                begun = time.monotonic()
                batches = self._next(phase, stream)
                self._log.waited(time.monotonic() - begun)
                exchange = self._exchange(batches, save=self._saver.is_due())
                num_images = self.loaders.step_size(phase, state.phase.step)
                weight = step_weight(active, self.loaders, state.phase.step, num_images)
                try:
                    lr = stepper.step(batches, step=state.step, phase_step=state.phase.step, normaliser=weight, window=self._log.window)
                except micro_batch.PERHAPS_FULL as error:
                    micro_batch.explain(error, self.loaders, phase)
                    raise
                flags = self._settle(exchange, "train", batches)
                if self._trace is not None:
                    self._trace.record(state.step + 1, batches)
                self._count(phase, num_images)
                self._log.count(batches, num_images, time.monotonic() - begun)
                if self._move_bar is not None:
                    self._move_bar(state.step)
                self._after_step(active, lr, save=flags.save)
                if profiler is not None:
                    profiler.step()
                if flags.stop or (self.runtime.world_size == 1 and self._saver.stop_is_due()):
                    self._saver.stop(active)

    def _solve(self, active: ActivePhase) -> None:
        """The one step of a phase whose head is solved. Nothing of it is saved before it is done: a start that is killed in it does it anew."""
        phase, state, num_images, begun = active.phase, self.state, self.loaders.train.num_samples, time.monotonic()
        found = solve_head(
            active, self.loaders, self.runtime, groups=self._groups(self.loaders.train, self.config.data.train), stop=lambda: self._before_feature_step([])
        )
        if found is None:
            self._saver.stop(active)
        assert found is not None
        (solution, num_folds), seconds = found, time.monotonic() - begun
        self._count(phase, num_images)
        state.phase.train_loss, state.phase.train_seconds = solution.loss, seconds
        self.tracker.solve(
            phase=phase.name,
            epoch=phase.first_epoch,
            step=state.step,
            loss=solution.loss,
            strength=solution.strength,
            seconds=round(seconds, 3),
            converged=solution.converged,
            passes=solution.passes,
            folds=num_folds,
            path=[list(tried) for tried in solution.path],
        )
        state.phase.pending_eval = True
        self._evaluate(active)
        self._saver.save(active)

    def _profiled(self, phase: Phase) -> AbstractContextManager[StepProfiler | None]:
        steps = self.config.run.profile
        if steps is None or not self.runtime.is_main:
            return nullcontext()
        from dtl.runs.profile import StepProfiler

        left = phase.num_steps - self.state.phase.step
        return closing(StepProfiler(self.session.folder.path, phase.name, steps=steps, left=left, device=self.runtime.device, log=self.tracker.print))

    def _blend(self, active: ActivePhase) -> None:
        """Evaluate points between the weights that entered the phase and those at its end. Nothing of it is saved, and the end has its checkpoint: a start that
        is killed or stopped here does all of it anew, and more epochs go on from the end.

        Running statistics of batch norms. Where both ends have the same ones, bit for bit (`norm_statistics: frozen`, frozen parts), they are constants of the
        network: it was trained with them, and every point has them. Where they differ, their mean describes the activations of no network (Izmailov et al.
        2018, "Averaging weights leads to wider optima"; Jordan et al. 2022, "REPAIR"), so each point gets its own: of training images as evaluation sees them.
        """
        active.sync_buffers(self.runtime)
        end, module = active.at_end(self.runtime), active.module
        norms = self.runtime.agree(moved_norms(module, active.start, end))
        for share in BLENDS:
            active.put(between(active.start, end, share), self.runtime)
            if norms:
                num, stream = self.loaders.clean_batches(STATISTICS_BATCH, STATISTICS_IMAGES)
                forward = ForwardPass(module, self.normalise, self.runtime)
                if not estimate_statistics(forward, module, norms, num, stream, stops=self._before_feature_step):
                    self._saver.stop_at_end()
            self._evaluate(active, blend=share)
        kept = "no point between its start and its end" if active.blend is None else f"blend {active.blend:g}"
        self.tracker.print(f"phase {active.phase.name} keeps {kept}")

    def _finish(self, active: ActivePhase) -> None:
        """Leave the phase's weights in the network, and note what the phase has come to."""
        phase, state = active.phase, self.state
        self.heart.enter("phase", state.step)
        active.sync_buffers(self.runtime)
        if state.phase.ended and state.epoch_step:
            self._log.epoch(active)
        active.take_result(self.runtime)
        self.predictions = active.predictions
        leave(active, self.runtime)
        self.loaders.cached = {}
        self.tracker.end_phase()
        note_result(phase, state, blend=active.blend)

    # ---- a step

    def _next(self, phase: Phase, stream: Iterator[list[Batch]]) -> list[Batch]:
        """This rank's micro-batches of the next step."""
        phase_step = self.state.phase.step
        self.heart.what = lambda: self.loaders.batch_name(phase, phase_step)
        self.heart.enter("load", self.state.step + 1)
        return next(stream)

    def _exchange(self, batches: list[Batch], *, save: bool = False) -> Exchange:
        """All-reduce this rank's flags of a step while it is computed; `_settle` waits for the result. Nothing of a step counts before that,
        and a rank that is asked to stop may well finish the step first."""
        return self.runtime.exchange(Flags(stop=self._saver.stop_is_due(), failed=any(batch.bad for batch in batches), save=save))

    def _settle(self, exchange: Exchange, split: str, batches: list[Batch]) -> Flags:
        """The flags of all ranks. Damaged samples, which had weight 0 in the step, are written to bad_samples.jsonl, or end the run."""
        self.heart.enter("collective")
        flags = exchange.result()
        if flags.failed:
            self._bad_samples.take(split, batches)
        return flags

    def _count(self, phase: Phase, num_images: int) -> None:
        state = self.state
        state.step += 1
        state.phase.step += 1
        state.epoch, state.epoch_step = phase.epoch_of(state.phase.step)
        state.phase.num_images += num_images

    def _after_step(self, active: ActivePhase, lr: float, *, save: bool) -> None:
        phase, state, every_steps = active.phase, self.state, self.config.checkpoint.every_steps
        last, evaluated = state.phase.step == phase.num_steps, phase.eval_due(state.phase.step)
        if state.step % self.config.tracking.log_every == 0 or last:
            self._log.step(active, lr, stall_seconds=self._saver.stall_seconds)
        if last or state.epoch_step == 0:
            self._log.epoch(active)
        if evaluated:
            state.phase.pending_eval = True
            self._evaluate(active)
            last = last or state.phase.ended
            save = self.runtime.agree(self._saver.has_waited()) or save
        if last or save or (every_steps is not None and state.step % every_steps == 0):
            self._saver.save(active)
        if evaluated:
            self._pause(active)

    def _pause(self, active: ActivePhase) -> None:
        """After an evaluation: stop where `Session.pause` says so. What follows is the same as without a pause."""
        phase, state, pause = active.phase, self.state, self.session.pause
        at_end = phase is self.phases[-1] and (state.phase.step == phase.num_steps or state.phase.ended)
        if pause is not None and state.phase.step and not at_end and phase.epoch_of(state.phase.step - 1)[0] + 1 >= pause:
            self._saver.stop(active, why=PAUSED)

    # ---- an evaluation

    def _evaluate(self, active: ActivePhase, *, blend: float | None = None) -> None:
        """Validation metrics of the weights that the phase would leave behind (the moving average where there is one), or of a point of its blend."""
        self.heart.enter("evaluate", self.state.step)
        self._log.check_loss(active)
        phase, state = active.phase, self.state
        active.sync_buffers(self.runtime)
        self._saver.check_weights(active)
        monitor, classes = monitored_in(phase, self.config.checkpoint.monitor), phase.task.class_names(self.loaders.classes)
        monitored = None if monitor in ("top1", "top5", "loss") else Monitored(monitor, classes, self.runtime.device)
        # The run delivers weights of its last phase: what these predict for each image is kept with them.
        rows = PredictionRows() if phase is self.phases[-1] or self.config.data.group is not None else None
        results = ImageResults(monitor, classes, self.loaders.val.num_samples) if phase.config.keep == "one_se" else None
        with active.evaluating() if blend is None else nullcontext():
            sums = evaluate(
                active.evaluated,
                self.loaders.val_steps(),
                self.runtime,
                task=phase.task,
                num_outputs=phase.num_outputs,
                loss=active.eval_loss,
                normalise=self.normalise,
                agree=lambda batches: self._agree_on_eval_step("val", batches),
                takers=[taker.add for taker in (monitored, rows, results) if taker is not None],
            )
            if sums is not None:
                more = {} if monitored is None else {monitor: monitored.value(self.runtime)}
                self._judge(active, {**sums.result(), **more}, rows, results, monitor, blend)
        if sums is None and blend is not None:
            self._saver.stop_at_end()
        if sums is None:
            self._saver.stop(active)
        state.phase.pending_eval = False
        self._log.spend(phase)

    def _measure_test(self) -> None:
        """Metrics of the weights that the run delivers, on images that chose nothing. A start that is killed here does it anew, from the last checkpoint."""
        phase, state, test = self.phases[-1], self.state, self.loaders.test
        assert test is not None
        self.heart.enter("evaluate", state.step)
        rows = None if self.config.data.group is None else PredictionRows()
        sums = evaluate(
            self.network.module,
            self.loaders.test_steps(),
            self.runtime,
            task=phase.task,
            num_outputs=phase.num_outputs,
            loss=build_loss("cross_entropy"),
            normalise=self.normalise,
            agree=lambda batches: self._agree_on_eval_step("test", batches),
            takers=[] if rows is None else [rows.add],
        )
        if sums is None:
            self._saver.stop_at_end()
        assert sums is not None
        self.test = {**sums.result()}
        if rows is not None:
            self.test |= self._interval(phase, rows.all_ranks(self.runtime), self._groups(test, self.config.data.test))
        self.tracker.test(phase=phase.name, epoch=phase.epoch_of(max(0, state.phase.step - 1))[0], step=state.step, **self.test)

    def _agree_on_eval_step(self, split: str, batches: list[Batch]) -> Callable[[], bool]:
        exchange = self._exchange(batches)

        def stop() -> bool:
            flags = self._settle(exchange, split, batches)
            self.heart.enter("evaluate")
            return flags.stop

        return stop

    def _before_feature_step(self, batches: list[Batch]) -> bool:
        self.heart.enter("features", self.state.step)
        return self._settle(self._exchange(batches), "train", batches).stop

    def _judge(
        self, active: ActivePhase, metrics: dict[str, Any], rows: PredictionRows | None, results: ImageResults | None, monitor: str, blend: float | None
    ) -> None:
        """Log the evaluation, keep the weights where the phase's rule says so, and see whether the phase has reached its end early."""
        phase, state = active.phase, self.state
        epoch, entering = phase.epoch_of(max(0, state.phase.step - 1))[0], state.phase.step == 0
        state.phase.looks = None if state.phase.looks is None else state.phase.looks + 1
        # Early stopping goes by what the phase's own steps come to.
        judgement = Judgement(gain=False, end=None) if entering or blend is not None else judge(metrics, phase, state, monitor=monitor)
        keeps = judgement.gain or phase.config.keep == "last"
        if results is not None:
            new = results.all_ranks(self.runtime, metrics)
            keeps = self.runtime.is_main and active.choose(new, PairedError(monitor, phase.num_outputs, self._val_groups))
        keeps, ended = self.runtime.agree((keeps, judgement.end is not None))
        self.tracker.val(phase=phase.name, epoch=epoch, step=state.step, kept=keeps, entering=entering, blend=blend, **metrics)
        if keeps and rows is not None:
            predictions = rows.all_ranks(self.runtime)
            active.predictions = predictions if self.runtime.is_main else None
            metrics |= self._interval(phase, predictions, self._val_groups)
        if keeps:
            active.blend = blend
            note_kept(metrics, phase, state)
            active.keep_weights(self.runtime)
        if ended and state.phase.step < phase.num_steps:
            state.phase.ended = True
            self.tracker.note("early stop", step=state.step, phase=phase.name, why=judgement.end)
            self.tracker.print(f"phase {phase.name} ends early at step {state.step}: {judgement.end}")

    def _groups(self, shards: Shards, source: str | None) -> npt.NDArray[np.int64] | None:
        """In the main process: the group of each image, where the config names groups. Every rank must call it."""
        data = self.config.data
        with self.runtime.together("groups"):
            if data.group is None or not self.runtime.is_main:
                return None
            return find_groups(shards, data.group, str(source or data.train), columns=data.columns).codes

    def _interval(self, phase: Phase, predictions: ImagePredictions, groups: npt.NDArray[np.int64] | None) -> dict[str, Interval | None]:
        """`top1_interval` of metrics, where it is not Wilson's: whole groups are drawn (main process)."""
        if groups is None or phase.task.name != "classify":
            return {}
        right = ~predictions.wrong & ~np.isnan(predictions.probability)
        return {"top1_interval": accuracy_interval(right, Bootstrap(len(right), groups[predictions.samples]))}


class Saver:
    """When a checkpoint is due, what goes into it, and how a run stops."""

    def __init__(self, session: Session, log: StepLog, bad_samples: BadSamples, state: TrainState) -> None:
        self.config, self.runtime, self.heart, self.store, self.deadline = session.config, session.runtime, session.heart, session.store, session.deadline
        self.log, self.bad_samples, self.state = log, bad_samples, state
        self.stall_seconds = 0.0
        """How long the loop stood still for saving, in this start."""
        self._saved_step, self._checked_step, self._last_save = -1, -1, time.monotonic()

    def is_due(self) -> bool:
        """By `checkpoint.every_minutes`, which the main process looks at."""
        minutes = self.config.checkpoint.every_minutes
        return self.runtime.is_main and minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def has_waited(self) -> bool:
        """The last save is long enough ago for an evaluation to be worth another."""
        return time.monotonic() - self._last_save >= SECONDS_BETWEEN_SAVES

    def check_weights(self, active: ActivePhase) -> None:
        """Once a step."""
        if self._checked_step != self.state.step:
            check_weights(active, self.runtime, self.state)
            self._checked_step = self.state.step

    def save(self, active: ActivePhase, *, wait: bool = False) -> None:
        """Called by all ranks together. `wait`: until it is on the disk."""
        self.heart.enter("save", self.state.step)
        self.log.check_loss(active)  # a diverged run must not replace a good checkpoint
        self.log.spend(active.phase)
        active.sync_buffers(self.runtime)
        self.check_weights(active)
        self.log.store()
        self.state.bad_samples = self.bad_samples.entries
        with self.runtime.together("checkpoint"):
            if self.runtime.is_main:
                groups, facts = active.checkpoint_tensors(self.runtime)
                facts |= checkpoint_state(self.config, self.state, self.runtime, active.network.preprocessing)
                self.stall_seconds += self.store.save(self.state.step, groups, facts, wait=wait)
        self.deadline.saw_save(self.store.save_seconds)
        self._last_save = time.monotonic()
        self._saved_step = self.state.step

    def stop_is_due(self) -> bool:
        return self.runtime.stop_signal is not None or (self.runtime.is_main and self.deadline.due() is not None)

    def stop(self, active: ActivePhase, *, why: str = "a signal") -> None:
        """Save, wait until it is on the disk, and leave together: raises Stopped. `why`: unless a signal or the deadline asks for it."""
        why = self._why(why)
        if self._saved_step == self.state.step:  # it is being written already, or has just been
            self.heart.enter("save")
            with self.runtime.together("checkpoint"):
                self.store.flush()
        if not self.runtime.agree(self.store.saved_step == self.state.step):
            self.save(active, wait=True)
        if not self.runtime.agree(self.store.saved_step == self.state.step):
            raise UserError(f"stopped by {why}, but {self.runtime.agree(self.store.failure(self.state.step))}")
        raise Stopped(why, step=self.state.step)

    def stop_at_end(self) -> None:
        """`stop` after the last step of a phase, which has its checkpoint: raises Stopped."""
        why = self._why("a signal")
        self.heart.enter("save")
        with self.runtime.together("checkpoint"):
            self.store.flush()
        raise Stopped(why, step=self.state.step)

    def _why(self, otherwise: str) -> str:
        return self.runtime.agree("a signal" if self.runtime.stop_signal is not None else self.deadline.due() or otherwise)
