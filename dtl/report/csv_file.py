"""A run's history as one CSV table, for spreadsheets and pandas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dtl.errors import UserError
from dtl.files import user_path, write_whole
from dtl.text import csv_line
from dtl.untrusted import json_lines

EVENTS = ("train", "val", "epoch")
FIRST = ("run", "event", "phase", "epoch", "step")


def write_csv(runs: Sequence[str | Path], file: str | Path) -> int:
    """One line an event (train, val, epoch) of each run, in order; what an event does not have stays empty. Returns the number of lines."""
    rows = []
    for run in map(Path, runs):
        path = run / "history.jsonl"
        try:
            events = list(json_lines(path))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}; give a run folder (runs/NAME)") from error
        for event in events:
            if event.get("event") in EVENTS:
                rows.append({"run": run.name, **{key: value for key, value in event.items() if not isinstance(value, list | dict)}})
    columns = [*FIRST, *sorted({key for row in rows for key in row} - set(FIRST))]
    text = "".join([csv_line(columns), *(csv_line([row.get(column) for column in columns]) for row in rows)])
    try:
        write_whole(user_path(file), lambda out: out.write(text.encode("utf-8", "surrogateescape")))
    except OSError as error:
        raise UserError(f"--csv {file}: cannot be written: {error.strerror or error}") from error
    return len(rows)
