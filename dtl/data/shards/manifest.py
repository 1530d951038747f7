"""`manifest.json`: what a packed split is. It is written last, so a folder that has one is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from dtl.data.remote.address import is_remote
from dtl.errors import UserError
from dtl.files import fsync_folder, write_whole
from dtl.text import some
from dtl.untrusted import Check, Count, PlainObject, Record, Sha256, Text, is_sha256, only_version

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
INDEXED = "WebDataset shards"
"""`made_by.source` of a manifest for tars from other tools, unlike those that dtl packed."""


def _shard_url(text: str) -> str:
    if not text or text != text.strip() or any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise ValueError(f"{text[:80]!r} is neither a path nor an address")
    return text


def _dataset_id(text: str) -> str:
    """It becomes part of file names in the cache."""
    if not 8 <= len(text) <= 64 or set(text) - set("0123456789abcdef"):
        raise ValueError(f"{text[:80]!r} is not a hexadecimal number")
    return text


def _made_by(facts: dict[str, Any]) -> dict[str, Any]:
    """Free, but for what is used as more than text."""
    keys, rules = facts.get("keys_sha256"), facts.get("rules")
    if keys is not None and not (isinstance(keys, str) and is_sha256(keys)):
        raise ValueError("keys_sha256 is not a SHA-256 (64 hexadecimal digits)")
    if rules is not None and not (
        isinstance(rules, dict) and set(rules) <= {"image_field", "label_field"} and all(one is None or isinstance(one, str) for one in rules.values())
    ):
        raise ValueError("rules must be an object with the strings image_field and label_field")
    return facts


DatasetId = Annotated[str, Check(_dataset_id)]


class Shard(Record):
    """One tar. `url` is relative to the manifest, or the address of a remote one."""

    url: Annotated[str, Check(_shard_url)]
    samples: Count
    bytes: Count
    sha256: Sha256


class PixelFacts(Record):
    """What packing found in the images. `wide` of them have values of more than 8 bits, from `low` to `high`; their EXIF orientation is in the index."""

    wide: Count = 0
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def of(cls, wide: npt.NDArray[np.bool_], lows: npt.NDArray[np.float64], highs: npt.NDArray[np.float64]) -> PixelFacts:
        """Of all images, [N]."""
        return cls(wide=int(wide.sum()), low=float(lows[wide].min()), high=float(highs[wide].max())) if wide.any() else cls()


class Manifest(Record):
    """One split: its classes in the order of their labels, its shards, and how it was made.

    `dataset_id` is a hash of content (see `dataset_id`), the same wherever the files lie; `index_sha256` ties index.bin to this manifest.
    """

    max_bytes = 256 << 20  # of a million shards, 100 TB and more
    max_values = 8_000_000

    version: Annotated[int, only_version(MANIFEST_VERSION, otherwise="pack the data again")]
    classes: tuple[Text, ...]
    display_names: dict[Text, Text]
    shards: tuple[Shard, ...]
    class_counts: tuple[Count, ...]
    dataset_id: DatasetId
    index_sha256: Sha256
    made_by: Annotated[PlainObject, Check(_made_by)]
    pixels: PixelFacts | None = None
    """None of sets that an older dtl packed or indexed."""

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Under a temporary name, then renamed: a reader sees all of it or nothing."""
        for name in self.classes:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise UserError(f"the name of the class '{name}' is not UTF-8; rename it in the source") from None
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_whole(folder / MANIFEST_NAME, lambda file: file.write(text.encode()))
        fsync_folder(folder)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Manifest:
        """The manifest in the folder `path`."""
        file = Path(path) / MANIFEST_NAME
        try:
            return super().read(file)
        except FileNotFoundError:
            raise UserError(f"{path} holds no {MANIFEST_NAME}: it is not a folder of packed shards (make one with `dtl pack SRC DST`)") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from None

    @classmethod
    def parse(cls, data: bytes | str, origin: str) -> Manifest:
        """Also checks what is right field by field and wrong together."""
        manifest = super().parse(data, origin)
        if fault := manifest._contradiction():
            raise UserError(f"{origin} is damaged: {fault}")
        return manifest

    def _contradiction(self) -> str | None:
        classes, counts = self.classes, self.class_counts
        if len(set(classes)) != len(classes) or len(counts) != len(classes):
            return f"{len(classes)} class names ({len(set(classes))} different) and {len(counts)} class counts"
        if sum(counts) != self.num_samples:
            return f"class_counts add up to {sum(counts)} samples, the shards to {self.num_samples}"
        if sum(shard.bytes for shard in self.shards) >= 1 << 63:
            return "the sizes of its shards add up to 2^63 bytes or more"
        if "keys_sha256" in self.made_by:  # tars from other tools, which may lie anywhere
            return None
        outside = next((url for url in (shard.url for shard in self.shards) if not is_remote(url) and (url[0] == "/" or ".." in url.split("/"))), None)
        return None if outside is None else f"the shard {outside[:80]!r} lies outside its folder"


def dataset_id(classes: Sequence[str], *, sizes: npt.NDArray[np.uint32], crcs: npt.NDArray[np.uint32], labels: npt.NDArray[np.int32]) -> str:
    """Hash of the class names and of each sample's size, crc32 and label in packed order: content, not paths."""
    digest = hashlib.sha256(json.dumps([list(classes), len(labels)], ensure_ascii=False).encode())
    for column, kind in ((sizes, "<u4"), (crcs, "<u4"), (labels, "<i4")):
        digest.update(np.ascontiguousarray(column, kind).data)
    return digest.hexdigest()[:32]


def check_class_maps(train: Manifest, val: Manifest, *, split: str = "validation") -> None:
    """Refuse two splits whose label numbers do not mean the same classes: they would be scored against wrong names in silence."""
    if val.classes == train.classes:
        return
    name = split if split == "test" else "val"
    again = f"pack both together, or pack {name} with the classes of train (`dtl pack {name.upper()} DST --classes-from TRAIN_SHARDS`)"
    unknown = [name for name in val.classes if name not in set(train.classes)]
    if unknown:
        raise UserError(f"the {split} data has {_named(unknown)}, which the training data does not have (it has {_named(train.classes)}); {again}")
    missing = [name for name in train.classes if name not in set(val.classes)]
    if missing:
        raise UserError(f"the {split} data was packed without {_named(missing)}, so its label numbers stand for other classes than in training; {again}")
    at = next(i for i, (a, b) in enumerate(zip(train.classes, val.classes)) if a != b)
    raise UserError(
        f"training and {split} have their classes in different orders: label {at} is '{train.classes[at]}' in training "
        f"and '{val.classes[at]}' in {split}; {again}"
    )


def _named(classes: Sequence[str]) -> str:
    return f"class{'' if len(classes) == 1 else 'es'} {some(classes, limit=8, quoted=True)}"
