"""Lines before the first step."""

from __future__ import annotations

import math
import re
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dtl import machine
from dtl.training.run import classes_without_images, too_few_steps, too_few_threads


def test_classes_without_images_are_named_for_each_split() -> None:
    assert classes_without_images(["a", "b", "c"], [1, 1, 1], [2, 1, 1]) == []
    train, val = classes_without_images(["a", "b", "c"], [0, 1, 1], [1, 0, 0])
    assert train.startswith("1 of 3 classes without a training image")
    assert train.endswith("a")
    assert val.startswith("2 of 3 classes without a validation image")
    assert "b" in val
    assert "c" in val


@pytest.mark.parametrize(("images", "batch"), [(120, 64), (1, 4), (64, 64), (257, 64), (319, 64), (320, 64), (40, 16), (9, 64), (100_000, 50_000), (30, 8)])
def test_a_batch_that_leaves_few_steps_is_named_with_one_that_does_not(images: int, batch: int) -> None:
    steps = -(-images // batch)
    lines = too_few_steps(images, batch, steps)
    assert bool(lines) == (steps < 5 and batch > 4)
    for line in lines:
        found = re.search(r"^an epoch has \d+ steps?: [\d,]+ training images? in batches of \d+; --data.global-batch-size (\d+) gives (\d+)$", line)
        assert found, line
        smaller, more = map(int, found.groups())
        assert -(-images // smaller) == more
        assert more > steps
        assert more >= 5 or smaller == 4


@pytest.mark.parametrize(
    ("mine", "others", "line"),
    [
        (range(4), [range(4, 8)] * 3, "each process computes with 1 thread, but 4 cores per process are available: "),  # bound (srun, mpirun --bind-to)
        (range(8), [range(8)] * 3, "each process computes with 1 thread, but 2 cores per process are available: "),
        (range(2), [range(2)] * 7, None),
    ],
)
def test_idle_cores_are_counted_as_the_ranks_are_bound(monkeypatch: pytest.MonkeyPatch, mine: range, others: list[range], line: str | None) -> None:
    ranks = [(socket.gethostname(), frozenset(cores)) for cores in (mine, *others)]
    runtime: Any = SimpleNamespace(
        rank=0, device=torch.device("cpu"), gather=lambda value: [value, *ranks[1:]], launch=SimpleNamespace(local_world_size=len(ranks))
    )
    monkeypatch.setattr(machine, "own_cores", lambda: frozenset(mine))
    monkeypatch.setattr(machine, "physical_cores", lambda cores: cores)
    monkeypatch.setattr(machine, "core_quota", lambda: math.inf)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = too_few_threads(runtime)
    assert found == [] if line is None else len(found) == 1 and found[0].startswith(line)
