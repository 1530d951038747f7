"""What limits an epoch: the advice follows from what was measured, and is silent where nothing is to change."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dtl.data.loading.batch import Batch
from dtl.machine import peak_bytes
from dtl.training.throughput import EpochSpeed, advise, first_line

# Two loader processes, busy all the time at 10 ms an image, give 200 images/s; the training alone would take 800.
STARVED = EpochSpeed(seconds=100.0, waited=75.0, images=20_000, loading=200.0, computing=190.0)
USUAL = {"workers": 2, "cores": 16, "on_cpu": False, "image_size": 224, "short_side": 375.0}


def test_pads_are_no_images() -> None:
    """They repeat an image of their micro-batch, and nobody waits for them to be read."""
    speed = EpochSpeed()
    for slots in ([0, 1, 2, -1], [3, 4, -1, -1]):
        tensors = {"labels": torch.zeros(4, dtype=torch.int64), "weights": torch.ones(4), "samples": torch.zeros(4, dtype=torch.int64)}
        speed.add([Batch(images=torch.zeros(4, 3, 2, 2, dtype=torch.uint8), slots=torch.tensor(slots), epoch=0, step=0, **tensors)])
    assert speed.images == 5


def test_workers_are_counted_from_the_measured_times() -> None:
    assert advise(STARVED, **USUAL) == (  # type: ignore[arg-type]
        "data loading is the bottleneck (75% of the time is spent waiting for it): an image takes 10.0 ms, 2 loader processes 100% busy; "
        "--data.workers 8 (this process has 16 cores)"
    )


def test_the_first_line_says_what_loading_and_training_reach() -> None:
    slower = replace(STARVED, seconds=110.0, waited=70.0)
    assert first_line([STARVED, slower], workers=2, cores=8.0, on_cpu=False) == (
        "data: 2 loader processes per rank (8 cores per rank) can prepare 400 images/s, training takes 1,000 images/s; the GPU waits 75% of the time for data"
    )
    alone = EpochSpeed(seconds=4.0, waited=3.0, images=100, loading=3.0, computing=3.0)
    assert first_line([alone], workers=0, cores=0.5, on_cpu=True) == (
        "data: the training process itself (0.5 cores per rank) can prepare 33 images/s, training takes 100 images/s; the CPU waits 75% of the time for data"
    )


@pytest.mark.parametrize(
    ("changes", "speed", "said"),
    [
        ({"cores": 4}, {}, "--data.workers 4 (this process has 4 cores; 8 workers would be needed)"),
        ({"cores": 4, "on_cpu": True}, {}, "--data.workers 3 "),
        ({"workers": 0}, {"loading": 75.0, "computing": 75.0}, "in the training process itself; --data.workers 3 "),
        ({"cores": 2, "short_side": 3000.0}, {}, "3000 pixels on the short side, 256 would do: dtl pack SRC DST --short-side 256"),
        ({"cores": 2}, {}, "375 pixels on the short side, 256 would do"),
        ({"cores": 2, "short_side": 250.0}, {}, "use more cores per process, or fewer augmentations"),
        ({}, {"computing": 20.0}, "waiting for the disk (or for a free core) 90% of that time; put the data on a local disk"),
    ],
)
def test_the_advice_depends_on_what_is_short(changes: dict[str, object], speed: dict[str, float], said: str) -> None:
    assert said in advise(replace(STARVED, **speed), **{**USUAL, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "speed",
    [
        {"waited": 10.0},  # the training is the limit
        {"seconds": 1.0, "waited": 0.9},  # too short to tell
        {"loading": 40.0},  # the loader processes are not busy
        {"images": 0, "loading": 0.0},  # cached features
    ],
)
def test_no_advice_where_loading_is_not_the_limit(speed: dict[str, float]) -> None:
    assert advise(replace(STARVED, **speed), **USUAL) == ""  # type: ignore[arg-type]


def test_memory_is_that_of_the_process_alone() -> None:
    """Linux hands a parent's peak on to its children, launchers and test sessions among them (getrusage's ru_maxrss)."""
    before = peak_bytes()
    held = torch.ones(400 * 2**20, dtype=torch.uint8)
    assert peak_bytes() >= before
    assert peak_bytes() > len(held)
    code = "from dtl.machine import peak_bytes; before = peak_bytes(); held = bytearray(b'x') * 300 * 2**20; print(before, peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    small, large = map(int, done.stdout.split())
    assert small < peak_bytes() - 2**27
    assert large >= small + 290 * 2**20
