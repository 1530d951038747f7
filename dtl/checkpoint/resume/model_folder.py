"""A model folder: what a run leaves, enough to predict, to export, or to transfer from.

    model/model.safetensors     the module's state dict under its own names
    model/model.json            architecture, classes, preprocessing, metrics, where it came from

Replaced as a whole: a reader sees the old folder or the new one, never weights of one with the facts of the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from dtl import files
from dtl.checkpoint.resume import tensors_file
from dtl.errors import UserError
from dtl.version import __version__

FORMAT = 1
_PREPROCESSING = ("mean", "std", "image_size", "interpolation", "crop_ratio")


@dataclass(frozen=True)
class ModelFacts:
    """What model.json says. `order` lists the state dict's names as the module registers them, which a file of tensors forgets."""

    architecture: dict[str, Any]
    """`name`, `num_classes`, `options`."""
    classes: tuple[str, ...]
    display_names: dict[str, str]
    """By class, where it has one."""
    preprocessing: dict[str, Any]
    """`mean`, `std`, `image_size` (pixels), `interpolation`, `crop_ratio`; and `transform`, what evaluation did exactly, where it is known."""
    metrics: dict[str, Any]
    made_by: dict[str, Any]
    order: tuple[str, ...]


def save_model_folder(
    folder: str | Path,
    state_dict: Mapping[str, Tensor],
    *,
    architecture: Mapping[str, Any],
    classes: Sequence[str],
    display_names: Mapping[str, str],
    preprocessing: Mapping[str, Any],
    metrics: Mapping[str, Any],
    made_by: Mapping[str, Any],
) -> None:
    """Write a model folder, atomically, in place of one that may be there. `state_dict`: tensors on any device, in the module's order.

    `architecture`: name, num_classes, options. `made_by`: run, step and the like; the versions of dtl and torch are added.
    Raises UserError where it cannot be written; a model folder that was there stays then.
    """
    if architecture["num_classes"] != len(classes):
        raise ValueError(f"a model of {architecture['num_classes']} classes with {len(classes)} class names")
    if missing := [key for key in _PREPROCESSING if key not in preprocessing]:
        raise ValueError(f"preprocessing lacks {', '.join(missing)}")
    target = Path(folder).absolute()
    facts = {
        "format": FORMAT,
        "architecture": dict(architecture),
        "classes": list(classes),
        "display_names": dict(display_names),
        "preprocessing": dict(preprocessing),
        "metrics": dict(metrics),
        "made_by": {**made_by, "dtl": __version__, "torch": torch.__version__},
        "order": list(state_dict),
    }
    temporary = target.with_name(f".writing-{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".writing-{target.name}-*"):
            files.remove(leftover)
        temporary.mkdir()
        tensors_file.write_tensors(temporary / "model.safetensors", {name: tensor.detach().cpu() for name, tensor in state_dict.items()})
        tensors_file.write_json(temporary / "model.json", facts)
        files.publish(temporary, target)
    except OSError as error:
        files.discard(temporary)
        raise UserError(f"the model could not be written to {target}: {error.strerror or error}") from error


def read_model_json(folder: str | Path) -> ModelFacts:
    """The facts of a model folder. Raises UserError where it is not one, or was written by a newer dtl."""
    path = files.published(Path(folder)) / "model.json"
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{folder} is no model folder: {path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get("format"), int):
        raise UserError(f"{path} is no model.json of dtl: it has no format number")
    if value["format"] > FORMAT:
        raise UserError(f"{path} has format {value['format']}, this dtl knows up to {FORMAT}: update dtl")
    try:
        facts = ModelFacts(
            architecture=dict(value["architecture"]),
            classes=tuple(value["classes"]),
            display_names=dict(value["display_names"]),
            preprocessing={**value["preprocessing"], **{key: value["preprocessing"][key] for key in _PREPROCESSING}},
            metrics=dict(value["metrics"]),
            made_by=dict(value["made_by"]),
            order=tuple(value["order"]),
        )
        name, num_classes = facts.architecture["name"], facts.architecture["num_classes"]
    except KeyError as error:
        raise UserError(f"{path} is damaged: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if num_classes != len(facts.classes):
        raise UserError(f"{path} is damaged: {name} with {num_classes} outputs, but {len(facts.classes)} classes")
    return facts


def load_model_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The state dict of a model folder, in the module's order, in host memory. Raises UserError where it is missing or damaged."""
    order = read_model_json(folder).order
    path = files.published(Path(folder)) / "model.safetensors"
    try:
        tensors = load_safetensors(path.read_bytes())
    except OSError as error:
        raise UserError(f"the weights {path} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"the weights {path} are damaged: {error}") from error
    if difference := sorted(tensors.keys() ^ set(order)):
        raise UserError(f"{path} and model.json do not belong together: {difference[0]} is in one of them only")
    return {name: tensors[name] for name in order}
