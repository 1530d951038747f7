"""Samples that could not be used: named, written down once each, counted against the budget. Never silence, never a hang."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dtl.config import DataConfig
from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Runtime
from dtl.errors import DamagedSample, UnreachableSample, UserError
from dtl.untrusted import as_utf8, json_lines


class BadSamples:
    """The ledger `bad_samples.jsonl`, written by the main process; `count` is the same on every rank.

    `known`: its entries in the checkpoint that the run resumes from; those that the file has lost are written again.
    """

    def __init__(self, path: Path, runtime: Runtime, options: DataConfig, known: Sequence[dict[str, Any]] = ()) -> None:
        self.path, self.runtime, self.skip, self.max_bad = path, runtime, options.on_error == "skip", options.max_bad
        self.entries: list[dict[str, Any]] = read_ledger(path) if runtime.is_main else []
        """In the main process: what the ledger holds."""
        if runtime.is_main:
            have = {_place(entry) for entry in self.entries}
            self._append([entry for entry in known if _place(entry) not in have])
        self._known: set[tuple[str, int]] = runtime.agree({_place(entry) for entry in self.entries})

    @property
    def count(self) -> int:
        return len(self._known)

    def take(self, split: str, batches: Iterable[Batch]) -> None:
        """Called by all ranks together, as soon as one of them has a bad sample in its batches.

        Raises UserError on all ranks: with the first sample's line under `fail`, or when there are more than `max_bad`; and in any case for
        one that cannot be read now, since nothing is known about it.
        """
        mine = [(sample, damage) for batch in batches for sample, damage in batch.bad]
        away = [line for lines in self.runtime.gather([str(d) for _, d in mine if isinstance(d, UnreachableSample)]) for line in lines]
        if away:
            raise UserError(away[0])
        found = [entry for entries in self.runtime.gather([_entry(split, s, d) for s, d in mine]) for entry in entries]
        if found and not self.skip:
            raise UserError(f"{found[0]['message']}; repack the data, or leave such samples out with --data.on-error skip --data.max-bad N")
        new = {_place(entry): entry for entry in found if _place(entry) not in self._known}
        self._known |= new.keys()
        if self.runtime.is_main:
            self._append(list(new.values()))
        if self.count > self.max_bad:
            raise UserError(f"{self.count} damaged samples are more than data.max_bad {self.max_bad} (listed in {self.path}); the last: {found[-1]['message']}")

    def _append(self, entries: list[dict[str, Any]]) -> None:
        if entries:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
            self.entries += entries


def _place(entry: dict[str, Any]) -> tuple[str, int]:
    return str(entry["split"]), int(entry["sample"])


def _entry(split: str, sample: int, damage: DamagedSample) -> dict[str, Any]:
    return {
        "split": split,
        "sample": sample,
        "shard": as_utf8(damage.shard),
        "key": as_utf8(damage.key),
        "offset": damage.offset,
        "reason": as_utf8(damage.reason),
        "message": as_utf8(str(damage)),
    }


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """A line that is none is left out, such as the torn last one of a killed run: its sample will be met again."""
    entries: dict[tuple[str, int], dict[str, Any]] = {}
    if path.exists():
        for line in json_lines(path):
            if isinstance(line.get("split"), str) and isinstance(line.get("sample"), int):
                entries[_place(line)] = line
    return list(entries.values())
