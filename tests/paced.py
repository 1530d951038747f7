"""A network that dawdles on demand, so that what is to happen in the middle of a run happens there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from networks import small as build_small
from torch import nn

QUICK_STEPS = 10  # forward passes: those of the trial for memory, and the first steps
SECONDS = 3.0

_steps = 0


def small(num_classes: int) -> nn.Module:
    """As `networks.small`; while the file $HOLD exists, each step of training but the first few takes seconds longer."""
    network = build_small(num_classes)
    network.register_forward_pre_hook(_dawdle)
    return network


def _dawdle(module: nn.Module, inputs: Any) -> None:
    global _steps
    _steps += module.training
    until = time.monotonic() + SECONDS
    while module.training and _steps > QUICK_STEPS and time.monotonic() < until and Path(os.environ["HOLD"]).exists():
        time.sleep(0.05)
