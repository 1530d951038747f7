"""Distributed transfer learning for image classification.

    dtl.pack(source, destination)                       images into shards
    dtl.build_loader(source, split="train")             batches, as training sees them
    dtl.load_pretrained(model, source, by="auto")       weights into any network, with a TransferReport or TransferRefused
    dtl.fit("finetune", {"data.train": "photos"})       a run, resumed where it stopped; gives a Run
    dtl.evaluate(run), dtl.predict(run, images)         exact metrics; classes and probabilities
    dtl.load_model(run), dtl.export(run, to="onnx")     the trained network, here or for other programs

docs/api.md has all of them. `import dtl` is quick: what needs torch is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dtl.version import __version__

_HOMES = {
    "dtl.errors": ("TransferRefused", "UserError"),
    "dtl.api": ("Run", "TransferReport", "build_loader", "evaluate", "export", "fit", "load_model", "load_pretrained", "pack", "predict"),
}
__all__ = [
    "Run",
    "TransferRefused",
    "TransferReport",
    "UserError",
    "__version__",
    "build_loader",
    "evaluate",
    "export",
    "fit",
    "load_model",
    "load_pretrained",
    "pack",
    "predict",
]

if TYPE_CHECKING:
    from dtl.api import Run, TransferReport, build_loader, evaluate, export, fit, load_model, load_pretrained, pack, predict
    from dtl.errors import TransferRefused, UserError


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = found = getattr(importlib.import_module(home), name)  # asked for once
            return found
    raise AttributeError(f"module 'dtl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
