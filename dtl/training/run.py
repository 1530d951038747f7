"""A run, as a table of contents; and what it prints and writes down at its start."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Mapping, Sequence

import torch

from dtl.checkpoint.resume.resume import note_changes
from dtl.checkpoint.transfer.apply import TransferReport
from dtl.config import Config
from dtl.config.own import needs_record, note_made
from dtl.data.audited import AUDITED_NAME, write_ledger
from dtl.data.copies import COPIES_NAME, describe_copies, find_copies_quickly
from dtl.data.dhash import find_alike
from dtl.data.shards.index import Shards
from dtl.data.twins import Twin, Twins
from dtl.distributed.devices import gpu_expected
from dtl.distributed.launch import launch_variables
from dtl.distributed.runtime import Runtime, fp16_instead
from dtl.files import write_whole
from dtl.models.build import forward_logits
from dtl.models.freeze import freeze
from dtl.runs.predictions import TWINS_NAME
from dtl.text import counted, some
from dtl.training import build
from dtl.training.dataloaders import rank_cores
from dtl.training.loop import Trainer
from dtl.training.publish import MakeReport, is_finished, publish, show_result_again
from dtl.training.session import Result, Session

# From this many starts at one step on, status.json says that there is no progress.
STARTS_WITHOUT_PROGRESS = 3
OVERFIT_STEPS = 200
_FEW_STEPS, _STEPS_AIMED_AT = 5, 10  # an epoch
OVERFIT_IMAGES = 16


def run(
    config: Config, name: str, *, report: MakeReport | None = None, started: float | None = None, pause: int | None = None, measure_test: bool = True
) -> Result:
    """One run, from its config to its model folder and, with `report`, the pages about it. Raises UserError where the user's input is wrong.

    `started` (by time.monotonic): `checkpoint.deadline_seconds` counts from then on; by default from now on. `pause`: stop at the first evaluation after
    so many epochs, as a signal would, unless the run ends there. Without `measure_test` a test set is held out, but not looked at.
    """
    session = Session(config, name, started=started, pause=pause)
    with session:
        runtime, log = session.runtime, session.console.print
        with session.before_first_step():  # may take hours, or be refused; an earlier run in the folder stays as it is
            parts = build.prepare(config, session.folder, session.store, runtime, log, enter=session.heart.enter)
            session.config = config = parts.config
            if is_finished(session, parts.state, parts.phases):
                show_result_again(session, parts.state)
                return session.result
            if not measure_test:
                parts.loaders.test = None
            note_changes(config, parts.checkpoint, parts.state, runtime, log)
            build.check_phases(parts.phases, parts.network, parts.loaders, runtime, monitor=config.checkpoint.monitor)
            transfer = None
            if parts.checkpoint is None:
                transfer = build.load_pretrained(config, parts.network, runtime, parts.loaders.train, log, parts.weights, session.folder.path)
            loaded = build.head_is_loaded(parts.network, transfer)
            if parts.checkpoint is None and not loaded:
                build.check_blend(parts.phases[0])
            parts.weights = None  # their memory
            normalise = build.place_network(config, parts.network, runtime)
        trainer = Trainer(session, parts.network, normalise, parts.loaders, parts.phases, parts.state, head_is_loaded=loaded)
        _begin(session, trainer, transfer)
        if config.run.debug:
            overfit_one_batch(trainer)
        trainer.train(parts.checkpoint)
        publish(session, trainer, report)
    return session.result


def _begin(session: Session, trainer: Trainer, transfer: TransferReport | None) -> None:
    """Write down what this start is, and print it (main process)."""
    config, runtime, folder, state, log = session.config, session.runtime, session.folder, trainer.state, session.console.print
    state.incarnation = folder.incarnation
    starts = runtime.agree(folder.count_starts(state.step) if runtime.is_main else 0)
    idle = too_few_threads(runtime)
    if not runtime.is_main:
        return
    write_whole(folder.path / "config.yaml", lambda file: file.write(config.to_yaml().encode()))
    if needs_record(config):
        note_made(folder.path / "config.yaml", log)
    if transfer is not None:
        transfer.to_json(folder.path / "transfer.json")
    stuck = (
        ""
        if starts <= STARTS_WITHOUT_PROGRESS
        else (
            f"start number {starts} in a row from step {state.step}, without a new checkpoint: give each start more time, "
            "or save more often (--checkpoint.every_steps)"
        )
    )
    folder.launch_variables = launch_variables(os.environ)
    folder.write_status("running", why=stuck, step=state.step)
    if stuck:
        log(stuck)
    train, val, test = trainer.loaders.train, trainer.loaders.val, trainer.loaders.test
    held_out = "" if test is None else f" (and {counted(test.num_samples, 'test image')}, measured once at the end)"
    resumed = f"; resuming at step {state.step}" if state.step else ""
    log(
        f"run {folder.path}: {train.num_samples:,} training and {counted(val.num_samples, 'validation image')}{held_out} of "
        f"{counted(train.num_classes, 'class')}, {trainer.network.name}, {counted(runtime.world_size, 'process')} on "
        f"{runtime.device.type}, precision {runtime.precision}{resumed}"
    )
    log(build.delivered(config, trainer.network.preprocessing).line(cropped=build.crop_matters(config)))
    log(trainer.loaders.evaluation_view)
    if any(phase.config.task == "classify" for phase in trainer.phases):
        tested = None if test is None else test.manifest.class_counts
        for line in classes_without_images(trainer.loaders.classes, train.manifest.class_counts, val.manifest.class_counts, tested):
            log(line)
    last = trainer.phases[-1]
    if config.run.device == "auto" and runtime.device.type == "cpu" and not runtime.launch.use_cpu and (warning := gpu_expected(os.environ)):
        log(warning)
    for line in [
        *config.notes,
        *(too_few_steps(train.num_samples, trainer.loaders.global_batch_size, last.steps_per_epoch) if last.config.optimizer != "solve" else ()),
        *idle,
        *fp16_instead(config.precision, runtime),
    ]:
        log(line)
    splits = {"train": train, "val": val} if test is None else {"train": train, "val": val, "test": test}
    write_ledger(splits, folder.path / AUDITED_NAME)
    if not state.step:
        report_copies(session, splits)


def report_copies(session: Session, splits: Mapping[str, Shards]) -> None:
    """One line about images that are in the data more than once; copies.csv lists them, and twins.jsonl those that look like a training image.

    Never a refusal: it may be meant so.
    """
    path = session.folder.path / COPIES_NAME
    for old in (path, path.with_name(TWINS_NAME)):
        old.unlink(missing_ok=True)
    copies = find_copies_quickly(splits)
    if line := describe_copies(copies):
        session.console.print(line if not copies.num_groups else f"{line}; all are listed in {path}")
    if copies.num_groups:
        copies.write_csv(path)
    Twins(path.with_name(TWINS_NAME), splits).record("bits", [Twin(*one) for one in find_alike(splits)])


def classes_without_images(classes: Sequence[str], train: Sequence[int], val: Sequence[int], test: Sequence[int] | None = None) -> list[str]:
    """A line about the classes without a training image, and one about those without a validation image."""
    lines = []
    for counts, split, so in (
        (train, "training", "cannot be learned"),
        (val, "validation", "left out of top1"),
        (test, "test", "left out of its top1"),
    ):
        if counts is None:
            continue
        names = [name for name, count in zip(classes, counts) if not count]
        if names:
            lines.append(f"{len(names)} of {counted(len(classes), 'class')} without a {split} image ({so}): {some(names)}")
    return lines


def too_few_steps(images: int, batch: int, steps: int) -> list[str]:
    """Of few images a batch of the usual size makes an epoch of two steps, in which little is learnt."""
    smaller = max(4, 2 ** int(math.log2(max(1, images / _STEPS_AIMED_AT))))
    if steps >= _FEW_STEPS or smaller >= batch:
        return []
    return [
        f"an epoch has {counted(steps, 'step')}: {counted(images, 'training image')} in batches of {batch}; "
        f"--data.global-batch-size {smaller} gives {-(-images // smaller)}"
    ]


def too_few_threads(runtime: Runtime) -> list[str]:
    """Launchers give each process one thread on a CPU; one line says what that leaves idle. All ranks together."""
    threads, share = torch.get_num_threads(), int(rank_cores(runtime, physical=True))
    if runtime.device.type != "cpu" or threads >= share or "OMP_NUM_THREADS" not in os.environ:
        return []
    return [
        f"each process computes with {counted(threads, 'thread')}, but {share} cores per process are available: "
        f"accelerate launch --num_cpu_threads_per_process {share} ..., or OMP_NUM_THREADS={share} before the command"
    ]


def overfit_one_batch(trainer: Trainer) -> None:
    """Fit a copy of the network to one batch: a network, a loss or labels that cannot do even that will not learn anything."""
    phase = trainer.phases[-1]
    stream = trainer.loaders.train_steps(phase, 0)
    with contextlib.closing(stream):  # type: ignore[type-var]
        batch = next(stream)[0]
    device = trainer.runtime.device
    module = copy.deepcopy(trainer.network.module)
    freeze(module, {name for name, _ in module.named_parameters()})
    module.train()
    few = slice(OVERFIT_IMAGES)
    images, labels, _ = phase.task.prepare(trainer.normalise(batch.images[few]), batch.labels[few].to(device), batch.weights[few].to(device))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    losses: list[float] = []
    while len(losses) < OVERFIT_STEPS and not (losses and losses[-1] < 0.5 * losses[0]):
        logits, _auxiliary = forward_logits(module, images)
        if logits.shape[1] != phase.num_outputs:
            trainer.tracker.print("overfit one batch: skipped, because the head of the last phase is created later")
            return
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    result = "it can learn" if losses[-1] < 0.5 * losses[0] else "IT DOES NOT LEARN: check the images, the labels and the network"
    trainer.tracker.print(f"overfit one batch: loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps: {result}")
