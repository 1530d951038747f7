"""Counter-based random numbers: each one is a pure function of a key and a counter, without any generator state.

The key is made of integers and short words, such as `(seed, epoch, "crop.scale")`; the counter is the sample that the number belongs to. So it
is the same on any rank, in any worker and after any restart, and there is no state to save or to lose.

The mixer is splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), in our own uint64 arithmetic:
NumPy's generator streams may change between versions, and the order of a data set must not. Golden values are in the tests.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1
# The same as Python's integers: a key is made at each step, and converting them would be most of its cost.
_INT_GAMMA, _INT_MIX_1, _INT_MIX_2 = int(_GAMMA), int(_MIX_1), int(_MIX_2)


def key(*parts: int | str) -> np.uint64:
    """One 64-bit key for a sequence of integers and words; another order of the parts is another key."""
    return np.uint64(int_key(*parts))


def int_key(*parts: int | str) -> int:
    """The same, as Python's integer."""
    state = 0
    for part in parts:
        state = _mix_int(state ^ _part(part))
    return state


def keys(items: npt.ArrayLike, *parts: int | str) -> npt.NDArray[np.uint64]:
    """One key for each integer of `items`, under the same `parts`; the shape of `items`."""
    numbers = np.asarray(items).astype(np.uint64)
    with np.errstate(over="ignore"):
        # Two rounds, so that neighbouring items share no low-order pattern with neighbouring keys.
        return _mix(_mix(numbers) ^ key(*parts))


def permutation(n: int, *parts: int | str) -> npt.NDArray[np.int64]:
    """A permutation of 0 ... n-1; equal keys (they do occur) keep their order, so the result is the same everywhere."""
    return np.argsort(keys(np.arange(n, dtype=np.uint64), *parts), kind="stable").astype(np.int64)


def uniform(items: npt.ArrayLike, *parts: int | str) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each integer of `items`, with 53 random bits."""
    return (keys(items, *parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = values + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def _mix_int(value: int) -> int:
    z = (value + _INT_GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * _INT_MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _INT_MIX_2) & _MASK
    return z ^ (z >> 31)


def _part(part: int | str) -> int:
    return _word(part) if isinstance(part, str) else int(part) & _MASK


@lru_cache(maxsize=256)
def _word(word: str) -> int:
    state = 0x73747269  # a word and an integer of the same bytes differ
    for byte in word.encode():
        state = _mix_int(state ^ byte)
    return state
