"""The processes of a run, looked at from outside."""

from __future__ import annotations

import psutil


def children(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children()}
