"""`quarantine.json`: samples of a split that were found damaged and are left out, while the shards stay as they are.

Beside it lies an index without their rows, which readers map in place of index.bin: everything above sees a split that never had these
samples, with another dataset id. So a plan needs to know nothing of it, and costs nothing more. A new quarantine gets an index of a new
name before quarantine.json is replaced: at any instant the two belong together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt

from dtl.data.shards.manifest import DatasetId, Manifest
from dtl.errors import UserError
from dtl.files import fsync_folder, write_whole
from dtl.untrusted import Count, FileName, Record, Sha256, Text, as_utf8, only_version

QUARANTINE_NAME = "quarantine.json"
QUARANTINE_VERSION = 1
_AGAIN = "run `dtl verify SHARDS --quarantine` again, or remove the file to use all samples"


class BadSample(Record):
    """One sample that is left out; `sample` is its number in index.bin."""

    sample: Count
    shard: Text
    key: Text
    offset: Count
    reason: Text


class Quarantine(Record):
    """`of` is the dataset id of the manifest it belongs to; `shard_samples` and `class_counts` are those that are left."""

    version: Annotated[int, only_version(QUARANTINE_VERSION)] = QUARANTINE_VERSION
    of: DatasetId
    index: FileName
    index_sha256: Sha256
    shard_samples: tuple[Count, ...]
    class_counts: tuple[Count, ...]
    samples: tuple[BadSample, ...]

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """The samples' numbers in index.bin, growing."""
        return np.array([bad.sample for bad in self.samples], np.int64)

    @classmethod
    def of_folder(cls, folder: Path, manifest: Manifest) -> Quarantine | None:
        """None where there is none. UserError where it cannot be read, or is about another data set."""
        path = folder / QUARANTINE_NAME
        try:
            found = cls.read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); {_AGAIN}") from None
        except UserError as error:
            raise UserError(f"{error}; {_AGAIN}") from None
        if found.of != manifest.dataset_id or len(found.shard_samples) != len(manifest.shards):
            raise UserError(f"{path} belongs to another data set than the manifest beside it; {_AGAIN}")
        if fault := found._contradiction(manifest):
            raise UserError(f"{path} is damaged: {fault}; {_AGAIN}")
        return found

    def _contradiction(self, manifest: Manifest) -> str | None:
        """What is right field by field, and wrong together."""
        numbers, left = [bad.sample for bad in self.samples], sum(self.shard_samples)
        if any(after <= before for before, after in pairwise(numbers)) or (numbers and numbers[-1] >= manifest.num_samples):
            return f"its sample numbers must be increasing and below {manifest.num_samples}"
        if left + len(numbers) != manifest.num_samples or left != sum(self.class_counts) or len(self.class_counts) != len(manifest.classes):
            counts = f"manifest ({manifest.num_samples}) and class_counts ({sum(self.class_counts)})"
            return f"{len(numbers)} samples left out and {left} kept do not agree with {counts}"
        if any(now > before for now, before in zip(self.shard_samples, (shard.samples for shard in manifest.shards))):
            return "a shard has more samples than in the manifest"
        return None

    def write(self, folder: Path) -> None:
        samples = [{**asdict(bad), "shard": as_utf8(bad.shard), "key": as_utf8(bad.key)} for bad in self.samples]
        text = json.dumps({**asdict(self), "samples": samples}, indent=1, ensure_ascii=True) + "\n"
        write_whole(folder / QUARANTINE_NAME, lambda file: file.write(text.encode()))
        fsync_folder(folder)

    def applied(self, manifest: Manifest) -> Manifest:
        """The manifest of what is left: fewer samples, another dataset id; bytes and sha256 of the shards stay."""
        shards = tuple(replace(shard, samples=samples) for shard, samples in zip(manifest.shards, self.shard_samples))
        return replace(
            manifest,
            shards=shards,
            class_counts=self.class_counts,
            dataset_id=self.dataset_id(),
            index_sha256=self.index_sha256,
        )

    def dataset_id(self) -> str:
        digest = hashlib.sha256(f"quarantine of {self.of}\n".encode())
        digest.update(np.ascontiguousarray(self.numbers, "<i8").data)
        return digest.hexdigest()[:32]


def left_out_index_name(samples: Sequence[int]) -> str:
    return f"index-without-{hashlib.sha256(np.array(samples, '<i8').tobytes()).hexdigest()[:12]}.bin"


def original_number(sample: int, left_out: npt.NDArray[np.int64]) -> int:
    """The number in index.bin of the `sample`-th sample that is left; `left_out` grows."""
    return sample + int(np.searchsorted(left_out - np.arange(len(left_out)), sample, side="right"))
