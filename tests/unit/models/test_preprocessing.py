"""Networks come with the preprocessing of their default weights."""

from __future__ import annotations

import json

import pytest

from dtl.models.build import build
from dtl.models.preprocessing import Preprocessing, resolve


def test_preprocessing_is_that_of_the_default_weights() -> None:
    imagenet = Preprocessing()
    assert build("resnet18", num_classes=2, meta=True).preprocessing == imagenet
    assert build("dtl/resnet18_plain", num_classes=2, meta=True).preprocessing == imagenet
    tiny = build("dtl/resnet_tiny", num_classes=2, meta=True).preprocessing
    assert (tiny.image_size, tiny.crop_ratio) == (32, 1.0)
    assert build("dtl/resnet18_plain", num_classes=2, meta=True, options={"small_images": True}).preprocessing == tiny
    inception = build("inception_v3", num_classes=2, meta=True).preprocessing
    assert (inception.image_size, round(inception.crop_ratio * 342)) == (299, 299)
    swin = build("swin_t", num_classes=2, meta=True).preprocessing
    assert (swin.interpolation, swin.crop_ratio) == ("bicubic", 224 / 232)
    vit = build("timm/vit_tiny_patch16_224", num_classes=2, meta=True).preprocessing
    assert vit == Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=224, interpolation="bicubic", crop_ratio=0.9)


def test_what_the_loaded_weights_say_comes_first() -> None:
    """Then what is the network's own, which is its size; then the usual values. Facts of one set of weights are not for another."""
    mobilenet = build("mobilenet_v2", num_classes=2, meta=True).preprocessing
    assert round(mobilenet.crop_ratio * 232) == 224, "that of torchvision's own second weights"
    foreign = resolve(mobilenet, None)
    assert foreign == Preprocessing(image_size=224, crop_ratio=0.875)
    assert foreign.line() == (
        "preprocessing: image size 224 (the network's own); crop ratio 0.875, bilinear, mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (usual values)"
    )
    own = resolve(mobilenet, mobilenet.to_json(), source="torchvision:mobilenet_v2")
    assert own == mobilenet
    assert own.line(cropped=False).endswith("std 0.229 0.224 0.225 (from torchvision:mobilenet_v2)")
    assert "crop ratio" not in own.line(cropped=False)
    vit = build("timm/vit_small_patch14_dinov2", num_classes=2, meta=True).preprocessing
    assert (vit.image_size, resolve(vit, None)) == (518, Preprocessing(image_size=518))
    huge = build("torchvision/vit_h_14", num_classes=2, meta=True).preprocessing
    assert huge.image_size == 224, "what it is built for: its default weights are for 518"
    tiny = build("dtl/resnet_tiny", num_classes=2, meta=True).preprocessing
    assert resolve(tiny, None) == tiny
    assert resolve(Preprocessing(), None) == Preprocessing()


def test_values_survive_json_and_damage_is_an_error() -> None:
    values = Preprocessing(image_size=(96, 160), crop_ratio=0.9).to_json()
    assert Preprocessing.from_values(json.loads(json.dumps(values))) == Preprocessing(image_size=(96, 160), crop_ratio=0.9)
    assert "bilinear (instead of lanczos)" in resolve(Preprocessing(), {**values, "interpolation": "lanczos"}, source="x").line()
    for name, wrong in (("mean", [1, 2]), ("std", [0, 1, 1]), ("image_size", [1, 2, 3]), ("image_size", 0), ("crop_ratio", 0), ("crop_ratio", None)):
        with pytest.raises((KeyError, TypeError, ValueError)):
            resolve(Preprocessing(), {**values, name: wrong})
