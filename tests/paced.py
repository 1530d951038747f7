"""Networks, and a report, that dawdle on demand, so that what is to happen in the middle of a run happens there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import networks
from torch import nn

QUICK_STEPS = "10"
"""Forward passes, unless $QUICK_STEPS says another number: those of the trial for memory (two a phase), and the first steps."""
SECONDS = 3.0

_steps = 0


def small(num_classes: int) -> nn.Module:
    """As `networks.small`; while the file $HOLD exists, each step of training but the first few takes seconds longer."""
    return _paced(networks.small(num_classes))


def without_norms(num_classes: int) -> nn.Module:
    """As `networks.without_norms`, in the same way."""
    return _paced(networks.without_norms(num_classes))


def _paced(network: nn.Module) -> nn.Module:
    network.register_forward_pre_hook(_dawdle)
    return network


def _dawdle(module: nn.Module, inputs: Any) -> None:
    global _steps
    _steps += module.training
    quick, until = int(os.environ.get("QUICK_STEPS", QUICK_STEPS)), time.monotonic() + SECONDS
    while module.training and _steps > quick and time.monotonic() < until and Path(os.environ["HOLD"]).exists():
        time.sleep(0.05)


def report() -> None:
    """The report is not begun while the file $HOLD exists."""
    import dtl.report

    make = dtl.report.make_report

    def held(*arguments: Any, **more: Any) -> Any:
        while Path(os.environ["HOLD"]).exists():
            time.sleep(0.05)
        return make(*arguments, **more)

    dtl.report.make_report = held
