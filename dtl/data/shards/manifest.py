"""`manifest.json`: what a packed split is. It is written last, so a folder that has one is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl.errors import UserError
from dtl.files import fsync_folder, write_whole
from dtl.text import some

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar. `url` is relative to the manifest, or the address of a remote one."""

    url: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """One split: its classes in the order of their labels, its shards, and how it was made.

    `dataset_id` is a hash of content (see `dataset_id`), the same wherever the files lie; `index_sha256` ties index.bin to this manifest.
    """

    version: int
    classes: tuple[str, ...]
    display_names: dict[str, str]
    shards: tuple[Shard, ...]
    class_counts: tuple[int, ...]
    dataset_id: str
    index_sha256: str
    made_by: dict[str, Any]

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Under a temporary name, then renamed: a reader sees all of it or nothing."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_whole(folder / MANIFEST_NAME, lambda file: file.write(text.encode()))
        fsync_folder(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / MANIFEST_NAME
        try:
            return cls.parse(path.read_bytes(), path)
        except FileNotFoundError:
            raise UserError(f"{folder} holds no {MANIFEST_NAME}: it is not a folder of packed shards (make one with `dtl pack SRC DST`)") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    @classmethod
    def parse(cls, text: bytes, path: Path | str) -> Manifest:
        """The manifest that `text` is; `path` is what messages call it."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if not isinstance(raw, dict) or "shards" not in raw:
            raise UserError(f"{path} is not a manifest of dtl")
        if raw.get("version") != MANIFEST_VERSION:
            raise UserError(f"{path} has format version {raw.get('version')}, this dtl reads version {MANIFEST_VERSION}; pack the data again")
        return cls._parse(raw, path)

    @classmethod
    def _parse(cls, raw: dict[str, Any], path: Path | str) -> Manifest:
        wrong = {field.name for field in fields(cls)} ^ set(raw)
        if wrong:
            raise UserError(f"{path} has missing or unknown fields: {', '.join(sorted(wrong))}")
        try:
            shards = tuple(Shard(url=str(s["url"]), samples=int(s["samples"]), bytes=int(s["bytes"]), sha256=str(s["sha256"])) for s in raw["shards"])
            manifest = cls(
                version=MANIFEST_VERSION,
                classes=tuple(str(name) for name in raw["classes"]),
                display_names={str(name): str(shown) for name, shown in raw["display_names"].items()},
                shards=shards,
                class_counts=tuple(int(count) for count in raw["class_counts"]),
                dataset_id=str(raw["dataset_id"]),
                index_sha256=str(raw["index_sha256"]),
                made_by=dict(raw["made_by"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None
        if len(set(manifest.classes)) != len(manifest.classes) or len(manifest.class_counts) != len(manifest.classes):
            raise UserError(
                f"{path} is damaged: {len(manifest.classes)} classes, {len(set(manifest.classes))} of them different, {len(manifest.class_counts)} counts"
            )
        if sum(manifest.class_counts) != manifest.num_samples:
            raise UserError(f"{path} is damaged: the classes have {sum(manifest.class_counts)} samples, the shards {manifest.num_samples}")
        return manifest


def dataset_id(classes: Sequence[str], *, sizes: npt.NDArray[np.uint32], crcs: npt.NDArray[np.uint32], labels: npt.NDArray[np.int32]) -> str:
    """Hash of the class names and of each sample's size, crc32 and label in packed order: content, not paths."""
    digest = hashlib.sha256(json.dumps([list(classes), len(labels)], ensure_ascii=False).encode())
    for column, kind in ((sizes, "<u4"), (crcs, "<u4"), (labels, "<i4")):
        digest.update(np.ascontiguousarray(column, kind).data)
    return digest.hexdigest()[:32]


def check_class_maps(train: Manifest, val: Manifest) -> None:
    """Refuse two splits whose label numbers do not mean the same classes: they would be scored against wrong names in silence."""
    if val.classes == train.classes:
        return
    again = "pack both together, or val with the classes of train (`dtl pack VAL DST --classes-from TRAIN_SHARDS`)"
    unknown = [name for name in val.classes if name not in set(train.classes)]
    if unknown:
        raise UserError(f"validation has {_named(unknown)} which training does not know; training has {_named(train.classes)}; {again}")
    missing = [name for name in train.classes if name not in set(val.classes)]
    if missing:
        raise UserError(f"validation was packed without {_named(missing)}, so its label numbers mean other classes than training's; {again}")
    at = next(i for i, (a, b) in enumerate(zip(train.classes, val.classes)) if a != b)
    raise UserError(
        f"training and validation have their classes in another order: label {at} is '{train.classes[at]}' in training "
        f"and '{val.classes[at]}' in validation; {again}"
    )


def _named(classes: Sequence[str]) -> str:
    return f"class{'' if len(classes) == 1 else 'es'} {some(classes, limit=8, quoted=True)}"
