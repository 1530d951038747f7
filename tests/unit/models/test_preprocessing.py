"""Networks come with the preprocessing of their default weights."""

from __future__ import annotations

from dtl.models.build import build
from dtl.models.preprocessing import Preprocessing


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
