"""A model folder as a network that runs: built from its architecture, strictly filled, with the preprocessing it was evaluated with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtl import files
from dtl.checkpoint.resume.model_folder import load_network
from dtl.config.models import ImageSize, as_size
from dtl.config.own import stored_config
from dtl.data.transforms.geometry import BLACK, Colour, Fitted, ShortSide, Square
from dtl.data.transforms.transforms import EVALUATION_VERSION, Transform, eval_transform
from dtl.distributed.devices import gpu_expected
from dtl.distributed.runtime import Runtime
from dtl.errors import UserError
from dtl.files import user_path
from dtl.models.build import Network, Preprocessing
from dtl.models.model_json import ModelFacts, read_model_json
from dtl.runs.folder import never_began, read_status, why_none_began
from dtl.text import Log, near_run, to_nobody, to_stderr
from dtl.training.evaluate import ForwardPass
from dtl.training.phases import TASKS, Task, task_named


@dataclass
class StoredModel:
    """A model folder, opened: the network in eval mode with the folder's weights, on the CPU until it is placed."""

    folder: Path
    facts: ModelFacts
    network: Network
    transform: Transform
    """From a decoded image to the uint8 pixels that the network was evaluated on."""
    task: Task

    @property
    def classes(self) -> tuple[str, ...]:
        return self.facts.classes

    @property
    def temperature(self) -> float:
        return 1.0 if self.facts.calibration is None else self.facts.calibration.temperature

    @property
    def threshold(self) -> float | None:
        found = None if self.facts.calibration is None else self.facts.calibration.threshold
        return None if found is None else found.value

    @property
    def shown_names(self) -> tuple[str, ...]:
        """The display name of each class; its own name where it has none."""
        return tuple(self.facts.display_names.get(name, name) for name in self.classes)


@dataclass(frozen=True)
class RunningModel:
    """A stored model on this rank's device, among the ranks that use it together."""

    stored: StoredModel
    run: Path | None
    """The run folder that it was named by."""
    forward: ForwardPass
    runtime: Runtime


@contextmanager
def running_model(
    place: str | Path, *, device: str = "auto", precision: str | None = None, trust: bool = False, log: Log = to_nobody
) -> Iterator[RunningModel]:
    """The model of a run or a model folder, on every rank; afterwards the process is as it was.

    `precision`: auto, no, bf16 or fp16; None is the one that the model was trained in, where it can be. `trust`: see `open_model`.
    UserError where there is no model.
    """
    folder, run = find_model(place)
    before = _trained_in(folder, run) if precision is None else None
    with Runtime(device=device, precision=precision or "auto", trained_in=before) as runtime:
        runtime.signals.release()  # nothing to save: a signal just ends it
        with runtime.together("model"):
            stored = open_model(folder, trust=trust, log=log if runtime.is_main else to_nobody)
        if runtime.is_main and before not in (None, runtime.precision):
            log(f"{folder} was trained with precision {before}, but runs with {runtime.precision} here: results may differ in the last digits")
        if runtime.is_main and device == "auto" and runtime.device.type == "cpu" and not runtime.launch.use_cpu and (warning := gpu_expected(os.environ)):
            log(warning)
        yield RunningModel(stored, run, ForwardPass.of(stored.network, runtime, temperature=stored.temperature, threshold=stored.threshold), runtime)


def find_model(place: str | Path) -> tuple[Path, Path | None]:
    """(model folder, run folder) of a run or a model folder; the latter has no run. UserError where it is neither."""
    path = user_path(place)
    if _is_model(path):
        return path, None
    if _is_model(path / "model"):
        return path / "model", path
    if not path.exists():
        raise UserError(f"{path} does not exist{near_run(path) or '; give a run (runs/NAME) or a model folder'}")
    if never_began(path):
        raise UserError(f"{path} holds no model: {why_none_began(path)}")
    if (path / "config.yaml").is_file():
        status = read_status(path)
        raise UserError(f"{path} has no model yet: the run is {status.state} (step {status.step}), and the model is written when it is done")
    raise UserError(f"{path} is neither a run nor a model folder: it holds no model.json and no model/ folder")


def open_model(folder: Path, *, trust: bool = False, log: Log = to_stderr) -> StoredModel:
    """A model folder, opened: see `load_network`."""
    facts, network = load_network(folder, trust=trust, log=log)
    network.module.eval().requires_grad_(False)
    network.preprocessing = _preprocessing(folder, facts.preprocessing)
    transform = replace(_transform(folder, facts), reading=network.preprocessing.reading)
    channels = transform.reading.channels
    if len(transform.fill) != channels:
        if any(transform.fill):
            raise UserError(f"{folder / 'model.json'} is damaged: preprocessing.transform: fill {list(transform.fill)} is no colour of {channels} channels")
        transform = replace(transform, fill=BLACK[:1] * channels)
    return StoredModel(folder=folder, facts=facts, network=network, transform=transform, task=_task(facts))


def _trained_in(folder: Path, run: Path | None) -> str | None:
    """The precision that the model's run computed in; None where it is not recorded (an older dtl, or damage, which `open_model` reports)."""
    known: list[Any] = []
    with suppress(UserError):
        made_by = read_model_json(folder).made_by
        known = [made_by.get("precision"), (made_by.get("settings") or {}).get("precision")]  # an older dtl kept the setting only
        if run is not None:
            known.append(stored_config(run).config.precision)
    return next((value for value in known if value in ("no", "bf16", "fp16")), None)


def _is_model(folder: Path) -> bool:
    return (files.published(folder) / "model.json").is_file()


def _preprocessing(folder: Path, values: dict[str, Any]) -> Preprocessing:
    try:
        return Preprocessing.from_values(values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'model.json'} is damaged: preprocessing: {error}") from error


def _transform(folder: Path, facts: ModelFacts) -> Transform:
    """The transform of evaluation, as it is described; else from size and crop, with the run's config beside it where there is one."""
    values = facts.preprocessing
    described = values.get("transform")
    if described is not None:
        return _described_transform(folder, described)
    config = stored_config(folder.parent).config if (folder.parent / "config.yaml").is_file() else None
    return eval_transform(
        image_size=_size(values["image_size"]),
        crop_ratio=float(values["crop_ratio"]),
        interpolation=str(values["interpolation"]),
        square=config is not None and config.data.augment.preset == "cifar" and config.data.crop_ratio == "auto",
    )


def _described_transform(folder: Path, described: dict[str, Any]) -> Transform:
    """The inverse of `Transform.describe()`."""
    path = folder / "model.json"
    try:
        geometry: dict[str, Any] = {name: _size(value) if name.endswith("_size") else value for name, value in dict(described["geometry"]).items()}
        kind = {"ShortSide": ShortSide, "Square": Square, "Fitted": Fitted}[geometry.pop("name")]
        # An older dtl wrote one number for training and evaluation, `version`: 1 and 2, between which evaluation was the same.
        version = int(described.get("evaluation_version", 1))
        plain = eval_transform(image_size=geometry["image_size"], interpolation=str(described["interpolation"]))
        transform = replace(plain, geometry=kind(**geometry), fill=_colour(described.get("fill", BLACK)))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: preprocessing.transform: {type(error).__name__} {error}") from error
    if version != EVALUATION_VERSION:
        raise UserError(
            f"{path}: it was trained with version {version} of the evaluation transforms, but this dtl has version {EVALUATION_VERSION}; "
            "use the version of dtl that trained it, or train it again"
        )
    return transform


def _size(value: Any) -> ImageSize:
    """As JSON has it: a number, or a list of height and width."""
    height, width = value if isinstance(value, list) else (value, value)
    return as_size(int(height), int(width))


def _colour(values: Any) -> Colour:
    colour = tuple(int(value) for value in values)
    if not all(0 <= value <= 255 for value in colour):
        raise ValueError(f"fill {values} is no colour")
    return colour


def _task(facts: ModelFacts) -> Task:
    """The outputs of a task of its own (the four rotations) are a pretext network's; everything else classifies the data set's classes."""
    own = [task for task in TASKS.values() if task.name != "classify" and task.class_names(()) == facts.classes]
    return own[0] if own else task_named("classify")
