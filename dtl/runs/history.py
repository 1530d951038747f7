"""history.jsonl: what a run's training and evaluations measured, one JSON object a line. It is always written, and it is the truth."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtl.untrusted import as_utf8, json_line, open_regular

# Once: `json.dumps` with options makes an encoder for each call.
_as_json = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode


class History:
    """history.jsonl: one JSON object a line, in the order of steps, each line on the disk's way when `append` returns.

    Numbers that JSON does not know are written as the strings "nan", "inf" and "-inf", which `float` reads.
    `offset` is the size of the file in bytes, whole lines only: what a checkpoint remembers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last_step = 0
        self._unwritten = b""
        self._logged: set[tuple[object, ...] | None] = set()
        content = _content(self.path)
        self._keep(content, content.rfind(b"\n") + 1)

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one line. Raises ValueError for a step before the last one's. After an OSError (a full disk) the line is
        kept, and written before the next."""
        step = event.get("step")
        if isinstance(step, int):
            if step < self.last_step:
                raise ValueError(f"history is in the order of steps: {step} after {self.last_step}")
            self.last_step = step
        if _identity(event) in self._logged:
            return
        self._unwritten += (_as_json(_plain(event)) + "\n").encode()
        self._write()

    def resume_at(self, offset: int, *, step: int) -> int:
        """Continue at `offset`, where the history of a checkpoint of `step` ended: later lines are cut off, and will be written
        again. Where the file does not fit that (it was edited), lines of later steps are cut off instead.

        Returns how many bytes of the checkpoint's history are missing (0, but for a disk that lost them).
        """
        content = _content(self.path)
        fits = 0 <= offset <= len(content) and (offset == 0 or content[offset - 1 : offset] == b"\n")
        if not fits:
            self.truncate_after(step)
            return max(0, offset - len(content))
        self._keep(content, offset)
        if self.last_step > step:
            self.truncate_after(step)
        return 0

    def truncate_after(self, step: int) -> None:
        """Cut off the lines of steps after `step`, and a torn last line."""
        content = _content(self.path)
        end = 0
        for line in content.splitlines(keepends=True):
            found = json_line(line).get("step")
            if (isinstance(found, int) and found > step) or not line.endswith(b"\n"):
                break
            end += len(line)
        self._keep(content, end)

    def sync(self) -> None:
        """Put what is written on the disk for certain; before a checkpoint that counts on it."""
        if self.path.is_file():
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())

    @property
    def offset(self) -> int:
        return self._size

    def _keep(self, content: bytes, end: int) -> None:
        """Make the first `end` bytes of the file's `content` all that there is."""
        if end < len(content):
            os.truncate(self.path, end)
        self._size, self._written, self._unwritten = end, end, b""
        self.last_step, self._logged = 0, set()
        for line in reversed(content[:end].splitlines()):
            event = json_line(line)
            step = event.get("step")
            if isinstance(step, int):
                if step < self.last_step:
                    break
                self.last_step = step
                self._logged.add(_identity(event))
        self._logged.discard(None)

    def _write(self) -> None:
        # Opened each time: a network disk sends what was written when a file is closed, and a vanished folder is noticed.
        with open(self.path, "ab", buffering=0) as file:
            while self._unwritten:
                # What the disk has not taken stays ours, and a line that was cut in two is completed by the next try.
                written = file.write(self._unwritten) or 0
                self._unwritten = self._unwritten[written:]
                self._written += written
        self._size = self._written


def _content(path: Path) -> bytes:
    if not path.exists():
        return b""
    with open_regular(path) as file:
        return file.read()


def _plain(value: Any) -> Any:
    """As JSON takes it: numbers that it does not know become strings, unknown objects (paths, arrays of one) their own words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return as_utf8(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {as_utf8(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    with suppress(TypeError, ValueError, AttributeError):
        return _plain(value.item())  # numbers of numpy and torch
    return str(value)


def _identity(event: Mapping[str, Any]) -> tuple[object, ...] | None:
    """What may stand in the history only once; notes may repeat."""
    if event.get("event") not in ("train", "val", "epoch", "test", "solve"):
        return None
    return event["event"], str(event.get("phase")), event.get("step"), str(event.get("blend"))  # text: an edited line may hold a list there
