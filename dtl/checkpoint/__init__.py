"""Resume and transfer. The names below are loaded when first asked for: importing the package imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtl.checkpoint.outcomes import Outcome
    from dtl.checkpoint.plan import TransferPlan, plan_transfer
    from dtl.checkpoint.read import SourceWeights, read_weights
    from dtl.checkpoint.transfer import apply_plan, load_pretrained
    from dtl.checkpoint.transfer_report import TransferReport

_HOMES = {
    "Outcome": "outcomes",
    "SourceWeights": "read",
    "TransferPlan": "plan",
    "TransferReport": "transfer_report",
    "apply_plan": "transfer",
    "load_pretrained": "transfer",
    "plan_transfer": "plan",
    "read_weights": "read",
}
__all__ = [
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
