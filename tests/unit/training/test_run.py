"""Lines before the first step."""

from __future__ import annotations

from dtl.training.run import classes_without_images


def test_classes_without_images_are_named_for_each_split() -> None:
    assert classes_without_images(["a", "b", "c"], [1, 1, 1], [2, 1, 1]) == []
    train, val = classes_without_images(["a", "b", "c"], [0, 1, 1], [1, 0, 0])
    assert train.startswith("1 of 3 classes without a training image")
    assert train.endswith("a")
    assert val.startswith("2 of 3 classes without a validation image")
    assert "b" in val
    assert "c" in val
