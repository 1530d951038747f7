"""Speeds are measured on the user's own images."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_decoding_is_measured_on_ones_own_images(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / name / f"{number}.jpg")
    from dtl.doctor.measure import decode

    facts = decode({"image_size": 32, "data": str(tmp_path), "seconds": 0.05})
    assert facts["what"].startswith("6 images of")
    assert 0 < facts["ms_per_image"] < 1000
    with pytest.raises(ValueError, match="has no images that could be read"):
        decode({"image_size": 32, "data": str(tmp_path / "nothing"), "seconds": 0.05})


@pytest.mark.parametrize(
    ("has_bf16", "wanted", "precision"), [(True, "auto", "bf16"), (False, "auto", "no"), (False, "bf16", "bf16"), (True, "no", "no"), (False, "fp16", "no")]
)
def test_the_network_is_timed_in_the_precision_that_training_takes(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, wanted: str, precision: str) -> None:
    import torch

    from dtl.distributed import runtime
    from dtl.doctor.measure import model

    computed = set()
    linear = torch.nn.functional.linear
    monkeypatch.setattr(runtime, "_cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: computed.add((made := linear(*given)).dtype) or made)  # type: ignore[func-returns-value]
    facts = model({"model": "dtl/resnet_tiny", "image_size": 32, "batch_size": 2, "device": "cpu", "seconds": 0.0, "precision": wanted})
    assert (facts["precision"], computed) == (precision, {torch.bfloat16 if precision == "bf16" else torch.float32})
    assert facts["images_s"] > 0


def test_the_network_is_timed_with_the_recipes_options_and_memory_format(monkeypatch: pytest.MonkeyPatch) -> None:
    import networks
    import torch

    from dtl.doctor.measure import model

    seen = []

    class Small(torch.nn.Module):
        def __init__(self, num_classes: int, width: int) -> None:
            super().__init__()
            self.network, self.width = networks.small(num_classes), width

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.device.type != "meta" and len(x) == 3:
                seen.append((self.width, x.is_contiguous(memory_format=torch.channels_last)))
            return self.network(x)

    monkeypatch.setattr(networks, "wide_or_not", Small, raising=False)
    for channels_last in ("auto", False):
        given = {"image_size": 16, "batch_size": 3, "device": "cpu", "seconds": 0.0, "options": {"width": 7}, "channels_last": channels_last}
        model({"model": "networks:wide_or_not", "precision": "no", **given})
    assert sorted(set(seen)) == [(7, False), (7, True)]
