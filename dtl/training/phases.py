"""A run is an ordered list of phases; here their durations become steps, once, and their places in the run are fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dtl.checkpoint.resume.state import Best, Kept, TrainState
from dtl.config import PhaseConfig
from dtl.errors import UserError
from dtl.intervals import Interval, wilson
from dtl.text import counted

# ---- tasks


class Task(Protocol):
    """How a batch becomes what the network is asked."""

    @property
    def name(self) -> str:
        """As in the configuration."""
        ...

    @property
    def expansion(self) -> int:
        """Images asked about for each image loaded."""
        ...

    def num_outputs(self, num_classes: int) -> int:
        """Outputs of the head, for a data set of `num_classes`."""
        ...

    def class_names(self, classes: Sequence[str]) -> tuple[str, ...]:
        """The names of the outputs, for a data set of `classes`."""
        ...

    def prepare(self, images: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images [B,C,H,W], labels int64 [B], weights [B] -> the same three with expansion x B rows."""
        ...


class Classify:
    """The data set's own labels."""

    name = "classify"
    expansion = 1

    def num_outputs(self, num_classes: int) -> int:
        return num_classes

    def class_names(self, classes: Sequence[str]) -> tuple[str, ...]:
        return tuple(classes)

    def prepare(self, images: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return images, labels, weights


class Rotate:
    """By how much was the image turned? (RotNet: Gidaris et al. 2018, arXiv 1803.07728)

    All four rotations of each image are in one batch, as in the paper. Row `turn * B + b` is image b turned by `turn` x 90 degrees
    counter-clockwise, and its label is `turn`: pixels are moved, never interpolated. The given labels are not looked at.
    """

    name = "rotate"
    expansion = 4

    def num_outputs(self, num_classes: int) -> int:
        return self.expansion

    def class_names(self, classes: Sequence[str]) -> tuple[str, ...]:
        return ("0°", "90°", "180°", "270°")

    def prepare(self, images: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_images, _, height, width = images.shape
        assert height == width, f"images of {height} x {width} pixels cannot be rotated by 90 degrees (the task rotate needs square images)"
        # Filled block by block, so that channels_last stays what it is; torch.cat would fall back to contiguous.
        shape = (4 * num_images, *images.shape[1:])
        turned = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=_memory_format(images))
        for turn in range(4):
            turned[turn * num_images : (turn + 1) * num_images] = torch.rot90(images, turn, dims=(2, 3))
        turns = torch.arange(4, device=labels.device, dtype=labels.dtype).repeat_interleave(num_images)
        return turned, turns, weights.repeat(4)


TASKS: dict[str, Task] = {"classify": Classify(), "rotate": Rotate()}


def task_named(name: str) -> Task:
    """The task of that name; UserError for an unknown one."""
    if name not in TASKS:
        raise UserError(f"task is {name!r}; it must be one of {', '.join(TASKS)}")
    return TASKS[name]


def _memory_format(images: Tensor) -> torch.memory_format:
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Phase:
    """One phase with its place in the run. `epoch` counts on over all phases, so that no phase repeats another's order."""

    name: str
    index: int
    config: PhaseConfig
    task: Task
    num_outputs: int
    first_epoch: int
    first_step: int
    """Steps of the run done before this phase."""
    steps_per_epoch: int
    num_steps: int
    eval_every_steps: int

    def epoch_of(self, phase_step: int) -> tuple[int, int]:
        """(epoch of the run, step within it) of the phase's step number `phase_step`, from 0."""
        return self.first_epoch + phase_step // self.steps_per_epoch, phase_step % self.steps_per_epoch

    def eval_due(self, steps_done: int) -> bool:
        return steps_done == self.num_steps or steps_done % self.eval_every_steps == 0


def plan_phases(phases: Mapping[str, PhaseConfig], *, steps_per_epoch: int, num_classes: int) -> list[Phase]:
    """The run's phases, in order, with all durations in steps."""
    planned: list[Phase] = []
    first_epoch = first_step = 0
    for index, (name, config) in enumerate(phases.items()):
        num_steps = config.num_steps(steps_per_epoch)
        task = task_named(config.task)
        planned.append(
            Phase(
                name=name,
                index=index,
                config=config,
                task=task,
                num_outputs=task.num_outputs(num_classes),
                first_epoch=first_epoch,
                first_step=first_step,
                steps_per_epoch=steps_per_epoch,
                num_steps=num_steps,
                eval_every_steps=max(1, round(config.eval_every * steps_per_epoch)),
            )
        )
        first_step += num_steps
        first_epoch += -(-num_steps // steps_per_epoch)
    return planned


# ---- early stopping, best weights


@dataclass(frozen=True)
class Judgement:
    """What an evaluation means for its phase."""

    gain: bool
    """The best evaluation of the phase so far; among equals, the one with the lower loss."""
    end: str | None
    """Why the phase may end early, or None."""


def judge(metrics: dict[str, Any], phase: Phase, state: TrainState, *, monitor: str) -> Judgement:
    """Compare with the best of the phase, and write that and early stopping's counter into `state`."""
    value, loss = float(metrics[monitor]), float(metrics["loss"])
    best = state.results.best.get(phase.name)
    assert best is None or best.metric == monitor, "a resume refuses another monitor"
    better = best is None or (math.isnan(best.value) and not math.isnan(value)) or (value < best.value if monitor == "loss" else value > best.value)
    gain = better or (best is not None and value == best.value and loss < best.loss)
    if gain:
        state.results.best[phase.name] = Best(metric=monitor, value=value, step=state.step, loss=loss)
    # A loss that falls for ever at one top1 is no reason to continue.
    state.phase.evaluations_without_gain = 0 if better else state.phase.evaluations_without_gain + 1
    stop = phase.config.early_stop
    if stop.threshold is not None and (value <= stop.threshold if monitor == "loss" else value >= stop.threshold):
        return Judgement(gain, f"{monitor} {value:.4f} reached {stop.threshold}")
    if stop.patience is not None and state.phase.evaluations_without_gain >= stop.patience:
        return Judgement(gain, f"no better {monitor} in {counted(stop.patience, 'evaluation')}")
    return Judgement(gain, None)


def note_kept(metrics: dict[str, Any], phase: Phase, state: TrainState) -> None:
    """The weights of this evaluation are what the phase leaves behind, for now."""
    epoch, _ = phase.epoch_of(max(0, state.phase.step - 1))
    state.phase.kept = Kept(state.step, epoch, state.phase.train_loss, metrics)


def top1_interval(task: str, val: Mapping[str, Any]) -> Interval | None:
    """The 95 % interval of an evaluation's top1: that of its groups of images, else Wilson's; None where its images are no independent ones, as the four
    rotations of one."""
    if task == "classify" and "top1_interval" in val:
        found = val["top1_interval"]
        return None if found is None else (float(found[0]), float(found[1]))
    return wilson(val.get("top1"), val.get("num_samples") or 0) if task == "classify" else None


def note_result(phase: Phase, state: TrainState, *, blend: float | None = None) -> None:
    """A finished phase's row of the closing table, into `state`; one that went on for more epochs replaces its earlier row.

    Both losses and top1 are of the weights that the phase leaves behind: those of the evaluation after step `kept`, or so far (`blend`, 0..1) on the way
    from the weights that entered the phase to its last ones, which are of no epoch.
    """
    kept, best = state.phase.kept, state.results.best.get(phase.name)
    row = {
        "phase": phase.name,
        "task": phase.config.task,
        "epochs": round(state.phase.step / phase.steps_per_epoch, 2),
        "seconds": max(state.results.seconds.get(phase.name, 0.0), 1e-9),
        "images_per_second": state.phase.num_images / max(state.phase.train_seconds, 1e-9),
        "kept_step": None if kept is None else kept.step,
        # The weights that entered the phase are of no epoch of its own.
        "kept_epoch": None if kept is None or kept.step == state.step - state.phase.step or blend is not None else kept.epoch,
        "blend": blend,
        "looks": state.phase.looks if phase.config.keep != "last" else 1,
        "train_loss": None if kept is None or blend is not None else kept.train_loss,
        "val": None if kept is None else {name: value for name, value in kept.val.items() if name != "top1_interval"},
        "top1_interval": None if kept is None else top1_interval(phase.config.task, kept.val),
        "best": None if best is None else vars(best),
    }
    state.results.phases = [*(old for old in state.results.phases if old["phase"] != phase.name), row]
