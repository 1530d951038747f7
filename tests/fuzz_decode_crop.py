"""`python fuzz_decode_crop.py NUM SEED`: mutated JPEGs, in a process of its own because a crash is what it looks for.

Whatever the bytes: where a rectangle comes out, decoding the whole image gives an image, and the same pixels in the rectangle.
"""

from __future__ import annotations

import sys

import numpy as np
from tiny_images import encoded

from dtl.data.decoding.decode import Region, crop_jpeg, decode, native

HEIGHT, WIDTH = 61, 90
KINDS = [
    {"subsampling": "4:4:4", "quality": 95},
    {"subsampling": "4:2:2", "quality": 70},
    {"subsampling": "4:2:0", "quality": 85},
    {"subsampling": "4:2:0", "quality": 85, "restart_marker_blocks": 3},
    {"mode": "L"},
    {"progressive": True},
]
MARKERS = [0x00, 0xC0, 0xC2, 0xC4, 0xD0, 0xD3, 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xEE, 0xFE, 0xFF]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    found = bytearray(data)
    scan = data.rindex(b"\xff\xda")
    for _ in range(int(rng.integers(1, 4))):
        # Half of the time in the headers, which are short, half in the pixels.
        at = int(rng.integers(2, scan + 12) if rng.random() < 0.5 else rng.integers(scan, len(data)))
        at = min(at, len(found) - 1)
        kind = rng.integers(7)
        if kind == 0:
            found[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            found[at] = int(rng.integers(256))
        elif kind == 2:
            del found[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            found[at:at] = rng.bytes(int(rng.integers(1, 40)))
        elif kind == 4:
            found[at : at + 2] = bytes([0xFF, MARKERS[int(rng.integers(len(MARKERS)))]])
        elif kind == 5:
            del found[max(at, 4) :]
        else:
            found[at : at + 8] = bytes(8)
        if len(found) < 4:
            break
    return bytes(found)


def main(num: int, seed: int) -> None:
    assert native().on, native().summary
    rng = np.random.default_rng(seed)
    originals = [encoded(height=HEIGHT, width=WIDTH, **kind) for kind in KINDS]
    taken = 0
    for number in range(num):
        data = mutated(originals[number % len(originals)], rng)
        reduction = int(rng.choice([1, 1, 2, 4, 8]))
        high, wide = -(-HEIGHT // reduction), -(-WIDTH // reduction)
        height, width = int(rng.integers(1, high + 1)), int(rng.integers(1, wide + 1))
        top, left = int(rng.integers(high - height + 1)), int(rng.integers(wide - width + 1))
        found = crop_jpeg(data, Region(reduction, top, left, height, width), height=HEIGHT, width=WIDTH)
        if found is None:
            continue
        taken += 1
        whole = decode(data, reduction)
        assert whole.shape == (high, wide, 3), f"mutation {number}: another size"
        part = whole[top : top + height, left : left + width]
        assert np.array_equal(found, part), f"mutation {number}: other pixels"
    print(taken)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
