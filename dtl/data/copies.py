"""Exact copies of images, within a split and in two of them: a validation image that is trained on too says nothing about new images.

Found by size and CRC-32, which the indexes have, then by the bytes of those few. CRC-32 alone does not do: each chunk of a PNG ends with its own CRC,
and so the files of PNGs of one size have only 2^16 different ones. Images that were encoded or resized in another way are not found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dtl.data.shards.index import Shards
from dtl.data.sources.content_split import content_hash
from dtl.files import write_whole
from dtl.text import counted, csv_line

COPIES_NAME = "copies.csv"
_MOST_SAMPLES = 20_000_000  # searched beside other work: they take 8 seconds and 220 MB
_MOST_BYTES = 256 << 20  # read and compared beside other work
_MOST_ROWS = 100_000
_BATCH = 64  # samples in memory
_SHOWN = 3


@dataclass(frozen=True)
class Copies:
    """Images that are in the splits more than once. Row i: sample `samples[i]` of split number `parts[i]` belongs to group `groups[i]`; groups count from 0."""

    splits: Mapping[str, Shards]
    groups: npt.NDArray[np.int64]
    parts: npt.NDArray[np.uint8]
    samples: npt.NDArray[np.int64]
    num_unknown: int
    """How many more images have the size and the CRC-32 of another one, but have not been compared, or cannot be read."""

    @property
    def num_groups(self) -> int:
        return int(self.groups[-1]) + 1 if len(self.groups) else 0

    def also_in(self, split: str, other: str) -> int:
        """How many images of a split are in the other one too."""
        names = list(self.splits)
        there = np.zeros(self.num_groups, bool)
        there[self.groups[self.parts == names.index(other)]] = True
        return int(there[self.groups[self.parts == names.index(split)]].sum())

    def repeated_in(self, split: str) -> int:
        """How many images of a split repeat another one of it."""
        mine = self.groups[self.parts == list(self.splits).index(split)]
        return len(mine) - len(np.unique(mine))

    def with_two_labels(self) -> npt.NDArray[np.int64]:
        """The groups whose images do not all have the same class."""
        classes = self._classes()
        first = classes[np.searchsorted(self.groups, np.arange(self.num_groups))]
        return np.unique(self.groups[classes != first[self.groups]])

    def members(self, group: int) -> list[tuple[str, str, str]]:
        """(split, path, class) of a group's images."""
        names = list(self.splits)
        rows = range(int(np.searchsorted(self.groups, group)), int(np.searchsorted(self.groups, group, side="right")))
        found = []
        for row in rows:
            split, sample = names[self.parts[row]], int(self.samples[row])
            shards = self.splits[split]
            found.append((split, shards.name(sample), shards.classes[shards.labels[sample]]))
        return found

    def write_csv(self, path: Path) -> None:
        """One line per image: group,split,path,label. The first 100,000 of very many."""
        rows = (csv_line([group, *member]) for group in range(self.num_groups) for member in self.members(group))
        text = csv_line(["group", "split", "path", "label"]) + "".join(row for row, _ in zip(rows, range(_MOST_ROWS)))
        write_whole(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))

    def _classes(self) -> npt.NDArray[np.int64]:
        """A number for the class of each row, the same for the same name in all splits."""
        numbers: dict[str, int] = {}
        found = np.zeros(len(self.samples), np.int64)
        for part, shards in enumerate(self.splits.values()):
            mine = self.parts == part
            of_label = np.array([numbers.setdefault(name, len(numbers)) for name in shards.classes], np.int64)
            found[mine] = of_label[shards.labels[self.samples[mine]]]
        return found


def find_copies(splits: Mapping[str, Shards], *, most_bytes: int | None = None) -> Copies:
    """All groups of equal images in `splits`. Up to `most_bytes` are read to compare them, first those of two splits."""
    all_shards = list(splits.values())
    parts, samples = _candidates(all_shards)
    if not len(parts):
        return Copies(splits, np.zeros(0, np.int64), parts, samples, 0)
    keys = _keys(all_shards, parts, samples)
    order = np.lexsort((samples, parts, keys))
    keys, parts, samples = keys[order], parts[order], samples[order]
    readable = _within(most_bytes, keys, parts)
    hashes = _hashes(all_shards, parts, samples, readable)  # leaves out of `readable` what turned out not to be
    unknown = int(np.sum(~readable))
    keys, parts, samples, hashes = keys[readable], parts[readable], samples[readable], hashes[readable]
    order = np.lexsort((samples, parts, hashes, keys))
    parts, samples = parts[order], samples[order]
    group = np.cumsum(_begins(keys[order], hashes[order])) - 1
    kept = np.bincount(group)[group] > 1 if len(group) else np.zeros(0, bool)
    return Copies(splits, np.cumsum(_begins(group[kept])) - 1, parts[kept], samples[kept], unknown)


def find_copies_quickly(splits: Mapping[str, Shards]) -> Copies:
    """`find_copies` beside other work, such as at the start of a run: limited in time and memory, and nothing is downloaded for it."""
    if sum(shards.num_samples for shards in splits.values()) > _MOST_SAMPLES:
        return find_copies({})
    return find_copies(splits, most_bytes=0 if any(shards.cache is not None for shards in splits.values()) else _MOST_BYTES)


def _within(most_bytes: int | None, keys: npt.NDArray[np.uint64], parts: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which rows, sorted by key, to read: whole groups of a key, those of two splits first."""
    if most_bytes is None:
        return np.ones(len(keys), bool)
    starts = np.flatnonzero(_begins(keys))
    in_two = np.maximum.reduceat(parts, starts) != np.minimum.reduceat(parts, starts)
    group_bytes = np.add.reduceat((keys >> np.uint64(32)).astype(np.int64), starts)
    order = np.argsort(~in_two, kind="stable")
    chosen = np.zeros(len(starts), bool)
    chosen[order] = np.cumsum(group_bytes[order]) <= most_bytes
    return np.repeat(chosen, np.diff(np.append(starts, len(keys))))


def _candidates(shards: Sequence[Shards]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(split, sample) of all images whose size and CRC-32 another one has."""
    columns = [(one.sizes.astype(np.uint64) << np.uint64(32)) | one.crcs for one in shards]
    keys = np.concatenate([np.zeros(0, np.uint64), *columns])
    keys.sort()
    twice = keys[1:][keys[1:] == keys[:-1]]
    del keys
    found = [np.flatnonzero(_is_in(column, twice)) for column in columns]
    parts = [np.full(len(samples), part, np.uint8) for part, samples in enumerate(found)]
    return np.concatenate([np.zeros(0, np.uint8), *parts]), np.concatenate([np.zeros(0, np.int64), *found])


def _is_in(keys: npt.NDArray[np.uint64], those: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    if not len(those):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(those, keys), len(those) - 1)
    return np.asarray(those[at] == keys)


def _keys(shards: Sequence[Shards], parts: npt.NDArray[np.uint8], samples: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    keys = np.zeros(len(samples), np.uint64)
    for part, one in enumerate(shards):
        mine = parts == part
        keys[mine] = (one.sizes[samples[mine]].astype(np.uint64) << np.uint64(32)) | one.crcs[samples[mine]]
    return keys


def _begins(*columns: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Where a row of sorted columns differs from the one before."""
    begins = np.zeros(len(columns[0]), bool)
    begins[:1] = True
    for column in columns:
        begins[1:] |= column[1:] != column[:-1]
    return begins


def _hashes(shards: Sequence[Shards], parts: npt.NDArray[np.uint8], samples: npt.NDArray[np.int64], readable: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """A hash of the bytes of the readable rows; what is damaged is taken out of `readable`."""
    hashes = np.zeros(len(samples), np.uint64)
    for part, one in enumerate(shards):
        rows = np.flatnonzero(readable & (parts == part))
        rows = rows[np.argsort(samples[rows])]  # in reading order
        reader = copy(one)  # with open files of its own, which are closed after this
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            for row, data in zip(batch, reader.read(samples[batch])):
                if isinstance(data, bytes):
                    hashes[row] = content_hash(data)
                else:
                    readable[row] = False
    return hashes


def describe_copies(copies: Copies) -> str:
    """One line about all of them, with counts and names; empty where there are none."""
    said = []
    for trained, other in combinations(copies.splits, 2):
        if count := copies.also_in(other, trained):
            of = f"{count:,} of {counted(copies.splits[other].num_samples, 'image')} of {other} {'is' if count == 1 else 'are'} also in {trained}"
            said.append(f"{of} ({_examples(copies, trained, other)}), so accuracy on {other} is overestimated")
    for split, shards in copies.splits.items():
        if count := copies.repeated_in(split):
            said.append(f"{count:,} of {counted(shards.num_samples, 'image')} of {split} {'repeats' if count == 1 else 'repeat'} another one")
    two = copies.with_two_labels()
    if len(two):
        members = copies.members(int(two[0]))
        unlike = next(member for member in members if member[2] != members[0][2])
        named = ", ".join(f"{path} of {split} is '{label}'" for split, path, label in (members[0], unlike))
        said.append(f"{counted(len(two), 'image')} {'has' if len(two) == 1 else 'have'} two labels ({named})")
    if copies.num_unknown:
        more = "more images" if said else "images"
        said.append(f"{copies.num_unknown:,} {more} have the size and CRC-32 of another one, but were not compared (dtl verify compares them)")
    sure = "copies" if copies.num_groups else "possible copies"
    return f"{sure} of the same image: {'; '.join(said)}" if said else ""


def _examples(copies: Copies, one: str, other: str) -> str:
    """Names in `other` of the first images that are in both."""
    names = list(copies.splits)
    groups = np.intersect1d(*(copies.groups[copies.parts == names.index(split)] for split in (one, other)))
    paths = [next(path for split, path, _ in copies.members(int(group)) if split == other) for group in groups[:_SHOWN]]
    return f"{', '.join(paths)}{' ...' if len(groups) > _SHOWN else ''}"
