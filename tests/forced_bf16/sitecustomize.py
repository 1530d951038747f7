"""What the tests say of the CPU, in each of their processes: Python imports a module of this name at its start, and conftest.py puts its folder on the path.

DTL_TEST_BF16=on|off: the CPU computes in bf16, or does not. DTL_TEST_BF16_ASKED=FILE: lists there the test files in which anybody asks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_read_text = Path.read_text


def read_text(self: Path, *given: Any, **named: Any) -> str:
    text = _read_text(self, *given, **named)
    if str(self) != "/proc/cpuinfo":
        return text
    asked, wanted = os.environ.get("DTL_TEST_BF16_ASKED"), os.environ.get("DTL_TEST_BF16")
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
    if asked and test:
        with open(asked, "a") as file:
            file.write(f"{test}\n")
    if wanted:
        text = text.replace("avx512_bf16", "").replace("amx_bf16", "")
    return f"{text}\nflags : avx512_bf16\n" if wanted == "on" else text


Path.read_text = read_text  # type: ignore[method-assign]
