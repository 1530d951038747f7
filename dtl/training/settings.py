"""What the training loop goes by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Plain values that the loop goes by."""

    seed: int
    init: str
    freeze_norm: bool
    sync_bn: str | bool
    compile: bool
    channels_last: bool
    log_every: int
    every_steps: int | None
    every_minutes: float | None
    monitor: str
    image_size: int
    fit_memory: bool
    """Halve the micro-batch until it fits."""
    cache_dir: Path | None
    """Where features of frozen backbones are kept; None: they are not."""
