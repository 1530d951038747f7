"""A run is an ordered list of phases; here their durations become steps, once, and their places in the run are fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dtl.config import PhaseConfig
from dtl.training.tasks import Task, task_named


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
