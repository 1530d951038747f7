"""Validation and test images with a twin among the training images: twins.jsonl in the run folder, and the one line that a run prints about them.

At the start twins are found by the hashes that packing keeps (`dtl.data.dhash`); where a phase trains on cached features these find more, and come in their
place. No image is decoded and no network is asked for this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dtl.data.near import SCENE
from dtl.data.shards.index import Shards
from dtl.errors import UserError
from dtl.files import write_whole
from dtl.text import counted
from dtl.untrusted import as_utf8, json_lines

_BY = {"cosine": f"the cached features (whitened cosine of {SCENE:g} or more)", "bits": "the hashes made while packing"}
_IMAGE = {"val": "validation image", "test": "test image"}


@dataclass(frozen=True)
class Twin:
    """An image of another split with the training image that it is most like."""

    split: str
    sample: int
    other: int
    near: float
    """By features their whitened cosine, by hashes the number of bits that differ."""


@dataclass
class Twins:
    """Those of a run. `splits` begins with the training images."""

    file: Path
    splits: Mapping[str, Shards]
    told: bool = False
    """The line was printed, by this start of the run or one before."""

    def are_known_by(self, way: Literal["cosine", "bits"]) -> bool:
        return any(way in line for line in self._listed())

    def record(self, way: Literal["cosine", "bits"], found: Sequence[Twin]) -> None:
        """List them, one JSON object a line, in place of what is listed of the same images."""
        train = next(iter(self.splits.values()))
        lines: list[dict[str, Any]] = []
        for one in found:
            shards = self.splits[one.split]
            line = {"split": one.split, "sample": one.sample, "path": as_utf8(shards.name(one.sample)), "other": as_utf8(train.name(one.other))}
            line[way] = round(one.near, 4)
            if shards.sizes[one.sample] == train.sizes[one.other] and shards.crcs[one.sample] == train.crcs[one.other]:
                line["copy"] = True
            lines.append(line)
        known = {(one.split, one.sample) for one in found}
        lines += [line for line in self._listed() if (line.get("split"), line.get("sample")) not in known]
        if lines:
            write_whole(self.file, lambda out: out.writelines((json.dumps(line) + "\n").encode() for line in lines))

    def line(self) -> str:
        """About all that are no exact copies, of which `dtl.data.copies` has a line; empty where there are none."""
        new = [line for line in self._listed() if not line.get("copy")]
        said = []
        for split, image in _IMAGE.items():
            if of := [line for line in new if line.get("split") == split]:
                nearest = max(of, key=lambda line: line.get("cosine", 0.0))
                count = f"{len(of):,} of {counted(self.splits[split].num_samples, image)} {'has a twin' if len(of) == 1 else 'have twins'} in train"
                said.append(f"{count} (such as {nearest['path']} and {nearest['other']})")
        by = " and ".join(how for way, how in _BY.items() if any(way in line for line in new))
        return f"{'; '.join(said)}, by {by}, so accuracy may be overestimated; all are listed in {self.file}" if said else ""

    def _listed(self) -> list[dict[str, Any]]:
        try:
            lines = list(json_lines(self.file)) if self.file.is_file() else []
        except (OSError, UserError):
            return []
        return [line for line in lines if isinstance(line.get("path"), str) and isinstance(line.get("other"), str)]
