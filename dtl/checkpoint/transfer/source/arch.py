"""The network that weights were saved from (`source_arch`): one that dtl can build, or `transformers:CLASS`, a class of that package and no other code."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from dtl.checkpoint.transfer.layers.layer import layers_of, num_source_classes, specs_of
from dtl.checkpoint.transfer.source.read import SourceWeights
from dtl.config.functions import raised
from dtl.errors import UserError
from dtl.models.build import build, within_bounds
from dtl.models.meta import build_on_meta
from dtl.text import nearest
from dtl.untrusted import read_json

TRANSFORMERS = "transformers:"
_MAX_SIZE = 1 << 20
_MOST_BESIDE = 1 << 24
"""Parameters of a network that its file may lack."""


def source_network(named: str, weights: SourceWeights, otherwise: int, *, num_classes: int | None = None, meta: bool = True) -> nn.Module:
    """The network `named`, with as many outputs as the weights' head has (`num_classes`, where the user has said it; `otherwise`, where none is found)."""
    outputs = num_classes or num_source_classes(layers_of(specs_of(weights.tensors)), otherwise)
    if not named.startswith(TRANSFORMERS):
        return build(named, num_classes=outputs, meta=meta, own=True).module
    return _of_transformers(named.removeprefix(TRANSFORMERS), weights, outputs, meta=meta)


def _of_transformers(class_name: str, weights: SourceWeights, outputs: int, *, meta: bool) -> nn.Module:
    """A class of the installed package, by the config.json beside the weights. Nothing is downloaded, and no code of a repository (auto_map) is run."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise UserError(f"source_arch {TRANSFORMERS}{class_name} needs the package transformers: pip install transformers") from None
    found = getattr(transformers, class_name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and getattr(found, "config_class", None)):
        classes = [name for name in dir(transformers) if name.endswith(("Model", "ForImageClassification"))]
        raise UserError(f"source_arch: transformers {transformers.__version__} has no network {class_name!r}{nearest(class_name, classes)}")
    made: Any = found
    beside = Path(weights.origin).with_name("config.json")
    settings = _settings(beside) if beside.is_file() else {"num_labels": outputs}
    most = _MOST_BESIDE + 4 * sum(tensor.numel() for tensor in weights.tensors.values())
    try:
        config = made.config_class(**settings)
        with within_bounds(class_name, most):  # a stranger's sizes: without memory at first
            network: nn.Module = build_on_meta(lambda: made(config))
        return network if meta else made(config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"source_arch: {class_name} cannot be built by {beside}: {raised(error)[:300]}") from error


def _settings(path: Path) -> dict[str, Any]:
    """The sizes in config.json, numbers and lists of them, and the activation. Other words could name code or repositories (attn_implementation, backbone)."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object")
    labels = found.get("id2label")
    sizes = {name: value for name, value in found.items() if _is_size(value) or (name == "hidden_act" and isinstance(value, str))}
    if large := next((name for name, value in sizes.items() if _largest(value) > _MAX_SIZE), None):
        raise UserError(f"{path}: {large} is larger than {_MAX_SIZE:,}, which no network of images has")
    return {**sizes, **({"num_labels": len(labels)} if isinstance(labels, dict) else {})}


def _is_size(value: object) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, list) and all(isinstance(each, (int, float)) for each in value))


def _largest(size: object) -> float:
    values = size if isinstance(size, list) else [size]
    return max((abs(value) for value in values if isinstance(value, (int, float))), default=0)
