"""Which samples go to validation: decided by each image's content, so that it survives renaming, copies and new images."""

from __future__ import annotations

import math
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from dtl.errors import UserError


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
