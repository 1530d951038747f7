"""`dtl train --dry-run`: all of a run's start that needs no GPU, by the code of the start itself, and nothing in the run folder.

What it packs and downloads stays in the caches, so that a job on a machine without internet finds it there.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dtl.checkpoint.resume.store import CheckpointStore
from dtl.config import Config
from dtl.config.models import ImageSize
from dtl.data.remote.fetch import Unfetched
from dtl.data.shards.index import Shards
from dtl.distributed.deadline import Deadline
from dtl.distributed.runtime import Runtime
from dtl.distributed.signals import StoppedBeforeFirstStep
from dtl.errors import EXIT_DONE, EXIT_STOPPED, EXIT_WRONG_INPUT, UserError
from dtl.models.build import Network
from dtl.models.freeze import freeze, set_train_mode
from dtl.models.init import head_init
from dtl.models.meta import meta_copy
from dtl.models.network import forward_logits, image_shape
from dtl.models.norms import norms_alone
from dtl.runs.console import Console
from dtl.runs.folder import RunFolder, check_is_run
from dtl.text import counted, to_stderr
from dtl.training import build
from dtl.training.active import phase_line, set_head, trained_names
from dtl.training.micro_batch import MOMENTS
from dtl.training.phases import Phase
from dtl.training.publish import is_at_end

Log = Callable[[str], None]


def dry_run(config: Config, name: str, *, started: float | None = None) -> int:
    """The exit status: 0, or 75 after a signal. UserError for what the run's start would refuse.

    Of a launch one process of each node works, for all of them; the others leave at once.
    """
    rank = os.environ.get("RANK") or "0"
    if (os.environ.get("LOCAL_RANK") or "0") != "0":
        return EXIT_DONE
    folder = RunFolder(f"{config.run.dir}/{name}")
    deadline = Deadline(config.checkpoint.deadline_seconds, started=time.monotonic() if started is None else started)
    with Runtime.planned(config.precision) as runtime:
        log = Console(is_main=rank == "0").print
        try:
            with runtime.before_first_step(deadline.due):
                check_is_run(folder.path)
                _prepare(config, folder, runtime, log)
        except StoppedBeforeFirstStep as stopped:
            log(f"dry run stopped by {stopped}: packed and downloaded data is kept; the same command continues")
            return EXIT_STOPPED
        except UserError as error:
            if rank == "0":
                raise
            time.sleep(3.0)  # a mistake that all nodes find is printed by the first one, and its launcher ends this process
            to_stderr(f"dtl: rank {rank} (host {socket.gethostname()}): {error}")
            return EXIT_WRONG_INPUT
        log(f"dry run done: this run can start; nothing was written to {folder.path}")
    return EXIT_DONE


def _prepare(config: Config, folder: RunFolder, runtime: Runtime, log: Log) -> None:
    store = CheckpointStore(folder.path / "checkpoints", config.checkpoint, log=log)
    parts = build.prepare(config, folder, store, runtime, log)
    config = parts.config
    for line in config.notes:
        log(line)
    network, loaders, step = parts.network, parts.loaders, parts.state.step
    for split, shards in (("training", loaders.train), ("validation", loaders.val), ("test", loaders.test)):
        if shards is None:
            continue
        log(f"data: {counted(shards.num_samples, f'{split} image')} of {counted(shards.num_classes, 'class')} in {shards.folder}")
        with runtime.together("data"):
            _fetch_all(shards, log)
    log(build.delivered(config, network.preprocessing).line(cropped=build.crop_matters(config)))
    log(loaders.evaluation_view)
    log(f"network: {network.name}, {sum(parameter.numel() for parameter in network.module.parameters()):,} parameters")
    build.check_phases(parts.phases, network, loaders, runtime, monitor=config.checkpoint.monitor)
    if parts.checkpoint is None:
        transfer = build.load_pretrained(config, network, runtime, loaders.train, log, weights=parts.weights)
        if not build.head_is_loaded(network, transfer):
            build.check_blend(parts.phases[0])
    elif is_at_end(parts.state, parts.phases):
        log(f"{folder.path} has no step left to train (it ended at step {step})")
    else:
        log(f"{folder.path} would resume at step {step}, from {parts.checkpoint.path.name}")
    checkpointed = "; less with model.checkpoint_activations" if config.model.checkpoint_activations else ""
    memories: dict[tuple[object, ...], str] = {}
    for phase in parts.phases:
        loaders.use(phase)
        with runtime.together("phases"):
            set_head(network, phase, init=head_init(config), seed=config.run.seed)
            trained = trained_names(network, phase, image_size=loaders.image_size, log=log)
            frozen_statistics = phase.config.norm_statistics == "frozen"
            freeze(network.module, trained, freeze_norm=config.model.freeze_norm, frozen_statistics=frozen_statistics)
            size = loaders.layout(phase).micro_batch_size
            kind = (trained, phase.task.name, size, loaders.image_size, phase.config.optimizer, bool(phase.config.ema))
            if kind not in memories:
                memories[kind] = memory(network, phase, size, loaders.image_size)
        log(phase_line(phase, network.module, loaders.image_size if loaders.views else None))
        log(f"phase {phase.name}: memory of each of {counted(runtime.world_size, 'process')} in float32, about {memories[kind]}{checkpointed}")


def _fetch_all(shards: Shards, log: Log) -> None:
    """Remote shards into the cache, where it keeps all of them."""
    cache = shards.cache
    if cache is None:
        return
    if cache.limit is not None:
        log(f"data.cache_gb limits the cache, so the shards in {shards.folder} are downloaded during training")
        return
    log(f"downloading shards to {cache.folder} ({cache.num_bytes / 1e9:.2f} GB, without those that are there)")
    try:
        for number in range(len(cache.urls)):
            if cache.holds(number):
                cache.local(number)
    except Unfetched as error:
        raise UserError(str(error)) from None


def memory(network: Network, phase: Phase, micro_batch_size: int, image_size: ImageSize) -> str:
    """What training the phase takes, in words. The network is frozen as in the phase. Activations are counted on the meta device, as autograd saves them."""
    parameters = list(network.module.parameters())
    trained = sum(_bytes(parameter) for parameter in parameters if parameter.requires_grad)
    buffers = sum(map(_bytes, network.module.buffers()))
    rows = micro_batch_size * phase.task.expansion
    parts = {
        "weights": sum(map(_bytes, parameters)) + buffers,
        "gradients": 0 if phase.config.optimizer == "solve" else trained,
        "optimizer": trained * MOMENTS[phase.config.optimizer],
        "moving average": trained + buffers if phase.config.ema else 0,
    }
    if phase.config.optimizer == "solve":
        shown = ", ".join(f"{name} {_shown(size)}" for name, size in parts.items() if size)
        return f"{_shown(sum(parts.values()))} ({shown}); solving the head comes on top of it"
    saved = saved_bytes(network.module, torch.empty(image_shape(network.module, rows, image_size), device="meta"))
    parts |= {f"activations of {counted(rows, 'image')}": saved} if saved is not None else {}
    unknown = "" if saved is not None else "; the activations come on top of it (this network does not run on shapes alone)"
    shown = ", ".join(f"{name} {_shown(size)}" for name, size in parts.items() if size)
    return f"{_shown(sum(parts.values()))} ({shown}){unknown}"


def saved_bytes(module: nn.Module, images: Tensor) -> int | None:
    """Bytes that autograd keeps from the forward pass for the backward pass; None where the network cannot run on the meta device."""
    copied = meta_copy(module)
    set_train_mode(copied)
    weights = {parameter.untyped_storage()._cdata for parameter in copied.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept.setdefault(storage, tensor)
        return tensor

    try:
        with norms_alone(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward_logits(copied, images)
    except (RuntimeError, NotImplementedError):
        return None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
