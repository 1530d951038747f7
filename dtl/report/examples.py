"""Images of a finished run, through the run's own loader, transforms and model: what it trained on, and what it predicts for others.

B images of a batch, S pixels of a side, K classes. One process, no workers; memory is bounded by one batch and by 16 bytes a sample.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtl.checkpoint.resume.model_folder import load_network, may_build
from dtl.config import Config
from dtl.config.models import shown_size, sides
from dtl.config.own import MAX_IMAGE_SIZE, is_function
from dtl.data.loading.batch import Batch
from dtl.data.loading.loader import BatchDataset
from dtl.data.sampling.plan import MicroBatch
from dtl.data.shards.index import Shards
from dtl.data.transforms.mix import mix_batch
from dtl.distributed.runtime import Runtime
from dtl.errors import UnreachableSample, UserError
from dtl.keyed import permutation, uniform
from dtl.models.build import build as build_model
from dtl.models.build import options_of
from dtl.models.model_json import read_model_json
from dtl.models.preprocessing import Preprocessing
from dtl.optim.losses import Loss
from dtl.report.record import RunRecord
from dtl.report.style import percent
from dtl.runs.predictions import ImagePredictions
from dtl.text import Log, to_nobody
from dtl.training import build
from dtl.training.dataloaders import DataLoaders
from dtl.training.evaluate import ForwardPass, PredictionRows, Sums
from dtl.training.phases import Phase, Task, task_named
from dtl.untrusted import read_json

Ints = npt.NDArray[np.int64]
NUM_TILES = 24
_BATCH = {"cpu": 32, "cuda": 128}


@dataclass(frozen=True)
class Tile:
    """One image with its words. `right` is None where nothing was predicted."""

    pixels: npt.NDArray[np.uint8]
    """[S, S, 3]"""
    caption: str
    note: str = ""
    right: bool | None = None
    file: str = ""
    """Where the image came from."""

    @property
    def words(self) -> str:
        """For those who do not see the picture."""
        mark = {None: "", True: "right: ", False: "wrong: "}[self.right]
        return ", ".join([f"{mark}{self.caption}", *(words for words in (self.note, self.file) if words)])


@dataclass(frozen=True)
class TrainingView:
    """How images look to the network in `phases` (which look alike)."""

    phases: tuple[str, ...]
    words: str
    tiles: list[Tile]


@dataclass
class Examples:
    """The data of a run, opened."""

    config: Config
    runtime: Runtime
    loaders: DataLoaders
    phases: list[Phase]
    names: list[str]
    """Display names of the classes."""
    trust: bool = False
    """Call the function that a model.json of another user names."""
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        self.seed = self.config.run.seed

    @classmethod
    def open(cls, record: RunRecord, *, device: str = "auto", trust: bool = False, log: Log = to_nobody) -> Examples:
        """UserError where the data is gone, or is not what the run was trained on."""
        if record.stored is None:
            raise UserError("the run's config.yaml is missing or cannot be used")
        record.stored.require("data.train", "data.val", "data.test", "data.group.regex")
        if record.stored.config.data.train is None:
            raise UserError("the run's config.yaml names no training data")
        config = _at_home(record.stored.config, record.path)
        own = record.stored.own or _is_trusted(config.model.name, record.path / "model", trust, log)
        runtime = Runtime.alone(config.run.device if device == "auto" else device)
        data = build.open_data(config, runtime, log, again=True)
        train = data.train
        made_with = None if record.model is None else record.model.made_by.get("data")
        if made_with not in (None, train.dataset_id):
            raise UserError(f"data.train ({config.data.train}) is no longer the data that the run was trained on")
        network = build_model(config.model.name, num_classes=train.num_classes, options=options_of(config.model, config.data.channels), meta=True, own=own)
        network.preprocessing = _preprocessing(record, network.preprocessing, own=own)
        loaders = build.build_dataloaders(config, runtime, data, network)
        names = [train.manifest.display_names.get(name, name) for name in train.classes]
        return cls(config, runtime, loaders, build.planned(config, loaders), names, trust)

    # ---- training images

    def training_views(self, num_tiles: int = NUM_TILES) -> list[TrainingView]:
        """The first images of each kind of phase: phases with the same task and mixing look alike."""
        kinds: dict[tuple[object, ...], list[Phase]] = {}
        for phase in self.phases:
            kinds.setdefault((phase.config.task, phase.config.mixup, phase.config.cutmix, self._unaugmented(phase), self.loaders.size_of(phase)), []).append(
                phase
            )
        views = []
        for phases in kinds.values():
            self.loaders.use(phases[0])
            views.append(self._training_view(phases, num_tiles))
        self.loaders.use(self.phases[-1])
        return views

    def _training_view(self, phases: Sequence[Phase], num_tiles: int) -> TrainingView:
        phase, tiles = phases[0], list[Tile]()
        for step in range(min(num_tiles, phase.num_steps, phase.steps_per_epoch)):
            if len(tiles) + phase.task.expansion > num_tiles:
                break
            tiles += self._step_tiles(phase, step, (num_tiles - len(tiles)) // phase.task.expansion)
        mixed = bool(phase.config.mixup or phase.config.cutmix)
        words = "each image in its four rotations" if phase.task.name == "rotate" else "with mixup or cutmix" if mixed else ""
        if self._unaugmented(phase):
            words = "not augmented, because their features are cached"
        return TrainingView(tuple(phase.name for phase in phases), words, tiles)

    def _step_tiles(self, phase: Phase, step: int, most: int) -> list[Tile]:
        """At most `most` first images of one step of the phase's first epoch, as its task makes them."""
        samples = self.loaders.plan(phase.first_epoch).step_samples(step)[: most + most % 2]  # whole pairs, which may be mixed
        transform = self.loaders.val_transform if self._unaugmented(phase) else self.loaders.train_transform
        batch = self._load(self.loaders.train, transform, samples, epoch=phase.first_epoch, step=step)
        images, labels, weights = phase.task.prepare(batch.images, batch.labels, batch.weights)
        names = self._names(phase.task)
        shares = torch.nn.functional.one_hot(labels, phase.num_outputs).float()
        if phase.config.mixup or phase.config.cutmix:
            floats, shares = mix_batch(
                images.float(), shares, batch.slots, weights=weights, mixup=phase.config.mixup, cutmix=phase.config.cutmix,
                seed=self.seed, epoch=batch.epoch, step=batch.step,
            )  # fmt: skip
            images = floats.round().clamp(0, 255).to(torch.uint8)
        # The turns of one image side by side, not all images of one turn.
        rows = np.arange(len(images)).reshape(phase.task.expansion, -1).T.ravel()
        tiles = [Tile(_pixels(images[row]), _shares_text(shares[row], names)) for row in rows.tolist() if weights[row] > 0]
        return tiles[: most * phase.task.expansion]

    def _unaugmented(self, phase: Phase) -> bool:
        """Its features were cached from images as evaluation sees them (dtl.training.features), whatever augmentation is set."""
        config = phase.config
        return config.cache_features is True and config.views == 1 and not self.loaders.train_transform.is_fixed

    # ---- validation images

    def predict(self, model: Path, *, max_images: int, seconds: float) -> tuple[ImagePredictions, dict[str, Any]]:
        """Ask the model folder about at most `max_images` validation images, drawn by key, for about `seconds`: for a run that kept no predictions.

        Returns them with their metrics. It computes in float32.
        """
        facts = read_model_json(model)
        task = self.task_of(facts.classes)
        forward = ForwardPass.of(load_network(model, trust=self.trust)[1], self.runtime)
        samples = draw_samples(self.loaders.val.num_samples, max_images, self.seed)
        loss, sums, rows = Loss(), Sums(len(facts.classes), self.runtime.device), PredictionRows()
        for outputs in forward.over(self._batches(samples, seconds), task):
            losses, _ = loss(outputs.logits, outputs.labels)
            sums.update(outputs.logits, outputs.labels, outputs.weights, losses)
            rows.add(outputs, losses)
        found = rows.all_ranks(self.runtime)
        if not len(found):
            raise UserError("none of the validation images could be read")
        return found, sums.result()

    def _batches(self, samples: Ints, seconds: float) -> Iterator[Batch]:
        """Batches until the samples or the seconds are used up; one batch at least."""
        size, ends = _BATCH[self.runtime.device.type], time.monotonic() + seconds
        for start in range(0, len(samples), size):
            yield self._load(self.loaders.val, self.loaders.val_transform, samples[start : start + size], epoch=0)
            if time.monotonic() >= ends:
                return

    def tiles(self, found: ImagePredictions, chosen: Ints, names: Sequence[str], task: Task, *, with_files: bool = False) -> list[Tile]:
        """The images of these rows of `found`, loaded once more: keeping all of them would cost memory."""
        if not len(chosen):
            return []
        samples = found.samples[chosen]
        batch = self._load(self.loaders.val, self.loaders.val_transform, samples, epoch=0)
        tiles = []
        for place, row in enumerate(chosen.tolist()):
            label, predicted = int(found.labels[row]), int(found.predicted[row])
            image = batch.images[place]
            if task.name == "rotate":
                image = torch.rot90(image, label, dims=(1, 2))
            sure, right = percent(float(found.probability[row]), 0), label == predicted
            file = self.loaders.val.name(int(samples[place])) if with_files else ""
            tiles.append(Tile(_pixels(image), names[predicted], sure if right else f"{sure}, true: {names[label]}", right, file))
        return tiles

    def _load(self, shards: Shards, transform: Any, samples: Ints, *, epoch: int, step: int = 0) -> Batch:
        samples = np.asarray(samples, np.int64)
        request = MicroBatch(epoch, step, samples, np.arange(len(samples)), np.ones(len(samples), np.float32))
        batch = BatchDataset(shards, transform, image_size=self.loaders.image_size, seed=self.seed).__getitems__(request)
        for _, damage in batch.bad:
            if isinstance(damage, UnreachableSample):
                raise damage
        return batch

    def _names(self, task: Task) -> list[str]:
        return self.names if task.name == "classify" else list(task.class_names(self.names))

    def task_of(self, classes: Sequence[str]) -> Task:
        """The model folder belongs to the last phase."""
        task = task_named(self.phases[-1].config.task)
        if task.num_outputs(self.loaders.val.num_classes) != len(classes):
            raise UserError(f"the model has {len(classes)} classes, but the validation data has {self.loaders.val.num_classes}")
        return task


def draw_samples(num_samples: int, most: int, seed: int) -> Ints:
    """At most `most` distinct sample numbers in a keyed random order; costs O(most), not O(num_samples)."""
    if num_samples <= 4 * most:
        return permutation(num_samples, seed, "report")[:most]
    drawn = (uniform(np.arange(2 * most), seed, "report") * num_samples).astype(np.int64)
    _, first = np.unique(drawn, return_index=True)
    return drawn[np.sort(first)][:most]


def _is_trusted(function: str, model: Path, trust: bool, log: Log) -> bool:
    """Whether a function that config.yaml names is the one that model.json names, and may be called."""
    if not is_function(function) or not (model / "model.json").is_file():
        return False
    facts = read_model_json(model)
    return facts.architecture["name"] == function and may_build(model, facts, trust=trust, log=log)


def _preprocessing(record: RunRecord, network: Preprocessing, *, own: bool) -> Preprocessing:
    """As the run's model.json has it, of an unfinished run its newest checkpoint; else the network's."""
    try:
        if record.model is not None:
            found = Preprocessing.from_values(record.model.preprocessing)
        else:
            states = sorted((record.path / "checkpoints").glob("step-*/state.json"), key=lambda path: int(path.parent.name.partition("-")[2]))
            stored = read_json(states[-1]).get("preprocessing") if states else None
            found = network if stored is None else Preprocessing.from_values(stored)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"the preprocessing that the run stored is damaged: {type(error).__name__} {error}") from error
    if not own and max(sides(found.image_size)) > MAX_IMAGE_SIZE:
        raise UserError(f"the run is not yours, and its images of {shown_size(found.image_size)} pixels are larger than {MAX_IMAGE_SIZE:,}")
    return found


def _at_home(config: Config, run: Path) -> Config:
    """Relative paths are those of the folder the run was started in, which may not be this one: seen from RUN's place."""
    place = Path(config.run.dir)
    home = run.resolve().parents[len(place.parts)] if not place.is_absolute() and len(run.resolve().parents) > len(place.parts) else None
    if home is None:
        return config
    moved = {}
    for name in ("train", "val", "test", "audit", "names", "cache_dir"):
        value = getattr(config.data, name)
        if isinstance(value, str) and not Path(value).exists() and (home / value).exists():
            moved[name] = str(home / value)
    return config.model_copy(update={"data": config.data.model_copy(update=moved)}) if moved else config


def _pixels(image: Tensor) -> npt.NDArray[np.uint8]:
    """RGB; of other channels the first three, or the first one as gray."""
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def _shares_text(shares: Tensor, names: Sequence[str]) -> str:
    """`ants`, or `ants 64 % + bees 36 %` of a mixed image."""
    found = [(float(share), index) for index, share in enumerate(shares.tolist()) if share > 0.005]
    if len(found) == 1:
        return names[found[0][1]]
    return " + ".join(f"{names[index]} {percent(share, 0)}" for share, index in sorted(found, reverse=True))
