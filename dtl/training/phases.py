"""A run is an ordered list of phases; here their durations become steps, once, and their places in the run are fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtl.config import PhaseConfig
from dtl.errors import UserError

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
        assert height == width, f"images of {height} x {width} pixels do not fit on themselves when turned"
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
        num_steps = config.steps or max(1, round((config.epochs or 1.0) * steps_per_epoch))
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
