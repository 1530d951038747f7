"""`quarantine.json`: samples of a split that were found damaged and are left out, while the shards stay as they are.

Beside it lies an index without their rows, which readers map in place of index.bin: everything above sees a split that never had these
samples, with another dataset id. So a plan needs to know nothing of it, and costs nothing more. A new quarantine gets an index of a new
name before quarantine.json is replaced: at any instant the two belong together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl.data.shards.manifest import Manifest
from dtl.errors import UserError
from dtl.files import fsync_folder, write_whole

QUARANTINE_NAME = "quarantine.json"
QUARANTINE_VERSION = 1
_AGAIN = "run `dtl verify SHARDS --quarantine` again, or remove the file to use all samples"


@dataclass(frozen=True)
class BadSample:
    """One sample that is left out; `sample` is its number in index.bin."""

    sample: int
    shard: str
    key: str
    offset: int
    reason: str


@dataclass(frozen=True)
class Quarantine:
    """`of` is the dataset id of the manifest it belongs to; `shard_samples` and `class_counts` are those that are left."""

    of: str
    index: str
    index_sha256: str
    shard_samples: tuple[int, ...]
    class_counts: tuple[int, ...]
    samples: tuple[BadSample, ...]

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """The samples' numbers in index.bin, growing."""
        return np.array([bad.sample for bad in self.samples], np.int64)

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> Quarantine | None:
        """None where there is none. UserError where it cannot be read, or is about another data set."""
        path = folder / QUARANTINE_NAME
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); {_AGAIN}") from None
        try:
            if raw["version"] != QUARANTINE_VERSION:
                raise UserError(f"{path} has format version {raw['version']}, this dtl reads version {QUARANTINE_VERSION}; {_AGAIN}")
            found = cls(
                of=str(raw["of"]),
                index=str(raw["index"]),
                index_sha256=str(raw["index_sha256"]),
                shard_samples=tuple(int(count) for count in raw["shard_samples"]),
                class_counts=tuple(int(count) for count in raw["class_counts"]),
                samples=tuple(BadSample(**bad) for bad in raw["samples"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__} {error}); {_AGAIN}") from None
        if found.of != manifest.dataset_id or len(found.shard_samples) != len(manifest.shards):
            raise UserError(f"{path} is about another data set than the manifest beside it; {_AGAIN}")
        return found

    def write(self, folder: Path) -> None:
        value: dict[str, Any] = {"version": QUARANTINE_VERSION, **asdict(self)}
        text = json.dumps(value, indent=1, ensure_ascii=True) + "\n"
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
