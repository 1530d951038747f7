"""Entering and leaving a phase: head, frozen parts, parameter groups, optimizer, moving average, and a new wrap for DDP.

DDP's reducer knows only the parameters that required a gradient when it was built (lightning#20340), so each phase wraps anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dtl.checkpoint.resume.state import load_optimizer, optimizer_tensors
from dtl.checkpoint.resume.store import Checkpoint, copy_to_host
from dtl.config.models import ImageSize, shown_size
from dtl.distributed.determinism import fix_buckets
from dtl.distributed.runtime import Runtime
from dtl.errors import UserError
from dtl.imports import ddp_without_compiler, plain_forward
from dtl.keyed import key
from dtl.models.build import Network, forward_logits, replace_head
from dtl.models.freeze import checksum, freeze, frozen_names, select, set_train_mode, unused_parameters
from dtl.models.groups import layer_groups
from dtl.models.init import Init
from dtl.models.norms import gathering_norms, plain_norms, synchronise_norms
from dtl.models.strict_load import check_tensors
from dtl.optim.groups import build_groups, build_optimizer
from dtl.optim.losses import Loss, build_loss, class_weights
from dtl.optim.schedule import Schedule, lr_at, schedule_of
from dtl.runs.predictions import ImagePredictions
from dtl.text import counted
from dtl.training.keep import Evaluated, PairedError, choose
from dtl.training.phases import Phase

SYNC_BN_BELOW = 16


class Trained(nn.Module):
    """What Accelerate wraps: the network under autocast, giving logits [B, K] and those of auxiliary heads.

    A new one each phase, so that nothing that wrapping leaves behind ever touches the network itself.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return forward_logits(self.module, images)


@dataclass
class ActivePhase:
    """Everything that lives as long as one phase."""

    phase: Phase
    network: Network
    wrapped: nn.Module
    """The network as the loop calls it: under autocast, and DDP with several ranks."""
    optimizer: torch.optim.Optimizer
    """Accelerate's wrapper, which knows the gradient scaler."""
    schedule: Schedule
    loss: Loss
    eval_loss: Loss
    class_weights: Tensor | None
    """float32 [K] on the CPU, for the step's denominator."""
    ema: ExponentialMovingAverage | None
    frozen_names: tuple[str, ...]
    frozen_checksum: str
    parameters: list[nn.Parameter]
    cut: str | None = None
    """Name of the module that is trained on cached features, instead of the whole network on images."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """In the main process: the network's state dict at the evaluation that the phase keeps so far, in host memory."""
    candidates: dict[str, Evaluated] = field(default_factory=dict)
    """In the main process, with `keep: one_se`: what the evaluations `kept` and `best` found for each image."""
    start: dict[str, Tensor] = field(default_factory=dict)
    """In the main process, with `after: blend`: what entered the phase of the tensors that it may change, in host memory."""
    blend: float | None = None
    """The phase keeps weights so far on the way from there to its end."""
    predictions: ImagePredictions | None = None
    """In the main process: what the evaluation of the weights that the phase would leave behind has predicted; of a run's last phase."""

    @property
    def evaluated(self) -> nn.Module:
        """What gives logits for the batches that the phase is fed."""
        return self.module if self.cut is None else self.module.get_submodule(self.cut)

    @property
    def module(self) -> nn.Module:
        return self.network.module

    def sync_buffers(self, runtime: Runtime) -> None:
        """All ranks get the main process's normalisation statistics: one network is evaluated, saved and passed to the next phase."""
        tensors = list(self.module.buffers())
        if self.ema is not None:
            tensors += self.ema.buffers()
        runtime.sync_tensors(tensors)

    def checkpoint_tensors(self, runtime: Runtime) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """For a checkpoint: weights, optimizer and moving average as groups of tensors, and as JSON what is not a tensor. Nothing is copied."""
        tensors, optimizer = optimizer_tensors(self.optimizer)
        groups = {"model": dict(self.module.state_dict()), "optimizer": tensors}
        if self.ema is not None:
            groups["ema"] = self.ema.state_tensors()
        if self.kept:
            groups["best"] = self.kept
        if self.start:
            groups["start"] = self.start
        groups |= {f"{name}_images": candidate.tensors() for name, candidate in self.candidates.items()}
        if self.predictions is not None:
            groups["predictions"] = {name: torch.from_numpy(column) for name, column in vars(self.predictions).items()}
        scaler = runtime.accelerator.scaler
        return groups, {
            "optimizer": optimizer,
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema_updates": None if self.ema is None else self.ema.num_updates,
        }

    def restore(self, checkpoint: Checkpoint, runtime: Runtime) -> None:
        """Optimizer, moving average, kept weights and scaler as `checkpoint_tensors` gave them. The weights were loaded before the phase was entered."""
        load_optimizer(self.optimizer.optimizer, checkpoint.tensors("optimizer"), checkpoint.state["optimizer"])  # type: ignore[attr-defined]
        if self.ema is not None:
            self.ema.load(checkpoint.tensors("ema"), num_updates=int(checkpoint.state["ema_updates"]))
        if runtime.is_main and "best" in checkpoint.groups:
            self.kept = checkpoint.tensors("best")
        if runtime.is_main and "start" in checkpoint.groups:
            self.start = checkpoint.tensors("start")
        if runtime.is_main and "kept_images" in checkpoint.groups:
            self.candidates = {name: Evaluated.from_tensors(checkpoint.tensors(f"{name}_images")) for name in ("kept", "best")}
        if runtime.is_main and "predictions" in checkpoint.groups:
            self.predictions = ImagePredictions(**{name: column.numpy() for name, column in checkpoint.tensors("predictions").items()})
        if runtime.accelerator.scaler is not None and checkpoint.state["scaler"] is not None:
            runtime.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])

    def choose(self, new: Evaluated, error: PairedError) -> bool:
        """Whether the present weights, which came to `new`, take the place of what the phase keeps (main process)."""
        kept, best = choose(new, self.candidates.get("kept"), self.candidates.get("best"), error)
        self.candidates = {"kept": kept, "best": best}
        return kept is new

    def keep_weights(self, runtime: Runtime) -> None:
        """The present weights are what the phase keeps so far."""
        if runtime.is_main and self.phase.config.keep != "last":
            self.kept = copy_to_host(self.module.state_dict(), self.kept)

    def take_result(self, runtime: Runtime) -> None:
        """Put the weights that the phase passes on into the network: those of the evaluation that it keeps, of its moving average, or the last."""
        if self.phase.config.keep != "last":
            self.put(self.kept, runtime)
        elif self.ema is not None:
            self.ema.copy_to(self.module)

    def put(self, tensors: Mapping[str, Tensor], runtime: Runtime) -> None:
        """Make `tensors`, a state dict of the main process, the weights of all ranks; none there (of a checkpoint without kept weights): its present ones."""
        if runtime.is_main and tensors:
            own = self.module.state_dict()
            check_tensors(own, tensors, "the weights that the phase keeps belong to another network")
            for name, tensor in own.items():
                tensor.copy_(tensors[name], non_blocking=True)
        runtime.sync_tensors([*self.module.parameters(), *self.module.buffers()])

    def remember_start(self, runtime: Runtime) -> None:
        """The present weights are those that enter the phase."""
        if runtime.is_main and self.phase.config.after == "blend":
            frozen = set(self.frozen_names)
            self.start = copy_to_host({name: tensor for name, tensor in self.module.state_dict().items() if name not in frozen}, {})

    def at_end(self, runtime: Runtime) -> dict[str, Tensor]:
        """In the main process: a copy of the present weights, those of the moving average where there is one, in host memory."""
        if not runtime.is_main:
            return {}
        with self.evaluating():
            return copy_to_host(self.module.state_dict(), {})

    def evaluating(self) -> AbstractContextManager[None]:
        """Within it the network has the weights that the phase would leave behind now: those of its moving average where there is one."""
        return nullcontext() if self.ema is None else self.ema.swapped(self.module)

    def set_lr(self, phase_step: int) -> float:
        """Learning rate of the step number `phase_step` (from 0) into all groups; returns the phase's own, without group scales."""
        lr = lr_at(phase_step, schedule=self.schedule, num_steps=self.phase.num_steps, base_lr=self.phase.config.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return lr


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights start + share (end - start), tensor by tensor (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903): those of an end themselves at 0 and 1. What
    `start` lacks, and what is no floating point number, is the end's.

    A tensor that is the same at both ends is the same at every point, bit for bit.
    """
    made = dict(end)
    for name, first in start.items():
        last = end[name]
        if share in (0.0, 1.0):
            made[name] = first if share == 0.0 else last
        elif last.is_floating_point():
            exact = torch.promote_types(last.dtype, torch.float32)
            made[name] = torch.lerp(first.to(exact), last.to(exact), share).to(last.dtype)
    return made


def set_head(network: Network, phase: Phase, *, init: Init, seed: int) -> bool:
    """A fresh head where the phase's task has another number of outputs; the same values on every rank."""
    if network.num_outputs == phase.num_outputs:
        return False
    torch.manual_seed(int(key(seed, "head", phase.index)) >> 1)
    replace_head(network, phase.num_outputs, init=init)
    return True


def trained_names(network: Network, phase: Phase, *, image_size: ImageSize, log: Callable[[str], None]) -> frozenset[str]:
    """The parameters that the phase trains: those that its config names, without those that get no gradient."""
    train = phase.config.train
    trainable = select(network, list(train) if isinstance(train, tuple) else train)
    unused = unused_parameters(network, trainable, image_size=image_size)
    if unused:
        log(f"phase {phase.name}: {counted(len(unused), 'parameter')} without a gradient, left out; the first is {min(unused)}")
        trainable = trainable - unused
    if not trainable:
        raise UserError(f"phases.{phase.name}.train: nothing is left to train")
    return trainable


def enter(
    network: Network,
    phase: Phase,
    runtime: Runtime,
    *,
    class_counts: list[int],
    classes: list[str],
    freeze_norm: bool,
    micro_batch_size: int,
    image_size: ImageSize,
    sync_bn: str | bool = "auto",
    compile_network: bool = False,
    choose_cut: Callable[[frozenset[str]], str | None] = lambda trainable: None,
    log: Callable[[str], None],
) -> ActivePhase:
    """Freeze, build the optimizer, wrap. The head must already be the phase's (`set_head`).

    `choose_cut(names of what is trained)`: the module to train on cached features, or None.
    """
    config, trainable = phase.config, trained_names(network, phase, image_size=image_size, log=log)
    plain_before = plain_norms(network.module)  # before freezing, which marks the modules themselves
    frozen_statistics = config.norm_statistics == "frozen"
    freeze(network.module, trainable, freeze_norm=freeze_norm, frozen_statistics=frozen_statistics)
    set_train_mode(network.module)
    _sync_norms(network.module, runtime, sync_bn, before=plain_before, micro_batch_size=micro_batch_size, image_size=image_size, log=log)

    groups = build_groups(
        network.module,
        trainable,
        layer_groups=layer_groups(network),
        head_lr_scale=config.head_lr_scale,
        layer_decay=config.layer_decay,
        weight_decay=config.weight_decay,
        decay_norms_and_biases=config.decay_norms_and_biases,
    )
    optimizer = build_optimizer(groups, name=config.optimizer, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, betas=config.betas)
    weights = None
    if config.class_weights != "none" and config.task == "classify":
        weights = class_weights(config.class_weights, class_counts, classes)
    frozen = frozen_names(network.module, freeze_norm=freeze_norm, frozen_statistics=frozen_statistics)
    parameters = [parameter for parameter in network.module.parameters() if parameter.requires_grad]
    cut = choose_cut(trainable)
    trained: nn.Module = Trained(network.module if cut is None else network.module.get_submodule(cut))
    if compile_network:
        trained.compile()
    with warnings.catch_warnings(), ddp_without_compiler():
        # torch 2.14 has another name for it, which older ones do not know.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        # Everything is on its device: to look whether it should be moved, Accelerate imports what shards tensors, and with it PyTorch's compiler.
        wrapped = runtime.accelerator.prepare_model(trained, device_placement=False)
    fix_buckets(wrapped)
    plain_forward(wrapped)
    return ActivePhase(
        phase=phase,
        network=network,
        wrapped=wrapped,
        optimizer=runtime.accelerator.prepare_optimizer(optimizer, device_placement=False),
        schedule=schedule_of(config, phase.steps_per_epoch),
        loss=build_loss(
            config.loss,
            smoothing=config.label_smoothing,
            gamma=config.focal_gamma,
            alpha=config.focal_alpha,
            class_weights=weights,
        ).to(runtime.device),
        eval_loss=build_loss("cross_entropy"),
        class_weights=weights,
        ema=ExponentialMovingAverage(network.module, decay=config.ema) if config.ema else None,
        frozen_names=frozen,
        frozen_checksum=checksum(network.module, frozen),
        parameters=parameters,
        cut=cut,
    )


def leave(active: ActivePhase, runtime: Runtime) -> None:
    """Prove that what was frozen did not move, and let go of what the phase held."""
    now = checksum(active.module, active.frozen_names)
    if now != active.frozen_checksum:
        raise RuntimeError(f"phase {active.phase.name}: frozen weights or statistics changed ({active.frozen_checksum[:12]} -> {now[:12]})")
    runtime.accelerator.free_memory()


def _sync_norms(
    module: nn.Module,
    runtime: Runtime,
    wanted: str | bool,
    *,
    before: frozenset[str],
    micro_batch_size: int,
    image_size: ImageSize,
    log: Callable[[str], None],
) -> None:
    """Let the norms that gather statistics in this phase do so over all ranks; frozen ones evaluate, which is the same either way.

    `before`: those that did so in the phase before."""
    if not gathering_norms(module) or runtime.world_size == 1 or wanted is False:
        return
    if runtime.device.type != "cuda":
        if wanted is True:
            raise UserError("model.sync_bn is true, but PyTorch supports SyncBatchNorm on GPUs only; use auto or false")
        return
    if wanted is True or micro_batch_size < SYNC_BN_BELOW:
        names, left = synchronise_norms(module, image_size=image_size, agree=runtime.agree)
        if not names <= before:
            whose = f"computed over all {runtime.world_size} ranks (--model.sync-bn false: per rank, without communication)"
            log(f"SyncBatchNorm: batch norm statistics are {whose}")
        if left:
            log(left)


def phase_line(phase: Phase, module: nn.Module, image_size: ImageSize | None = None) -> str:
    """What a phase is: of `module`, the parameters that require a gradient are trained. `image_size`: where not all phases have one."""
    num = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in module.parameters())
    length = f"{counted(phase.num_steps / phase.steps_per_epoch, 'epoch')} of {counted(phase.steps_per_epoch, 'step')}"
    if phase.config.optimizer == "solve":
        length = "solved in one step"
    images = "" if image_size is None else f", images of {shown_size(image_size)} pixels"
    return f"phase {phase.name}: {phase.config.task}, {length}{images}, {num:,} of {total:,} parameters trained"


def phase_lines(active: ActivePhase, runtime: Runtime, image_size: ImageSize | None = None) -> list[str]:
    """What a phase is, at its start; and that its norms' statistics are rank 0's, where ranks have statistics of their own."""
    phase = active.phase
    lines = [phase_line(phase, active.module, image_size)]
    if phase.config.norm_statistics == "frozen" and (kept := trained_norms(active.module)):
        norms = counted(len(kept), "trained norm")
        lines.append(f"phase {phase.name}: {norms} with the running statistics that came with the weights (phases.{phase.name}.norm_statistics: frozen)")
    own = [
        part
        for part in active.evaluated.modules()
        if part.training and getattr(part, "running_mean", None) is not None and not isinstance(part, torch.nn.SyncBatchNorm)
    ]
    if runtime.world_size > 1 and own:
        norms = counted(len(own), "norm")
        lines.append(f"phase {phase.name}: {norms} keep separate running statistics on each rank; those of rank 0 are evaluated and saved")
    return lines


def trained_norms(module: nn.Module) -> list[str]:
    """Norms with running statistics of which a parameter is trained."""
    statistics = [(name, part) for name, part in module.named_modules() if getattr(part, "running_mean", None) is not None]
    return [name for name, part in statistics if any(parameter.requires_grad for parameter in part.parameters(recurse=False))]


# ---- the moving average of the weights


class ExponentialMovingAverage:
    """Averages the parameters of `module` that require a gradient, and the running statistics of its normalisation layers.

    A frozen parameter has no average, so it stays what it is, bit for bit; so do statistics that do not move. Other buffers are
    copied. (Statistics are averaged too, as torchvision's and timm's averages do: averaged weights produce activations that the
    latest statistics do not describe.) Build it after freezing, and anew for each phase.

    With `warm_up` the decay of update n (from 0) is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, *, decay: float, warm_up: bool = True) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema is {decay}; it must be 0 or more and less than 1")
        self.decay, self.warm_up, self.num_updates = decay, warm_up, 0
        averaged, copied = _names(module)
        tensors = _tensors(module)
        # The module's own tensors, which every loader and optimizer changes in place: no walk over the modules in each step.
        self._live = {name: tensors[name] for name in (*averaged, *copied)}
        self._kept = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._averaged, self._copied = averaged, copied
        self._buffers = [name for name in self._kept if not isinstance(tensors[name], nn.Parameter)]

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights into the average: once after each optimizer step. Never waits for the device."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warm_up else self.decay
        live, kept = self._live, self._kept
        if self._averaged:
            torch._foreach_lerp_([kept[n] for n in self._averaged], [live[n].detach() for n in self._averaged], 1 - decay)
        if self._copied:
            torch._foreach_copy_([kept[n] for n in self._copied], [live[n] for n in self._copied])
        self.num_updates += 1

    def buffers(self) -> list[Tensor]:
        """The averaged statistics and copied buffers, in the same order on every rank: ranks see other images, and differ in them."""
        return [self._kept[name] for name in self._buffers]

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside `num_updates`: name in the module -> average."""
        return dict(self._kept)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], *, num_updates: int) -> None:
        """Go on from `state_tensors()` of an average of the same parameters."""
        check_tensors(self._kept, tensors, "the checkpoint's moving average (EMA) belongs to other parameters")
        for name, kept in self._kept.items():
            kept.copy_(tensors[name])
        self.num_updates = num_updates

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Make the average the weights of `module`."""
        tensors = _tensors(module)
        for name, kept in self._kept.items():
            tensors[name].copy_(kept)

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """`module` has the averaged weights inside the block, and its own again after it, whatever happens there."""
        tensors = _tensors(module)
        # The copy is made before anything changes: running out of memory here leaves the module as it is.
        own = {name: tensors[name].detach().clone() for name in self._kept}
        try:
            self.copy_to(module)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in own.items():
                    tensors[name].copy_(tensor)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _names(module: nn.Module) -> tuple[list[str], list[str]]:
    """Names of what is averaged, and of the saved buffers that are copied."""
    averaged = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    saved = module.state_dict(keep_vars=True).keys()
    norms = {prefix for prefix, child in module.named_modules() if isinstance(child, _NormBase)}
    copied: list[str] = []
    for name, buffer in module.named_buffers():
        if name not in saved:
            continue
        is_statistic = name.rpartition(".")[0] in norms and buffer.is_floating_point()
        (averaged if is_statistic else copied).append(name)
    return averaged, copied
