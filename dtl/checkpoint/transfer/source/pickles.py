"""What a pickle would import, read off its opcodes: nothing in the file is executed."""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import BinaryIO

# The first thing that torch wrote into files before 1.6: a pickled number.
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_PICKLES = 5


def is_legacy_torch(path: Path) -> bool:
    """Whether a file begins as `torch.save` began it before torch 1.6."""
    try:
        with path.open("rb") as file:
            return any(argument == _TORCH_MAGIC for _, argument, _ in pickletools.genops(file))
    except Exception:  # whatever is wrong with the bytes, they are no such file
        return False


def pickled_globals(path: Path) -> list[str]:
    """Dotted names of the classes and functions that the file's pickles name, sorted; what was found before any damage."""
    found: set[str] = set()
    try:
        with path.open("rb") as file:
            for _ in range(_MOST_PICKLES):
                _collect(file, found)
    except Exception:  # the end of the pickles, or of what is whole
        pass
    return sorted(found)


def _collect(file: BinaryIO, found: set[str]) -> None:
    """Names in the next pickle. STACK_GLOBAL takes the two strings before it, which may have been said earlier (memo)."""
    strings: list[str] = []
    memo: dict[int, str | None] = {}
    last: str | None = None
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = last
        elif opcode.name in ("BINPUT", "LONG_BINPUT") and isinstance(argument, int):
            memo[argument] = last
        elif opcode.name == "GLOBAL":
            found.add(str(argument).replace(" ", "."))
            last = None
        elif opcode.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]))
            last = None
        else:
            last = memo.get(argument) if "BINGET" in opcode.name and isinstance(argument, int) else argument if isinstance(argument, str) else None
            if last is not None:
                strings.append(last)
