"""From a decoded image to the uint8 pixels that the network sees, in two parts.

`Transform.draw` makes all random choices of a batch from (seed, epoch, sample) and the indexed sizes, before any image is decoded.
`Transform.apply` is a pure function of one image and its draws. So a sample's pixels are the same in any batch, on any rank, in any worker and
after any restart. B samples, H W pixels of the decoded image, S those of a square output. Images are normalised on the device; nothing here is float.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dtl.config.functions import code_sha256
from dtl.config.models import INTERPOLATIONS, AugmentConfig, Fit, ImageSize, Interpolation, as_size, shown_size, sides
from dtl.data.decoding.decode import Region
from dtl.data.transforms import pixels
from dtl.data.transforms.geometry import (
    BLACK,
    Colour,
    Fitted,
    FittedCrop,
    Floats,
    Geometry,
    Ints,
    Pixels,
    Placement,
    RandomResizedCrop,
    ShortSide,
    Square,
    place,
    random_boxes,
)
from dtl.data.transforms.pixels import RAND_AUGMENT, TRIVIAL_AUGMENT_WIDE, apply_operation, draw_operations
from dtl.errors import UserError
from dtl.keyed import uniform
from dtl.reading import AS_BEFORE, Reading

# Raise them with every change that gives other pixels for the same sample: resumes and caches compare them. EVALUATION_VERSION covers
# evaluation, here and in geometry.py (resize, crop, square, pad): model folders of another version are refused. TRANSFORM_VERSION covers training;
# finished models do not depend on it.
TRANSFORM_VERSION = 2
EVALUATION_VERSION = 1
VERSIONS = {"training": TRANSFORM_VERSION, "evaluation": EVALUATION_VERSION}

# torchvision erases after normalising, with zeros: that is the mean of the data set, here ImageNet's in 0 ... 255.
IMAGENET_MEAN: Colour = (124, 116, 104)

_MUCH = 2 / 3  # of an image's area: where evaluation sees less, that is a warning

_ERASE_SCALE = (0.02, 0.33)
_ERASE_RATIO = (0.3, 3.3)


@dataclass(frozen=True)
class Draws:
    """The random choices for B samples; None where the transform has no such step.

    `sizes` [B,2] are the (height, width) the boxes are meant for; `erase` [B,4] is (top, left, height, width) in the output, height 0
    for none; `turns` [B] counts turns by 90 degrees to the left; `jitter` [B,4] holds the factors of brightness, contrast, saturation and the
    hue shift, `jitter_order` [B,4] their order.
    """

    sizes: Ints
    placement: Placement
    horizontal_flip: npt.NDArray[np.bool_]
    vertical_flip: npt.NDArray[np.bool_]
    turns: Ints | None = None
    angles: Floats | None = None
    operations: Ints | None = None
    magnitudes: Floats | None = None
    jitter: Floats | None = None
    jitter_order: Ints | None = None
    grayscale: npt.NDArray[np.bool_] | None = None
    erase: Ints | None = None


@dataclass(frozen=True)
class Transform:
    """The transform of training or evaluation (`augment` None: nothing is random). Stateless and picklable.

    Use: `draws = draw(samples, widths, heights, seed=, epoch=)` for a batch, then for each sample `apply(image, draws, i, out[i])`, or decode only
    `region(draws, i)` and call `apply_crop`.
    """

    geometry: RandomResizedCrop | Square | ShortSide | Fitted | FittedCrop
    interpolation: Interpolation = "bilinear"
    augment: AugmentConfig | None = None
    erase_fill: Colour = IMAGENET_MEAN
    fill: Colour = BLACK
    """Around an image that does not fill the window."""
    reading: Reading = AS_BEFORE
    """How stored values become pixels."""

    @property
    def image_size(self) -> ImageSize:
        """Of the output, in pixels."""
        return self.geometry.image_size

    @property
    def function(self) -> str | None:
        """The user's own, which is called on the decoded image first; its result is then drawn for by its own size."""
        return None if self.augment is None else self.augment.function

    @property
    def is_fixed(self) -> bool:
        """A sample has the same pixels in each epoch: nothing is random."""
        if self.augment is None:
            return True
        given = {"horizontal_flip": bool(self.augment.horizontal_flip), "color_jitter": jitter_strengths(self.augment), "reduced_decode": True}
        return self.augment.model_copy(update=given) == AugmentConfig(preset="none", horizontal_flip=False, color_jitter=(0.0, 0.0, 0.0, 0.0))

    def describe(self) -> dict[str, Any]:
        """Everything that the pixels depend on, as JSON, for the keys of caches."""
        augment = None
        if self.augment is not None:
            augment = {**self.augment.model_dump(), "color_jitter": list(jitter_strengths(self.augment))}
            augment = {key: value for key, value in augment.items() if key not in ("turns", "function") or value}
            if self.augment.function is not None:
                augment["function"] = [self.augment.function, code_sha256(self.augment.function, "data.augment.function")]
            augment["randaugment"] = list(self.augment.randaugment) if self.augment.randaugment else None
        geometry = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.geometry).items()}
        return {
            # An augmented image is resized as in evaluation.
            **({} if self.augment is None else {"version": TRANSFORM_VERSION}),
            "evaluation_version": EVALUATION_VERSION,
            "geometry": {"name": type(self.geometry).__name__, **geometry},
            "interpolation": self.interpolation,
            "augment": augment,
            "erase_fill": list(self.erase_fill),
            **({} if not any(self.fill) else {"fill": list(self.fill)}),
            **({} if self.reading == AS_BEFORE else {"pixels": self.reading.to_json()}),
        }

    def draw(self, samples: npt.ArrayLike, widths: npt.ArrayLike, heights: npt.ArrayLike, *, seed: int, epoch: int) -> Draws:
        """The draws of B samples from their ids and indexed sizes in pixels, each [B]: a pure function of these, `seed` and `epoch`."""
        ids = np.asarray(samples, dtype=np.int64)
        wide, high = np.asarray(widths, dtype=np.int64), np.asarray(heights, dtype=np.int64)
        geometry: Geometry = self.geometry
        placement = geometry.draw(ids, wide, high, seed=seed, epoch=epoch)
        never = np.zeros(len(ids), bool)
        draws = Draws(sizes=np.stack([high, wide], axis=1), placement=placement, horizontal_flip=never, vertical_flip=never)
        return draws if self.augment is None else self._draw_augment(self.augment, draws, ids, seed, epoch)

    def what_is_seen(self, widths: Ints, heights: Ints) -> str:
        """One line: how much of the median of N images, of `widths` and `heights` [N] in pixels, evaluation shows.

        A `warning:` where over a third is cut off.
        """
        geometry: Geometry = self.geometry
        shares = geometry.draw(np.arange(len(widths)), widths, heights, seed=0, epoch=0).seen(widths, heights, self.image_size)
        median = np.argsort(shares, kind="stable")[(len(shares) - 1) // 2]
        share, size = float(shares[median]), f"{widths[median]}x{heights[median]}"
        if isinstance(self.geometry, Square | Fitted):
            how = "padded" if isinstance(self.geometry, Fitted) and self.geometry.padded else "stretched"
            shape = "a square" if isinstance(self.image_size, int) else shown_size(self.image_size)
            return f"evaluation sees the whole image, {how} to {shape} (median image {size})"
        line = f"evaluation sees {100 * share:.0f} % of the median image (centre crop, {size})"
        if share > 0.995:
            return line
        return f"{'' if share >= _MUCH else 'warning: '}{line}; --data.fit pad sees all of it"

    def reduction(self, draws: Draws, i: int) -> int:
        """1, 2, 4 or 8: sample `i` may be decoded at this fraction of its size."""
        return draws.placement.reduction(i)

    def region(self, draws: Draws, i: int) -> Region:
        """The rectangle of sample `i` that `apply_crop` needs, and the fraction of its size that it may be decoded at."""
        return draws.placement.region(i)

    def apply(self, image: Pixels, draws: Draws, i: int, out: torch.Tensor) -> None:
        """Write sample `i`, whose decoded pixels are `image` [H,W,3], whole or reduced, into `out` (uint8 [3,H,W], any strides).

        ValueError if the image is not of the size the index gave: a box of another image would be cut.
        """
        height, width = draws.sizes[i].tolist()
        factor = 1
        channels = self.reading.channels
        if image.shape != (height, width, channels):
            factor = self.reduction(draws, i)
            if image.shape != (-(-height // factor), -(-width // factor), channels):
                raise ValueError(f"decoded to {tuple(image.shape)}, but ({height}, {width}, {channels}) according to the index; index the shards again")
        _, top, left, high, wide = draws.placement.region(i, reduction=factor)
        self.apply_crop(image[top : top + high, left : left + wide], draws, i, out)

    def apply_crop(self, crop: Pixels, draws: Draws, i: int, out: torch.Tensor) -> None:
        """The same from the pixels of `region` alone, uint8 [region.height, region.width, 3]."""
        placement = draws.placement
        place(
            crop,
            out,
            resized=tuple(placement.resized[i].tolist()),
            offset=tuple(placement.offsets[i].tolist()),
            horizontal_flip=bool(draws.horizontal_flip[i]),
            vertical_flip=bool(draws.vertical_flip[i]),
            interpolation=self.interpolation,
            fill=self.fill,
        )
        if draws.turns is not None and draws.turns[i]:
            out.copy_(torch.rot90(out, int(draws.turns[i]), (1, 2)).clone())
        if self._changes_pixels(draws, i):
            target = out.permute(1, 2, 0).numpy()
            np.copyto(target, self._augmented(np.ascontiguousarray(target), draws, i))

    def _draw_augment(self, augment: AugmentConfig, draws: Draws, ids: Ints, seed: int, epoch: int) -> Draws:
        flips = augment.preset != "none" or augment.turns if augment.horizontal_flip is None else augment.horizontal_flip
        if flips:
            draws = replace(draws, horizontal_flip=uniform(ids, seed, epoch, "horizontal_flip") < 0.5)
        if augment.vertical_flip:
            draws = replace(draws, vertical_flip=uniform(ids, seed, epoch, "vertical_flip") < augment.vertical_flip)
        if augment.turns:
            draws = replace(draws, turns=(4 * uniform(ids, seed, epoch, "turns")).astype(np.int64))
        if augment.rotation:
            draws = replace(draws, angles=augment.rotation * (2 * uniform(ids, seed, epoch, "rotation") - 1))
        if augment.randaugment is not None or augment.trivial:
            num_ops, magnitude = augment.randaugment or (1, None)
            operations, magnitudes = draw_operations(self._space, ids, num_ops=num_ops, magnitude=magnitude, image_size=self.image_size, seed=seed, epoch=epoch)
            draws = replace(draws, operations=operations, magnitudes=magnitudes)
        if any(strengths := jitter_strengths(augment)):
            jitter, order = _draw_jitter(strengths, ids, seed=seed, epoch=epoch)
            draws = replace(draws, jitter=jitter, jitter_order=order)
        if augment.grayscale:
            draws = replace(draws, grayscale=uniform(ids, seed, epoch, "grayscale") < augment.grayscale)
        if augment.erasing:
            draws = replace(draws, erase=_draw_erase(augment.erasing, self.image_size, ids, seed=seed, epoch=epoch))
        return draws

    @property
    def _space(self) -> tuple[Any, ...]:
        assert self.augment is not None
        return TRIVIAL_AUGMENT_WIDE if self.augment.trivial else RAND_AUGMENT

    def _changes_pixels(self, draws: Draws, i: int) -> bool:
        return bool(
            draws.angles is not None
            or draws.operations is not None
            or draws.jitter is not None
            or (draws.grayscale is not None and draws.grayscale[i])
            or (draws.erase is not None and draws.erase[i, 2])
        )

    def _augmented(self, image: Pixels, draws: Draws, i: int) -> Pixels:
        if draws.angles is not None:
            image = pixels.rotate(image, float(draws.angles[i]))
        if draws.operations is not None and draws.magnitudes is not None:
            for number, magnitude in zip(draws.operations[i].tolist(), draws.magnitudes[i].tolist()):
                image = apply_operation(self._space, number, magnitude, image)
        if draws.jitter is not None and draws.jitter_order is not None:
            image = _jittered(image, draws.jitter[i].tolist(), draws.jitter_order[i].tolist())
        if draws.grayscale is not None and draws.grayscale[i]:
            image = pixels.grayscale(image)
        if draws.erase is not None and draws.erase[i, 2]:
            top, left, height, width = draws.erase[i].tolist()
            image = image.copy()
            image[top : top + height, left : left + width] = self.erase_fill
        return image


def train_transform(
    *,
    image_size: ImageSize,
    augment: AugmentConfig,
    interpolation: str = "bilinear",
    crop_ratio: float = 0.875,
    erase_fill: Colour = IMAGENET_MEAN,
    fit: Fit = "crop",
    reading: Reading = AS_BEFORE,
) -> Transform:
    """The transform of training: the preset's geometry and the augmentations of `augment`. The presets `light` and `none` use `crop_ratio`.

    imagenet: random resized crop (8 % to 100 % of the area, 3/4 to 4/3 of the output's proportions) and flip. cifar: resized to the output, shifted by
    up to an eighth, flip. light: short side to image_size / crop_ratio, random crop, flip. none: the central crop of evaluation.
    With `fit` "stretch" or "pad" the whole image first gets the output's shape, padded with `erase_fill` (the mean); imagenet and light crop that.
    """
    size, mode = _checked_size(image_size), _checked_interpolation(interpolation)
    _check_colours(augment, reading.channels)
    if augment.turns and len({*sides(size)}) > 1:
        raise UserError(f"data.augment.turns needs a square data.image_size: turned by 90 degrees, {sides(size)[0]} x {sides(size)[1]} pixels are not the same")
    shift = min(sides(size)) // 8 if augment.preset == "cifar" else 0
    geometry: RandomResizedCrop | Square | ShortSide | Fitted | FittedCrop
    if fit != "crop":
        padded = fit == "pad"
        if augment.preset == "imagenet":
            geometry = FittedCrop(size, padded, reduced=augment.reduced_decode)
        elif augment.preset == "light":
            geometry = Fitted(size, _resize_size(size, crop_ratio), padded)
        else:
            geometry = Fitted(size, size, padded, shift=shift)
    elif augment.preset == "imagenet":
        height, width = sides(size)
        aspect = width / height
        geometry = RandomResizedCrop(size, ratio=(3 / 4 * aspect, 4 / 3 * aspect), reduced=augment.reduced_decode)
    elif augment.preset == "cifar":
        geometry = Square(size, padding=shift)
    else:
        geometry = ShortSide(size, _resize_size(size, crop_ratio), random=augment.preset == "light")
    return Transform(
        geometry, interpolation=mode, augment=augment, erase_fill=erase_fill, fill=erase_fill if fit == "pad" else BLACK[:1] * reading.channels, reading=reading
    )


def eval_transform(
    *,
    image_size: ImageSize,
    crop_ratio: float = 0.875,
    interpolation: str = "bilinear",
    resize_size: ImageSize | None = None,
    square: bool = False,
    fit: Fit = "crop",
    fill: Colour = IMAGENET_MEAN,
    reading: Reading = AS_BEFORE,
) -> Transform:
    """The transform of evaluation: resize the short side to `resize_size` (round(image_size / crop_ratio) if not given), then centre crop.

    `square` resizes the whole image to the output instead, which goes with the preset `cifar`. With `fit` "stretch" or "pad" the whole image
    gets the output's shape, whatever the crop ratio; `fill` is the colour around a padded one.
    """
    size, mode = _checked_size(image_size), _checked_interpolation(interpolation)
    if fit != "crop":
        return Transform(
            Fitted(size, size, padded=fit == "pad"), interpolation=mode, fill=fill if fit == "pad" else BLACK[:1] * reading.channels, reading=reading
        )
    if square:
        return Transform(Square(size), interpolation=mode, fill=BLACK[:1] * reading.channels, reading=reading)
    if resize_size is not None and min(sides(resize_size)) < 1:
        raise UserError(f"resize_size is {resize_size}; it must be at least 1 (pixels)")
    return Transform(ShortSide(size, resize_size or _resize_size(size, crop_ratio)), interpolation=mode, fill=BLACK[:1] * reading.channels, reading=reading)


def _check_colours(augment: AugmentConfig, channels: int) -> None:
    """UserError for what changes colours, where there are none."""
    given = {"color_jitter": any(jitter_strengths(augment)), "grayscale": augment.grayscale, "randaugment": augment.randaugment, "trivial": augment.trivial}
    names = [f"data.augment.{name}" for name, value in given.items() if value]
    if names and channels != 3:
        raise UserError(
            f"{' and '.join(names)} changes colours, and data.channels is {channels}: leave it out, or write a function of your own (data.augment.function)"
        )


def jitter_strengths(augment: AugmentConfig) -> tuple[float, float, float, float]:
    """Strengths of brightness, contrast, saturation and hue; one number stands for the first three."""
    given = augment.color_jitter
    return given if isinstance(given, tuple) else (given, given, given, 0.0)


def _resize_size(image_size: ImageSize, crop_ratio: float) -> ImageSize:
    if not 0 < crop_ratio <= 1:
        raise UserError(f"crop_ratio is {crop_ratio}; it must be above 0 and at most 1 (the fraction of the resized short side that the crop keeps)")
    height, width = sides(image_size)
    return as_size(round(height / crop_ratio), round(width / crop_ratio))


def _checked_size(image_size: ImageSize) -> ImageSize:
    if min(sides(image_size)) < 1:
        raise UserError(f"image_size is {image_size}; it must be at least 1 (pixels)")
    return image_size


def _checked_interpolation(name: str) -> Interpolation:
    for known in INTERPOLATIONS:
        if name == known:
            return known
    raise UserError(f"interpolation is {name!r}; it must be one of {', '.join(INTERPOLATIONS)}")


def _draw_jitter(strengths: tuple[float, float, float, float], ids: Ints, *, seed: int, epoch: int) -> tuple[Floats, Ints]:
    """Factors [B,4] in max(0, 1 - s) ... 1 + s, the hue's shift in -s ... s, and the order [B,4] in which the four are applied."""
    factors, order_keys = np.empty((len(ids), 4)), np.empty((len(ids), 4))
    for column, (name, strength) in enumerate(zip(("brightness", "contrast", "saturation", "hue"), strengths)):
        low, high = (-strength, strength) if name == "hue" else (max(0.0, 1 - strength), 1 + strength)
        factors[:, column] = low + (high - low) * uniform(ids, seed, epoch, "jitter", name)
        order_keys[:, column] = uniform(ids, seed, epoch, "jitter.order", name)
    return factors, np.argsort(order_keys, axis=1, kind="stable")


def _jittered(image: Pixels, factors: list[float], order: list[int]) -> Pixels:
    for step in order:
        factor = factors[step]
        if step == 3:
            image = pixels.hue(image, factor) if factor else image
        elif factor != 1:
            image = (pixels.brightness, pixels.contrast, pixels.saturation)[step](image, factor)
    return image


def _draw_erase(probability: float, size: ImageSize, ids: Ints, *, seed: int, epoch: int) -> Ints:
    """Rectangles [B,4] in the output, zeros for none; area and aspect ratio as torchvision draws them, ten tries."""
    boxes = np.zeros((len(ids), 4), np.int64)
    hit = np.flatnonzero(uniform(ids, seed, epoch, "erase") < probability)
    heights, widths = (np.full(len(hit), side) for side in sides(size))
    boxes[hit] = random_boxes(ids[hit], widths, heights, scale=_ERASE_SCALE, ratio=_ERASE_RATIO, names=(seed, epoch, "erase.box"))
    return boxes
