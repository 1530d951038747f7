"""Resume and transfer. The names below are loaded when first asked for: importing the package imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtl.checkpoint.resume.store import CheckpointStore
    from dtl.checkpoint.transfer.apply import TransferReport, apply_plan, load_pretrained
    from dtl.checkpoint.transfer.outcomes import Outcome
    from dtl.checkpoint.transfer.plan import TransferPlan, plan_transfer
    from dtl.checkpoint.transfer.source.read import SourceWeights, read_weights

_HOMES = {
    "CheckpointStore": "resume.store",
    "Outcome": "transfer.outcomes",
    "SourceWeights": "transfer.source.read",
    "TransferPlan": "transfer.plan",
    "TransferReport": "transfer.apply",
    "apply_plan": "transfer.apply",
    "load_pretrained": "transfer.apply",
    "plan_transfer": "transfer.plan",
    "read_weights": "transfer.source.read",
}
__all__ = [
    "CheckpointStore",
    "Outcome",
    "SourceWeights",
    "TransferPlan",
    "TransferReport",
    "apply_plan",
    "load_pretrained",
    "plan_transfer",
    "read_weights",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"dtl.checkpoint.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dtl.checkpoint' has no attribute '{name}'")
