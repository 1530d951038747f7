"""The names that notebooks and scripts use: data, pretrained weights, runs, and the predictions of trained models.

Everything works as on the command line, but in this process. A notebook is one process; `accelerate launch` starts several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from dtl.checkpoint.transfer.apply import TransferReport, load_pretrained
from dtl.config import resolve_config
from dtl.config.models import AugmentConfig, DataConfig, ImageSize
from dtl.data.loading.batch import Transform
from dtl.data.loading.loader import StepLoader
from dtl.data.open import open_split, reading_of
from dtl.data.packing.pack import pack
from dtl.data.sampling.plan import EpochPlan, RankLayout
from dtl.data.shards.index import Shards
from dtl.data.sources.splits import NoSplit
from dtl.data.transforms.transforms import eval_transform, train_transform
from dtl.errors import TransferRefused, UserError
from dtl.text import to_stderr
from dtl.untrusted import json_lines

__all__ = [
    "BatchIterable",
    "Run",
    "TransferRefused",
    "TransferReport",
    "UserError",
    "build_loader",
    "evaluate",
    "export",
    "fit",
    "load_model",
    "load_pretrained",
    "pack",
    "predict",
]

Image = str | Path | PIL.Image.Image | np.ndarray[Any, Any] | Tensor
Images = Image | Sequence[Image]


# ---- data


@dataclass
class BatchIterable:
    """Batches of one epoch, the same as training's: iterate it as often as you like, `epoch` may be changed in between."""

    shards: Shards
    transform: Transform
    image_size: ImageSize
    batch_size: int
    workers: int
    seed: int
    epoch: int
    shuffle: bool
    rank: int = 0
    world_size: int = 1
    decode_on: torch.device | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.shards.classes

    def __len__(self) -> int:
        return self._plan(self.epoch).num_steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images uint8 [B, 3, H, W], labels int64 [B], weights float32 [B]); weight 0 is padding. A damaged sample raises."""
        plan = self._plan(self.epoch)
        layout = RankLayout.for_plan(plan, num_ranks=self.world_size, micro_batch_size=None)
        loader = StepLoader(
            self.shards,
            self.transform,
            plans=self._plan,
            layout=layout,
            rank=self.rank,
            image_size=self.image_size,
            seed=self.seed,
            workers=self.workers,
            decode_on=self.decode_on,
        )
        for step in loader.steps(self.epoch, 0, plan.num_steps):
            for batch in step:
                if batch.bad:
                    raise batch.bad[0][1]
                yield batch.images, batch.labels, batch.weights

    def _plan(self, epoch: int) -> EpochPlan:
        return EpochPlan(self.shards.shard_sizes, seed=self.seed, epoch=epoch, global_batch_size=self.batch_size, shuffle=self.shuffle)


def _validation_images(source: str | Path, data: DataConfig) -> Shards:
    """The source's validation images, or all of it where it has no splits. Never its test set: test images choose nothing."""
    try:
        return open_split(source, data, split="own val")
    except NoSplit as error:
        try:
            open_split(source, data, split="own test")
        except NoSplit:
            return open_split(source, data, split="val")
        raise UserError(f"{source} has test images, but no validation images; give the folder of the images to look at as the source") from error


def build_loader(
    source: str | Path,
    split: str = "train",
    image_size: ImageSize = 224,
    batch_size: int = 64,
    workers: int = 2,
    seed: int = 0,
    epoch: int = 0,
    *,
    augment: AugmentConfig | None = None,
    cache_dir: str | Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    decode_on: torch.device | None = None,
) -> BatchIterable:
    """The loader that training uses, without training: `for images, labels, weights in dtl.build_loader("photos/train"): ...`

    `split` "train" shuffles and augments (by default as the preset imagenet), "val" does neither. `batch_size` is that of all ranks together.
    Images stay uint8: normalise them on the device. `decode_on`: a GPU that decodes JPEGs, and holds the images then. Raises UserError for what cannot be read.
    """
    if split not in ("train", "val"):
        raise UserError(f"split is {split!r}; it must be train or val")
    data, training = DataConfig(cache_dir=None if cache_dir is None else str(cache_dir)), split == "train"
    shards = open_split(source, data, split=split) if training else _validation_images(source, data)
    reading = reading_of(shards, data)
    transform = (
        train_transform(image_size=image_size, augment=augment or AugmentConfig(), reading=reading)
        if training
        else eval_transform(image_size=image_size, reading=reading)
    )
    return BatchIterable(shards, transform, image_size, batch_size, workers, seed, epoch, training, rank, world_size, decode_on)


# ---- runs and models


@dataclass(frozen=True)
class Run:
    """A run folder, and how far it got."""

    folder: Path
    state: str
    """done, or stopped (by a signal, after saving: `dtl.fit` again resumes it)."""
    phases: tuple[dict[str, Any], ...]
    """One row per finished phase: phase, epochs, seconds, images_per_second, kept_step, kept_epoch, blend, looks, train_loss, val, best."""
    test: dict[str, Any] | None = None
    """Metrics on the test set (top1, top5, loss, num_samples, and `look`: which look at it this was), once the run is done; None without one."""

    @property
    def model(self) -> Path:
        """The model folder, once the run is done."""
        return self.folder / "model"

    @property
    def metrics(self) -> dict[str, Any]:
        """Validation metrics of the weights that the last phase kept: top1, top5, loss, num_samples; {} before the run is done."""
        return dict(self.phases[-1]["val"] or {}) if self.phases else {}

    def history(self) -> list[dict[str, Any]]:
        """history.jsonl: every event, in order."""
        return [event for event in json_lines(self.folder / "history.jsonl") if event]


def fit(recipe: str | Path | Mapping[str, Any] = "digits", options: Mapping[str, Any] | None = None) -> Run:
    """Train by a recipe, as `dtl train` does: a config file, a built-in one (digits, finetune, features), or its sections as a dict.

    `options` override the recipe, by their dotted names: `dtl.fit("finetune", {"data.train": "all_photos", "data.val_fraction": 0.15})`.
    The same call again resumes a run that stopped, and returns the result of a finished one. Raises UserError as the command does.
    """
    if not isinstance(recipe, str | Path | Mapping):
        raise UserError(
            f"the recipe is a {type(recipe).__name__}; give a config file, the name of a built-in recipe, or a dict. A network of your own goes into the "
            'options by its name, so that a run can be resumed and its model loaded: {"model.name": "package.module:function"}'
        )
    config, name = resolve_config(recipe, options or {})
    from dtl.runs.folder import read_status, stopped_under_this_agent

    folder = Path(config.run.dir) / name
    if not stopped_under_this_agent(folder):
        from dtl.report import report_at_end
        from dtl.training.run import run

        run(config, name, report=report_at_end)
    status = read_status(folder)
    return Run(folder, status.state, status.phases, status.test)


def evaluate(
    model: str | Path | Run,
    data: str | Path | None = None,
    *,
    split: Literal["val", "test"] = "val",
    by_group: bool = False,
    flip: bool = False,
    batch_size: int = 64,
    workers: int = 2,
    device: str = "auto",
    trust: bool = False,
) -> dict[str, Any]:
    """Exact metrics of a run or model folder: {top1, top5, loss, num_samples, per_class, confusion, ...}, as `dtl evaluate --json`.

    `data`: any source of images; by default the run's own `split`, val or test. `by_group`: also of the groups of the run's data.group, as `by_group`;
    `flip`: by the mean probabilities of each image and its mirror image. On several processes each gets the same numbers.
    `trust`: as `--trust`: call the function that builds the network, if the model.json was made by somebody else.
    """
    from dtl.inference.evaluate import evaluate as measure
    from dtl.inference.model import running_model

    with running_model(_place(model), device=device, trust=trust, log=to_stderr) as running:
        return measure(
            running, None if data is None else str(data), split=split, by_group=by_group, flip=flip, batch_size=batch_size, workers=workers, log=to_stderr
        )


def predict(
    model: str | Path | Run, images: Images, *, top: int = 1, batch_size: int = 64, workers: int = 0, device: str = "auto", trust: bool = False
) -> list[dict[str, Any]]:
    """Classes of images, in their order: one {path, label, name, probability} per image, and with `top` > 1 the list `predictions`.

    `images`: files, folders, list files or packed shards; or images in memory: PIL, uint8 arrays [H, W, 3] or [H, W], uint8 tensors [3, H, W], one or
    several, also as a batch [N, ...]. Those have `path` "image 0", "image 1" ..., and the same result as from their files.
    An image that cannot be read has {path, problem} instead. On several processes
    the main one gets the predictions, the others an empty list. `trust`: as in `evaluate`.
    """
    from dtl.inference.images import find_images
    from dtl.inference.model import running_model
    from dtl.inference.predict import predict as predictions

    if top < 1:
        raise UserError(f"top is {top}; it must be at least 1")
    with running_model(_place(model), device=device, trust=trust, log=to_stderr) as running:
        with running.runtime.together("images"):
            inputs = find_images(_images(images), channels=running.stored.transform.reading.channels)
        found = [one for part in predictions(running, inputs, top=top, batch_size=batch_size, workers=workers) for one in part]
        return [one.to_json(running.stored, lists=top > 1) for one in found]


def load_model(model: str | Path | Run, *, trust: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network in eval mode, on the CPU, and its metadata: classes, display_names, preprocessing, architecture, metrics, calibration.

    The network's logits are its own: divide them by `calibration["temperature"]`, where `dtl calibrate` has found one.

    `trust`: as in `evaluate`.
    """
    from dtl.inference.model import find_model, open_model

    stored = open_model(find_model(_place(model))[0], trust=trust, log=to_stderr)
    facts = stored.facts
    known = {
        "classes": list(facts.classes),
        "display_names": dict(facts.display_names),
        "preprocessing": dict(facts.preprocessing),
        "architecture": dict(facts.architecture),
        "metrics": dict(facts.metrics),
        "calibration": None if facts.calibration is None else asdict(facts.calibration),
    }
    return stored.network.module, known


def export(model: str | Path | Run, out: str | Path, *, to: str = "onnx", images: Images | None = None, trust: bool = False) -> Path:
    """Write the model as onnx, torch-export or safetensors, after comparing it with PyTorch on real images, and FILE.json next to it.

    `trust`: as in `evaluate`.
    """
    from dtl.inference.export import export as write
    from dtl.inference.export import need, real_images
    from dtl.inference.images import find_images
    from dtl.inference.model import find_model, open_model

    if to not in ("onnx", "torch-export", "safetensors"):
        raise UserError(f"to is {to!r}; it must be onnx, torch-export or safetensors")
    if to == "onnx":
        need("onnx", "onnxscript")
    stored = open_model(find_model(_place(model))[0], trust=trust, log=to_stderr)
    inputs = None if images is None else find_images(_images(images), channels=stored.transform.reading.channels)
    return Path(write(stored, Path(out), to=to, images=real_images(stored, inputs)).path)


def _images(images: Images) -> list[object]:
    several = images if isinstance(images, Iterable) and not isinstance(images, str | Path | PIL.Image.Image | np.ndarray | Tensor) else [images]
    return [str(one) if isinstance(one, Path) else one for one in several]


def _place(model: str | Path | Run) -> str:
    if not isinstance(model, str | Path | Run):
        raise UserError(f"the model is a {type(model).__name__}; give a run (dtl.fit returns one), a run folder or a model folder")
    return str(model.folder if isinstance(model, Run) else model)
