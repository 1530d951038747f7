"""model.json: what a model folder's network is, read without torch, and checked field by field."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from dtl import files
from dtl.errors import UserError
from dtl.reading import MAX_CHANNELS
from dtl.text import Log, counted
from dtl.untrusted import Check, Count, PlainObject, Record, Sha256, Text

FORMAT = 1
PREPROCESSING = ("mean", "std", "image_size", "interpolation", "crop_ratio")
MAX_IMAGE_SIZE = 1 << 14
"""Pixels of a side that a model.json may ask for; each image takes that many squared."""

_SIZES = {"image_size": (1, MAX_IMAGE_SIZE), "resize_size": (1, 2 * MAX_IMAGE_SIZE), "padding": (0, MAX_IMAGE_SIZE), "shift": (0, MAX_IMAGE_SIZE)}


def _format(number: int) -> int:
    if not 1 <= number <= FORMAT:
        raise ValueError(f"{number}, this dtl knows up to {FORMAT}: update dtl")
    return number


def _architecture(facts: dict[str, Any]) -> dict[str, Any]:
    name, outputs, options = facts.get("name"), facts.get("num_classes"), facts.get("options", {})
    if not isinstance(name, str) or not isinstance(outputs, int) or isinstance(outputs, bool) or outputs < 1:
        raise ValueError("must have a name and a positive num_classes")
    if not isinstance(options, dict | None):
        raise ValueError("options must be an object")
    return facts


def _preprocessing(facts: dict[str, Any]) -> dict[str, Any]:
    if missing := [key for key in PREPROCESSING if key not in facts]:
        raise ValueError(f"{missing[0]} is missing")
    for name in ("mean", "std"):
        if not isinstance(facts[name], list) or not 1 <= len(facts[name]) <= MAX_CHANNELS or not all(map(_is_number, facts[name])):
            raise ValueError(f"{name} must be three numbers, or one for each channel")
    if not _is_number(facts["crop_ratio"]) or not isinstance(facts["interpolation"], str):
        raise ValueError("crop_ratio must be a number, interpolation a string")
    rest: list[Any] = [facts]
    while rest:
        one = rest.pop()
        for key, (least, most) in _SIZES.items():
            size = one.get(key, 1)
            pair = size if key.endswith("_size") and isinstance(size, list) and len(size) == 2 else [size]  # an oblong one is [height, width]
            if not all(isinstance(side, int) and not isinstance(side, bool) and least <= side <= most for side in pair):
                raise ValueError(f"{key} {str(size)[:40]} is not from {least} to {most}")
        rest += [inner for inner in one.values() if isinstance(inner, dict)]
    size = facts["image_size"]
    if not 0 < facts["crop_ratio"] <= 1 or (max(size) if isinstance(size, list) else size) / facts["crop_ratio"] > 2 * MAX_IMAGE_SIZE:
        raise ValueError(f"crop_ratio {facts['crop_ratio']} is not above 0 and at most 1, or its images are over {2 * MAX_IMAGE_SIZE} pixels wide")
    return facts


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class WeightsFile(Record):
    """What model.safetensors was when the folder was written."""

    bytes: Count
    sha256: Sha256


def _temperature(value: float) -> float:
    if not 1e-3 <= value <= 1e3:
        raise ValueError(f"{value:g} is not from 0.001 to 1,000")
    return value


def _share(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{value:g} is not between 0 and 1")
    return value


class Threshold(Record):
    """Of two classes the second is predicted where its probability is `value` or more."""

    criterion: Text
    """What it was chosen by."""
    value: Annotated[float, Check(_share)]


class Calibration(Record):
    """What `dtl calibrate` found, for these weights: logits are divided by the temperature, before anything else is computed from them."""

    temperature: Annotated[float, Check(_temperature)]
    threshold: Threshold | None = None
    data: Text
    """The dataset id of the images that it was fitted on."""
    num_samples: Count


class ModelFacts(Record):
    """What model.json says. `order` lists the state dict's names as the module registers them, which a file of tensors forgets."""

    format: Annotated[int, Check(_format)]
    architecture: Annotated[PlainObject, Check(_architecture)]
    """`name`, `num_classes`, `options`."""
    classes: tuple[Text, ...]
    display_names: dict[Text, Text]
    """By class, where it has one."""
    preprocessing: Annotated[PlainObject, Check(_preprocessing)]
    """`mean`, `std`, `image_size` (pixels, or [height, width]), `interpolation`, `crop_ratio`; and `transform`, what evaluation did, where it is known."""
    metrics: PlainObject
    made_by: PlainObject
    order: tuple[Text, ...]
    weights: WeightsFile | None = None
    """None in folders of dtl 0.1.0: nothing then protects the weights."""
    calibration: Calibration | None = None
    json_sha256: str = ""
    """Of model.json itself, whatever it says: `--trust` is given for it."""

    @classmethod
    def parse(cls, data: bytes | str, origin: str) -> Self:
        facts = super().parse(data, origin)
        return replace(facts, json_sha256=hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest())


def read_model_json(folder: str | Path) -> ModelFacts:
    """The facts of a model folder. Raises UserError where it is not one, or was written by a newer dtl."""
    path = files.published(Path(folder)) / "model.json"
    try:
        facts = ModelFacts.read(path)
    except OSError as error:
        raise UserError(f"{folder} is not a model folder: {path} cannot be read ({error.strerror or error})") from error
    name, num_classes = facts.architecture["name"], facts.architecture["num_classes"]
    if num_classes != len(facts.classes):
        raise UserError(f"{path} is damaged: {name} has {num_classes} outputs, but {counted(len(facts.classes), 'class')} listed")
    if facts.calibration is not None and facts.calibration.threshold is not None and num_classes != 2:
        raise UserError(f"{path} is damaged: it has a threshold, which is for two classes, and {counted(num_classes, 'class')}")
    return facts


def check_weights(path: Path, facts: ModelFacts, found: files.FileFacts, *, log: Log) -> None:
    """UserError where the weights at `path` are not those that the model.json beside them is about. `found`: what was read."""
    recorded = facts.weights
    if recorded is None:
        log(f"{path.with_name('model.json')} records no SHA-256 of the weights (an older dtl wrote it): they are used unchecked")
    elif found.size != recorded.bytes:
        raise UserError(
            f"the weights {path} are damaged: {found.size:,} bytes, but {recorded.bytes:,} according to model.json; use an undamaged copy, or train again"
        )
    elif found.sha256 != recorded.sha256:
        raise UserError(
            f"the weights {path} do not match the model.json beside them (their SHA-256 differs): they are damaged or were replaced; "
            "use an undamaged copy, or train again"
        )
