"""What an image looks like in 128 bits, found while it is packed: copies that were encoded or resized again are found later without decoding anything.

A difference hash (dHash): the image as 9 x 9 means; a bit says whether a cell is brighter than its neighbour on the left, or above, by more than a tenth of
the image's contrast, so that flat areas are zeros and not noise. Packing has the pixels at that moment, and 45 x 45 of them are looked at.
Images that are cropped or mirrored are for `dtl audit`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dtl.data.shards.index import DHASHES_NAME, Shards
from dtl.errors import UserError
from dtl.untrusted import read_regular

MOST_BITS = 8
"""Two images look alike up to this number of bits that differ. Of the 18 million pairs of the CIFAR-10 tenth the first that is none has 11."""
_SMALLEST = 16  # pixels; a smaller image has no details
_LEAST_ONES = 24  # with fewer there is little to see: a bird in the sky
_MOST_PRODUCTS = 1_000_000_000  # beside other work: some seconds
_CELLS, _EACH = 9, 5
SIDE = _CELLS * _EACH
_EDGE = 0.1
_BLOCK = 2048

Hashes = npt.NDArray[np.uint64]


def points_of(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[SIDE,SIDE]: green at as many points of an image [H,W,C], all that `dhashes` needs of it; zeros where it is too small."""
    height, width, channels = pixels.shape
    if min(height, width) < _SMALLEST:
        return np.zeros((SIDE, SIDE), np.uint8)
    return pixels.reshape(-1).take(_places(height, width, channels))


@lru_cache(maxsize=512)
def _places(height: int, width: int, channels: int) -> npt.NDArray[np.int64]:
    rows, columns = ((2 * np.arange(SIDE) + 1) * side // (2 * SIDE) for side in (height, width))
    return (rows[:, None] * width + columns) * channels + min(1, channels - 1)


def dhashes(points: npt.NDArray[np.uint8]) -> Hashes:
    """uint64 [N,2] of `points_of` images [N,SIDE,SIDE]; zeros where there is nothing to see."""
    cells = points.reshape(-1, _CELLS, _EACH, _CELLS, _EACH).sum(axis=(2, 4), dtype=np.float32)
    least = _EDGE * cells.std(axis=(1, 2), keepdims=True)
    corner = cells[:, :-1, :-1]
    bits = np.stack([cells[:, :-1, 1:] - corner > least, cells[:, 1:, :-1] - corner > least], axis=1).reshape(len(cells), 2, 64)
    return np.packbits(bits & (bits.sum(axis=(1, 2), keepdims=True) >= _LEAST_ONES), axis=2).view("<u8")[..., 0]


def read_dhashes(shards: Shards) -> Hashes | None:
    """Of each sample [N,2]; None where packing kept none."""
    rows = shards.num_samples + len(shards.quarantined) if shards.part is None else shards.part[1]
    try:
        found = np.load(io.BytesIO(read_regular(shards.folder / DHASHES_NAME, max_bytes=16 * rows + (1 << 16))))
    except (OSError, UserError, ValueError, EOFError, SyntaxError):
        return None
    if not isinstance(found, np.ndarray) or found.dtype != np.dtype("<u8") or found.shape != (rows, 2):
        return None
    return np.asarray(found[shards.numbers], np.uint64)


def find_alike(splits: Mapping[str, Shards]) -> list[tuple[str, int, int, int]]:
    """Images of each split but the first that look like one of the first: split, sample, that one, and how many bits differ. Nothing where packing kept no
    hashes, or of very many images."""
    names = list(splits)
    train = splits[names[0]]
    known, found = read_dhashes(train), list[tuple[str, int, int, int]]()
    for name in names[1:]:
        hashes = None if known is None else read_dhashes(splits[name])
        if known is None or hashes is None or len(known) * len(hashes) > _MOST_PRODUCTS:
            continue
        samples, others, bits = _nearest(hashes, known)
        found += [(name, *of) for of in zip(samples.tolist(), others.tolist(), bits.tolist())]
    return found


def _nearest(hashes: Hashes, known: Hashes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of `hashes` that have a row of `known` within MOST_BITS, the nearest of these, and its distance."""
    usable = np.flatnonzero(known.any(axis=1))
    samples, others, distances = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for first in range(0, len(hashes), _BLOCK):
        rows = first + np.flatnonzero(hashes[first : first + _BLOCK].any(axis=1))
        mine = _signs(hashes[rows])
        best, where = np.full(len(rows), 129, np.int64), np.zeros(len(rows), np.int64)
        for start in range(0, len(usable), _BLOCK):
            differ = ((128 - mine @ _signs(known[usable[start : start + _BLOCK]]).T) / 2).astype(np.int64)
            least = differ.argmin(axis=1)
            value = differ[np.arange(len(rows)), least]
            nearer = value < best
            best[nearer], where[nearer] = value[nearer], usable[start + least[nearer]]
        near = best <= MOST_BITS
        samples, others, distances = [*samples, rows[near]], [*others, where[near]], [*distances, best[near]]
    return np.concatenate(samples), np.concatenate(others), np.concatenate(distances)


def _signs(hashes: Hashes) -> npt.NDArray[np.float32]:
    bits = np.unpackbits(np.ascontiguousarray(hashes, "<u8").view(np.uint8).reshape(len(hashes), 16), axis=1)
    return 2 * bits.astype(np.float32) - 1
