"""A model folder: what a run leaves, enough to predict, to export, or to transfer from.

    model/model.safetensors     the module's state dict under its own names
    model/model.json            architecture, classes, preprocessing, metrics, where it came from; bytes and SHA-256 of the weights

Replaced as a whole: a reader sees the old folder or the new one, never weights of one with the facts of the other. Whoever copies or edits
one of the two files alone is noticed: the weights are hashed in the pass that reads them, and compared with model.json.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from dtl import files
from dtl.checkpoint.resume import tensors_file
from dtl.config.own import is_allowed, is_function, may_call, note_made
from dtl.errors import UserError
from dtl.files import open_regular
from dtl.models.build import Network, build
from dtl.models.hub import hub_name
from dtl.models.model_json import FORMAT, PREPROCESSING, Calibration, ModelFacts, check_weights, read_model_json
from dtl.models.strict_load import strict_load
from dtl.text import Log, counted, to_stderr
from dtl.untrusted import read_json
from dtl.version import __version__

FILES = ("model.safetensors", "model.json")
# Parameters beside those of the file: some networks register one twice, and a head of any size is tried on the meta device.
_SPARE_VALUES = 200_000_000


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
        raise ValueError(f"the model has {architecture['num_classes']} outputs, but {counted(len(classes), 'class name')} given")
    if missing := [key for key in PREPROCESSING if key not in preprocessing]:
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
        written = tensors_file.write_tensors(temporary / "model.safetensors", {name: tensor.detach().cpu() for name, tensor in state_dict.items()})
        facts["weights"] = {"bytes": written.size, "sha256": written.sha256}
        tensors_file.write_json(temporary / "model.json", files.without_nan(facts))
        files.publish(temporary, target, made=FILES)
    except OSError as error:
        files.discard(temporary)
        raise UserError(f"the model could not be written to {target}: {error.strerror or error}") from error


def load_model_tensors(folder: str | Path, *, log: Log = to_stderr) -> dict[str, Tensor]:
    """The state dict of a model folder, in the module's order, in host memory. Raises UserError where it is missing or damaged.

    `log` takes the line about a folder whose model.json records no hash.
    """
    facts = read_model_json(folder)
    path = files.published(Path(folder)) / "model.safetensors"
    try:
        data, digest = _read_hashed(path)
    except OSError as error:
        raise UserError(f"the weights {path} cannot be read: {error.strerror or error}") from error
    check_weights(path, facts, files.FileFacts(len(data), digest), log=log)
    try:
        tensors = load_safetensors(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"the weights {path} are damaged: {' '.join(str(error).split())[:200]}") from error
    if difference := sorted(tensors.keys() ^ set(facts.order)):
        raise UserError(f"{path} does not match model.json: {difference[0]} is in only one of them")
    return {name: tensors[name] for name in facts.order}


def check_model_folder(folder: str | Path, *, log: Log = to_stderr) -> None:
    """UserError where a model folder is not whole. Reads its weights once, and keeps none of them."""
    facts = read_model_json(folder)
    path = files.published(Path(folder)) / "model.safetensors"
    try:
        check_weights(path, facts, files.hash_file(path), log=log)
    except OSError as error:
        raise UserError(f"the weights {path} cannot be read: {error.strerror or error}") from error


def _read_hashed(path: Path) -> tuple[bytes, str]:
    """All bytes of a file and their SHA-256: the file is read once, and hashed in memory."""
    with open_regular(path) as file:
        data = file.read()
    return data, hashlib.sha256(data).hexdigest()


def write_calibration(folder: str | Path, calibration: Calibration | None, facts: ModelFacts, *, log: Log = to_stderr) -> None:
    """Put a calibration into model.json, or take it out; nothing else of it changes, and the weights are not touched.

    `facts`: of the model that it was found for. UserError where the folder has another one by now, or cannot be written.
    """
    path = files.published(Path(folder)) / "model.json"
    now = read_model_json(folder)
    if now.json_sha256 != facts.json_sha256:
        raise UserError(f"{path} was written anew meanwhile: calibrate again")
    try:
        values = {key: value for key, value in read_json(path).items() if key != "calibration"}
        if calibration is not None:
            values["calibration"] = asdict(calibration)
        text = json.dumps(values, indent=1) + "\n"
        files.write_whole(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    if is_function(name := now.architecture["name"]) and is_allowed(name, now.json_sha256):
        note_made(path, log)


def load_network(folder: str | Path, *, trust: bool = False, log: Log = to_stderr) -> tuple[ModelFacts, Network]:
    """The facts of a model folder, and its network with its weights. Each tensor of the file must have its place in the network and the other way round.

    The network comes from a catalogue. A function that model.json names is called only where a run of this user wrote it, or with `trust`, which is kept.
    """
    facts = read_model_json(folder)
    own = may_build(folder, facts, trust=trust, log=log)
    tensors = load_model_tensors(folder, log=log)
    network = build(
        facts.architecture["name"],
        num_classes=facts.architecture["num_classes"],
        options=dict(facts.architecture.get("options") or {}),
        own=own,
        max_values=2 * sum(tensor.numel() for tensor in tensors.values()) + _SPARE_VALUES,
    )
    strict_load(network.module, tensors, f"{folder}/model.safetensors", name=network.name)
    return facts, network


def may_build(folder: str | Path, facts: ModelFacts, *, trust: bool, log: Log) -> bool:
    """Whether the network is a function that may be called; False for one of a catalogue, UserError for a function that may not."""
    name, path = facts.architecture["name"], Path(folder) / "model.json"
    if not is_function(name) or hub_name(name) is not None:  # what is fetched from the hub has another name in model.json
        return False
    arguments = {"num_classes": facts.architecture["num_classes"], **(facts.architecture.get("options") or {})}
    may_call(name, arguments, file=path, sha256=facts.json_sha256, trust=trust, log=log)
    return True
