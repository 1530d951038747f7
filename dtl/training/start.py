"""What can be known before the first step: refused before the run leaves anything behind, or said in one line at its start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import torch

from dtl.checkpoint.transfer.source.read import check_is_there
from dtl.config import Config
from dtl.distributed.runtime import Runtime
from dtl.errors import UserError
from dtl.machine import num_physical_cores
from dtl.models.build import Network
from dtl.models.catalog import find
from dtl.models.freeze import select
from dtl.runs.folder import RunFolder
from dtl.text import counted, some
from dtl.training.active import ActivePhase
from dtl.training.dataloaders import Feeds
from dtl.training.losses import class_weights
from dtl.training.phases import Phase


def check_names(config: Config, folder: RunFolder, runtime: Runtime) -> None:
    """A mistyped network, or weights that are not there, are told before hours of packing. A run that goes on needs its source no more."""
    goes_on = config.run.resume != "never" and any((folder.path / "checkpoints").glob("step-*"))
    with runtime.together("names"):
        find(config.model.name)
        if config.transfer is not None and config.transfer.source != "pretrained" and not goes_on:
            check_is_there(config.transfer.source)


def check_phases(phases: Sequence[Phase], network: Network, feeds: Feeds, runtime: Runtime) -> None:
    """A mistake in the last phase is told now, not after the hours of the first."""
    with runtime.together("phases"):
        for phase in phases:
            config = phase.config
            try:
                select(network, list(config.train) if isinstance(config.train, tuple) else config.train)
                if config.task == "classify":
                    class_weights(config.class_weights, feeds.class_counts, feeds.classes)
            except UserError as error:
                raise UserError(f"phase {phase.name}: {error}") from error


def clear_folder(config: Config, folder: RunFolder, runtime: Runtime) -> None:
    """With `run.resume: never` what an earlier run has left goes, once nothing can refuse this start any more."""
    if config.run.resume != "never":
        return
    with runtime.together("run folder"):
        if runtime.is_main:
            for name in ("checkpoints", "model", "report"):
                shutil.rmtree(folder.path / name, ignore_errors=True)
            for name in ("history.jsonl", "bad_samples.jsonl", "transfer.json", "status.json"):
                (folder.path / name).unlink(missing_ok=True)


def remarks(phases: Sequence[Phase], feeds: Feeds, runtime: Runtime) -> list[str]:
    """What is no mistake, but may not go unsaid."""
    lines = []
    if any(phase.config.task == "classify" for phase in phases):
        lines += unseen_classes(feeds.classes, feeds.train.manifest.class_counts, feeds.val.manifest.class_counts)
    return [*lines, *few_threads(runtime)]


def unseen_classes(classes: Sequence[str], train: Sequence[int], val: Sequence[int]) -> list[str]:
    """A line about the classes without a training image, and one about those without a validation image."""
    lines = []
    for counts, split, so in (
        (train, "training", "cannot be learned"),
        (val, "validation", "not measured, and count nowhere in top1"),
    ):
        names = [name for name, count in zip(classes, counts) if not count]
        if names:
            lines.append(f"{len(names)} of {counted(len(classes), 'class')} without a {split} image, so {so}: {some(names)}")
    return lines


def phase_lines(active: ActivePhase, runtime: Runtime) -> list[str]:
    """What a phase is, at its start; and that its norms' statistics are rank 0's, where ranks have statistics of their own."""
    phase = active.phase
    num = sum(parameter.numel() for parameter in active.parameters)
    total = sum(parameter.numel() for parameter in active.module.parameters())
    length = f"{counted(phase.num_steps / phase.steps_per_epoch, 'epoch')} of {counted(phase.steps_per_epoch, 'step')}"
    lines = [f"phase {phase.name}: {phase.config.task}, {length}, {num:,} of {total:,} parameters trained"]
    own = [
        part
        for part in active.evaluated.modules()
        if part.training and getattr(part, "running_mean", None) is not None and not isinstance(part, torch.nn.SyncBatchNorm)
    ]
    if runtime.world_size > 1 and own:
        norms = counted(len(own), "norm")
        lines.append(f"phase {phase.name}: the statistics of {norms} are each rank's own in training; rank 0's are evaluated, saved and handed on")
    return lines


def few_threads(runtime: Runtime) -> list[str]:
    """Launchers give each process one thread on a CPU; one line says what that leaves idle."""
    if runtime.device.type != "cpu":
        return []
    threads, processes = torch.get_num_threads(), max(1, runtime.launch.local_world_size)
    share = num_physical_cores() // processes
    if threads >= share or "OMP_NUM_THREADS" not in os.environ:
        return []
    return [
        f"computing with {counted(threads, 'thread')} a process, and there are {share} cores for each: "
        f"accelerate launch --num_cpu_threads_per_process {share} ..., or OMP_NUM_THREADS={share} before the command"
    ]
