"""From the config to what a run is made of: data, network, dataloaders, phases, pretrained weights; and what of it can be refused early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from socket import gethostname
from typing import Any

import torch
from torch import nn

from dtl.checkpoint.resume.resume import find_checkpoint
from dtl.checkpoint.resume.state import TrainState
from dtl.checkpoint.resume.store import Checkpoint, CheckpointStore
from dtl.checkpoint.transfer.apply import TransferReport, apply_plan
from dtl.checkpoint.transfer.layers.layer import specs_of
from dtl.checkpoint.transfer.plan import TransferPlan, plan_weights
from dtl.checkpoint.transfer.source.hubs import source_named
from dtl.checkpoint.transfer.source.read import SourceWeights, check_is_there, preprocessing_for, read_weights
from dtl.config import Config
from dtl.config.auto import batch_size_of, with_batch_size
from dtl.config.load import is_shipped, with_sgd
from dtl.config.models import DataConfig, ImageSize, PhaseConfig, shown_size
from dtl.data.loading import device as device_decode
from dtl.data.loading.shared_memory import check_shared_memory, fits
from dtl.data.open import channel_statistics, check_reading, reading_of
from dtl.data.remote.cache import limit_in_bytes
from dtl.data.remote.cache_space import divide
from dtl.data.sampling.balance import class_members
from dtl.data.shards.index import Shards
from dtl.data.splits_of_run import Splits, open_splits
from dtl.data.transforms.own import OwnFunction
from dtl.data.transforms.transforms import eval_transform, train_transform
from dtl.distributed.runtime import Runtime
from dtl.errors import TransferRefused, UserError
from dtl.keyed import key
from dtl.models.activation import enable_activation_checkpointing
from dtl.models.build import Network, build, for_phases, options_of, size_in, sized
from dtl.models.catalog import find
from dtl.models.freeze import select
from dtl.models.init import head_init, initialize
from dtl.models.network import Normalise, image_shape, to_device
from dtl.models.preprocessing import Preprocessing
from dtl.optim.losses import class_weights
from dtl.optim.solve import too_large
from dtl.reading import Reading
from dtl.runs.folder import REFUSED_TRANSFER, RunFolder
from dtl.text import counted, some, to_nobody
from dtl.training.dataloaders import DataLoaders, View, choose_workers, rank_cores
from dtl.training.metrics import check_monitor
from dtl.training.phases import Phase, plan_phases

Log = Callable[[str], None]
DEBUG_TRAIN_STEPS = 4
DEBUG_VAL_STEPS = 2


@dataclass
class Parts:
    """What a run is made of, before anything of it is on a device or in the run folder."""

    config: Config
    """As it was given, with the batch size that `auto` comes to; a head that a recipe of dtl would solve, but cannot, is trained by SGD."""
    network: Network
    loaders: DataLoaders
    phases: list[Phase]
    checkpoint: Checkpoint | None
    """What the run resumes from."""
    state: TrainState
    weights: SourceWeights | None
    """The pretrained weights of a run that begins, until they are loaded."""


def prepare(config: Config, folder: RunFolder, store: CheckpointStore, runtime: Runtime, log: Log, *, enter: Callable[[str], None] = to_nobody) -> Parts:
    """Data packed, network built, phases planned, checkpoint found. Reads the run folder, writes nothing there. `enter`: takes the name of each stage."""
    check_names(config, folder, runtime)
    enter("data")
    data = open_data(config, runtime, log)
    enter("model")
    network = build_network(config, data.train.num_classes, runtime)
    config = sgd_where_unsolvable(with_batch_size(config, data.train.num_samples), network, data.train.num_samples, runtime)
    checkpoint, state = find_checkpoint(config, store, runtime, data.ids())
    weights = None if checkpoint else read_pretrained(config, network, runtime)
    facts = data_facts(config, runtime, data)
    with runtime.together("model"):
        found = (
            with_data(config, preprocessing_for(network.preprocessing, weights), facts)
            if checkpoint is None
            else stored_preprocessing(config, network, checkpoint)
        )
        warnings = check_reading(found.reading, data.all())
    if runtime.is_main:
        for line in warnings:
            log(line)
    network = network_for(found, config, network, runtime, pretrained=weights is not None)
    loaders = build_dataloaders(config, runtime, data, network)
    return Parts(config, network, loaders, planned(config, loaders), checkpoint, state, weights)


# ---- what can be refused before it costs anything


def check_names(config: Config, folder: RunFolder, runtime: Runtime) -> None:
    """A mistyped network, or weights that are not there, are refused before hours of packing. A run that resumes needs its source no more."""
    resumes = config.run.resume != "never" and any((folder.path / "checkpoints").glob("step-*"))
    with runtime.together("names"):
        find(config.model.name, own=True)
        if config.transfer is not None and config.transfer.source != "pretrained" and not resumes:
            check_is_there(config.transfer.source)


def check_phases(phases: Sequence[Phase], network: Network, loaders: DataLoaders, runtime: Runtime, *, monitor: str) -> None:
    """A mistake in the last phase is refused now, not after the hours of the first."""
    with runtime.together("phases"):
        if any(phase.config.task == "classify" for phase in phases):
            check_monitor(monitor, loaders.classes, loaders.val.manifest.class_counts)
        for before, phase in zip([None, *phases], phases):
            config = phase.config
            if before is not None and (before.task.name, before.num_outputs) != (phase.task.name, phase.num_outputs):
                check_blend(phase)
            if config.task == "rotate" and not isinstance(size := loaders.size_of(phase), int):
                setting = "data.image_size" if config.image_size is None else f"phases.{phase.name}.image_size"
                raise UserError(f"phase {phase.name}: the task rotate needs square images, but {setting} is {shown_size(size)}; give one number")
            check_phase(phase.name, config, network, loaders.train)


def check_phase(name: str, config: PhaseConfig, network: Network, train: Shards) -> None:
    """UserError for what a phase cannot train of this network, or with these classes. The network may be on the meta device."""
    try:
        trained = select(network, list(config.train) if isinstance(config.train, tuple) else config.train)
        if config.optimizer == "solve" and trained != (heads := select(network, "head")):
            raise UserError(
                f"optimizer solve trains the head alone, but `train` has {counted(len(trained - heads), 'other parameter')}, such as "
                f"{min(trained - heads, default='none')}; use `train: head`, or optimizer sgd"
            )
        if config.task == "classify":
            class_weights(config.class_weights, list(train.manifest.class_counts), train.classes)
    except UserError as error:
        raise UserError(f"phase {name}: {error}") from error


def head_is_loaded(network: Network, transfer: TransferReport | None) -> bool:
    """The head has pretrained weights too."""
    return transfer is not None and not {f"{head}.weight" for head in network.heads} & set(transfer.fresh)


def check_blend(phase: Phase) -> None:
    """Called for a phase that begins with a new head: UserError where it is to be blended with the weights that entered it."""
    if phase.config.after == "blend":
        raise UserError(
            f"phases.{phase.name}.after is blend, but the phase begins with a new head: the networks at its start and at its end are different ones; train the "
            "head in a phase before it (`head: {train: head}`), or leave `after` out"
        )


# ---- data


def open_data(config: Config, runtime: Runtime, log: Log, *, again: bool = False) -> Splits:
    """The shards of a run; an image folder is packed into the cache first, by one process of each node. `again`: its start has said what is held out."""
    data = config.data
    assert data.train is not None
    labelled = any(phase.task != "rotate" for phase in config.phases.values())

    def opened(found: Mapping[str, str] | None = None) -> Splits:
        return open_splits(
            data,
            labelled=labelled,
            progress=runtime.is_main,
            log=log if runtime.is_main else to_nobody,
            notes=to_nobody if again else None,
            leads=runtime.local_rank == 0,
            found=found,
        )

    with runtime.together("data"):
        # Listing a source, packing it and checking its index are work on all of the data: one process of each node does it.
        splits = opened(dict(entry.split("=", 1) for entry in runtime.once_a_node(lambda: [f"{name}={place}" for name, place in opened().places().items()])))
        if labelled and splits.train.num_classes < 2:
            raise UserError(
                f"{data.train} has only one class, {splits.train.classes[0]!r}; a classifier needs at least two (without labels, use the task rotate)"
            )
    for name, (_, dataset_id) in zip(("training", "validation", "test"), splits.ids().items()):
        runtime.same(f"the {name} data", dataset_id)
    return splits


def build_dataloaders(config: Config, runtime: Runtime, splits: Splits, network: Network) -> DataLoaders:
    train = splits.train
    data, batch_size = config.data, batch_size_of(config.data, train.num_samples)
    ranks_here, cores = runtime.gather(gethostname()).count(gethostname()), rank_cores(runtime)
    with runtime.together("batches"):
        if batch_size < runtime.world_size:
            raise UserError(
                f"data.global_batch_size {batch_size} is smaller than the {runtime.world_size} processes, each of which needs a sample per step; "
                f"give --data.global_batch_size {runtime.world_size} or more, or start fewer processes"
            )
        facts = with_settings(config, network.preprocessing)
        views = {name: _view(data, replace(facts, image_size=size)) for name, size in phase_sizes(config, facts).items()}
        view = views[list(views)[-1]]
        if data.augment.function is not None:
            OwnFunction(data.augment.function).function  # noqa: B018  # a mistake in its name is told here, not by a loader process
        if data.decode == "device":
            device_decode.ready(view.train, runtime.device)
    with runtime.together("batches"):  # not in one with the above: ranks that fail there would miss `main_first` here
        loaders = DataLoaders(
            train=train,
            val=splits.val,
            test=splits.test,
            train_transform=view.train,
            val_transform=view.val,
            views=views if len({one.image_size for one in views.values()}) > 1 else {},
            evaluation_view=view.val.what_is_seen(*splits.val.shapes(exif=facts.reading.exif)[:2]),
            rank=runtime.rank,
            world_size=runtime.world_size,
            image_size=view.image_size,
            global_batch_size=batch_size,
            micro_batch_size=None if data.micro_batch_size == "auto" else data.micro_batch_size,
            workers=0,
            cores=cores,
            seed=config.run.seed,
            window=data.window,
            drop_last=data.last == "drop",
            balance=data.balance,
            members=runtime.main_first(lambda: class_members(train, data.balance, cache_dir=data.cache_dir, shared=data.cache_shared)),
            pin_memory=runtime.device.type == "cuda",
            decode_on=runtime.device if data.decode == "device" else None,
            max_train_steps=DEBUG_TRAIN_STEPS if config.run.debug else None,
            max_val_steps=DEBUG_VAL_STEPS if config.run.debug else None,
        )
        loaders.plan(0)
        loaders.workers = 0 if config.run.debug else choose_workers(data.workers, runtime, cores, batch_bytes=loaders.batch_bytes)
        while data.workers == "auto" and loaders.workers > 1 and not fits(loaders.shared_bytes, ranks=ranks_here):
            loaders.workers -= 1
        if runtime.accelerator is not None:  # a dry run loads nothing here
            check_shared_memory(loaders.shared_bytes, ranks=ranks_here, workers=loaders.workers)
        if demands := loaders.cache_demands(planned(config, loaders)):
            divide(demands, limit_in_bytes(data))
    return loaders


def _view(data: DataConfig, facts: Preprocessing) -> View:
    train = train_transform(
        image_size=facts.image_size,
        augment=data.augment,
        interpolation=facts.interpolation,
        crop_ratio=facts.crop_ratio,
        erase_fill=_mean_colour(facts.mean),
        fit=data.fit,
        reading=facts.reading,
    )
    val = eval_transform(
        image_size=facts.image_size,
        crop_ratio=facts.crop_ratio,
        interpolation=facts.interpolation,
        square=data.augment.preset == "cifar" and data.crop_ratio == "auto",
        fit=data.fit,
        fill=_mean_colour(facts.mean),
        reading=facts.reading,
    )
    return View(facts.image_size, train, val)


def planned(config: Config, loaders: DataLoaders) -> list[Phase]:
    return plan_phases(config.phases, steps_per_epoch=loaders.steps_per_epoch, num_classes=loaders.train.num_classes)


def _mean_colour(mean: tuple[float, ...]) -> tuple[int, ...]:
    """What random erasing and bars are filled with: zero after normalisation."""
    return tuple(round(255 * value) for value in mean)


# ---- model


def stored_preprocessing(config: Config, network: Network, checkpoint: Checkpoint) -> Preprocessing:
    """Of a run that continues: as it began. An older dtl stored none, and used what the network's published weights say, whatever was loaded."""
    stored = checkpoint.state.get("preprocessing")
    try:
        return with_settings(config, network.preprocessing) if stored is None else Preprocessing.from_values(stored)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.path}/state.json is damaged: preprocessing: {type(error).__name__} {error}") from error


def with_settings(config: Config, found: Preprocessing) -> Preprocessing:
    """The settings decide where they give a number."""
    size, crop_ratio = config.data.image_size, config.data.crop_ratio
    if size != "auto":
        found = replace(found, image_size=size, origins={**found.origins, "image_size": "data.image_size"})
    elif (told := size_in(config.model.options)) is not None:
        found = replace(found, image_size=told, origins={**found.origins, "image_size": "model.options"})
    if crop_ratio != "auto":
        found = replace(found, crop_ratio=crop_ratio, origins={**found.origins, "crop_ratio": "data.crop_ratio"})
    return found


def phase_sizes(config: Config, found: Preprocessing) -> dict[str, ImageSize]:
    """The size of the images in each phase; `found`: what holds for phases without one of their own."""
    return {name: phase.image_size or found.image_size for name, phase in config.phases.items()}


def delivered(config: Config, found: Preprocessing) -> Preprocessing:
    """What holds for the model that a run makes: its images have the size of the last phase."""
    name = list(config.phases)[-1]
    size = config.phases[name].image_size
    return found if size is None else replace(found, image_size=size, origins={**found.origins, "image_size": f"phases.{name}.image_size"})


@dataclass(frozen=True)
class DataFacts:
    """What the training images decide of the preprocessing."""

    reading: Reading
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None
    """Mean and std, measured where the images are not of three channels."""


def data_facts(config: Config, runtime: Runtime, splits: Splits) -> DataFacts:
    """The same on all ranks."""
    measured = None
    with runtime.together("data"):
        reading = reading_of(splits.train, config.data)
        if reading.channels != 3 and runtime.is_main:
            measured = channel_statistics(splits.train, reading)
    return DataFacts(reading, runtime.agree(measured))


def with_data(config: Config, found: Preprocessing, data: DataFacts) -> Preprocessing:
    """`with_settings`, and what the training images decide."""
    found, reading = with_settings(config, found), data.reading
    if data.statistics is not None:
        mean, std = data.statistics
        found = replace(found, mean=mean, std=std, origins={**found.origins, **dict.fromkeys(("mean", "std"), "measured on the training images")})
    known = "data.range" if config.data.range != "auto" else "data.range auto: the training images' values"
    return replace(found, reading=reading, origins={**found.origins, **({} if reading.range is None else {"pixels": known})})


def crop_matters(config: Config) -> bool:
    """Whether the crop ratio has an effect: see `data.fit` and the presets."""
    data = config.data
    return data.augment.preset == "light" or (data.fit == "crop" and not (data.augment.preset == "cifar" and data.crop_ratio == "auto"))


def build_network(config: Config, num_classes: int, runtime: Runtime) -> Network:
    """The network with its initial values, the same on every rank; no weights transferred yet. `config` is the user's own, not one that a run stored."""
    with runtime.together("model"):
        return _build(config, num_classes, options_of(config.model, config.data.channels))


def network_to_check(config: Config, num_classes: int) -> Network:
    """`build_network`, for questions about its layers: on the meta device, if it is no function of the user's, which may compute with its values."""
    on_meta = find(config.model.name, own=True).library != "function"
    return _build(config, num_classes, options_of(config.model, config.data.channels), meta=on_meta)


def network_for(preprocessing: Preprocessing, config: Config, network: Network, runtime: Runtime, *, pretrained: bool = False) -> Network:
    """`network`, as `build_network` made it, or another one that takes images of the size of each phase; with this preprocessing. `pretrained`: see `sized`."""

    def again(options: dict[str, Any], *, meta: bool) -> Network:
        return _build(config, network.num_outputs, options, meta=meta)

    with runtime.together("model"):
        wanted = delivered(config, preprocessing)
        named = wanted.origins.get("image_size", "")
        made = sized(network, wanted.image_size, again, pretrained=pretrained, setting=named if named.startswith("phases.") else "data.image_size")
        made = for_phases(made, phase_sizes(config, preprocessing), again)
    made.preprocessing = preprocessing
    return made


def _build(config: Config, num_classes: int, options: dict[str, Any], *, meta: bool = False) -> Network:
    torch.manual_seed(int(key(config.run.seed, "model")) >> 1)
    return build(config.model.name, num_classes=num_classes, init=config.model.init, options=options, meta=meta, own=True)


def sgd_where_unsolvable(config: Config, network: Network, num_images: int, runtime: Runtime) -> Config:
    """A recipe that comes with dtl solves its heads only where it can: other networks are trained by SGD. What the user has written himself stands."""
    for name, phase in config.phases.items():
        if phase.optimizer == "solve" and is_shipped(config, f"phases.{name}.optimizer"):
            with runtime.together("model"):
                why = _why_unsolvable(network, num_images) if runtime.is_main else ""
            if why := runtime.agree(why):
                config = with_sgd(config, name, why)
    return config


def _why_unsolvable(network: Network, num_images: int) -> str:
    """Quickly, with one random image; the phase itself looks closer (`PhaseFeatures.choose_cut`)."""
    head = network.module.get_submodule(network.heads[0])
    if not isinstance(head, nn.Linear) or head.bias is None:
        return f"the head {network.heads[0]} is no linear layer with a bias"
    if why := too_large(num_images, head.in_features, head.out_features):
        return why
    given: list[Any] = []
    modes, hook = {part: part.training for part in network.module.modules()}, head.register_forward_hook(lambda module, inputs, output: given.append(output))
    try:
        network.module.eval()
        with torch.random.fork_rng(devices=[]), torch.inference_mode(), contextlib.suppress(RuntimeError, ValueError, TypeError):  # of another image size
            output = network.module(torch.randn(image_shape(network.module, 1, network.preprocessing.image_size)))
            if len(given) != 1 or not isinstance(output, torch.Tensor) or output.shape != given[0].shape or not torch.equal(output, given[0]):
                return f"the output of the network is not the output of {network.heads[0]}"
    finally:
        hook.remove()
        for part, mode in modes.items():
            part.training = mode
    return ""


def place_network(config: Config, network: Network, runtime: Runtime) -> Normalise:
    """Onto the device, channels last where asked; returns what makes its input from images."""
    channels_last = to_device(network.module, runtime.device, channels_last=config.model.channels_last)
    if config.model.checkpoint_activations:
        enable_activation_checkpointing(network)
    return Normalise(network.preprocessing, runtime.device, channels_last=channels_last)


def read_pretrained(config: Config, network: Network, runtime: Runtime) -> SourceWeights | None:
    """The pretrained weights that the config names, the same file on every rank; not loaded yet."""
    if config.transfer is None:
        return None
    options = config.transfer
    with runtime.together("transfer"):
        weights = runtime.main_first(lambda: read_weights(source_named(options.source, network.name, named=config.model.name)))
        if options.adapter is not None:
            from dtl.checkpoint.transfer.source.adapter import with_adapter

            weights = with_adapter(weights, options.adapter)
    runtime.same("the pretrained weights' file", weights.fingerprint)
    return weights


def load_pretrained(
    config: Config, network: Network, runtime: Runtime, train: Shards, log: Log, weights: SourceWeights | None = None, folder: Path | None = None
) -> TransferReport | None:
    """Load the pretrained weights that the config names; the same on every rank, or not at all. `weights`: what `read_pretrained` gave, if it was called.
    `folder`: where the report of a refusal is written, whose beginning is logged."""
    if folder is not None and runtime.is_main:
        (folder / REFUSED_TRANSFER).unlink(missing_ok=True)  # of an earlier start
    weights = weights or read_pretrained(config, network, runtime)
    if weights is None:
        return None
    with runtime.together("transfer"):
        # Planned once: what one process decided holds for all.
        plan = _plan_transfer(config, network, train, weights) if runtime.is_main else None
    plan = runtime.agree(plan)
    assert plan is not None
    runtime.same("the plan of the transfer", plan.digest)
    with runtime.together("transfer"):
        if plan.refusals:
            raise _refused(TransferReport.of(plan, weights), weights, network, folder, log if runtime.is_main else to_nobody)
        preprocessing = {"mean": network.preprocessing.mean, "std": network.preprocessing.std}
        report = apply_plan(plan, weights, network.module, target_preprocessing=preprocessing)
    runtime.same("the transferred weights", report.checksum)
    new = [head for head in network.heads if f"{head}.weight" in report.fresh]
    if head_init(config) == "zero" and isinstance(network.module.get_submodule(network.heads[0]), nn.Linear) and new:
        initialize(map(network.module.get_submodule, new), "zero")
        note = f"the new head {some(new)} starts at zero; --model.init library leaves it as the network's library draws it"
        report = replace(report, plan=replace(report.plan, notes=(*report.plan.notes, note)))
    if runtime.is_main:
        for line in report.lines():
            log(line)
    return report


def _refused(report: TransferReport, weights: SourceWeights, network: Network, folder: Path | None, log: Log) -> TransferRefused:
    """One line for all ranks; the table's beginning in the log, and all of it in a file."""
    from dtl.checkpoint.transfer.which import looks_like

    for line in report.short_lines():
        log(line)
    if folder is not None and log is not to_nobody:
        report.to_json(folder / REFUSED_TRANSFER)
    where = "" if folder is None else f" (the whole report: {folder / REFUSED_TRANSFER})"
    likely = looks_like(specs_of(weights.tensors), network.name)
    hint = "" if likely is None else f"; the weights look like {likely}"
    return TransferRefused(f"transfer from {report.source} refused{where}: {report.plan.refusals[0]}{hint}")


def _plan_transfer(config: Config, network: Network, train: Shards, weights: SourceWeights) -> TransferPlan:
    options = config.transfer
    assert options is not None
    from dtl.checkpoint.transfer.source.arch import source_network

    source_model = source_network(options.source_arch, weights, network.num_outputs) if options.source_arch else None
    return plan_weights(
        weights,
        network.module,
        options,
        mapping=options.map,
        source_model=source_model,
        heads=network.heads,
        target_classes=list(train.classes),
        image_size=delivered(config, with_settings(config, network.preprocessing)).image_size,
    )
