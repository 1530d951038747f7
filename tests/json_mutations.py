"""Valid files, changed as an attacker or a bad disk would: for the fuzz tests of dtl's readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

from hypothesis import strategies as st

from dtl.errors import UserError

WRONG_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "a", "../../x", "/etc/passwd", "a\0b", "\n\x1b[31m",
    "0" * 64, "\ud800", "x" * 10_000, [], [[]], {}, {"a": {}}, [1, 2, 3], ["a"] * 50, "pipe:touch PWNED", "http://127.0.0.1:1/x", "NaN",
]  # fmt: skip


T = TypeVar("T")


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """(what `work()` gives, ""), or (None, the line of its refusal)."""
    refusal = ""
    try:
        return work(), ""
    except UserError as error:
        refusal = str(error)
    assert len(refusal) < 4000
    return None, refusal


@st.composite
def mutated_json(draw: st.DrawFn, value: Any) -> bytes:
    """JSON text of `value` with one to three changes: a field replaced, removed, renamed or doubled; or the text's bytes changed."""
    changed = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(_places(changed))) if _places(changed) else (None, None)
        if parent is None:
            break
        kind = draw(st.sampled_from(["replace", "remove", "double", "rename"]))
        if kind == "replace":
            parent[key] = deepcopy(draw(st.sampled_from(WRONG_VALUES) | st.integers() | st.floats() | st.text(max_size=20)))  # the next change may be inside it
        elif kind == "remove":
            del parent[key]
        elif kind == "double" and isinstance(parent, list):
            parent.insert(key, parent[key])
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = parent.pop(key)
    text = json.dumps(changed).encode()
    return draw(mutated_bytes(text)) if draw(st.integers(0, 3)) == 0 else text


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes flipped, cut, doubled, or filled with zeros."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not out:
            break
        at = draw(st.integers(0, len(out) - 1))
        kind = draw(st.sampled_from(["flip", "cut", "double", "zero", "put", "number"]))
        if kind == "flip":
            out[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del out[at:]
        elif kind == "double":
            out[at:at] = out[at : at + draw(st.integers(1, 200))]
        elif kind == "zero":
            out[at : at + 64] = bytes(len(out[at : at + 64]))
        elif kind == "number":
            out[at : at + 8] = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])).to_bytes(8, "little")
        else:
            out[at:at] = draw(st.binary(max_size=20) | st.sampled_from([b"[" * 5000, b'{"a":' * 3000, b"1e999", b"NaN", b"\0", b"9" * 5000]))
    return bytes(out)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in plain values."""
    found: list[tuple[Any, Any]] = []
    rest = [value]
    while rest:
        one = rest.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in keys]
        rest += [one[key] for key in keys]
    return found
