"""How images reach a network: what its published weights were trained to see, and what a run uses, from the weights that it loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dtl.config.models import INTERPOLATIONS, ImageSize, as_size, shown_size, sides
from dtl.imports import without_compiler
from dtl.reading import AS_BEFORE, Reading

FACTS = ("image_size", "crop_ratio", "interpolation", "mean", "std")
USUAL, OWN = "usual values", "the network's own"


@dataclass(frozen=True)
class Preprocessing:
    """How images reach a network; the ImageNet values by default.

    `mean` and `std` are for pixels in 0..1, one number per channel; `image_size` in pixels; `crop_ratio` = image_size / short side before the centre crop.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    image_size: ImageSize = 224
    interpolation: str = "bilinear"
    crop_ratio: float = 0.875
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where each of these came from, in words, by its name; empty where it is not known."""
    reading: Reading = AS_BEFORE
    """How stored values become pixels."""

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Preprocessing:
        """What `to_json` gave, or a model.json. ValueError, KeyError or TypeError where it is something else."""
        reading = Reading.from_values(values.get("pixels"))
        mean, std, size = _numbers(values["mean"]), _numbers(values["std"]), values["image_size"]
        if len(mean) != reading.channels or len(std) != reading.channels or min(std) <= 0:
            raise ValueError(f"mean {mean} and std {std} must be {reading.channels} numbers each, and std positive")
        image_size = as_size(*(int(side) for side in (size if isinstance(size, list | tuple) else (size, size))))
        crop_ratio = float(values["crop_ratio"])
        if min(sides(image_size)) < 1 or not 0 < crop_ratio <= 1:
            raise ValueError(f"image_size {size} or crop_ratio {crop_ratio} is out of range")
        return cls(mean, std, image_size, str(values["interpolation"]), crop_ratio, dict(values.get("origins", {})), reading)

    def to_json(self) -> dict[str, Any]:
        """Without `origins`."""
        size = self.image_size if isinstance(self.image_size, int) else list(self.image_size)
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "image_size": size,
            "interpolation": self.interpolation,
            "crop_ratio": self.crop_ratio,
            "pixels": self.reading.to_json(),
        }

    def line(self, *, cropped: bool = True) -> str:
        """All of it and where it came from. `cropped`: the crop ratio has an effect."""
        by_origin: dict[str, list[str]] = {}
        for name in FACTS:
            if name != "crop_ratio" or cropped:
                by_origin.setdefault(self.origins.get(name, "not recorded"), []).append(self._shown(name))
        parts = [f"{', '.join(words)} ({origin})" for origin, words in by_origin.items()]
        if self.reading.range is not None:
            low, high = self.reading.range
            parts.append(f"values of more than 8 bits: {low:g} becomes 0, {high:g} becomes 255 ({self.origins.get('pixels', 'not recorded')})")
        return "preprocessing: " + "; ".join(parts)

    def _shown(self, name: str) -> str:
        value = getattr(self, name)
        if name == "interpolation":
            return str(value)
        text = shown_size(value) if name == "image_size" else f"{value:.4g}" if name == "crop_ratio" else " ".join(f"{one:.4g}" for one in value)
        return f"{name.replace('_', ' ')} {text}"


def resolve(network: Preprocessing, weights: Mapping[str, Any] | None, *, source: str = "") -> Preprocessing:
    """What a run uses unless its settings say otherwise: what the loaded weights say, else the network's own size, else the usual values.

    `network`: that of the network's published weights, of which only what is its own is for other weights too. `weights`: what the weights from
    `source` say of themselves. ValueError, KeyError or TypeError where that is damaged.
    """
    if weights is None:
        own = [name for name, origin in network.origins.items() if origin == OWN]
        return replace(Preprocessing(), **{name: getattr(network, name) for name in own}, origins=dict.fromkeys(FACTS, USUAL) | dict.fromkeys(own, OWN))
    found = Preprocessing.from_values(weights)
    if found.reading.channels != 3:  # measured on other images, and for other channels
        found = replace(found, mean=Preprocessing.mean, std=Preprocessing.std)
    found = replace(found, reading=AS_BEFORE, origins=dict.fromkeys(FACTS, f"from {source}"))
    if found.interpolation in INTERPOLATIONS:
        return found
    return replace(found, interpolation="bilinear", origins={**found.origins, "interpolation": f"instead of {found.interpolation}"})


def of_torchvision(preset: Any) -> Preprocessing:
    """That of the `transforms()` of a set of torchvision's weights."""
    image_size, resize = int(preset.crop_size[0]), int(preset.resize_size[0])
    return Preprocessing(
        mean=_numbers(preset.mean),
        std=_numbers(preset.std),
        image_size=image_size,
        interpolation=str(preset.interpolation.value),
        crop_ratio=image_size / resize,
    )


def torchvision_preprocessing(name: str) -> Preprocessing:
    """That of the default weights of a torchvision model."""
    with without_compiler():
        import torchvision.models

    return of_torchvision(torchvision.models.get_model_weights(name).DEFAULT.transforms())


def timm_preprocessing(pretrained_cfg: Mapping[str, Any]) -> Preprocessing:
    """That of a timm model's `pretrained_cfg`."""
    plain = Preprocessing()
    size = pretrained_cfg.get("input_size") or (3, *sides(plain.image_size))
    return Preprocessing(
        mean=_numbers(pretrained_cfg.get("mean") or plain.mean),
        std=_numbers(pretrained_cfg.get("std") or plain.std),
        image_size=as_size(int(size[-2]), int(size[-1])),
        interpolation=str(pretrained_cfg.get("interpolation") or plain.interpolation),
        crop_ratio=float(pretrained_cfg.get("crop_pct") or plain.crop_ratio),
    )


def _numbers(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
