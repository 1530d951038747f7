"""`dtl train`: the whole run, as a table of contents."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dtl.config import Config, load_config
from dtl.errors import UserError

if TYPE_CHECKING:
    from dtl.checkpoint.resume.state import TrainState
    from dtl.checkpoint.resume.store import Checkpoint, CheckpointStore
    from dtl.checkpoint.transfer.report import TransferReport
    from dtl.distributed.runtime import Runtime
    from dtl.distributed.watchdog import Heartbeat
    from dtl.models.build import Network
    from dtl.runs.folder import RunFolder
    from dtl.runs.tracker import Console, Tracker
    from dtl.training.dataloaders import Feeds
    from dtl.training.loop import Trainer
    from dtl.training.phases import Phase

EXIT_STOPPED = 75
SECONDS_TO_SPEAK = 20.0


def run(arguments: Sequence[str]) -> int:
    if any(argument in ("-h", "--help") for argument in arguments):
        from dtl.config.help import help_text

        print(help_text())
        return 0
    wanted = [argument for argument in arguments if argument != "--print-config"]
    config, name = load_config(wanted)
    if len(wanted) < len(arguments):
        print(config.to_yaml(), end="")
        return 0
    if config.run.debug:
        from dtl.training.debug import debug_config

        config, name = debug_config(config, name)
    return train(config, name)


def train(config: Config, name: str) -> int:
    """One run from its config to its end; returns the exit status."""
    from dtl.runs.folder import RunFolder

    started = time.monotonic()
    folder = RunFolder(f"{config.run.dir}/{name}")
    if folder.was_stopped_under_this_agent():  # before anything that takes seconds, on every rank by itself
        if os.environ.get("RANK", "0") == "0":
            _tell(f"{folder.path} was stopped, and its launcher has started it again: leaving; the same command goes on")
        else:
            time.sleep(SECONDS_TO_SPEAK)  # the first to leave makes the launcher end the others, and rank 0 is to say why
        return EXIT_STOPPED

    from dtl.distributed.runtime import Runtime
    from dtl.distributed.watchdog import Doctor, Heartbeat, PeerLost
    from dtl.training.debug import debugging

    # What the imports made never dies: the collector need not walk it, and so does not copy its pages in every loader process.
    gc.collect()
    gc.freeze()
    limit, heart = config.run.timeout_minutes, Heartbeat()
    with (
        Runtime(device=config.run.device, precision=config.precision, timeout_minutes=limit, compression=config.run.gradient_compression) as runtime,
        debugging(config.run.debug),
    ):
        fresh = config.run.resume == "never"
        runtime.signals.on_abort = lambda: _note_failure(folder, KeyboardInterrupt(), step=heart.step, fresh=fresh)
        doctor = Doctor(
            heart,
            rank=runtime.rank,
            world_size=runtime.world_size,
            name=runtime.token,
            limit=60 * limit,
            say=_tell,
            end=lambda line: _end(folder, heart, line, fresh=fresh),
        )
        try:
            with doctor:
                return _train(config, name, folder, runtime, heart, started)
        except PeerLost as lost:
            if str(lost):
                _end(folder, heart, str(lost), fresh=fresh)
            sys.stderr.flush()
            os._exit(1)  # the usual way out would wait for the rank that is gone
        except BaseException as error:
            _note_failure(folder, error, step=heart.step, fresh=fresh)
            raise
        finally:
            folder.release()


def _tell(line: str) -> None:
    print(f"dtl: {line}", file=sys.stderr, flush=True)


def _end(folder: RunFolder, heart: Heartbeat, line: str, *, fresh: bool) -> None:
    """Why the run ends although no rank has said so."""
    _tell(f"{line}; the same command goes on from the newest checkpoint")
    _note_failure(folder, RuntimeError(line), step=heart.step, fresh=fresh)


def _train(config: Config, name: str, folder: RunFolder, runtime: Runtime, heart: Heartbeat, started: float) -> int:
    from dtl.distributed.alike import check_alike
    from dtl.distributed.deadline import Deadline
    from dtl.distributed.signals import StoppedEarly
    from dtl.runs.tracker import Console
    from dtl.training import build, finish, start

    console = Console(is_main=runtime.is_main)
    deadline = Deadline(config.checkpoint.deadline_seconds, started=started)
    check_alike(config, name, runtime)
    build.take_folder(folder, runtime)
    try:
        with runtime.before_first_step(deadline.due):
            parts = _prepare(config, folder, runtime, heart, console)
    except StoppedEarly as stopped:
        return _stopped_early(folder, runtime, why=str(stopped), stage=heart.stage, fresh=config.run.resume == "never")
    if parts is None:
        return 0
    start.clear_folder(config, folder, runtime)
    tracker = build.open_tracker(config, name, folder, runtime, parts.state, console)
    trainer = build.build_trainer(
        config,
        runtime,
        folder=folder,
        network=parts.network,
        phases=parts.phases,
        feeds=parts.feeds,
        state=parts.state,
        store=parts.store,
        tracker=tracker,
        channels_last=parts.channels_last,
        heart=heart,
        deadline=deadline,
    )
    finish.begin(trainer, folder, config, parts.report)
    return _run(trainer, parts.checkpoint, config, folder)


class _Parts(NamedTuple):
    """What a run is made of; each has been found fit for it."""

    network: Network
    feeds: Feeds
    phases: list[Phase]
    store: CheckpointStore
    checkpoint: Checkpoint | None
    state: TrainState
    report: TransferReport | None
    channels_last: bool


def _prepare(config: Config, folder: RunFolder, runtime: Runtime, heart: Heartbeat, console: Console) -> _Parts | None:
    """Whatever may be refused or take long before the first step, and leaves the run folder as it was. None where the run is finished, and told so."""
    from dtl.checkpoint.resume import resume
    from dtl.checkpoint.resume.store import CheckpointStore
    from dtl.training import build, finish, start

    start.check_names(config, folder, runtime)
    heart.enter("data")
    train_shards, val_shards = build.open_shards(config, runtime, console.say)
    heart.enter("model")
    with runtime.together("model"):
        network = build.build_network(config, train_shards.num_classes)
    feeds = build.build_feeds(config, runtime, train_shards, val_shards, network)
    phases = build.planned(config, feeds)

    store = CheckpointStore(
        folder.path / "checkpoints",
        keep=config.checkpoint.keep,
        max_failures=config.checkpoint.max_failures,
        asynchronous=config.checkpoint.asynchronous,
        say=console.say,
        before_write=folder.check_incarnation,
    )
    checkpoint, state = resume.find_checkpoint(config, store, runtime, train_shards, val_shards)
    if finish.is_finished(folder, state, phases, runtime):
        finish.tell_result_again(folder, state, config, runtime, console)
        return None
    resume.note_changes(config, checkpoint, state, runtime, console.say)
    start.check_phases(phases, network, feeds, runtime)
    report = None if checkpoint else build.transfer_weights(config, network, runtime, train_shards, console.say)
    channels_last = build.place_network(config, network, runtime)
    return _Parts(network, feeds, phases, store, checkpoint, state, report, channels_last)


def _run(trainer: Trainer, checkpoint: Checkpoint | None, config: Config, folder: RunFolder) -> int:
    """From the first step to the end of the run, or to where it is stopped."""
    from dtl.training import finish
    from dtl.training.debug import overfit_one_batch
    from dtl.training.loop import Stopped

    if config.run.debug:
        overfit_one_batch(trainer)
    try:
        trainer.run(checkpoint)
    except Stopped as stopped:
        return _stopped(trainer, folder, trainer.tracker, trainer.runtime, why=str(stopped))
    except BaseException:
        trainer.tracker.close("failed")
        raise
    finally:
        trainer.store.close()
    trainer.heart.enter("finish")
    finish.end(trainer, folder, config)
    return 0


def _stopped(trainer: Trainer, folder: RunFolder, tracker: Tracker, runtime: Runtime, *, why: str) -> int:
    step = trainer.state.step
    if runtime.is_main:
        folder.write_status("stopped", why=why.removeprefix("a "), step=step)
    tracker.note(f"stopped by {why}", step=step)
    tracker.say(f"stopped by {why} at step {step}, its checkpoint is on the disk; the same command goes on from there")
    tracker.close("stopped")
    # The first rank that leaves with this status makes the launcher end the others: they must have nothing left to do.
    runtime.barrier()
    return EXIT_STOPPED


def _stopped_early(folder: RunFolder, runtime: Runtime, *, why: str, stage: str, fresh: bool) -> int:
    """Before the first step: no checkpoint is written, and what an earlier start has written stays as it was."""
    if runtime.is_main:
        _write_end(folder, "stopped", f"{why.removeprefix('a ')} before the first step", fresh=fresh, stage=stage)
        kept = "what is packed or fetched is kept, and the same command goes on with it" if stage == "data" else "the same command starts it again"
        _tell(f"stopped by {why} before the first step (stage {stage}): nothing to save yet; {kept}")
    runtime.barrier()
    return EXIT_STOPPED


def _note_failure(folder: RunFolder, error: BaseException, *, step: int = 0, fresh: bool = False) -> None:
    """status.json tells scripts what happened, also where launchers turn every status into 1."""
    if folder.incarnation == 0 or isinstance(error, SystemExit):
        return
    kind = "input" if isinstance(error, UserError) else "interrupted" if isinstance(error, KeyboardInterrupt) else "fault"
    why = f"{kind}: {error}" if str(error) else kind
    try:
        _write_end(folder, "failed", why, step=step, fresh=fresh and not isinstance(error, UserError))
    except (OSError, UserError) as problem:
        print(f"dtl: status.json could not be written: {problem}", file=sys.stderr)


def _write_end(folder: RunFolder, state: str, why: str, *, step: int = 0, fresh: bool, **more: Any) -> None:
    """How this start has ended. What an earlier one has finished stays in status.json.

    `fresh`: `run.resume: never`. With the earlier run still whole nothing is written: a job's next round would take it for a sign to go on with that.
    """
    from dtl.runs.folder import read_status

    before = read_status(folder.path) or {}
    if fresh and before and before.get("incarnation") != folder.incarnation:
        return
    kept = {key: before[key] for key in ("phases", "model", "progress") if key in before}
    folder.write_status(state, why=why, step=step or int(before.get("step", 0)), **kept, **more)
