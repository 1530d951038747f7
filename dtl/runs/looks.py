"""How often a test set has been looked at: each look, a set of weights that was measured on it, is a line of looks.jsonl in its run's folder.

A test set is known by the content of its images (see `dtl.data.splits_of_run.content_id`), wherever they lie. The same weights measured again say
nothing new, and are the same look. A run folder that is deleted takes its looks along; one that starts afresh keeps them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from dtl.text import to_stderr
from dtl.untrusted import json_lines

LOOKS_NAME = "looks.jsonl"
FOLDS_END = "-folds"
"""How the folder of the runs of `dtl folds` is called: NAME-folds."""
SEARCH_END = "-search"
"""And that of the trials of `dtl search`."""


def note_look(run: Path, content: str, *, weights: str, step: int) -> int | None:
    """Write down that these weights (by the SHA-256 of their file) were measured on the test set. Returns how many looks at it all runs
    beside `run` have taken, this one included; None where the folder cannot be written."""
    if (content, weights) not in _looks(run):
        line = json.dumps({"test": content, "weights": weights, "step": step}) + "\n"
        try:
            with open(run / LOOKS_NAME, "ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            to_stderr(f"{run / LOOKS_NAME} cannot be written ({error.strerror or error}): this look at the test set is not counted")
            return None
    return count_looks(run.parent, content)


def count_looks(runs: Path, content: str) -> int:
    """How many different weights of runs in `runs` were measured on the test set. Those of `dtl folds` and `dtl search` there count, too."""
    homes = [_home(runs)]
    with os.scandir(homes[0]) as found:
        homes += [Path(entry.path) for entry in found if entry.name.endswith((FOLDS_END, SEARCH_END)) and entry.is_dir()]
    folders = []
    for home in homes:
        with os.scandir(home) as found:
            folders += [Path(entry.path) for entry in found if (Path(entry.path) / LOOKS_NAME).is_file()]
    return len({look for folder in folders for look in _looks(folder) if look[0] == content})


def describe_look(look: object, runs: Path) -> str:
    return f"look {look} at this test set by runs in {_home(runs)}/" if isinstance(look, int) else "looks at it are not counted"


def _home(runs: Path) -> Path:
    """Of the runs of `dtl folds` or `dtl search`, where their folder lies."""
    return runs.parent if runs.name.endswith((FOLDS_END, SEARCH_END)) else runs


def _looks(run: Path) -> set[tuple[str, str]]:
    path = run / LOOKS_NAME
    if not path.is_file():
        return set()
    return {(str(line["test"]), str(line["weights"])) for line in json_lines(path) if "test" in line and "weights" in line}
