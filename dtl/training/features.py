"""A frozen backbone gives the same features each epoch: compute them once, on all ranks, and train the head on them.

"Feature extraction" in the tutorials runs the whole network for each image and epoch, to train its last layer. N samples, V views of
each, R ranks, m slots of a rank. Features are float32 [V, N, ...] in a memory-mapped file of each node, under a name made of all that
they depend on: frozen weights, data, transform, precision, and the seed where views are drawn.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from dtl.config import PhaseConfig
from dtl.config.load import SGD_EPOCHS
from dtl.config.models import ImageSize
from dtl.data.loading.batch import Batch, Transform
from dtl.data.loading.loader import StepLoader
from dtl.data.near import scene_pairs
from dtl.data.remote.address import own_folder
from dtl.data.sampling.plan import EpochPlan, MicroBatch, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.twins import Twin, Twins
from dtl.distributed.runtime import Runtime
from dtl.distributed.watchdog import Heartbeat
from dtl.errors import DamagedSample, UserError
from dtl.files import fsync_folder, temporary_suffix
from dtl.models.network import Network, Normalise, image_shape
from dtl.optim.solve import too_large
from dtl.text import counted
from dtl.training.active import ActivePhase
from dtl.training.dataloaders import DataLoaders
from dtl.training.evaluate import ForwardPass
from dtl.training.phases import Phase
from dtl.untrusted import Count, Record, Text, as_utf8, check_regular

FEATURES_VERSION = 1
_PROBE_IMAGES = 2
_MOST_COMPARED = 20_000  # images, beside other work: some seconds
_EXCHANGE_BYTES = 64 * 2**20


# ---- where the network is cut


def find_cut(network: Network, trainable: Collection[str], *, image_size: ImageSize) -> tuple[str | None, str]:
    """(name of the module to train on cached features, "") or (None, why not).

    It is the head, with what stands before it in a container of its own (the dropout in `classifier` of MobileNetV2). All before it must
    give the same values each time, and nothing may come after it: both are tried on a random batch, with the modules as they train.
    """
    module, head = network.module, network.heads[0]
    own = {f"{head}.{name}" for name, _ in module.get_submodule(head).named_parameters()}
    if set(trainable) != own:
        return None, "more than the head is trained"
    cut = head
    while "." in cut and {name for name, _ in module.named_parameters() if name.startswith(cut.rpartition(".")[0] + ".")} == own:
        cut = cut.rpartition(".")[0]
    if any(getattr(part, "running_mean", None) is not None and part.training for part in module.modules()):
        return None, "norm layers of the backbone update their running statistics (model.freeze_norm is false)"
    return _tried(module, cut, image_size)


def _tried(module: nn.Module, cut: str, image_size: ImageSize) -> tuple[str | None, str]:
    tail = module.get_submodule(cut)
    device = next(module.parameters()).device
    modes = {part: part.training for part in tail.modules()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        images = torch.randn(image_shape(module, _PROBE_IMAGES, image_size), device=device)
        tail.eval()  # its dropout stays with the head
        try:
            first, second = Backbone(module, cut), Backbone(module, cut)
            features, again = first(images), second(images)
            expected = tail(features)
        except _NotCuttable as problem:
            return None, str(problem)
        finally:
            for part, mode in modes.items():
                part.training = mode
    if not features.isfinite().all():
        return None, "the frozen part gives values that are not finite (its weights are too large, or not finite)"
    if not torch.equal(features, again):
        return None, "the frozen part is random (dropout or stochastic depth)"
    if not isinstance(first.output, Tensor) or first.output.shape != expected.shape or not torch.equal(first.output, expected):
        return None, f"the output of the network is not the output of {cut}"
    return cut, ""


def _before_linear(network: Network, cut: str | None, why_not: str, *, image_size: ImageSize) -> tuple[str | None, str]:
    """What `find_cut` gave, with the cut where the part behind it is a linear layer, or None and why it cannot be. The network evaluates."""
    head = network.module.get_submodule(network.heads[0])
    if not isinstance(head, nn.Linear) or head.bias is None:
        return None, f"the head {network.heads[0]} is no linear layer with a bias"
    if cut is None:
        return None, why_not
    features = torch.randn(_PROBE_IMAGES, head.in_features, device=head.weight.device)
    with torch.inference_mode(), contextlib.suppress(RuntimeError, ValueError, TypeError, IndexError):
        if torch.equal(network.module.get_submodule(cut)(features), head(features)):
            return cut, ""
    return _tried(network.module, network.heads[0], image_size)  # a pooling stands in its container


class _NotCuttable(Exception):
    """The network cannot be cut before its head."""


class Backbone:
    """The network up to what `cut` is given: images [B,3,S,S] -> features [B, ...]."""

    def __init__(self, module: nn.Module, cut: str) -> None:
        self.module, self.cut = module, cut
        self.output: Any = None
        self._inputs: list[tuple[Any, ...]] = []

    def __call__(self, images: Tensor) -> Tensor:
        self._inputs.clear()
        # With keyword arguments a tail would be called otherwise than we call it: such a network is not cut.
        hook = self.module.get_submodule(self.cut).register_forward_pre_hook(self._take, with_kwargs=True)
        try:
            self.output = self.module(images)
        finally:
            hook.remove()
        if len(self._inputs) != 1 or len(self._inputs[0]) != 1 or not isinstance(self._inputs[0][0], Tensor):
            raise _NotCuttable(f"{self.cut} is not called exactly once with one tensor")
        features: Tensor = self._inputs[0][0]
        if features.shape[0] != images.shape[0]:
            raise _NotCuttable(f"{self.cut} does not get one row per image")
        return features

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs.append(args if not kwargs else (*args, *kwargs.values(), None))


def decide(name: str, config: PhaseConfig, *, why_not: str, fixed: bool, num_epochs: float) -> tuple[int, str]:
    """(number of cached views, or 0 for none; what to log). `fixed`: the training images are the same each epoch.

    UserError where caching is demanded and cannot be.
    """
    demanded, head_only = config.cache_features is True, why_not != "more than the head is trained"
    if config.cache_features is False:
        return 0, ""
    if not why_not and (config.mixup or config.cutmix):
        why_not = "mixup and cutmix mix images"
    if not why_not and config.task != "classify":
        why_not = f"the task {config.task} changes the images"
    if why_not:
        if demanded:
            raise UserError(f"phases.{name}.cache_features is true, but {why_not}")
        return 0, f"features are computed each epoch: {why_not}" if head_only else ""
    views = 1 if fixed else config.views
    if not demanded and num_epochs <= views:
        return 0, ""
    if not demanded and not fixed and views == 1:
        return 0, (
            f"features are computed each epoch, since images are augmented at random; phases.{name}.views 4 caches four views of each, "
            f"phases.{name}.cache_features true one without augmentation"
        )
    return views, ""


# ---- the cached features


@dataclass(frozen=True)
class Part:
    """What is to be computed of one split."""

    split: str
    shards: Shards
    transform: Transform
    epochs: tuple[int, ...]
    """The epoch that each view's augmentation is drawn for."""


@dataclass
class FeatureCache:
    """Computes the features of a phase once, or finds them."""

    place: Path
    runtime: Runtime
    normalise: Normalise
    seed: int
    image_size: ImageSize
    workers: int
    batch_size: int
    """Images that a rank passes forward at once."""
    before_step: Callable[[list[Batch]], bool]
    """Makes all ranks agree, takes damaged samples, and says whether to stop."""
    heart: Heartbeat
    log: Callable[[str], None]

    def folder(self, module: nn.Module, cut: str, parts: list[Part], *, frozen: str) -> Path | None:
        """Where the features lie, computed if they are not there. `frozen`: a checksum of the frozen weights. None: stop (on all ranks)."""
        facts = {
            "version": FEATURES_VERSION,
            "cut": cut,
            "frozen": frozen,
            "precision": self.runtime.precision,
            "seed": None if all(part.transform.is_fixed for part in parts) else self.seed,  # seeds of a study share what is not drawn
            "parts": [[p.split, p.shards.dataset_id, p.shards.num_samples, p.shards.manifest.pixels is None, p.transform.describe(), p.epochs] for p in parts],
            "mean_std": self.normalise.facts,
        }
        folder = self.place / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
        if all(self.runtime.gather((folder / FACTS_NAME).is_file())):
            self.log(f"cached features are read from {folder}")
            return folder
        started = time.monotonic()
        temporary: Path | None = None
        try:
            with self.runtime.together("features"):
                temporary = Path(self.runtime.once_a_node(lambda: [str(self._temporary(folder))])[0])
            damaged = {}
            for part in parts:
                found = self._compute(module, cut, part, temporary)
                if found is None:
                    return None
                damaged[part.split] = found
            with self.runtime.together("features"):
                if self.runtime.leads_node:
                    (temporary / FACTS_NAME).write_text(json.dumps({**facts, "damaged": damaged}), encoding="utf-8")
                    fsync_folder(temporary)
                    _take_place(temporary, folder)
            self.runtime.barrier()
        finally:
            if temporary is not None and self.runtime.leads_node:
                shutil.rmtree(temporary, ignore_errors=True)
        num = sum(part.shards.num_samples * len(part.epochs) for part in parts)
        self.log(f"features of {counted(num, 'image')} computed once in {time.monotonic() - started:.1f} s, kept in {folder}")
        return folder

    def _temporary(self, folder: Path) -> Path:
        temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{temporary_suffix()}")
        temporary.mkdir(parents=True)
        return temporary

    def _compute(self, module: nn.Module, cut: str, part: Part, folder: Path) -> list[Any] | None:
        """Write the part's features into `folder`, this node's; returns its damaged samples, [view, sample, facts].

        Each rank writes its own rows into the file that the ranks of its node share, while the device computes the next step's; nothing but the flags
        of a step is all-reduced. Nodes exchange their rows at the end.
        """
        runtime, num_views = self.runtime, len(part.epochs)
        backbone, damaged = Backbone(module, cut), list[tuple[int, int, dict[str, Any]]]()
        # An image is read and decoded once, and all its views are passed forward together.
        size, epoch = -(-self.batch_size // num_views), part.epochs[0]
        plan = EpochPlan(part.shards.shard_sizes, seed=self.seed, epoch=epoch, global_batch_size=size * runtime.world_size, shuffle=False)
        layout = RankLayout.for_plan(plan, num_ranks=runtime.world_size, micro_batch_size=size)
        loader = StepLoader(
            part.shards,
            part.transform,
            plans=lambda _: plan,
            layout=layout,
            rank=runtime.rank,
            image_size=self.image_size,
            seed=self.seed,
            workers=self.workers,
            pin_memory=runtime.device.type == "cuda",
            views=part.epochs,
        )
        values: Any = None
        before: tuple[int, _Copied] | None = None
        stream = loader.steps(epoch, 0, plan.num_steps)
        try:
            for step, batches in enumerate(stream):
                if self.before_step(batches):
                    return None
                copied = _Copied(torch.cat([self._features(backbone, batch, num_views) for batch in batches], dim=1))
                if values is None:
                    values = self._shared_file(folder / f"{part.split}.npy", (num_views, part.shards.num_samples, *copied.shape[2:]))
                if before is not None:
                    _write_rows(values, plan, layout, runtime.rank, *before)
                before = step, copied
                damaged += [(step, sample, _facts(damage)) for batch in batches for sample, damage in batch.bad]
            if before is not None:
                _write_rows(values, plan, layout, runtime.rank, *before)
        finally:
            stream.close()  # type: ignore[attr-defined]
        with runtime.together("features"):  # which also waits until all rows are written
            values.flush()
        self._exchange_nodes(values, plan, layout)
        everyones = [(step, rank, sample, facts) for rank, found in enumerate(runtime.gather(damaged)) for step, sample, facts in found]
        everyones.sort(key=lambda entry: entry[:2])
        return [[view, sample, facts] for _, _, sample, facts in everyones for view in range(num_views)]

    def _features(self, backbone: Backbone, batch: Batch, num_views: int) -> Tensor:
        """float32 [V, B, ...] on the device, real slots first, pads behind, in slot order."""
        rows = ForwardPass(backbone, self.normalise, self.runtime)(batch.images).contiguous()
        return rows.view(num_views, -1, *rows.shape[1:])

    def _shared_file(self, path: Path, shape: tuple[int, ...]) -> Any:
        """The file of this node's ranks, mapped; its leader creates it."""
        with self.runtime.together("features"):
            if self.runtime.leads_node:
                self._file(path, shape)
        with self.runtime.together("features"):
            return np.load(path, mmap_mode="r+")

    def _exchange_nodes(self, values: Any, plan: EpochPlan, layout: RankLayout) -> None:
        """Give each node's file the rows of the others, in messages of some megabytes between one rank of each.

        All ranks wait for each message, so that the watchdog sees progress on all of them: over a slow network the whole may take longer than its limit.
        """
        runtime = self.runtime
        runtime.join_nodes()
        steps = max(1, _EXCHANGE_BYTES // max(1, values[:, :1].nbytes * plan.largest_step))
        for first in range(0, plan.num_steps if len(runtime.nodes) > 1 else 0, steps):
            self.heart.enter("features")
            for leader, ranks in runtime.nodes.items() if runtime.leads_node else ():
                spans = [_span(plan, layout, step, rank) for step in range(first, min(first + steps, plan.num_steps)) for rank in ranks]
                numbers = np.concatenate([np.arange(*span) for span in spans])
                rows = torch.from_numpy(values[:, numbers])
                runtime.from_node(leader, rows)
                if leader != runtime.rank:
                    values[:, numbers] = rows.numpy()
            runtime.barrier()
        self.heart.enter("features")
        if len(runtime.nodes) > 1 and runtime.leads_node:
            values.flush()
        runtime.barrier()

    def _file(self, path: Path, shape: tuple[int, ...]) -> None:
        size, free = 4 * int(np.prod(shape)), shutil.disk_usage(path.parent).free
        if size > free:
            raise UserError(
                f"the features of {shape[1]:,} images in {counted(shape[0], 'view')} take {size / 2**30:.1f} GiB, and {path.parent.parent} has "
                f"{free / 2**30:.1f} GiB free; use fewer views, another data.cache_dir, or cache_features false"
            )
        open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)  # writing into a map on a full disk would be a SIGBUS


class _Copied:
    """Rows [V, B, ...] on their way to host memory; on a GPU the copy is only queued."""

    def __init__(self, rows: Tensor) -> None:
        self.shape, self._rows, self._event = rows.shape, rows, None
        if rows.is_cuda:
            self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(rows.device))

    def numpy(self) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
        return self._rows.numpy()


def _span(plan: EpochPlan, layout: RankLayout, step: int, rank: int) -> tuple[int, int]:
    """The samples [first, end) of a rank in a step; they are not shuffled."""
    first, end = plan.step_bounds(step)
    low, high = layout.slots(end - first, rank)
    return first + low, first + high


def _write_rows(values: Any, plan: EpochPlan, layout: RankLayout, rank: int, step: int, copied: _Copied) -> None:
    first, end = _span(plan, layout, step, rank)
    values[:, first:end] = copied.numpy()[:, : end - first]


def _facts(damage: DamagedSample) -> dict[str, Any]:
    return {"shard": as_utf8(damage.shard), "key": as_utf8(damage.key), "offset": damage.offset, "reason": as_utf8(damage.reason)}


def _take_place(temporary: Path, folder: Path) -> None:
    """Give the finished folder its name, unless another node was first."""
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / FACTS_NAME).is_file():
            raise
    fsync_folder(folder.parent)


# ---- batches of cached features


FACTS_NAME = "facts.json"


class _Damage(Record):
    shard: Text
    key: Text
    offset: Count
    reason: Text


class _CachedFacts(Record):
    """facts.json, as far as it is read again: of each split, the damaged samples of each view."""

    damaged: dict[Text, tuple[tuple[Count, Count, _Damage], ...]]


def _mapped(path: Path, num_samples: int) -> Any:
    """float32 [V, N, ...], mapped; ValueError for anything else, without unpickling it."""
    check_regular(path, path.stat())
    values = np.load(path, mmap_mode="r")
    if not isinstance(values, np.ndarray) or values.dtype != np.float32 or values.ndim < 3 or values.shape[1] != num_samples or not values.shape[0]:
        raise ValueError("it does not hold the features of these images")
    return values


class FeatureDataset:
    """For `StepLoader`: batches whose `images` are features, float32 [B, ...]. The view of an epoch is (epoch - first) modulo V."""

    def __init__(self, shards: Shards, folder: Path, split: str, first_epoch: int) -> None:
        self.shards, self.first_epoch = shards, first_epoch
        try:
            self.values: Any = _mapped(folder / f"{split}.npy", shards.num_samples)
            damage = _CachedFacts.read(folder / FACTS_NAME).damaged[split]
        except (OSError, ValueError, EOFError, KeyError, UserError) as error:
            raise UserError(f"the cached features in {folder} are damaged ({split}: {error}): delete this folder, and run again") from None
        self.damaged = {(view, sample): DamagedSample(**asdict(facts)) for view, sample, facts in damage}

    def __getitems__(self, request: MicroBatch) -> Batch:
        view = (request.epoch - self.first_epoch) % len(self.values)
        labels = np.asarray(self.shards.labels[request.samples], np.int64)
        labels = np.where((labels < 0) | (labels >= self.shards.num_classes), 0, labels)  # of a damaged sample, at weight 0
        weights = request.weights.copy()
        bad = []
        if self.damaged:
            for slot, sample in enumerate(request.samples.tolist()):
                if (view, sample) in self.damaged:
                    weights[slot] = 0.0
                    if request.slots[slot] >= 0:
                        bad.append((sample, self.damaged[view, sample]))
        return Batch(
            images=torch.from_numpy(self.values[view][request.samples]),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(weights),
            samples=torch.from_numpy(request.samples),
            slots=torch.from_numpy(request.slots),
            epoch=request.epoch,
            step=request.step,
            bad=bad,
        )


# ---- twins


def find_twins(train: FeatureDataset, val: FeatureDataset) -> list[Twin]:
    """Validation images with a twin among the training images, by their cached features; none where these are of augmented views, or of very many images."""
    num_train, num_val = train.shards.num_samples, val.shards.num_samples
    if len(train.values) > 1 or num_train + num_val > _MOST_COMPARED:
        return []
    rows = np.concatenate([one.values[0].reshape(one.shards.num_samples, -1) for one in (train, val)])
    for start, one in ((0, train), (num_train, val)):
        rows[[start + sample for _, sample in one.damaged]] = np.nan
    pairs = scene_pairs(rows)
    found: dict[int, Twin] = {}
    for first, second, cosine in zip(pairs.first.tolist(), pairs.second.tolist(), pairs.cosine.tolist()):
        sample = second - num_train
        if first < num_train <= second and (sample not in found or cosine > found[sample].near):
            found[sample] = Twin("val", sample, first, cosine)
    return [found[sample] for sample in sorted(found)]


# ---- of a phase


# Features need no gradients: a rank can take more at once than a training step's share, and small shares would waste the machine.
_LEAST_BATCH = 32


@dataclass
class PhaseFeatures:
    """Of one run; `cache_dir` None turns caching off (debugging)."""

    runtime: Runtime
    network: Network
    loaders: DataLoaders
    normalise: Normalise
    seed: int
    cache_dir: Path | None
    heart: Heartbeat
    log: Callable[[str], None]
    twins: Twins | None = None
    """In the main process."""

    def choose_cut(self, phase: Phase, trainable: frozenset[str]) -> str | None:
        """The module that `phase` should train on cached features; None to train on images. The same on all ranks."""
        config = phase.config
        if (self.cache_dir is None and config.optimizer != "solve") or config.cache_features is False:
            return None
        solves = config.optimizer == "solve"
        if solves:
            self.network.module.eval()  # no step is taken: not even the head's dropout is wanted
        cut, why_not = find_cut(self.network, trainable, image_size=self.loaders.image_size)
        if solves:
            cut, why_not = _before_linear(self.network, cut, why_not, image_size=self.loaders.image_size)
        cut, why_not = self.runtime.agree((cut, why_not))
        if solves:
            self._check_solvable(phase, why_not)
            return cut
        num_epochs = phase.num_steps / phase.steps_per_epoch
        views, line = decide(phase.name, config, why_not=why_not, fixed=self.loaders.train_transform.is_fixed, num_epochs=num_epochs)
        if line:
            self.log(f"phase {phase.name}: {line}")
        return cut if views else None

    def fill(self, active: ActivePhase, before_step: Callable[[list[Batch]], bool]) -> bool:
        """Compute or find the features of the phase, and feed them from now on. False: all ranks are to stop."""
        phase, loaders = active.phase, self.loaders
        if active.cut is None:
            self._report_twins()
            return True
        assert self.cache_dir is not None  # run.debug solves no head
        fixed = loaders.train_transform.is_fixed
        epochs: tuple[int, ...] = (0,)
        if fixed or phase.config.views == 1:
            transform = loaders.train_transform if fixed else loaders.val_transform
        else:
            epochs, transform = tuple(range(phase.first_epoch, phase.first_epoch + phase.config.views)), loaders.train_transform
        cache = FeatureCache(
            place=own_folder(self.cache_dir) / "features",
            runtime=self.runtime,
            normalise=self.normalise,
            seed=self.seed,
            image_size=loaders.image_size,
            workers=loaders.workers,
            batch_size=max(_LEAST_BATCH, loaders.layout(phase).micro_batch_size),
            before_step=before_step,
            heart=self.heart,
            log=self.log,
        )
        parts = [Part("train", loaders.train, transform, epochs), Part("val", loaders.val, loaders.val_transform, (0,))]
        folder = cache.folder(self.network.module, active.cut, parts, frozen=active.frozen_checksum)
        if folder is None:
            return False
        # The views are those of the phase's first epochs, and go round. Evaluation is epoch 0 of its own.
        train, val = FeatureDataset(loaders.train, folder, "train", phase.first_epoch), FeatureDataset(loaders.val, folder, "val", 0)
        loaders.cached = {"train": train, "val": val}
        self._report_twins((train, val))
        return True

    def _report_twins(self, cached: tuple[FeatureDataset, FeatureDataset] | None = None) -> None:
        """One line a run, of the first phase that has something to say."""
        if self.twins is None:
            return
        try:
            if cached is not None and not self.twins.are_known_by("cosine"):
                self.twins.record("cosine", find_twins(*cached))
            line = self.twins.line()
        except (OSError, UserError) as error:  # a run does not fail by what it says about its data
            line = f"twins of validation images were not looked for: {error}"
        if line and not self.twins.told:
            self.log(line)
            self.twins.told = True

    # ---- a head that is solved

    def _check_solvable(self, phase: Phase, why_not: str) -> None:
        """UserError, with what trains it by SGD, where the phase's head cannot be solved."""
        if self.cache_dir is None:
            why_not = "run.debug caches no features"
        elif not why_not:
            head = self.network.module.get_submodule(self.network.heads[0])
            assert isinstance(head, nn.Linear)
            why_not = too_large(self.loaders.train.num_samples, head.in_features, head.out_features)
        if why_not:
            name = f"--phases.{phase.name}"
            raise UserError(f"phases.{phase.name}.optimizer is solve, but {why_not}; train it: {name}.optimizer sgd {name}.epochs {SGD_EPOCHS}")
