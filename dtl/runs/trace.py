"""What each step was really trained on, written down for whoever compares runs: `dtl verify-resume` and the tests.

With $DTL_TRACE set, each rank appends a line a finished step to $DTL_TRACE/rank-R-PID.jsonl: the step, and for each slot of the global
batch that the rank had, the sample and a hash of the image tensor as the loader gave it, after all augmentation.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from dtl.data.loading.batch import Batch


class StepTrace:
    def __init__(self, folder: Path, rank: int) -> None:
        self._file = (folder / f"rank-{rank}-{os.getpid()}.jsonl").open("a", buffering=1)

    def __del__(self) -> None:
        self._file.close()

    def record(self, step: int, batches: list[Batch]) -> None:
        """`step`: of the run, from 1."""
        slots = []
        for batch in batches:
            for slot, sample, image in zip(batch.slots.tolist(), batch.samples.tolist(), batch.images, strict=True):
                if slot >= 0:
                    slots.append((slot, sample, hashlib.blake2b(image.cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest()))
        self._file.write(json.dumps({"step": step, "slots": slots}) + "\n")


def open_trace(rank: int) -> StepTrace | None:
    """None unless $DTL_TRACE names a folder."""
    folder = os.environ.get("DTL_TRACE")
    return StepTrace(Path(folder), rank) if folder else None


def read_trace(folder: Path) -> dict[int, dict[int, set[tuple[int, str]]]]:
    """{step: {slot: {(sample, hash of the image)}}} over all ranks and starts; more than one in a set: starts that differ."""
    steps: dict[int, dict[int, set[tuple[int, str]]]] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # torn by a kill
            for slot, sample, digest in entry["slots"]:
                steps.setdefault(entry["step"], {}).setdefault(slot, set()).add((sample, digest))
    return steps
