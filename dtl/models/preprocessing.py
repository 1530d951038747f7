"""What a network's pretrained weights were trained to see."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocessing:
    """How images reach a network; the ImageNet values by default.

    `mean` and `std` are for pixels in 0..1; `image_size` in pixels; `crop_ratio` = image_size / short side before the centre crop.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    image_size: int = 224
    interpolation: str = "bilinear"
    crop_ratio: float = 0.875


def torchvision_preprocessing(name: str) -> Preprocessing:
    """That of the default weights of a torchvision model."""
    import torchvision.models

    weights = torchvision.models.get_model_weights(name)
    preset = weights.DEFAULT.transforms()
    image_size, resize = int(preset.crop_size[0]), int(preset.resize_size[0])
    return Preprocessing(
        mean=_triple(preset.mean),
        std=_triple(preset.std),
        image_size=image_size,
        interpolation=str(preset.interpolation.value),
        crop_ratio=image_size / resize,
    )


def timm_preprocessing(pretrained_cfg: dict[str, object]) -> Preprocessing:
    """That of a timm model's `pretrained_cfg`."""
    plain = Preprocessing()
    size = pretrained_cfg.get("input_size") or (3, plain.image_size, plain.image_size)
    return Preprocessing(
        mean=_triple(pretrained_cfg.get("mean") or plain.mean),
        std=_triple(pretrained_cfg.get("std") or plain.std),
        image_size=int(size[-1]),  # type: ignore[index]
        interpolation=str(pretrained_cfg.get("interpolation") or plain.interpolation),
        crop_ratio=float(pretrained_cfg.get("crop_pct") or plain.crop_ratio),  # type: ignore[arg-type]
    )


def _triple(values: object) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)  # type: ignore[attr-defined]
    return red, green, blue
