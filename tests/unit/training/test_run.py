"""Lines before the first step."""

from __future__ import annotations

import re

import pytest

from dtl.training.run import classes_without_images, too_few_steps


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
