"""`part.json`: some samples of a packed split as a split of its own, such as the share of train that is held out. The shards stay where they are.

    part.json      whose samples they are, and how many of each shard and class
    index.bin      their rows of the split's index
    numbers.npy    their numbers in the split's index.bin, growing: int64 [n]

A part lies in the cache. part.json is written last, so a folder that has one is complete. Everything above sees a split with its own dataset id.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from dtl.data.shards.manifest import DatasetId, Manifest
from dtl.errors import UserError
from dtl.files import fsync_folder, write_whole
from dtl.untrusted import Count, Record, Sha256, Text, only_version

PART_NAME = "part.json"
NUMBERS_NAME = "numbers.npy"
PART_VERSION = 1


class Part(Record):
    """`of` is the dataset id of the split whose samples they are, its quarantine applied; `rows` how many its index.bin has."""

    version: Annotated[int, only_version(PART_VERSION)] = PART_VERSION
    folder: Text
    of: DatasetId
    rows: Count
    dataset_id: DatasetId
    index_sha256: Sha256
    shard_samples: tuple[Count, ...]
    class_counts: tuple[Count, ...]

    @classmethod
    def of_folder(cls, folder: Path) -> Part | None:
        """None where the folder is no part."""
        try:
            return cls.read(folder / PART_NAME)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{folder / PART_NAME} cannot be read: {error.strerror or error}") from None

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1) + "\n"
        write_whole(folder / PART_NAME, lambda file: file.write(text.encode()))
        fsync_folder(folder)

    def applied(self, manifest: Manifest, place: Path) -> Manifest:
        """The manifest of these samples; `manifest` is that of the split, with its quarantine."""
        if manifest.dataset_id != self.of or len(manifest.shards) != len(self.shard_samples) or len(manifest.classes) != len(self.class_counts):
            raise UserError(f"{place} is a part of other data than {self.folder} holds now; delete {place.parent}, and run again")
        shards = tuple(replace(shard, samples=samples) for shard, samples in zip(manifest.shards, self.shard_samples))
        return replace(manifest, shards=shards, class_counts=self.class_counts, dataset_id=self.dataset_id, index_sha256=self.index_sha256)
