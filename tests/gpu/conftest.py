"""Runs of this folder are on simulated GPUs (tests/gpusim), or on what `pytest --device` names."""

from __future__ import annotations

import harness
import pytest
from gpusim import simulation


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    device = request.config.getoption("device") or "sim"
    if device == "sim":
        simulation.require()
        simulation.build()  # before any time limit of a test
    monkeypatch.setattr(harness, "default_device", device)
    return str(device)
