"""Bytes that were changed at random: what somebody's broken disk, or somebody, makes of a file. More examples with `pytest -m soak tests/fuzz`."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

_NUMBERS = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])


@st.composite
def mutated(draw: Any, originals: list[bytes]) -> bytes:
    """One of `originals` with a few changes: bits, numbers, pieces taken out, doubled, moved or cut off."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, min(len(data), draw(st.sampled_from([64, 1024, 1 << 30]))) - 1)))
        change = draw(st.integers(0, 6))
        length = draw(st.integers(1, 64))
        if change == 0 and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == 1:
            data[at : at + 1] = draw(st.binary(max_size=8))
        elif change == 2:
            size, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from("<>"))
            number = draw(_NUMBERS) & ((1 << 8 * size) - 1)
            data[at : at + size] = struct.pack(f"{order}{'BHxIxxxQ'[size - 1]}", number)
        elif change == 3:
            del data[at : at + length]
        elif change == 4:
            data[at:at] = data[at : at + length] * draw(st.integers(1, 50))
        elif change == 5:
            data = data[:at]
        else:
            data += draw(st.binary(max_size=64))
    return bytes(data)


@contextmanager
def bounded(*, megabytes: int = 256, seconds: float = 5.0) -> Iterator[None]:
    """Python's own memory and the time of this thread stay small."""
    begun = time.thread_time()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes << 20, f"{peak >> 20} MiB"
    assert time.thread_time() - begun < seconds


def fuzzed(strategy: Any, examples: int) -> Callable[[Callable[[Any], None]], Any]:
    """A test for `examples` of the strategy in CI, and for a hundred times as many in the soak."""

    def decorate(check: Callable[[Any], None]) -> Any:
        @pytest.mark.parametrize("times", [1, pytest.param(100, marks=pytest.mark.soak)])
        def test(times: int) -> None:
            settings(max_examples=examples * times, derandomize=times == 1)(given(strategy)(check))()

        test.__doc__ = check.__doc__
        return test

    return decorate


def one_line(error: Exception) -> None:
    """A clear message: there is one, and it has one line."""
    assert str(error)
    assert "\n" not in str(error)
