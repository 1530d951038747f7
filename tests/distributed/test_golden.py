"""The numbers of one short run, written down: a change that means to change none of them shows here if it does.

Other tests compare a run with itself; one that computes another loss or rate everywhere would pass them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import history, run
from recipes import write_recipe

PHASES: dict[str, Any] = {
    "pretext": {"task": "rotate", "train": "all", "steps": 6, "lr": 0.05, "schedule": "one_cycle"},
    "head": {"train": "head", "steps": 6, "lr": 0.02, "optimizer": "adamw", "label_smoothing": 0.1, "weight_decay": 0.05},
    "all": {
        "train": "all", "steps": 8, "lr": 0.05, "warmup": 0.25, "layer_decay": 0.8, "nesterov": True, "mixup": 0.3, "cutmix": 0.3, "clip_norm": 1.0,
        "loss": "focal",
    },
}  # fmt: skip
# (loss, lr) of each step, and (loss, top1) after each phase and before the last: torch 2.14, one thread, 22 November 2026. Other processors and versions round
# otherwise, which moves losses by some millionths; what they draw for initial values and dropout has been the same for years.
STEPS = [
    (1.473886, 0.002),
    (1.480823, 0.04972077177),
    (1.385869, 0.0405872827),
    (1.328025, 0.02313185513),
    (1.300596, 0.006673876509),
    (1.316640, 2e-07),
    (2.298326, 0.02),
    (2.303331, 0.01866025404),
    (2.308858, 0.015),
    (2.297582, 0.01),
    (2.287166, 0.005),
    (2.275561, 0.001339745962),
    (1.952463, 0.0005),
    (1.908783, 0.017),
    (1.735461, 0.0335),
    (1.804023, 0.05),
    (1.746570, 0.04522542486),
    (1.769248, 0.03272542486),
    (1.738992, 0.01727457514),
    (1.741713, 0.004774575141),
]
EVALUATIONS = [
    (1.352452, 0.325000),
    (2.242246, 0.219444),
    (2.242246, 0.219444),  # the weights that enter `all`
    (2.155123, 0.258333),
]


def test_the_losses_are_those_written_down(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, phases=PHASES, tracking={"log_every": 1}, data={"workers": 0})
    run(["--config", str(recipe)], cwd=tmp_path)
    events = history(tmp_path / "runs/tiny")
    steps = [(event["loss"], event["lr"]) for event in events if event["event"] == "train"]
    assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in STEPS], rel=5e-4)
    assert [lr for _, lr in steps] == pytest.approx([lr for _, lr in STEPS], rel=1e-8)
    found = [(event["loss"], event["top1"]) for event in events if event["event"] == "val"]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in EVALUATIONS], rel=5e-4)
    assert [top1 for _, top1 in found] == pytest.approx([top1 for _, top1 in EVALUATIONS], abs=0.01)
