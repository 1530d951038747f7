"""Values that are wrong by themselves, or beside another of their section, are refused in one line."""

from __future__ import annotations

import pytest

from dtl.config import config_from_dict
from dtl.config.models import AugmentConfig
from dtl.errors import UserError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "image-net"}, "data.augment.preset: must be 'imagenet', 'cifar', 'light' or 'none' (got 'image-net')"),
        ({"vertical_flip": 1.5}, "data.augment.vertical_flip: must be at most 1 (got 1.5)"),
        ({"grayscale": -0.1}, "data.augment.grayscale: must be at least 0 (got -0.1)"),
        ({"erasing": float("nan")}, "data.augment.erasing: "),
        ({"rotation": 200.0}, "data.augment.rotation: must be at most 180 (got 200.0)"),
        ({"color_jitter": (0.1, 0.1, 0.1, 0.6)}, "data.augment.color_jitter: "),
        ({"color_jitter": -0.1}, "data.augment.color_jitter: must be at least 0"),
        ({"color_jitter": float("inf")}, "data.augment.color_jitter: must be a finite number"),
        ({"randaugment": (0, 9)}, "data.augment.randaugment: must be at least 1"),
        ({"randaugment": (2, 31)}, "data.augment.randaugment: must be at most 30"),
        ({"randaugment": (2, 9), "trivial": True}, "data.augment: randaugment and trivial are both on; use one of them"),
    ],
)
def test_bad_augmentation_is_refused_in_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_dict({"data": {"augment": settings}}, "my.yaml")
    assert str(caught.value).startswith(f"my.yaml: {message}")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="AugmentConfig"):  # pydantic's own error, where it is made in Python
        AugmentConfig(**settings)  # type: ignore[arg-type]
