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


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "no")])
def test_the_network_is_timed_in_the_precision_that_training_takes(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, precision: str) -> None:
    import torch

    from dtl.distributed import runtime
    from dtl.doctor.measure import model

    computed = set()
    linear = torch.nn.functional.linear
    monkeypatch.setattr(runtime, "_cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: computed.add((made := linear(*given)).dtype) or made)  # type: ignore[func-returns-value]
    facts = model({"model": "dtl/resnet_tiny", "image_size": 32, "batch_size": 2, "device": "cpu", "seconds": 0.0})
    assert (facts["precision"], computed) == (precision, {torch.bfloat16 if has_bf16 else torch.float32})
    assert facts["images_s"] > 0
