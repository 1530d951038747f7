"""Runs and trained models from Python: `dtl.fit`, `dtl.evaluate`, `dtl.predict`, `dtl.load_model`, `dtl.export`.

Everything is as on the command line, in this process: a notebook is one process, several are started by `accelerate launch`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from dtl.config import Config, load_config
from dtl.errors import UserError

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Run:
    """A run folder, and how far it got."""

    folder: Path
    state: str
    """done, or stopped (by a signal, after saving: `dtl.fit` again goes on)."""
    phases: tuple[dict[str, Any], ...]
    """One row a finished phase: phase, epochs, seconds, images_per_second, kept_step, kept_epoch, train_loss, val, best."""

    @property
    def model(self) -> Path:
        """The model folder, once the run is done."""
        return self.folder / "model"

    @property
    def metrics(self) -> dict[str, Any]:
        """Validation metrics of the weights that the last phase handed on: top1, top5, loss, num_samples; {} before."""
        return dict(self.phases[-1]["val"] or {}) if self.phases else {}

    def history(self) -> list[dict[str, Any]]:
        """history.jsonl: every event, in order."""
        return [json.loads(line) for line in (self.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def fit(recipe: str | Path | Mapping[str, Any] = "digits", options: Mapping[str, Any] | None = None) -> Run:
    """Train by a recipe, as `dtl train` does: a config file, a built-in one (digits, finetune, features), or its sections as a dict.

    `options` go on top, under their dotted names: `dtl.fit("finetune", {"data.train": "all_photos", "data.val_fraction": 0.15})`.
    The same call again goes on where the run stopped, or gives the result of a finished one. Raises UserError as the command does.
    """
    config, name = _config(recipe, options or {})
    from dtl.runs.folder import read_status, stopped_under_this_agent

    folder = Path(config.run.dir) / name
    if not stopped_under_this_agent(folder):
        from dtl.report import report_at_end
        from dtl.training.run import run

        run(config, name, report=report_at_end)
    status = read_status(folder) or {}
    return Run(folder, str(status.get("state", "unknown")), tuple(status.get("phases", ())))


def evaluate(model: str | Path | Run, data: str | Path | None = None, *, batch_size: int = 64, workers: int = 2, device: str = "auto") -> dict[str, Any]:
    """Exact metrics of a run or model folder: {top1, top5, loss, num_samples, per_class, confusion, ...}, as `dtl evaluate --json`.

    `data`: any source of images; by default the run's own validation data.
    """
    from dtl.commands.evaluate import measure, parser

    given = [] if data is None else ["--data.val", str(data)]
    options = parser().parse_args([_place(model), *given, "--batch-size", str(batch_size), "--workers", str(workers), "--device", device])
    values = measure(options)
    assert values is not None
    return values


def predict(model: str | Path | Run, images: Paths, *, top: int = 1, batch_size: int = 64, workers: int = 0, device: str = "auto") -> list[dict[str, Any]]:
    """Classes of images, in their order: one {path, label, name, probability} an image, and with `top` > 1 the list `predictions`.

    `images`: files, folders, list files or packed shards. An image that cannot be read has {path, problem} instead.
    """
    from dtl.distributed.runtime import Runtime
    from dtl.inference.images import find_images
    from dtl.inference.model import find_model, open_model, place, trained_in
    from dtl.inference.predict import predict as predictions

    if top < 1:
        raise UserError(f"top is {top}; at least one class is asked for")
    stored = open_model(find_model(_place(model))[0])
    inputs = find_images([str(path) for path in ([images] if isinstance(images, str | Path) else images)])
    runtime = Runtime(device=device, trained_in=trained_in(stored.folder))
    parts = predictions(place(stored, runtime), stored.transform, inputs, runtime, top=min(top, len(stored.classes)), batch_size=batch_size, workers=workers)
    found: list[dict[str, Any]] = []
    for one in (one for part in parts for one in part):
        if one.problem is not None:
            found.append({"path": one.path, "problem": one.problem})
            continue
        named: list[dict[str, Any]] = [
            {"label": stored.classes[number], "name": stored.shown_names[number], "probability": probability}
            for number, probability in zip(one.classes, one.probabilities)
        ]
        found.append({"path": one.path, **named[0], **({"predictions": named} if top > 1 else {})})
    return found


def load_model(model: str | Path | Run) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network in eval mode, on the CPU, and what is known of it: classes, display_names, preprocessing, architecture, metrics."""
    from dtl.inference.model import find_model, open_model

    stored = open_model(find_model(_place(model))[0])
    facts = stored.facts
    known = {
        "classes": list(facts.classes),
        "display_names": dict(facts.display_names),
        "preprocessing": dict(facts.preprocessing),
        "architecture": dict(facts.architecture),
        "metrics": dict(facts.metrics),
    }
    return stored.network.module, known


def export(model: str | Path | Run, out: str | Path, *, to: str = "onnx", images: Paths | None = None) -> Path:
    """Write the model as onnx, torch-export or safetensors, after comparing it with PyTorch on real images; FILE.json lies beside it."""
    from dtl.inference.export import export as write
    from dtl.inference.export import need, real_images
    from dtl.inference.images import find_images
    from dtl.inference.model import find_model, open_model

    if to not in ("onnx", "torch-export", "safetensors"):
        raise UserError(f"to is {to!r}; it must be onnx, torch-export or safetensors")
    if to == "onnx":
        need("onnx", "onnxscript")
    stored = open_model(find_model(_place(model))[0])
    inputs = None if images is None else find_images([str(path) for path in ([images] if isinstance(images, str | Path) else images)])
    return Path(write(stored, Path(out), to=to, images=real_images(stored, inputs)).path)


def _config(recipe: str | Path | Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Config, str]:
    words = []
    for key, value in options.items():
        words += [f"--{key}", json.dumps(_plain(value))]  # JSON is YAML
    if not isinstance(recipe, Mapping):
        return load_config(["--config", str(recipe), *words])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "notebook.yaml"
        file.write_text(yaml.safe_dump(_plain(recipe), sort_keys=False), encoding="utf-8")
        return load_config(["--config", str(file), *words])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _place(model: str | Path | Run) -> str:
    return str(model.folder if isinstance(model, Run) else model)
