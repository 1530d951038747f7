"""What an evaluation means for its phase, and what a phase came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dtl.checkpoint.resume.state import Best, TrainState
from dtl.errors import UserError
from dtl.text import counted
from dtl.training.active import ActivePhase
from dtl.training.dataloaders import DataLoaders
from dtl.training.phases import Phase


@dataclass(frozen=True)
class Verdict:
    gain: bool
    """The best evaluation of the phase so far; among equals, the one with the lower loss."""
    end: str | None
    """Why the phase may end early, or None."""


def judge(metrics: dict[str, Any], phase: Phase, state: TrainState, *, monitor: str) -> Verdict:
    """Compare with the best of the phase, and write that, the early stop's counter and the metrics into `state`."""
    value, loss = float(metrics[monitor]), float(metrics["loss"])
    best = state.best.get(phase.name)
    assert best is None or best.metric == monitor, "a resume refuses another monitor"
    better = best is None or (value < best.value if monitor == "loss" else value > best.value)
    gain = better or (best is not None and value == best.value and loss < best.loss)
    if gain:
        state.best[phase.name] = Best(metric=monitor, value=value, step=state.step, loss=loss)
    # A loss that falls for ever at one top1 is no reason to go on.
    state.evaluations_without_gain = 0 if better else state.evaluations_without_gain + 1
    if gain or phase.config.keep == "last":
        epoch, _ = phase.epoch_of(max(0, state.phase_step - 1))
        state.extra["val"] = metrics
        state.extra["kept"] = {"step": state.step, "epoch": epoch, "train_loss": state.extra.get("train_loss")}
    stop = phase.config.early_stop
    if stop.threshold is not None and (value <= stop.threshold if monitor == "loss" else value >= stop.threshold):
        return Verdict(gain, f"{monitor} {value:.4f} reached {stop.threshold}")
    if stop.patience is not None and state.evaluations_without_gain >= stop.patience:
        return Verdict(gain, f"no better {monitor} in {counted(stop.patience, 'evaluation')}")
    return Verdict(gain, None)


def note_result(phase: Phase, state: TrainState) -> None:
    """A finished phase's row of the closing table, into `state`; one that went on for more epochs replaces its earlier row.

    Both losses and top1 are of the weights that the phase hands on: those of the evaluation after step `kept`.
    """
    kept = state.extra.get("kept") or {}
    row = {
        "phase": phase.name,
        "task": phase.config.task,
        "epochs": round(state.phase_step / phase.steps_per_epoch, 2),
        "seconds": max(state.seconds.get(phase.name, 0.0), 1e-9),
        "images_per_second": state.extra["images"] / max(state.extra["train_seconds"], 1e-9),
        "kept_step": kept.get("step"),
        "kept_epoch": kept.get("epoch"),
        "train_loss": kept.get("train_loss"),
        "val": state.extra.get("val"),
        "best": None if phase.name not in state.best else vars(state.best[phase.name]),
    }
    state.extra["train_loss"] = None  # the next phase has none until its first line
    state.extra["results"] = [*(old for old in state.extra.get("results", []) if old["phase"] != phase.name), row]


def diverged(active: ActivePhase, loaders: DataLoaders, state: TrainState, steps: list[int]) -> UserError:
    """What to say of a loss that is not finite; `steps`: the first such step of each rank."""
    phase = active.phase
    step = min(steps, default=state.step)
    phase_step = step - 1 - (state.step - state.phase_step)
    lr = active.set_lr(phase_step)
    names = loaders.sample_names(phase, phase_step, limit=4)
    return UserError(
        f"the loss is not finite at step {step} of phase {phase.name} (lr {lr:.3g}; samples {', '.join(names)} ...): "
        f"lower phases.{phase.name}.lr, add warmup or clip_norm, or look at these samples"
    )
