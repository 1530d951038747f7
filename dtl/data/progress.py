"""Progress of packing, indexing and verifying: a bar where stderr is a terminal, otherwise a plain line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from dtl.text import to_stderr

_LINE_EVERY_SECONDS = 10.0


class PackProgress:
    """`start` names a pass and its number of images, `advance` counts; nothing at all where not `visible`."""

    def __init__(self, *, visible: bool, unit: str = "images") -> None:
        self._visible, self._unit = visible, unit
        self._bar: Any = None
        self._task: Any = None
        self._pass, self._total, self._done, self._said = "", 0, 0, 0.0

    def __enter__(self) -> PackProgress:
        if self._visible and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description:8}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self._unit),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, name: str, total: int) -> None:
        self._pass, self._total, self._done, self._said = name, total, 0, time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total)

    def advance(self, samples: int) -> None:
        self._done += samples
        if self._bar is not None:
            self._bar.advance(self._task, samples)
        elif self._visible and time.monotonic() - self._said >= _LINE_EVERY_SECONDS:
            self._said = time.monotonic()
            to_stderr(f"{self._pass}: {self._done:,} of {self._total:,} {self._unit}")
