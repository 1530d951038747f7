"""Pickles read by a machine of our own: the values of honest ones, and nothing but a clear error for the others."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from dtl import pickles


def load(data: bytes, **options: object) -> object:
    return pickles.load(io.BytesIO(data), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_back_in_every_protocol(protocol: int) -> None:
    values = {"a": [1, -1, 1 << 70, 2.5, True, None], "b": ("x", "\u00e4\n'", b"\x00\xff"), 3: {"c": {1, 2}}, (1, "k"): frozenset([3])}
    values["again"] = values["a"]
    found = load(pickle.dumps(values, protocol))
    if protocol >= 4:
        assert found == values
    else:  # sets and frozen sets are calls there
        assert isinstance(found, dict)
        assert [found[key] for key in ("a", "b", "again")] == [values[key] for key in ("a", "b", "again")]


ARRAYS = [
    np.arange(12, dtype=kind).reshape(3, 4) for kind in ("u1", "i1", "<i2", ">i4", "<i8", "f2", "<f4", ">f8", "c8")
] + [np.array([True, False]), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 3)), np.array(2.5)]  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_come_back_bit_for_bit(protocol: int) -> None:
    for array, found in zip(ARRAYS, load(pickle.dumps(ARRAYS, protocol)), strict=True):  # type: ignore[call-overload]
        assert isinstance(found, pickles.Array)
        np.testing.assert_array_equal(found.numpy(), array)
        assert found.numpy().dtype == array.dtype.newbyteorder("=")


def test_numpy_1_and_python_2_wrote_other_names_and_text_for_bytes() -> None:
    array = np.arange(256, dtype=np.uint8)
    old = pickle.dumps(array, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    new = old.replace(b"numpy.core.multiarray", b"numpy._core.multiarray")
    assert old != new
    for either in (old, new):  # whichever NumPy reads
        np.testing.assert_array_equal(load(either).numpy(), array)  # type: ignore[attr-defined]
    # What Python 2 wrote: array([0 ... 255], uint8) with its bytes as a str.
    python2 = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02U\x01bq\x03\x87q\x04Rq\x05(K\x01M\x00\x01\x85q\x06"
        b"cnumpy\ndtype\nq\x07U\x02u1q\x08K\x00K\x01\x87q\x09Rq\x0a(K\x03U\x01|q\x0bNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0cb\x89T\x00\x01\x00\x00"
        + bytes(range(256))
        + b"q\x0dtq\x0eb."
    )
    np.testing.assert_array_equal(load(python2).numpy(), array)  # type: ignore[attr-defined]


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("protocol", range(6))
def test_what_a_pickle_calls_is_recorded_not_run(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: set[str] = set()
    found = load(pickle.dumps({"x": Evil(), "y": OrderedDict(a=1)}, protocol), names=names)
    assert isinstance(found, dict)
    assert isinstance(found["x"], pickles.Unknown)
    assert (found["x"].name, found["x"].arguments, found["y"]) == ("posix.system", ("touch executed",), {"a": 1})
    assert "posix.system" in names
    assert not (tmp_path / "executed").exists()


def _nested(depth: int) -> bytes:
    return b"\x80\x02)" + b"\x85" * depth + b"."


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends early"),
        (b"hello", "opcode|damaged"),
        (b"\x80\x04B\xff\xff\xff\xff.", "ends early|too large"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 10 << 30) + b".", "too large"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b".", "too large"),
        (b"\x80\x04\x8b" + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20) + b".", "number that is too large"),
        (b"I" + b"9" * 60_000 + b"\n.", "damaged"),
        (b"(" * 20_000 + b".", "nested too deep"),
        (b"}" + _nested(100)[2:-1] + b"Ns.", "an unhashable key"),
        (b"}]Ns.", "an unhashable key"),
        (b"Nh\x07.", "damaged"),
        (b"R.", "damaged"),
        (b"K\x01K\x02a.", "adds to a int as if it were a list"),
        (b"\x82\x01.", "out-of-band buffers or the extension registry"),
        (b"N\x85Q.", "persistent IDs outside"),
        (b"c" + b"x" * 100_000, "too long"),
    ],
)
def test_pickles_that_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(pickles.BadPickle, match=reason):
        load(data)


def test_numbers_in_a_pickle_allocate_nothing() -> None:
    """The memo of Python's own unpickler grows to the largest number that is named, and deep values overflow the stack when they are hashed."""
    tracemalloc.start()
    assert load(b"\x80\x02]r\xff\xff\xff\xff.") == []
    deep = load(_nested(200_000))
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()
    del deep


def _array(kind: str, state: tuple[object, ...], data: bytes, shape: object = (4,)) -> pickles.Array:
    dtype = pickles.DType(kind)
    dtype.build(state)
    return pickles.Array(shape, dtype, False, data)


_PLAIN = (3, "<", None, None, None, -1, -1, 0)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (lambda: _array("O8", _PLAIN, b"A" * 32), "type <O8, which are not numbers"),
        (lambda: _array("V8", _PLAIN, b"A" * 32), "not numbers"),
        (lambda: _array("f8", (3, "|", None, ("a",), {}, 8, 1, 0), b"A" * 32), "a state that NumPy does not write"),
        (lambda: _array("f8", _PLAIN, b"A" * 31), "does not fit its shape"),
        (lambda: _array("f8", _PLAIN, b"", (1 << 40, 1 << 40)), "does not fit its shape"),
        (lambda: _array("f8", _PLAIN, b"", (-1,)), "an impossible shape"),
        (lambda: _array("f8", _PLAIN, b"", (1,) * 40), "an impossible shape"),
        (lambda: _array("f8", _PLAIN, ["x"]), "does not fit its shape"),  # type: ignore[arg-type]
    ],
)
def test_arrays_that_are_refused(array: object, reason: str) -> None:
    with pytest.raises(pickles.BadPickle, match=reason):
        array().numpy()  # type: ignore[operator]
