"""The work of `dtl index`, shard by shard, in the processes of `dtl.data.workers`, without torch.

00000.tar          a remote shard, while it is read; it stays where the caller wants it
00000.npy          index columns of a shard (ROWS); its labels count the shard's own list of labels
00000.keys         the keys, in the same order

What else is found (bytes, sha256, labels, problems) is the answer.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtl.data.decoding.decode import DecodeError, bounds_of
from dtl.data.decoding.headers import Limits
from dtl.data.packing.job import LOCK_NAME, ROWS, write_array
from dtl.data.remote.address import is_remote
from dtl.data.remote.address import shown as shown_address
from dtl.data.remote.fetch import Unfetched, fetch_file, options_of_helper
from dtl.data.shards.index import flags_of
from dtl.data.shards.strings import StringTable
from dtl.data.wds.samples import Ignored, Label, Rules, Sample, open_tar, read_samples, shown
from dtl.data.wds.tar import DamagedTar, TarFile
from dtl.errors import UserError
from dtl.files import TEMPORARY

if TYPE_CHECKING:
    from dtl.config.models import DataConfig

MADE = re.compile(rf"{LOCK_NAME}|job\.json|\d{{5,}}\.(tar|npy|keys|json)|{TEMPORARY}\..*\.tmp")
"""The names of all files here, those of earlier versions included: nothing else is deleted."""
# Of one shard; more of them are counted only.
MAX_PROBLEMS = 50


@dataclass
class IndexJob:
    """A working folder, opened by the main process or by a worker."""

    folder: Path
    paths: list[str]
    rules: Rules
    options: DataConfig | None
    """How remote ones are fetched; None where all are local."""
    limits: Limits


def open_job(facts: dict[str, Any]) -> IndexJob:
    options = options_of_helper(facts["options"]) if any(map(is_remote, facts["paths"])) else None
    limits = Limits(facts["options"]["max_pixels"], facts["options"]["max_file_bytes"])
    return IndexJob(Path(facts["folder"]), facts["paths"], Rules(**facts["rules"]), options, limits)


def run_task(job: IndexJob, task: dict[str, Any]) -> dict[str, Any]:
    """Index one shard, `{"number"}`; the answer is its number and what was found (`_Shard.facts`)."""
    number = task["number"]
    path, stem = job.paths[number], job.folder / f"{number:05d}"
    if job.options is not None and is_remote(path):
        facts = _index(stem, _fetched(path, stem.with_suffix(".tar"), job.options), shown_address(path), job)
    else:
        facts = _index(stem, Path(path), None, job)
    return {"number": number, **facts}


def _fetched(url: str, path: Path, options: DataConfig) -> Path:
    try:
        fetch_file(url, path, options=options)
    except Unfetched as error:
        raise UserError(str(error)) from None
    return path


def _index(stem: Path, path: Path, name: str | None, job: IndexJob) -> dict[str, Any]:
    """`name`: what messages call the shard, where it is not its path."""
    found = _Shard(name or str(path), job.limits.max_pixels)
    with open_tar(path, name) as file:
        tar = TarFile(file, name)
        try:
            for sample in read_samples(tar, job.rules, found.ignored, job.limits):
                found.add(sample)
        except DamagedTar as error:
            raise UserError(f"{name or path}: damaged at byte {error.offset}: {error.reason}; copy or download the shard again") from None
    found.refuse_double_keys()
    StringTable.build(found.keys).write(stem.with_suffix(".keys"))
    write_array(stem.with_suffix(".npy"), np.frombuffer(bytes(found.rows), ROWS))
    return found.facts(tar)


@dataclass
class _Shard:
    """What one pass over a shard has found."""

    path: str
    max_pixels: int
    rows: bytearray = field(default_factory=bytearray)
    keys: list[str] = field(default_factory=list)
    labels: dict[Label, tuple[int, str]] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, int, str]] = field(default_factory=list)
    num_problems: int = 0
    ignored: Ignored = field(default_factory=Ignored)
    bounds: list[tuple[float, float]] = field(default_factory=list)
    """Least and greatest value of each image of more than 8 bits."""
    _hashes: array[int] = field(default_factory=lambda: array("Q"))
    _usable: bytearray = field(default_factory=bytearray)

    def add(self, sample: Sample) -> None:
        self._hashes.append(int.from_bytes(hashlib.blake2b(sample.key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"))
        problem = sample.problem
        if sample.header is not None and sample.header.wide:
            try:
                self.bounds.append(bounds_of(sample.data, self.max_pixels))
            except DecodeError as error:
                problem = f"its image: {error}"
        self._usable.append(not problem)
        if problem or sample.header is None or sample.label is None:
            self.num_problems += 1
            if len(self.problems) < MAX_PROBLEMS:
                self.problems.append((sample.key, sample.offset, problem))
            return
        code, _ = self.labels.setdefault(sample.label, (len(self.labels), sample.key))
        self.rules.setdefault(sample.rule, sample.key)
        self.keys.append(sample.key)
        header = sample.header
        row = (sample.offset, sample.size, sample.crc, code, *header.turned_size, flags_of(header.format, header.orientation))
        self.rows += np.array([row], ROWS).tobytes()

    def refuse_double_keys(self) -> None:
        """A key that comes back: its members are not next to each other, or two samples have it. Webdataset would make two of it."""
        hashes = np.frombuffer(self._hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if not len(again):
            return
        first, second = int(order[again[0]]), int(order[again[0] + 1])
        key = shown(self._key_at(first) or self._key_at(second))
        if self._usable[first] and self._usable[second]:
            raise UserError(f"{self.path}: two samples have the key {key} (samples {first} and {second} of the shard); write the tar again")
        raise UserError(
            f"{self.path}: the members of sample {key} are not next to each other, so WebDataset readers would split the sample; "
            "write the tar again in the order of its names: tar --sort=name -cf NEW.tar -C FOLDER ."
        )

    def _key_at(self, group: int) -> str:
        if self._usable[group]:
            return self.keys[sum(self._usable[:group])]
        problem = group - sum(self._usable[:group])
        return self.problems[problem][0] if problem < len(self.problems) else ""

    def facts(self, tar: TarFile) -> dict[str, Any]:
        return {
            "bytes": tar.num_bytes,
            "sha256": tar.sha256,
            "labels": [[label, key] for label, (_, key) in self.labels.items()],
            "rules": self.rules,
            "problems": self.problems,
            "num_problems": self.num_problems,
            "ignored": [self.ignored.count, self.ignored.first],
            "wide": [len(self.bounds), *((min(low for low, _ in self.bounds), max(high for _, high in self.bounds)) if self.bounds else (0.0, 0.0))],
        }
