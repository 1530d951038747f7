"""One optimizer step from a rank's micro-batches, and the sums that its log line needs.

Letters: B slots of a micro-batch, C H W channels and pixels, K outputs, R ranks. Nothing here makes the host wait for the device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dtl.checkpoint.resume.state import TrainState
from dtl.data.loading.batch import Batch
from dtl.data.sampling.balance import quotas
from dtl.data.transforms.mix import mix_batch
from dtl.distributed.runtime import Runtime
from dtl.distributed.watchdog import Heartbeat
from dtl.errors import Diverged
from dtl.imports import plain_step
from dtl.keyed import int_key, keys
from dtl.models.network import Normalise
from dtl.models.norms import no_rank_is_empty
from dtl.models.strict_load import first_not_finite
from dtl.optim.solve import Interrupted, Rows, Solution, Team, deal, solve
from dtl.training.active import ActivePhase
from dtl.training.dataloaders import DataLoaders
from dtl.training.features import FeatureDataset

# Weight of each auxiliary head's loss: Inception (Szegedy et al. 2016) has one at 0.4, GoogLeNet (2015) two at 0.3.
AUXILIARY_WEIGHT = {1: 0.4, 2: 0.3}


@dataclass
class Window:
    """Sums since the last log line. Weighted by the step's normaliser: `loss` is a mean over samples."""

    total: float = 0.0
    """This rank's share of the loss, without what `add` has got since it was last asked for."""
    weight_sum: float = 0.0
    """of all ranks"""
    bad_step: int = -1
    """The first step whose loss was not finite."""
    seconds: float = 0.0
    data_seconds: float = 0.0
    num_images: int = 0

    def __post_init__(self) -> None:
        self._added: list[tuple[int, Tensor]] = []
        self._read: tuple[Tensor, torch.cuda.Event] | None = None
        """The losses of what was added, on their way to the host, and the event after which they are there."""

    def add(self, step: int, loss: Tensor) -> None:
        """The loss of a micro-batch of step number `step` (from 1). Kept as it is: summing it now would be five small kernels a step."""
        self._added.append((step, loss))
        if len(self._added) >= 4096:
            self.sum()

    def start_reading(self) -> None:
        """Queue the copy of the losses from a GPU to the host, so that a later `sum` need not wait for what is queued behind it. Nothing is added after it."""
        if self._added:
            losses = torch.stack([loss for _, loss in self._added]).double()
            pinned = torch.empty(len(losses), dtype=torch.float64, pin_memory=True).copy_(losses, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(losses.device))
            self._read = pinned, event

    def sum(self) -> float:
        """This rank's share of the loss. The host waits for the device here, or for the copy that `start_reading` has queued."""
        if self._added:
            if self._read is None:
                losses = torch.stack([loss for _, loss in self._added]).to("cpu", torch.float64).tolist()
            else:
                self._read[1].synchronize()
                losses, self._read = self._read[0].tolist(), None
            for (step, _), loss in zip(self._added, losses, strict=True):
                self.total += loss
                if self.bad_step < 0 and not math.isfinite(self.total):
                    self.bad_step = step
            self._added.clear()
        return self.total


class Stepper:
    """Takes the optimizer steps of one phase."""

    def __init__(self, active: ActivePhase, runtime: Runtime, *, normalise: Normalise, seed: int, heart: Heartbeat) -> None:
        self.active, self.runtime, self.normalise, self.seed, self.heart = active, runtime, normalise, seed, heart
        self._on_host = runtime.device.type == "cpu"
        config = active.phase.config
        self._mixing = {"mixup": config.mixup, "cutmix": config.cutmix} if config.mixup or config.cutmix else None
        self._draws = int_key(seed, "step", runtime.rank)
        compiled = getattr(getattr(active.wrapped, "module", None), "_compiled_call_impl", None) is not None  # its norms are traced as they are
        self._synchronised = not compiled and any(isinstance(part, nn.SyncBatchNorm) for part in active.module.modules())
        self._scaler = runtime.accelerator.scaler
        # Accelerate's wrapper is for the scaler; without one it only looks for packages that are not there, a millisecond at each step.
        self._update = active.optimizer.step if self._scaler is not None else plain_step(getattr(active.optimizer, "optimizer", active.optimizer))

    def step(self, batches: list[Batch], *, step: int, phase_step: int, normaliser: float, window: Window) -> float:
        """Forward, backward and update for step number `step` of the run (from 0); returns the learning rate.

        `normaliser`: the sum of the weights of all samples of the global batch, over all ranks and all micro-batches. DDP averages
        gradients over R, so each local loss is sum(w * l) * R / normaliser: the gradient of the global batch at any R.
        """
        active, accelerator = self.active, self.runtime.accelerator
        lr = active.set_lr(phase_step)
        for micro_step, batch in enumerate(batches):
            last = micro_step == len(batches) - 1
            # Backward too: activations that were not kept are computed again there.
            checked = no_rank_is_empty() if self._synchronised else contextlib.nullcontext()
            with checked, contextlib.nullcontext() if last else accelerator.no_sync(active.wrapped):
                # Dropout and stochastic depth: the same in a resumed run, different on every rank and micro-step.
                _seed_draws(int_key(self._draws + step, micro_step) >> 1, self.runtime.device)
                self.heart.enter("forward")
                loss_sum = self.loss_sum(batch)
                self.heart.enter("backward")
                factor = self.runtime.world_size / normaliser
                loss = loss_sum * factor
                (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            window.add(step + 1, loss_sum.detach())
        if active.phase.config.clip_norm is not None:
            accelerator.unscale_gradients()
            # Not Accelerate's, which imports what shards tensors, to look for such ones: a second of each start.
            torch.nn.utils.clip_grad_norm_(active.parameters, active.phase.config.clip_norm)
        self._update()
        for parameter in active.parameters:
            parameter.grad = None  # as `zero_grad` does, which opens a range for the profiler each time
        if active.ema is not None:
            active.ema.update()
        window.weight_sum += normaliser
        return lr

    def loss_sum(self, batch: Batch) -> Tensor:
        """sum(w * l) over the micro-batch's real slots, with auxiliary heads where the network has them in training."""
        active, device = self.active, self.runtime.device
        images = self.normalise(batch.images)
        labels, weights = batch.labels, batch.weights
        if not self._on_host:
            labels, weights = labels.to(device, non_blocking=True), weights.to(device, non_blocking=True)
        images, labels, weights = active.phase.task.prepare(images, labels, weights)
        targets: Tensor = labels
        if self._mixing is not None:
            targets = torch.nn.functional.one_hot(labels, active.phase.num_outputs).to(torch.float32)
            images, targets = mix_batch(images, targets, batch.slots, weights=weights, seed=self.seed, epoch=batch.epoch, step=batch.step, **self._mixing)
        logits, auxiliary = active.wrapped(images)
        total = _weighted_sum(active, logits, targets, None if batch.full else weights)
        for other in auxiliary:
            total = total + AUXILIARY_WEIGHT.get(len(auxiliary), 0.3) * _weighted_sum(active, other, targets, None if batch.full else weights)
        return total


def _seed_draws(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and this rank's device. It seeds every kind of device that torch knows as well, and keeps a stack
    trace for each that is not there: a fifth of the time of a step on cached features."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _weighted_sum(active: ActivePhase, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """`weights`: of the slots, 1 or 0; None where all are 1 (the same sum, two operations less and none of theirs in the backward pass)."""
    if weights is None:
        return active.loss.total(logits, targets)
    losses = active.loss.losses(logits, targets)
    # Masked, not multiplied: a padded slot's loss may be infinite, and 0 * inf is not 0.
    return torch.where(weights > 0, losses * weights, 0.0).sum()


def step_weight(active: ActivePhase, loaders: DataLoaders, phase_step: int, num_images: int) -> float:
    """`normaliser` of a step of `num_images`; its labels are looked up only where classes have weights."""
    if active.class_weights is None:
        return float(num_images * active.phase.task.expansion)
    return normaliser(active, loaders.step_labels(active.phase, phase_step))


def normaliser(active: ActivePhase, labels: np.ndarray) -> float:
    """The sum of the weights of a global batch with these `labels` [n]; each rank knows them all from the plan and the index."""
    if active.class_weights is None:
        return float(len(labels) * active.phase.task.expansion)
    return float(active.class_weights.double()[torch.from_numpy(labels.astype(np.int64))].sum())


def diverged(active: ActivePhase, loaders: DataLoaders, state: TrainState, steps: list[int]) -> Diverged:
    """The error of a loss that is not finite; `steps`: the first such step of each rank."""
    phase = active.phase
    step = min(steps, default=state.step)
    phase_step = step - 1 - (state.step - state.phase.step)
    lr = active.set_lr(phase_step)
    names = loaders.sample_names(phase, phase_step, limit=4)
    return Diverged(
        f"the loss is not finite at step {step} of phase {phase.name} (lr {lr:.3g}; samples {', '.join(names)} ...): "
        f"lower phases.{phase.name}.lr, add warmup or clip_norm, or look at these samples"
    )


def check_weights(active: ActivePhase, runtime: Runtime, state: TrainState) -> None:
    """Diverged where a trained weight or a running statistic is not finite, though the loss may be: nothing can be kept of it, or resumed from it.

    Called by all ranks together, once the buffers are the same on all.
    """
    bad = runtime.agree(first_not_finite(_trained_tensors(active.module)) if runtime.is_main else None)
    if bad is not None:
        phase = active.phase
        rate = f"lower phases.{phase.name}.lr ({phase.config.lr:.3g}), or add warmup or clip_norm"
        raise Diverged(f"{bad} is not finite after step {state.step} of phase {phase.name}: {rate}")


def _trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}
    for prefix, part in module.named_modules():
        if part.training:
            found |= {f"{prefix}.{name}".lstrip("."): buffer for name, buffer in part.named_buffers(recurse=False) if name.startswith("running_")}
    return found


def solve_head(
    active: ActivePhase, loaders: DataLoaders, runtime: Runtime, *, groups: npt.NDArray[np.int64] | None, stop: Callable[[], bool]
) -> tuple[Solution, int] | None:
    """The head of a phase, solved on its cached features and put in place; and the number of folds. None: all ranks are to stop.

    `groups`: of each training image, where the config names groups (main process); else copies of an image are one. `stop`: asked after each pass over
    the features.
    """
    shards, dataset = loaders.train, loaders.cached["train"]
    assert isinstance(dataset, FeatureDataset)
    labels, weights = np.array(shards.labels, np.int64), np.ones(shards.num_samples)
    weights[(labels < 0) | (labels >= shards.num_classes)] = 0.0
    labels[weights == 0] = 0
    weights[[sample for view, sample in dataset.damaged if view == 0]] = 0.0
    if active.class_weights is not None:
        weights *= active.class_weights.double().numpy()[labels]
    if loaders.balance != "none":  # as often as an epoch would draw each
        counts = np.array(loaders.class_counts)
        weights *= (quotas(counts, loaders.balance) / np.maximum(counts, 1))[labels]
    folds = None
    if runtime.is_main:
        units = groups if groups is not None else (np.asarray(shards.sizes, np.int64) << 32) | np.asarray(shards.crcs, np.int64)
        folds = deal(labels, units, keys(units, "solve"))
    folds = runtime.agree(folds)
    features = dataset.values[0].reshape(len(labels), -1)
    rows = Rows(features, torch.from_numpy(labels), torch.from_numpy(weights), active.phase.config.label_smoothing)
    team = Team(runtime.rank, runtime.world_size, share=runtime.agree, add=runtime.sum, stop=stop, threads=torch.get_num_threads())
    try:
        found = solve(rows, num_classes=active.phase.num_outputs, folds=folds, team=team)
    except Interrupted:
        return None
    found = runtime.agree(found)
    head = active.module.get_submodule(active.network.heads[0])
    with torch.no_grad():
        head.weight.copy_(found.weight)  # type: ignore[operator]
        head.bias.copy_(found.bias)  # type: ignore[operator]
    return found, 0 if folds is None else int(folds.max()) + 1
