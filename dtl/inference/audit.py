"""What is wrong with a set of images: twins, images under two labels, labels that are probably wrong, classes too small. Nothing is changed.

All images of all splits are numbered through, in the order of the splits: N of them. Features are those of the network before its head, computed once
and cached as for a phase that trains a head on them (`dtl.training.features`), so a run that did so has them already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dtl.config.models import DataConfig, num_pixels
from dtl.data.audited import COLUMNS, names_in
from dtl.data.copies import find_copies
from dtl.data.loading.loader import BatchDataset
from dtl.data.near import MOST_PAIRS, SCENE, Pairs, near_pairs, scene_pairs
from dtl.data.same_photo import ALIKE, FINE, LARGE, SAME, SIDE, gray, of_images, registered, thumbnails, with_mirrored
from dtl.data.sampling.plan import MicroBatch
from dtl.data.shards.index import Shards
from dtl.data.transforms.transforms import Transform, eval_transform
from dtl.distributed.runtime import Runtime
from dtl.distributed.watchdog import Heartbeat
from dtl.errors import UserError
from dtl.files import write_whole
from dtl.inference.assess import RankBatches
from dtl.inference.labels import FOLDS, cost, deal, find_suspects
from dtl.models.freeze import checksum, frozen_names
from dtl.models.network import Network, Normalise
from dtl.reading import AS_BEFORE, Reading
from dtl.text import Log, counted, csv_line, some, to_nobody
from dtl.training.dataloaders import choose_workers, rank_cores
from dtl.training.features import FeatureCache, FeatureDataset, Part, find_cut

FEW = 10
"""Training images; a class of fewer is named."""
_BATCH = 64
_MOST_LOOKS = 20_000  # pairs whose pixels are compared
_LONG = 1200  # seconds that are announced
_RAISED = (ALIKE, 0.92, 0.96, 0.99)
KINDS = {
    "two labels": "one image under two labels",
    "same photo": "twins: the same photo",
    "same scene": "twins: the same scene",
    "label": "labels that are probably wrong",
}


@dataclass(frozen=True)
class Finding:
    """A line of audit.csv. `image` and `other` are numbers of images; -1 for no other one."""

    kind: str
    image: int
    score: float
    other: int = -1
    suggestion: str = ""
    alternative: tuple[int, float] | None = None
    """Of a label: the class that is more probable, with its probability."""


@dataclass(frozen=True)
class Images:
    """All images of all splits."""

    splits: Mapping[str, Shards]

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum([shards.num_samples for shards in self.splits.values()])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def names(self) -> list[str]:
        """As an audit has them."""
        return [name for names in names_in(self.splits).values() for name in names]

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.asarray(shards.labels, np.int64) for shards in self.splits.values()])

    @cached_property
    def split_of(self) -> npt.NDArray[np.int64]:
        """The number of each image's split."""
        return np.repeat(np.arange(len(self.splits)), np.diff(self.starts))

    @property
    def classes(self) -> tuple[str, ...]:
        return next(iter(self.splits.values())).classes

    def place(self, image: int) -> tuple[str, Shards, int]:
        """(split, its shards, the sample in it)"""
        number = int(self.split_of[image])
        split = list(self.splits)[number]
        return split, self.splits[split], image - int(self.starts[number])


@dataclass
class Audit:
    images: Images
    findings: list[Finding]
    small: list[tuple[str, int]]
    """Classes with few training images, and how many."""
    notes: list[str] = field(default_factory=list)
    reading: Reading = AS_BEFORE

    def tile(self, image: int, side: int) -> npt.NDArray[np.uint8] | None:
        """uint8 [S,S,3], for a page; None where the image cannot be read."""
        transform = eval_transform(image_size=side, crop_ratio=1.0, fit="pad", fill=(128,) * self.reading.channels, reading=self.reading)
        found = _loaded(*self.images.place(image)[1:], transform)
        if found is None:
            return None
        found = found[:3] if len(found) >= 3 else found[:1].expand(3, -1, -1)
        return np.ascontiguousarray(found.permute(1, 2, 0).numpy())

    def of_kind(self, kind: str) -> list[Finding]:
        return [one for one in self.findings if one.kind == kind]

    def lines(self) -> list[str]:
        """What is printed."""
        found, names, splits = [], self.images.names, list(self.images.splits)
        for kind, what in KINDS.items():
            some_of = self.of_kind(kind)
            if not some_of:
                continue
            across = [one for one in some_of if one.other >= 0 and self.images.split_of[one.image] != self.images.split_of[one.other]]
            found.append(f"{what}: {len(some_of):,}{f', of them {len(across):,} in two splits' if across else ''}")
            for one in some_of[:5]:
                other = f" and {names[one.other]}" if one.other >= 0 else ""
                where = "" if one.other < 0 else f" ({splits[self.images.split_of[one.image]]}, {splits[self.images.split_of[one.other]]})"
                label = "" if one.alternative is None else f": '{self.label(one.image)}', probably '{self.class_name(one.alternative[0])}'"
                found.append(f"  {one.score:.3f}  {names[one.image]}{other}{where}{label}")
        if self.small:
            found.append(f"classes with fewer than {FEW} training images: {some([f'{name} ({count})' for name, count in self.small])}")
        return found or ["nothing was found"]

    def label(self, image: int) -> str:
        number = int(self.images.labels[image])
        return self.class_name(number) if 0 <= number < len(self.images.classes) else "?"

    def class_name(self, number: int) -> str:
        """As the column action takes it, and as people call it."""
        name = self.images.classes[number]
        shown = next(iter(self.images.splits.values())).manifest.display_names.get(name, name)
        return name if shown == name else f"{name} ({shown})"

    def write_csv(self, path: Path) -> None:
        """audit.csv, its column `action` empty."""
        names = self.images.names
        rows = [csv_line(COLUMNS)]
        for one in self.findings:
            rows.append(csv_line([names[one.image], one.kind, round(one.score, 4), names[one.other] if one.other >= 0 else "", one.suggestion, ""]))
        try:
            write_whole(path, lambda file: file.write("".join(rows).encode("utf-8", "surrogateescape")))
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def audit(
    splits: Mapping[str, Shards],
    runtime: Runtime,
    *,
    reading: Reading,
    network: tuple[Network, Transform] | None,
    data: DataConfig,
    cache: Path,
    threshold: float = SCENE,
    log: Log,
) -> Audit | None:
    """All ranks together; the result on the main process, the same at any number of ranks. `network` and how it sees images; None: pixels alone are compared,
    and labels are not judged. `cache`: the folder of cached features."""
    images = Images(splits)
    if len(images) < 2:
        raise UserError("an audit compares images, but there is only one")
    workers = choose_workers(data.workers, runtime, rank_cores(runtime), batch_bytes=_BATCH * SIDE**2 * reading.channels)
    looked = _Pixels(images, reading, workers, runtime)
    thumbs = looked.thumbnails()
    features = None if network is None else _features(images, network, runtime, data=data, cache=cache, log=log)
    copies = _copies(images, runtime)
    alone = np.ones(len(images), bool)
    alone[copies.second] = False  # each content is searched for once
    coarse, raised = _alike(thumbs[alone], runtime)
    close = None if features is None else _near(features.values, alone & ~features.damaged, threshold, runtime, cache)
    if not runtime.is_main:
        return None
    numbers = np.flatnonzero(alone)
    notes = [] if raised == ALIKE else [f"many images look alike: pairs with a cosine of thumbnails of {raised:g} or more were compared pixel by pixel"]
    pairs = _judged(copies, Pairs(numbers[coarse.first], numbers[coarse.second], coarse.cosine), close, looked, notes)
    findings = [_of_pair(images, one) for one in pairs]
    if features is not None:
        findings += _of_labels(images, features, pairs, notes, log)
    order = {kind: place for place, kind in enumerate(KINDS)}
    findings.sort(key=lambda one: (order[one.kind], one.score if one.kind == "label" else -one.score, one.image, one.other))
    return Audit(images, findings, _small(splits), notes, reading)


def _small(splits: Mapping[str, Shards]) -> list[tuple[str, int]]:
    train = next(iter(splits.values()))
    return [(name, count) for name, count in zip(train.classes, train.manifest.class_counts) if count < FEW]


# ---- twins


@dataclass(frozen=True)
class _Pair:
    first: int
    second: int
    kind: str
    score: float


def _copies(images: Images, runtime: Runtime) -> Pairs:
    """Images of equal bytes: each with the first of them."""
    with runtime.together("copies"):
        found = find_copies(images.splits) if runtime.is_main else None
    rows = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if found is not None:
        numbers = images.starts[found.parts] + found.samples
        begins = np.searchsorted(found.groups, found.groups)
        again = np.flatnonzero(begins != np.arange(len(numbers)))
        rows = numbers[begins[again]], numbers[again]
    first, second = runtime.agree(rows)
    return Pairs(first, second, np.ones(len(first)))


def _alike(thumbs: npt.NDArray[np.float32], runtime: Runtime) -> tuple[Pairs, float]:
    """Pairs of images with thumbnails that are alike, and from which cosine on: the lowest at which all ranks together do not find too many."""
    both, share = with_mirrored(thumbs), (runtime.rank, runtime.world_size)
    for least in _RAISED:
        found: Pairs | None = None
        with runtime.together("twins"), suppress(UserError):
            found = near_pairs(both, least, share=share, most=MOST_PAIRS)
        everyone = runtime.gather(found)
        parts = [part for part in everyone if part is not None]
        if len(parts) == len(everyone) and sum(map(len, parts)) <= MOST_PAIRS:
            return of_images(Pairs.together(parts), len(thumbs)), least
    raise UserError(
        f"more than {MOST_PAIRS:,} pairs of images are almost the same picture (cosine of thumbnails {_RAISED[-1]:g}): audit fewer images at a time"
    )


def _near(values: Any, usable: npt.NDArray[np.bool_], threshold: float, runtime: Runtime, scratch: Path) -> Pairs:
    numbers = np.flatnonzero(usable)
    with runtime.together("twins"):
        found = scene_pairs(values if usable.all() else _Rows(values, numbers), threshold, share=(runtime.rank, runtime.world_size), scratch=scratch)
    found = Pairs.together(runtime.gather(found), threshold=threshold, most=MOST_PAIRS)
    return Pairs(numbers[found.first], numbers[found.second], found.cosine)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a mapped array, read when they are asked for."""

    values: Any
    numbers: npt.NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.numbers), self.values.shape[1]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Any) -> Any:
        return self.values[self.numbers[rows]]


def _judged(copies: Pairs, coarse: Pairs, close: Pairs | None, looked: _Pixels, notes: list[str]) -> list[_Pair]:
    """The second look: the same photo by its pixels, else the same scene by its features, else nothing."""
    cosines = {} if close is None else {(int(a), int(b)): float(c) for a, b, c in zip(close.first, close.second, close.cosine)}
    wanted = {(int(a), int(b)): float(c) for a, b, c in zip(coarse.first, coarse.second, coarse.cosine)}
    order = sorted({*wanted, *cosines}, key=lambda pair: (-max(cosines.get(pair, 0.0), wanted.get(pair, 0.0)), pair))
    if len(order) > _MOST_LOOKS:
        notes.append(f"the pixels of {_MOST_LOOKS:,} of {len(order):,} pairs were compared, those that are most alike")
    found = [_Pair(int(a), int(b), "same photo", 1.0) for a, b in zip(copies.first, copies.second)]
    for place, pair in enumerate(order):
        score = looked.registered(*pair) if place < _MOST_LOOKS else 0.0
        if score >= SAME:
            found.append(_Pair(*pair, "same photo", min(score, 1.0)))
        elif pair in cosines:
            found.append(_Pair(*pair, "same scene", cosines[pair]))
    return found


def _of_pair(images: Images, pair: _Pair) -> Finding:
    """`image` is the one to leave out: of a split that is trained on, where the other is not."""
    image, other = pair.first, pair.second
    across = images.split_of[image] != images.split_of[other]
    if not across and pair.kind == "same photo":
        image, other = other, image
    kind = "two labels" if pair.kind == "same photo" and images.labels[image] != images.labels[other] else pair.kind
    suggestion = "" if kind == "two labels" else "drop" if kind == "same photo" or across else "group"
    return Finding(kind, image, pair.score, other, suggestion)


class _Pixels:
    """The images small and gray, as far as they can be read."""

    def __init__(self, images: Images, reading: Reading, workers: int, runtime: Runtime) -> None:
        self.images, self.workers, self.runtime = images, workers, runtime
        self.transform, self.fine = (
            eval_transform(image_size=side, crop_ratio=1.0, fit="stretch", fill=(0,) * reading.channels, reading=reading) for side in (SIDE, FINE)
        )
        self._kept: dict[int, torch.Tensor] = {}

    def thumbnails(self) -> npt.NDArray[np.float32]:
        """[N,64] on every rank; zeros of an image that cannot be read."""
        found: npt.NDArray[np.float32] | None = None
        for start, shards in zip(self.images.starts.tolist(), self.images.splits.values()):
            batches, mine = RankBatches(shards, self.transform, batch_size=_BATCH, workers=self.workers, runtime=self.runtime), []
            with self.runtime.together("images"):
                for batch in batches:
                    usable = (batch.weights > 0).numpy()  # no pad, and not damaged
                    mine.append((start + batch.samples.numpy()[usable], thumbnails(gray(batch.images))[usable]))
            for rows, values in (part for ranks in self.runtime.gather(mine) for part in ranks):
                found = np.zeros((len(self.images), values.shape[1]), np.float32) if found is None else found
                found[rows] = values
        if found is None:
            raise UserError("none of the images can be read")
        return found

    def registered(self, one: int, other: int) -> float:
        a, b = self._image(one), self._image(other)
        score = 0.0 if a is None or b is None else registered(a, b)
        if score < SAME or min(self._shorter_side(one), self._shorter_side(other)) < LARGE:
            return score
        a, b = (_loaded(*self.images.place(image)[1:], self.fine) for image in (one, other))
        return 0.0 if a is None or b is None else min(score, registered(gray(a[None])[0], gray(b[None])[0]))

    def _shorter_side(self, image: int) -> int:
        _, shards, sample = self.images.place(image)
        widths, heights, _ = shards.shapes(np.array([sample]))
        return int(min(widths[0], heights[0]))

    def _image(self, image: int) -> torch.Tensor | None:
        if image not in self._kept:
            found = _loaded(*self.images.place(image)[1:], self.transform)
            if found is None:
                return None
            self._kept[image] = gray(found[None])[0]
        return self._kept[image]


def _loaded(shards: Shards, sample: int, transform: Transform) -> torch.Tensor | None:
    """uint8 [C,S,S]; None for an image that cannot be read."""
    request = MicroBatch(0, 0, np.array([sample]), np.zeros(1, np.int64), np.ones(1, np.float32))
    batch = BatchDataset(shards, transform, image_size=transform.image_size, seed=0).__getitems__(request)
    return None if batch.bad else batch.images[0]


# ---- features and labels


@dataclass(frozen=True)
class _Stacked:
    """The features of several splits as one array [N,D], read where they are."""

    parts: Sequence[Any]
    starts: npt.NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.starts[-1]), int(np.prod(self.parts[0].shape[1:]))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: Any) -> npt.NDArray[np.float32]:
        numbers = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        found = np.empty((len(numbers), self.shape[1]), np.float32)
        owner = np.searchsorted(self.starts, numbers, side="right") - 1
        for place in np.unique(owner):
            mine = owner == place
            found[mine] = np.asarray(self.parts[place][numbers[mine] - self.starts[place]]).reshape(int(mine.sum()), -1)
        return found


@dataclass(frozen=True)
class _Features:
    values: _Stacked
    damaged: npt.NDArray[np.bool_]


def _features(images: Images, network: tuple[Network, Transform], runtime: Runtime, *, data: DataConfig, cache: Path, log: Log) -> _Features:
    """Of the network before its head; found again where a run trained a head on them, or an earlier audit computed them."""
    made, transform = network
    head = {f"{made.heads[0]}.{name}" for name, _ in made.module.get_submodule(made.heads[0]).named_parameters()}
    for name, parameter in made.module.named_parameters():
        parameter.requires_grad_(name in head)
    cut, why_not = find_cut(made, head, image_size=transform.image_size)
    if cut is None:
        raise UserError(f"{made.name} gives no features to compare images by: {why_not}")
    batch_bytes = transform.reading.channels * num_pixels(transform.image_size) * _BATCH
    kept = FeatureCache(
        place=cache / "features",
        runtime=runtime,
        normalise=Normalise(made.preprocessing, runtime.device, channels_last=False),
        seed=0,
        image_size=transform.image_size,
        workers=choose_workers(data.workers, runtime, rank_cores(runtime), batch_bytes=batch_bytes),
        batch_size=_BATCH,
        before_step=lambda batches: False,
        heart=Heartbeat(),
        log=log if runtime.is_main else to_nobody,
    )
    frozen = checksum(made.module, frozen_names(made.module))
    parts, damaged = [], np.zeros(len(images), bool)
    trained = [name for name in images.splits if name in ("train", "val")]  # as a phase asks for them
    for names in [trained, *([name] for name in images.splits if name not in trained)]:
        folder = kept.folder(made.module, cut, [Part(name, images.splits[name], transform, (0,)) for name in names], frozen=frozen)
        assert folder is not None
        for name in names:
            found, start = FeatureDataset(images.splits[name], folder, name, 0), int(images.starts[list(images.splits).index(name)])
            damaged[[start + sample for _, sample in found.damaged]] = True
            parts.append(found.values[0])
    return _Features(_Stacked(parts, images.starts), damaged)


def _of_labels(images: Images, features: _Features, pairs: Sequence[_Pair], notes: list[str], log: Log) -> list[Finding]:
    """Labels that are probably wrong, of all splits; twins are in one fold."""
    groups = _joined(len(images), [(pair.first, pair.second) for pair in pairs])
    usable = ~features.damaged & (images.labels >= 0) & (images.labels < len(images.classes))
    owned = [len(np.unique(groups[usable & (images.labels == number)])) for number in range(len(images.classes))]
    alone = [name for name, count in zip(images.classes, owned) if count == 1]
    judged = [number for number, count in enumerate(owned) if count > 1]
    if alone:
        notes.append(f"labels are not judged of {counted(len(alone), 'class')} with a single image or a single group of twins: {some(alone)}")
    rows = np.flatnonzero(usable & np.isin(images.labels, judged))
    if len(judged) < 2 or len(np.unique(groups[rows])) < FOLDS:
        single = len(np.unique(groups[rows]))
        notes.append(f"labels are not judged: {FOLDS} folds of two classes need {FOLDS} images that are no twins; there are {single} of {len(judged)}")
        return []
    seconds, memory = cost(len(rows), features.values.shape[1], len(judged))
    if seconds > _LONG:
        log(
            f"labels of {len(rows):,} images of {len(judged):,} classes are judged by linear classifiers on this process alone, which may take "
            f"{seconds / 3600:.1f} hours and {memory / 2**30:.0f} GiB; without --model and --weights only twins are looked for"
        )
    labels = np.searchsorted(judged, images.labels[rows])
    found = find_suspects(_Rows(features.values, rows), labels, deal(groups[rows], labels, FOLDS), len(judged))
    findings = []
    for place, given, best, probability in zip(found.rows.tolist(), found.given.tolist(), found.suggested.tolist(), found.probability.tolist()):
        number = judged[best]
        findings.append(Finding("label", int(rows[place]), given, -1, f"relabel:{images.classes[number]}", (number, probability)))
    return findings


def _joined(number: int, pairs: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """The group of each image: of those that pairs connect, the lowest number."""
    root = np.arange(number)

    def of(one: int) -> int:
        while root[one] != one:
            root[one] = root[root[one]]
            one = int(root[one])
        return one

    for a, b in pairs:
        low, high = sorted((of(a), of(b)))
        root[high] = low
    return np.array([of(one) for one in range(number)], np.int64)
