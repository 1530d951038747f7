"""Crop, resize and window of training and evaluation images: drawn for a whole batch before anything is decoded.

Three steps describe every geometry here: cut a box out of the decoded image, resize it once, and look at the result through a
window of image_size pixels that may reach over the edge (one colour there). B samples, H W pixels, S image_size where it is a square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from dtl.config.models import ImageSize, Interpolation
from dtl.data.decoding.decode import Region
from dtl.keyed import uniform

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, ...]
"""One number per channel."""
BLACK: Colour = (0, 0, 0)
T = TypeVar("T", Pixels, torch.Tensor)

# The short side is scaled to resize_size, so the memory of the resized image grows with its aspect ratio. Beyond this ratio only a
# stripe is resized, which can shift the picture by less than a pixel against torchvision's Resize.
MAX_ASPECT = 16

REDUCTIONS = (2, 4, 8)  # libjpeg's own; the fractions between them cost more than decoding the whole image (measured)

_TRIES = 10  # as torchvision's RandomResizedCrop and RandomErasing


@dataclass(frozen=True)
class Placement:
    """The geometry of B samples, int64 throughout.

    `boxes` [B,4] (top, left, height, width) in pixels of the decoded image; `resized` [B,2] (height, width) of the box after the
    resize; `offsets` [B,2] (top, left) of the window in the resized box, negative where the window reaches over the edge.
    `reductions` [B] are 1, or 2, 4 or 8 where an image may come decoded at that fraction of its size, rounded up (geometries that
    never allow it leave it out).
    """

    boxes: Ints
    resized: Ints
    offsets: Ints
    reductions: Ints | None = None

    def reduction(self, i: int) -> int:
        """1, 2, 4 or 8: sample `i` may be decoded at this fraction of its size."""
        return 1 if self.reductions is None else int(self.reductions[i])

    def region(self, i: int, *, reduction: int | None = None) -> Region:
        """Where sample `i`'s box lies in the image at its reduction, or at another one that divides it."""
        factor = self.reduction(i) if reduction is None else reduction
        top, left, height, width = self.boxes[i].tolist()
        return Region(factor, top // factor, left // factor, -(-height // factor), -(-width // factor))

    def seen(self, widths: Ints, heights: Ints, image_size: ImageSize) -> Floats:
        """The share [B] of each image's area that the window shows."""
        ends = np.minimum(self.offsets + _pair(image_size), self.resized)
        shown = np.maximum(ends - np.maximum(self.offsets, 0), 0) / self.resized * self.boxes[:, 2:]
        shares: Floats = shown[:, 0] * shown[:, 1] / (heights * widths)
        return shares


class Geometry(Protocol):
    """Draws the placement of each sample from its index entry alone."""

    def draw(self, samples: Ints, widths: Ints, heights: Ints, *, seed: int, epoch: int) -> Placement: ...


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area and aspect ratio, resized to the window (Szegedy et al. 2015, "Going deeper with convolutions").

    The distribution is torchvision's: up to ten tries, then the largest central box within the ratios.
    """

    image_size: ImageSize
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    reduced: bool = True
    """Boxes that are 2, 4 or 8 times the output or more lie on the grid of images decoded at that fraction."""

    def draw(self, samples: Ints, widths: Ints, heights: Ints, *, seed: int, epoch: int) -> Placement:
        boxes = _central_boxes(widths, heights, ratio=self.ratio)
        found = random_boxes(samples, widths, heights, scale=self.scale, ratio=self.ratio, names=(seed, epoch, "crop"))
        boxes = np.where(found[:, 2:3] > 0, found, boxes)
        resized = _each(self.image_size, len(samples))
        reductions = None
        if self.reduced:
            boxes, reductions = on_reduced_grid(boxes, widths, heights, image_size=self.image_size)
        return Placement(boxes=boxes, resized=resized, offsets=np.zeros_like(resized), reductions=reductions)


@dataclass(frozen=True)
class Square:
    """The whole image resized to the window, then shifted by up to `padding` pixels each way with zeros moving in.

    With padding 4 at 32 pixels it is the usual CIFAR recipe (pad 4, random crop 32); with padding 0 it is its evaluation.
    """

    image_size: ImageSize
    padding: int = 0

    def draw(self, samples: Ints, widths: Ints, heights: Ints, *, seed: int, epoch: int) -> Placement:
        resized = _each(self.image_size, len(samples))
        offsets = np.zeros_like(resized)
        if self.padding:
            places = np.full(len(samples), 2 * self.padding + 1)
            for axis, name in enumerate(("shift.top", "shift.left")):
                offsets[:, axis] = below(places, uniform(samples, seed, epoch, name)) - self.padding
        return Placement(boxes=_whole(widths, heights), resized=resized, offsets=offsets)


@dataclass(frozen=True)
class ShortSide:
    """The short side resized to `resize_size`, then a central or a random window. An oblong window has an oblong `resize_size`, which is covered.

    Sizes and the central window round as torchvision's Resize and CenterCrop do, so the pixels are the same.
    """

    image_size: ImageSize
    resize_size: ImageSize
    random: bool = False

    def draw(self, samples: Ints, widths: Ints, heights: Ints, *, seed: int, epoch: int) -> Placement:
        boxes = self._stripes(samples, widths, heights, seed=seed, epoch=epoch)
        sizes, target = boxes[:, 2:], _each(self.resize_size, len(samples))
        # int(size * long / short): the division of the product is what torchvision computes, and it rounds down.
        free = (target[:, ::-1] * sizes / sizes[:, ::-1]).astype(np.int64)
        resized = np.maximum(free, target)  # the side that binds, the other one in proportion
        spare = resized - _pair(self.image_size)
        offsets = np.where(spare >= 0, np.rint(spare / 2).astype(np.int64), -((-spare) // 2))
        if self.random:
            for axis, name in enumerate(("window.top", "window.left")):
                room = np.maximum(spare[:, axis], 0) + 1
                place = below(room, uniform(samples, seed, epoch, name))
                offsets[:, axis] = np.where(spare[:, axis] > 0, place, offsets[:, axis])
        return Placement(boxes=boxes, resized=resized, offsets=offsets)

    def _stripes(self, samples: Ints, widths: Ints, heights: Ints, *, seed: int, epoch: int) -> Ints:
        boxes, target = _whole(widths, heights), _pair(self.resize_size)
        limits = [MAX_ASPECT * boxes[:, 3 - axis] * target[axis] // target[1 - axis] for axis in (0, 1)]
        if all((boxes[:, 2 + axis] <= limits[axis]).all() for axis in (0, 1)):
            return boxes
        for axis in (0, 1):
            sizes = boxes[:, 2 + axis]
            kept = np.minimum(sizes, limits[axis])
            spare = sizes - kept
            start = below(spare + 1, uniform(samples, seed, epoch, "stripe", axis)) if self.random else spare // 2
            boxes[:, axis], boxes[:, 2 + axis] = start, kept
        return boxes


@dataclass(frozen=True)
class Fitted:
    """The whole image in a canvas of `resize_size`, stretched to it, or padded: one side fills it, and the image stands in the middle.

    The window is that canvas. Where it is smaller, or may be shifted by up to `shift` pixels, its place is random. Sizes and the middle round as
    Pillow's ImageOps.pad does.
    """

    image_size: ImageSize
    resize_size: ImageSize
    padded: bool
    shift: int = 0

    def draw(self, samples: Ints, widths: Ints, heights: Ints, *, seed: int, epoch: int) -> Placement:
        boxes = _whole(widths, heights)
        resized = canvas = _each(self.resize_size, len(samples))
        if self.padded:
            sizes = boxes[:, 2:]
            free = np.rint(sizes / sizes[:, ::-1] * canvas[:, ::-1]).astype(np.int64)
            resized = np.maximum(np.minimum(free, canvas), 1)  # the side that binds, the other one in proportion
        offsets = -np.rint((canvas - resized) * 0.5).astype(np.int64)
        for axis, name in enumerate(("window.top", "window.left")):
            choices = _pair(self.resize_size)[axis] - _pair(self.image_size)[axis] + 2 * self.shift + 1
            if choices > 1:
                offsets[:, axis] += below(np.full(len(samples), choices), uniform(samples, seed, epoch, name)) - self.shift
        return Placement(boxes=boxes, resized=resized, offsets=offsets)


@dataclass(frozen=True)
class FittedCrop:
    """RandomResizedCrop in the canvas into which the whole image was stretched or padded, so that a crop may hold all of it.

    A padded image's crop lies inside of the image along each axis or holds all of it, since a crop of padding alone would teach nothing.
    """

    image_size: ImageSize
    padded: bool
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    reduced: bool = True

    def draw(self, samples: Ints, widths: Ints, heights: Ints, *, seed: int, epoch: int) -> Placement:
        sizes = np.stack([heights, widths], axis=1)
        window = _pair(self.image_size)
        canvas = sizes
        if self.padded:  # of the window's proportions: one side is the image's, the other one larger
            canvas = np.maximum(np.rint(sizes[:, ::-1] * window / window[::-1]).astype(np.int64), sizes)
        lengths = np.maximum(np.rint(self._shares(samples, seed=seed, epoch=epoch) * canvas).astype(np.int64), 1)
        margins = (canvas - sizes) // 2
        # Inside of the image, or around it and inside of the canvas.
        first = np.where(lengths <= sizes, 0, np.maximum(-margins, sizes - lengths))
        last = np.where(lengths <= sizes, sizes - lengths, np.maximum(np.minimum(0, canvas - margins - lengths), first))
        starts = np.empty_like(sizes)
        for axis, name in enumerate(("fitted.top", "fitted.left")):
            starts[:, axis] = first[:, axis] + below(last[:, axis] - first[:, axis] + 1, uniform(samples, seed, epoch, name))
        begin, end = np.maximum(starts, 0), np.minimum(starts + lengths, sizes)
        boxes = np.concatenate([begin, end - begin], axis=1)
        resized = np.maximum(np.rint((end - begin) * window / lengths).astype(np.int64), 1)
        offsets = -np.rint((begin - starts) * window / lengths).astype(np.int64)
        reductions = None
        if self.reduced:
            boxes, reductions = on_reduced_grid(boxes, widths, heights, image_size=self.image_size)
        return Placement(boxes=boxes, resized=resized, offsets=offsets, reductions=reductions)

    def _shares(self, samples: Ints, *, seed: int, epoch: int) -> Floats:
        """Height and width [B,2] of each crop as shares of the canvas's sides, at most 1; the first of ten tries that fits, else the whole canvas."""
        shares = np.ones((len(samples), 2))
        rest = np.arange(len(samples))
        for attempt in range(_TRIES):
            ids = samples[rest]
            area = self.scale[0] + (self.scale[1] - self.scale[0]) * uniform(ids, seed, epoch, "fitted", "area", attempt)
            low, high = np.log(self.ratio[0]), np.log(self.ratio[1])
            aspect = np.exp(low + (high - low) * uniform(ids, seed, epoch, "fitted", "aspect", attempt))
            found = np.sqrt(np.stack([area / aspect, area * aspect], axis=1))
            fits = (found <= 1).all(axis=1)
            shares[rest[fits]] = found[fits]
            rest = rest[~fits]
            if not len(rest):
                break
        return shares


def on_reduced_grid(boxes: Ints, widths: Ints, heights: Ints, *, image_size: ImageSize) -> tuple[Ints, Ints]:
    """Boxes moved by less than a pixel of the reduced image, and the reductions [B] (1, 2, 4, 8) that leave `image_size` pixels or more.

    JPEG decoders reduce by powers of two for less than the work of decoding; a box off the grid would shift the picture.
    """
    reductions, window = np.ones(len(boxes), np.int64), _pair(image_size)
    for factor in REDUCTIONS:
        reductions[(boxes[:, 2:] >= factor * window).all(axis=1)] = factor
    steps = reductions[:, None]
    starts, ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    starts, ends = (starts + steps // 2) // steps * steps, (ends + steps // 2) // steps * steps
    # The last pixel of a reduced image may stand for fewer than `steps` of the whole one.
    ends = np.minimum(ends, np.stack([heights, widths], axis=1))
    return np.concatenate([starts, ends - starts], axis=1), reductions


def random_boxes(
    samples: Ints,
    widths: Ints,
    heights: Ints,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    names: tuple[int | str, ...],
) -> Ints:
    """Boxes [B,4] of random area (a share in `scale` of the image's) and width / height in `ratio` (log-uniform).

    A row of zeros where ten tries gave no box that fits.
    """
    boxes = np.zeros((len(samples), 4), np.int64)
    rest = np.arange(len(samples))
    log_low, log_high = np.log(ratio[0]), np.log(ratio[1])
    for attempt in range(_TRIES):
        ids, width, height = samples[rest], widths[rest], heights[rest]
        share = scale[0] + (scale[1] - scale[0]) * uniform(ids, *names, "area", attempt)
        aspect = np.exp(log_low + (log_high - log_low) * uniform(ids, *names, "aspect", attempt))
        area = share * (width * height)
        w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        chosen = ids[fits]
        top = below((height - h + 1)[fits], uniform(chosen, *names, "top", attempt))
        left = below((width - w + 1)[fits], uniform(chosen, *names, "left", attempt))
        boxes[rest[fits]] = np.stack([top, left, h[fits], w[fits]], axis=1)
        rest = rest[~fits]
        if not len(rest):
            break
    return boxes


def _pair(size: ImageSize) -> Ints:
    """(height, width) [2], as NumPy spreads one number or two."""
    return np.broadcast_to(np.asarray(size, np.int64), 2)


def below(counts: Ints, uniforms: Floats) -> Ints:
    """Integers in [0, count), one for each uniform number; the minimum guards the product's rounding up to the count."""
    return np.minimum((uniforms * counts).astype(np.int64), counts - 1)


def place(
    crop: Pixels,
    out: torch.Tensor,
    *,
    resized: tuple[int, int],
    offset: tuple[int, int],
    horizontal_flip: bool,
    vertical_flip: bool,
    interpolation: Interpolation,
    fill: Colour = BLACK,
) -> None:
    """Write the window of one sample, cut out already, into `out` (uint8 [3,H,W], any strides; a channels_last batch is the faster one).

    `fill` is the colour where the window reaches over the image's edge.
    """
    target = out.permute(1, 2, 0).numpy()
    if resized == target.shape[:2] != crop.shape[:2] and offset == (0, 0) and target.flags.c_contiguous and not (horizontal_flip or vertical_flip):
        # The kernel behind `interpolate`, written straight into the batch.
        _KERNELS[interpolation](_as_batch(crop), resized, False, None, None, out=out[None])
        return
    picture = resize(crop, resized, interpolation)
    if offset != (0, 0) or picture.shape != target.shape:
        picture, target = clip_to_window(picture, target, offset, horizontal_flip, vertical_flip, fill)
    if not (horizontal_flip or vertical_flip):
        np.copyto(target, picture)
    elif target.strides[2] == 1:
        # NumPy reverses pixels of three bytes ten times slower than torch does.
        axes = [axis for axis, flip in enumerate((vertical_flip, horizontal_flip)) if flip]
        np.copyto(target, torch.from_numpy(_writable(picture)).flip(axes).numpy())
    else:
        np.copyto(target, picture[:: -1 if vertical_flip else 1, :: -1 if horizontal_flip else 1])


def resize(pixels: Pixels, size: tuple[int, int], interpolation: Interpolation) -> Pixels:
    """Antialiased resize of uint8 [H,W,3] to `size` (height, width) on torch's native uint8 kernel: torchvision's pixels."""
    height, width, _ = pixels.shape
    if (height, width) == size:
        return pixels
    resized = interpolate(_as_batch(pixels), size=size, mode=interpolation, align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


_KERNELS = {"bilinear": torch.ops.aten._upsample_bilinear2d_aa.out, "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out}


def _as_batch(pixels: Pixels) -> torch.Tensor:
    """[1,C,H,W] with exact channels_last strides: without them torch re-packs the output plane by plane (pytorch#68430)."""
    height, width, channels = pixels.shape
    dense = _writable(np.ascontiguousarray(pixels))
    return torch.from_numpy(dense).as_strided((1, channels, height, width), (channels * height * width, 1, channels * width, channels))


def clip_to_window(picture: T, target: T, offset: tuple[int, int], horizontal_flip: bool, vertical_flip: bool, fill: Colour = BLACK) -> tuple[T, T]:
    """The part of the picture [H,W,3] that the window sees, and the part of the target where it goes; the rest of the target is filled."""
    taken, given = [], []
    for start, length, size, flipped in zip(offset, picture.shape[:2], target.shape[:2], (vertical_flip, horizontal_flip)):
        first, last = max(start, 0), min(start + size, length)
        at = first - start
        if flipped:
            at = size - at - (last - first)
        taken.append(slice(first, last))
        given.append(slice(at, at + last - first))
    part = target[given[0], given[1]]
    if part.shape != target.shape:
        for channel, value in enumerate(fill):
            target[..., channel] = value
    return picture[taken[0], taken[1]], part


def _writable(pixels: Pixels) -> Pixels:
    """torch refuses to view read-only memory (which is what Pillow's arrays are) without a warning."""
    return pixels if pixels.flags.writeable else pixels.copy()


def _each(size: ImageSize, num: int) -> Ints:
    """[num, 2] (height, width)."""
    return np.tile(_pair(size), (num, 1))


def _whole(widths: Ints, heights: Ints) -> Ints:
    zeros = np.zeros_like(heights)
    return np.stack([zeros, zeros, heights, widths], axis=1)


def _central_boxes(widths: Ints, heights: Ints, *, ratio: tuple[float, float]) -> Ints:
    """The largest central box with an aspect ratio within `ratio`: what torchvision falls back to."""
    aspect = widths / heights
    w = np.where(aspect > ratio[1], np.rint(heights * ratio[1]).astype(np.int64), widths)
    h = np.where(aspect < ratio[0], np.rint(widths / ratio[0]).astype(np.int64), heights)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)
