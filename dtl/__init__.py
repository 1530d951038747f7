"""Distributed transfer learning for image classification.

    dtl.build_loader(source, split="train", image_size=224, batch_size=64)     batches, as training sees them
    dtl.load_pretrained(model, source, by="auto")                              weights into any network, with a report
    dtl.pack(source, destination)                                              images into shards

`import dtl` is quick: what needs torch is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["TransferRefused", "TransferReport", "UserError", "__version__", "build_loader", "load_pretrained", "pack"]

if TYPE_CHECKING:
    from dtl.api import TransferRefused, TransferReport, UserError, build_loader, load_pretrained, pack


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dtl' has no attribute {name!r}")
    return getattr(importlib.import_module("dtl.errors" if name in ("UserError", "TransferRefused") else "dtl.api"), name)
