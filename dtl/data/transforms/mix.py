"""Mixup (Zhang et al. 2017, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) between neighbours of the global batch.

Slots 2i and 2i + 1 of the global batch are a pair: they mix with each other, so every image is used once, and what a pair draws
depends on (seed, epoch, step, pair) alone. So the mixed images are the same at any world size and micro-batch size, as long as no
cut between ranks or micro-batches parts a pair. B slots of a micro-batch, P pairs in it, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtl.keyed import uniform

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def mix_batch(
    images: Tensor,
    targets: Tensor,
    slots: Tensor | npt.NDArray[np.int64],
    *,
    mixup: float,
    cutmix: float,
    seed: int,
    epoch: int,
    step: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix images [B,C,H,W] (floating point) and targets [B,K] within pairs; returns new tensors, or the given ones if nothing mixes.

    `slots` int64 [B], on the host: places in the global batch, -1 for a pad. `mixup`, `cutmix`: alpha of Beta(alpha, alpha), 0 is
    off; with both, a coin for each pair chooses. `weights` [B]: a pair with a weight of 0 in it (a damaged sample) stays unmixed, as
    does a slot without a partner. Works on the images' device and never waits for it.
    """
    assert images.is_floating_point(), "mix after normalising"
    assert len(slots) == len(images) == len(targets)
    first = _pairs(np.asarray(slots, dtype=np.int64))
    if not len(first) or not (mixup or cutmix):
        return images, targets
    places = np.asarray(slots, dtype=np.int64)[first] // 2
    height, width = images.shape[2:]
    share, boxes = draw_pairs(places, height, width, mixup=mixup, cutmix=cutmix, names=(seed, epoch, step))
    # One small copy to the device: partner, mixup's share of the own image, box (top, bottom, left, right). float32 holds them all.
    plan = np.zeros((len(images), 6), np.float32)
    plan[:, 0], plan[:, 1] = np.arange(len(images)), 1.0
    plan[first, 0], plan[first + 1, 0] = first + 1, first
    for rows in (first, first + 1):
        plan[rows, 1], plan[rows, 2:] = share, boxes
    on_device = torch.from_numpy(plan).to(images.device, non_blocking=True)
    partner, share_own, box = on_device[:, 0].long(), on_device[:, 1], on_device[:, 2:]
    if weights is not None:
        real = weights.to(images.device, non_blocking=True) > 0
        both = real & real[partner]
        share_own = torch.where(both, share_own, 1.0)
        box = torch.where(both[:, None], box, 0.0)
    return _mixed(images, targets, partner, share_own, box, mixup=mixup > 0, cutmix=cutmix > 0)


def draw_pairs(pairs: Ints, height: int, width: int, *, mixup: float, cutmix: float, names: tuple[int | str, ...]) -> tuple[Floats, Ints]:
    """For P pairs: mixup's share of the own image [P] (1 where cutmix was chosen) and cutmix's box [P,4] (top, bottom, left, right)."""
    use_cutmix = np.full(len(pairs), cutmix > 0)
    if mixup and cutmix:
        use_cutmix = uniform(pairs, *names, "mix.coin") < 0.5
    share = np.ones(len(pairs))
    boxes = np.zeros((len(pairs), 4), np.int64)
    if mixup:
        share = np.where(use_cutmix, 1.0, symmetric_beta(mixup, pairs, *names, "mixup"))
    if cutmix:
        # A box of 1 - lambda of the area around a random point, cut at the edge; the targets follow the box that is left of it.
        side = np.sqrt(1 - symmetric_beta(cutmix, pairs, *names, "cutmix"))
        for axis, size in enumerate((height, width)):
            centre = np.floor(uniform(pairs, *names, "cutmix.centre", axis) * size)
            half = np.floor(side * size) // 2
            boxes[:, 2 * axis] = np.clip(centre - half, 0, size)
            boxes[:, 2 * axis + 1] = np.clip(centre + half, 0, size)
        boxes[~use_cutmix] = 0
    return share, boxes


def symmetric_beta(alpha: float, items: Ints, *names: int | str) -> Floats:
    """One number from Beta(alpha, alpha) for each item, from four uniform ones and without rejection, so it never needs a state.

    S ~ Beta(alpha + 1, alpha + 1) by Ulrich's polar formula for symmetric beta laws (Ulrich 1984; Devroye 1986, "Non-Uniform Random
    Variate Generation", IX.4). S / (1 - S) is the ratio of two gammas of shape alpha + 1, and Gamma(alpha) = Gamma(alpha + 1) *
    U^(1 / alpha) (Devroye, IX.3): so the logit of the result is logit(S) + (log U - log V) / alpha, which no small alpha underflows.
    """
    radius, angle, u, v = (1 - uniform(items, *names, "beta", k) for k in range(4))  # in (0, 1], so that log is finite
    c = np.sqrt(1 - radius ** (2 / (2 * alpha + 1))) * np.cos(2 * np.pi * angle)
    logit = np.log1p(c) - np.log1p(-c) + (np.log(u) - np.log(v)) / alpha
    share: Floats = 0.5 * (1 + np.tanh(logit / 2))
    return share


def _mixed(images: Tensor, targets: Tensor, partner: Tensor, share: Tensor, box: Tensor, *, mixup: bool, cutmix: bool) -> tuple[Tensor, Tensor]:
    others = torch.index_select(images, 0, partner, out=torch.empty_like(images))  # `out` keeps channels_last
    mixed = images
    if mixup:
        own = share.to(images.dtype)[:, None, None, None]
        mixed = images * own + others * (1 - own)
    if cutmix:
        height, width = images.shape[2:]
        y = torch.arange(height, device=images.device)[None, :]
        x = torch.arange(width, device=images.device)[None, :]
        rows = (y >= box[:, 0:1]) & (y < box[:, 1:2])
        columns = (x >= box[:, 2:3]) & (x < box[:, 3:4])
        mixed = torch.where(rows[:, None, :, None] & columns[:, None, None, :], others, mixed)
        area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
        share = share * (1 - area / (height * width))
    kept = share.to(targets.dtype)[:, None]
    return mixed, targets * kept + targets.index_select(0, partner) * (1 - kept)


def _pairs(slots: Ints) -> Ints:
    """Rows [P] whose slot is even and has its partner in the next row.

    An odd slot without its even one means that a pair was parted by a cut between ranks or micro-batches, and so does more than one
    even slot without its odd one (only the last slot of a global batch has none): our mistake, since the result would depend on
    the cuts.
    """
    rows = np.flatnonzero(slots >= 0)
    even = rows[slots[rows] % 2 == 0]
    following = np.append(slots, -1)[even + 1]
    first: Ints = even[following == slots[even] + 1]
    alone = len(rows) - 2 * len(first)
    assert alone == 0 or (alone == 1 and len(even) == len(first) + 1), f"slots {slots.tolist()} separate a pair of the global batch"
    return first
