"""Which samples go to validation, or into which fold: decided by each image's content, so that it survives renaming, copies and new images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from dtl import keyed
from dtl.errors import UserError
from dtl.text import counted


def content_hash(data: bytes) -> int:
    """The first 64 bits of the sha256."""
    return int.from_bytes(sha256(data).digest()[:8], "big")


def split_by_content(hashes: npt.NDArray[np.uint64], labels: npt.NDArray[np.int32], fraction: float, *, num_classes: int) -> npt.NDArray[np.bool_]:
    """True for the samples of validation, ceil(fraction x N) of them, shared out over the classes by largest remainder.

    Within a class the smallest `hashes` (of the images' bytes) are taken: an added image moves at most a few others, those at the
    threshold. Copies of one content go together, also under two labels; then sizes may be off by the number of copies. Every
    class with two different images or more has at least one on each side.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the validation fraction must be between 0 and 1, got {fraction}")
    # One group per content; its class is the smallest label it appears under.
    order = np.lexsort((labels, hashes))
    first = np.ones(len(order), bool)
    first[1:] = hashes[order][1:] != hashes[order][:-1]
    group = np.cumsum(first) - 1
    group_label, group_size = labels[order][first], np.bincount(group)
    wanted = _shares(np.bincount(group_label[group], minlength=num_classes), fraction)
    chosen = np.zeros(len(group_size), bool)
    for label in range(num_classes):
        members = np.flatnonzero(group_label == label)  # by growing hash
        if len(members) < 2:
            continue
        total = np.cumsum(group_size[members])
        count = int(np.argmin(np.abs(total - wanted[label]))) + 1
        chosen[members[: min(max(count, 1), len(members) - 1)]] = True
    val = np.zeros(len(labels), bool)
    val[order] = chosen[group]
    return val


def _shares(counts: npt.NDArray[np.int64], fraction: float) -> npt.NDArray[np.int64]:
    """How many of each class, ceil(fraction x N) together: largest remainders, the lower class first where they are equal."""
    exact = counts * fraction
    shares: npt.NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    left = math.ceil(counts.sum() * fraction - 1e-9) - int(shares.sum())
    remainders = np.round(exact - shares, 9)
    shares[np.argsort(-remainders, kind="stable")[:left]] += 1
    return shares


def folds_by_content(hashes: npt.NDArray[np.uint64], labels: npt.NDArray[np.int32], folds: int, *, seed: int, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """The fold of each sample, from 0. The images of a class, in an order that `seed` decides, are dealt to the folds in turn, each to one with the fewest of
    its class, and of such folds to the smallest. So each class, and all of them together, differ by at most one image between folds.

    Copies of one content go together, also under two labels; where they are many, folds differ by more. UserError where a class has too few images.
    """
    contents, content = np.unique(hashes, return_inverse=True)
    label, size = np.full(len(contents), len(classes), np.int64), np.bincount(content)
    np.minimum.at(label, content, labels)
    present = np.unique(labels[(labels >= 0) & (labels < len(classes))])
    for one in present:
        if (number := int((label == one).sum())) < folds:
            raise UserError(too_few_for_folds(folds, classes[one], counted(number, "different image"), number))
    order = np.lexsort((keyed.keys(contents, "fold", seed), -size, label))
    dealt, total = np.empty(len(contents), np.int64), np.zeros(folds, np.int64)
    for members in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        have = np.zeros(folds, np.int64)
        copies = int((size[members] > 1).sum())
        for one in members[:copies]:
            dealt[one] = np.lexsort((total, have))[0]
            for counts in (have, total):
                counts[dealt[one]] += size[one]
        dealt[members[copies:]] = _fill(have, total, len(members) - copies)
        total += np.bincount(dealt[members[copies:]], minlength=folds)
    return np.asarray(dealt[content])


def _fill(have: npt.NDArray[np.int64], total: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.int64]:
    """The folds of so many images of a class, one after another into that with the fewest of it. `have`, `total`: images of the class, and all, by fold."""
    highest = int(have.max()) + -(-number // len(have))
    height = np.arange(int(have.min()), highest + 1)[:, None]
    heights, folds = np.broadcast_to(height, (len(height), len(have))), np.broadcast_to(np.arange(len(have)), (len(height), len(have)))
    free = heights >= have
    heights, folds = heights[free], folds[free]
    order = np.lexsort((folds, total[folds] - have[folds], heights))
    return np.asarray(folds[order][:number])


def too_few_for_folds(folds: int, name: str, has: str, most: int) -> str:
    """The line about a class that cannot be in each fold: it `has` so many images or groups, `most` of them."""
    what = f"at most {most} folds (--folds {most})" if most > 1 else "it cannot be held out and trained on"
    return f"{folds} folds need images of each class in each of them, but class '{name}' has {has}: {what}"
