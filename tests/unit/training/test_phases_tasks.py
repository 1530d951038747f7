"""dtl.training.phases: classification is untouched, rotation gives all four turns with their labels."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from dtl.config import PhaseConfig
from dtl.errors import UserError
from dtl.training.phases import TASKS, task_named


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("num_images", [1, 3])
def test_all_four_rotations_exactly(dtype: torch.dtype, channels_last: bool, num_images: int) -> None:
    images = torch.randint(0, 256, (num_images, 3, 8, 8)).to(dtype)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    weights = torch.tensor([1.0, 0.0, 1.0][:num_images])
    turned, turns, four_weights = task_named("rotate").prepare(images, torch.full((num_images,), 7), weights)
    assert turned.shape == (4 * num_images, 3, 8, 8)
    assert turned.dtype == dtype
    assert turned.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for turn in range(4):
        for b in range(num_images):
            row = turn * num_images + b
            expected = np.rot90(images[b].permute(1, 2, 0).numpy(), turn)  # counter-clockwise
            assert np.array_equal(turned[row].permute(1, 2, 0).numpy(), expected)
            assert turns[row] == turn
            assert four_weights[row] == weights[b]
    assert turns.dtype == torch.int64


def test_rotate_has_its_own_outputs() -> None:
    task = task_named("rotate")
    assert (task.name, task.expansion, task.num_outputs(10)) == ("rotate", 4, 4)
    assert task.class_names(["a"]) == ("0°", "90°", "180°", "270°")
    with pytest.raises(AssertionError, match="8 x 9 pixels"):
        task.prepare(torch.zeros(2, 3, 8, 9), torch.zeros(2), torch.ones(2))


def test_classify_changes_nothing() -> None:
    task = task_named("classify")
    given = (torch.rand(2, 3, 4, 5), torch.tensor([1, 0]), torch.ones(2))
    assert all(a is b for a, b in zip(task.prepare(*given), given))
    assert (task.name, task.expansion, task.num_outputs(10), task.class_names(["a", "b"])) == ("classify", 1, 10, ("a", "b"))


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(UserError, match="task is 'jigsaw'; it must be one of classify, "):
        task_named("jigsaw")


def test_the_recipes_know_every_task_and_each_keeps_its_shapes() -> None:
    assert set(get_args(PhaseConfig.model_fields["task"].annotation)) == set(TASKS)
    for name, task in TASKS.items():
        assert task.name == name
        images, labels, weights = task.prepare(torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2]), torch.tensor([1.0, 0.0, 1.0]))
        rows = 3 * task.expansion
        assert (images.shape, labels.shape, weights.shape) == ((rows, 3, 8, 8), (rows,), (rows,))
        assert int(labels.max()) < task.num_outputs(3) == len(task.class_names(["a", "b", "c"]))
        assert int((weights == 0).sum()) == task.expansion, "a pad stays a pad"
