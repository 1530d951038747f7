"""Pickles from anywhere, read without Python's unpickler: nothing is imported, nothing is called, no object is built from raw state.

A pickle is a program for a small stack machine. This is that machine with its own values only: numbers, text, bytes, lists, tuples, dicts and
sets. What a pickle names (`posix.system`) stays a `Name`. What it calls becomes an `Unknown` that keeps the arguments, unless the caller has
given a maker for that name. NumPy arrays become `Array`, whose bytes are looked at after type, shape and size were checked.

The work is proportional to the bytes read: each opcode takes at least one, and their number, the bytes and the nesting have limits.
"""

from __future__ import annotations

import codecs
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

MAX_BYTES = 4 << 30
"""Of one pickle; files of weights keep their tensors beside it, NumPy's arrays lie in it."""
_MAX_OPCODES = 5_000_000
_MAX_MARKS = 10_000
_MAX_TEXT = 1 << 16  # of a name or a number, which end at a line break
_MAX_LINE = 1 << 28  # of a text that ends at a line break: Python 2's first protocol
_MAX_KEY_DEPTH = 5  # of tuples as keys of a dict: hashing them recurses

Maker = Callable[[tuple[Any, ...]], Any]
"""Makes a value of the arguments of a call. Raises BadPickle where they are not those that belong there."""


class BadPickle(ValueError):
    """These bytes are not a pickle, or one that is not supported; the message is the reason."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names, as `module.name`. It is not looked up."""

    text: str


@dataclass(eq=False, slots=True)
class Unknown:
    """What a call of `name` would have given. `state` is what would have been given to the object then."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class DType:
    """The type of an array's elements, as text: `<f4`."""

    text: str

    def build(self, state: Any) -> None:
        """NumPy's state: (version, byte order, subtype, names, fields, ...)."""
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise BadPickle("an array's dtype has fields, or a state that NumPy does not write")
        self.text = ("" if state[1] == "=" else state[1]) + self.text.lstrip("<>|=")


@dataclass(eq=False, slots=True)
class Array:
    """A NumPy array as it lies in the pickle; `numpy()` checks and copies it."""

    shape: Any = ()
    dtype: Any = None
    fortran: bool = False
    data: Any = b""

    def build(self, state: Any) -> None:
        """NumPy's state: (version, shape, dtype, whether in Fortran order, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise BadPickle("an array has a state that NumPy does not write")
        _, self.shape, self.dtype, self.fortran, self.data = state

    def numpy(self) -> npt.NDArray[Any]:
        """A new array. Raises BadPickle for other elements than numbers, and for a size that is not that of the bytes."""
        name = self.dtype.text if isinstance(self.dtype, DType) else ""
        if name.lstrip("<>|=") not in _ELEMENTS:
            raise BadPickle(f"an array has elements of type {name or 'unknown'}, which are not numbers")
        if not isinstance(self.shape, tuple) or len(self.shape) > 32 or not all(type(side) is int and 0 <= side < 1 << 48 for side in self.shape):
            raise BadPickle("an array has an impossible shape")
        # Python 2 kept bytes as text.
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        kind = np.dtype(name)
        if not isinstance(data, (bytes, bytearray)) or math.prod(self.shape) * kind.itemsize != len(data):
            raise BadPickle(f"the size of an array's data does not fit its shape {self.shape} and dtype {name}")
        try:
            return np.frombuffer(data, kind).reshape(self.shape, order="F" if self.fortran else "C").astype(kind.newbyteorder("="), order="C")
        except ValueError:  # of an empty array, whose other sides are too large
            raise BadPickle("an array has an impossible shape") from None


_ELEMENTS = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"))


def _reconstruct(arguments: tuple[Any, ...]) -> Array:
    if not arguments or arguments[0] != Name("numpy.ndarray"):
        raise BadPickle("an array is of a subclass of numpy.ndarray")
    return Array()


def _frombuffer(arguments: tuple[Any, ...]) -> Array:
    if len(arguments) != 4:
        raise BadPickle("an array has arguments that NumPy does not write")
    data, dtype, shape, order = arguments
    return Array(shape, dtype, order == "F", data)


def _dtype(arguments: tuple[Any, ...]) -> DType:
    if not arguments or not isinstance(arguments[0], str) or len(arguments[0]) > 100:
        raise BadPickle("an array's dtype has arguments that NumPy does not write")
    return DType(arguments[0])


def _scalar(arguments: tuple[Any, ...]) -> Any:
    if len(arguments) != 2:
        raise BadPickle("a NumPy scalar has arguments that NumPy does not write")
    return Array((), arguments[0], False, arguments[1]).numpy().item()


def _encode(arguments: tuple[Any, ...]) -> bytes:
    """Bytes in protocol 2, where Python 3 writes them as text."""
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] not in ("latin1", "latin-1"):
        raise BadPickle("bytes are not encoded as Python writes them")
    return arguments[0].encode("latin1")


def _no_bytes(arguments: tuple[Any, ...]) -> bytes:
    """Empty bytes in protocol 2."""
    if arguments:
        raise BadPickle("bytes are not encoded as Python writes them")
    return b""


def _ordered(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if not arguments:
        return {}
    pairs = arguments[0]
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise BadPickle("a dict is not made of pairs")
    return {checked_key(key): value for key, value in pairs}


PLAIN: dict[str, Maker] = {
    **{f"{package}.multiarray._reconstruct": _reconstruct for package in ("numpy.core", "numpy._core")},
    **{f"{package}.numeric._frombuffer": _frombuffer for package in ("numpy.core", "numpy._core")},
    **{f"{package}.multiarray.scalar": _scalar for package in ("numpy.core", "numpy._core")},
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "collections.OrderedDict": _ordered,
}
"""NumPy's arrays and numbers, and ordered dicts: what data sets and weights consist of."""


def checked_key(key: Any, depth: int = 0) -> Any:
    """A key of a dict that can be hashed without deep recursion."""
    if isinstance(key, (list, dict, set, bytearray)) or depth > _MAX_KEY_DEPTH:
        raise BadPickle("a dict has an unhashable key")
    if isinstance(key, (tuple, frozenset)):
        for part in key:
            checked_key(part, depth + 1)
    return key


def load(
    file: BinaryIO,
    makers: Mapping[str, Maker] = PLAIN,
    *,
    persistent: Callable[[Any], Any] | None = None,
    names: set[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """The value of the pickle at the file's position, which is behind it then. Raises BadPickle.

    `makers` build the results of known calls; `persistent` gives the values that are kept outside of the pickle. All names go into `names`.
    """
    try:
        return _Machine(file, makers, persistent, names, max_bytes).run()
    except (BadPickle, OSError):
        raise
    except (IndexError, KeyError, ValueError, TypeError, OverflowError, AttributeError, struct.error) as error:
        raise BadPickle(f"the pickle is damaged ({type(error).__name__})") from None


class _Machine:
    def __init__(self, file: BinaryIO, makers: Mapping[str, Maker], persistent: Callable[[Any], Any] | None, names: set[str] | None, max_bytes: int) -> None:
        self._file, self._makers, self._persistent = file, makers, persistent
        self._names = set() if names is None else names
        self._left = max_bytes
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        file = self._file
        for _ in range(_MAX_OPCODES):
            code = file.read(1)
            if code == b".":
                return self._stack.pop()
            work = _OPCODES.get(code)
            if work is None:
                raise BadPickle("the pickle ends early" if not code else f"0x{code.hex()} is not a pickle opcode")
            self._left -= 1
            work(self)
        raise BadPickle(f"the pickle has more than {_MAX_OPCODES:,} opcodes")

    # ---- bytes

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise BadPickle("the pickle is too large")
        # In pieces: a size that is made up must not be allocated.
        parts = []
        while size > 0 and (part := self._file.read(min(size, 1 << 24))):
            parts.append(part)
            size -= len(part)
        if size:
            raise BadPickle("the pickle ends early")
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._left -= len(data)
        return data

    def skip(self, size: int) -> None:
        self.read(size)

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.read(struct.calcsize(form)))[0])

    def line(self, limit: int = _MAX_TEXT) -> bytes:
        found = self._file.readline(min(limit, self._left) + 1)
        self._left -= len(found)
        if not found.endswith(b"\n"):
            raise BadPickle("the pickle ends early, or a line of it is too long")
        return found[:-1]

    # ---- stack

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        if len(self._marked) >= _MAX_MARKS:
            raise BadPickle("the pickle is nested too deeply")
        self._marked.append(self._stack)
        self._stack = []

    def above_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def drop(self) -> None:
        self.above_mark()

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.above_mark()

    def put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def integer(self) -> None:
        text = self.line()
        self.push({b"00": False, b"01": True}[text] if text in (b"00", b"01") else int(text))

    def long(self, size: int) -> None:
        if size > _MAX_TEXT:
            raise BadPickle("the pickle holds a number that is too large")
        self.push(int.from_bytes(self.read(size), "little", signed=True))

    def string(self) -> None:
        text = self.line(_MAX_LINE)
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in b"'\"":
            raise BadPickle("the pickle holds a string without quotes")
        self.push(codecs.escape_decode(text[1:-1])[0].decode("latin1"))

    def name(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise BadPickle("the name of a global is not a string")
        found = Name(f"{module}.{name}".replace("__builtin__.", "builtins.").replace("copy_reg.", "copyreg."))
        self._names.add(found.text)
        return found

    def named(self) -> Name:
        return self.name(self.line().decode("utf-8"), self.line().decode("utf-8"))

    # ---- containers

    def append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        (target.items if isinstance(target, Unknown) else _of(target, list)).extend(items)

    def add(self, items: list[Any]) -> None:
        _of(self._stack[-1], set).update(map(checked_key, items))

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        pairs = target.pairs if isinstance(target, Unknown) else _of(target, dict)
        for at in range(0, len(items), 2):
            pairs[checked_key(items[at])] = items[at + 1]

    def dict_of(self, items: list[Any]) -> None:
        self.push({})
        self.set_items(items)

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise BadPickle("the pickle takes more values from its stack than there are")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self.push(items)

    # ---- objects

    def call(self, name: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise BadPickle("a call has no arguments")
        if not isinstance(name, Name):  # what an unknown thing would give is unknown too
            self.push(Unknown(name.name if isinstance(name, Unknown) else "unknown", arguments))
            return
        # copyreg._reconstructor(cls, base, state) and copyreg.__newobj__(cls, ...) make an object of their first argument.
        if name.text in ("copyreg._reconstructor", "copyreg.__newobj__") and arguments and isinstance(arguments[0], Name):
            name, arguments = arguments[0], ()
        maker = self._makers.get(name.text)
        self.push(Unknown(name.text, arguments) if maker is None else maker(arguments))

    def reduce(self, *, keywords: bool = False) -> None:
        if keywords:
            self._stack.pop()
        arguments = self._stack.pop()
        self.call(self._stack.pop(), arguments)

    def instance(self, name: Any, arguments: list[Any]) -> None:
        self.call(name, tuple(arguments))

    def object(self) -> None:
        items = self.above_mark()
        self.instance(items[0], items[1:])

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, (Array, DType)):
            target.build(state)
        elif isinstance(target, Unknown):
            target.state = state
        # The state of other objects (an ordered dict's attributes) is not needed.

    def persist(self, key: Any) -> None:
        if self._persistent is None:
            raise BadPickle("the pickle refers to persistent IDs outside of it")
        self.push(self._persistent(key))

    def stack_name(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self.push(self.name(module, name))


def _of(target: Any, kind: type[Any]) -> Any:
    if type(target) is not kind:
        raise BadPickle(f"the pickle adds to a {type(target).__name__} as if it were a {kind.__name__}")
    return target


def _not_read(_: _Machine) -> None:
    raise BadPickle("the pickle needs out-of-band buffers or the extension registry")


_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: m.skip(1),
    b"\x95": lambda m: m.skip(8),  # a frame: only a hint for reading ahead
    b"(": _Machine.mark,
    b"0": _Machine.pop,
    b"1": _Machine.drop,
    b"2": lambda m: m.push(m._stack[-1]),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": _Machine.integer,
    b"L": lambda m: m.push(int(m.line().rstrip(b"L"))),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.read(1)[0]),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.long(m.read(1)[0]),
    b"\x8b": lambda m: m.long(m.number("<I")),
    b"F": lambda m: m.push(float(m.line())),
    b"G": lambda m: m.push(struct.unpack(">d", m.read(8))[0]),
    b"S": _Machine.string,
    b"T": lambda m: m.push(m.read(m.number("<I")).decode("latin1")),
    b"U": lambda m: m.push(m.read(m.read(1)[0]).decode("latin1")),
    b"V": lambda m: m.push(m.line(_MAX_LINE).decode("raw-unicode-escape")),
    b"X": lambda m: m.push(m.read(m.number("<I")).decode("utf-8", "surrogatepass")),
    b"\x8c": lambda m: m.push(m.read(m.read(1)[0]).decode("utf-8", "surrogatepass")),
    b"\x8d": lambda m: m.push(m.read(m.number("<Q")).decode("utf-8", "surrogatepass")),
    b"B": lambda m: m.push(m.read(m.number("<I"))),
    b"C": lambda m: m.push(m.read(m.read(1)[0])),
    b"\x8e": lambda m: m.push(m.read(m.number("<Q"))),
    b"\x96": lambda m: m.push(m.read(m.number("<Q"))),  # a bytearray, which nobody changes here
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b")": lambda m: m.push(()),
    b"\x8f": lambda m: m.push(set()),
    b"l": lambda m: m.push(m.above_mark()),
    b"t": lambda m: m.push(tuple(m.above_mark())),
    b"d": lambda m: m.dict_of(m.above_mark()),
    b"\x91": lambda m: m.push(frozenset(map(checked_key, m.above_mark()))),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"a": lambda m: m.append([m._stack.pop()]),
    b"e": lambda m: m.append(m.above_mark()),
    b"\x90": lambda m: m.add(m.above_mark()),
    b"s": lambda m: m.set_items([*reversed([m._stack.pop(), m._stack.pop()])]),
    b"u": lambda m: m.set_items(m.above_mark()),
    b"g": lambda m: m.push(m._memo[int(m.line())]),
    b"h": lambda m: m.push(m._memo[m.read(1)[0]]),
    b"j": lambda m: m.push(m._memo[m.number("<I")]),
    b"p": lambda m: m.put(int(m.line())),
    b"q": lambda m: m.put(m.read(1)[0]),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m._memo)),
    b"c": lambda m: m.push(m.named()),
    b"\x93": _Machine.stack_name,
    b"R": _Machine.reduce,
    b"\x81": _Machine.reduce,
    b"\x92": lambda m: m.reduce(keywords=True),
    b"i": lambda m: m.instance(m.named(), m.above_mark()),
    b"o": _Machine.object,
    b"b": _Machine.build,
    b"P": lambda m: m.persist(m.line().decode("utf-8")),
    b"Q": lambda m: m.persist(m._stack.pop()),
    **dict.fromkeys((b"\x82", b"\x83", b"\x84", b"\x97", b"\x98"), _not_read),
}
