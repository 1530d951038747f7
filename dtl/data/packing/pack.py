"""Pack a source into shuffled WebDataset shards with a manifest and an index, once, in parallel.

Two passes over the images: the first finds out what each is (size, checksum, content hash, whether it decodes), the second writes the
shards. Between them everything is decided, so the bytes do not depend on the number of processes, and an interrupted packing resumes.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl import keyed
from dtl.data.decoding.headers import MAX_PIXELS
from dtl.data.groups import listed_groups, split_by_group
from dtl.data.packing.destination import Existing, clear_errors, make_room, prepare_destination, working_alone
from dtl.data.packing.job import DOUBTFUL, MADE, PACK_VERSION, ROWS, SCAN, UNREADABLE, Job, PackOptions
from dtl.data.packing.tasks import SCANNED, ShardFacts, load_chunk, shard_name, shrink_factor
from dtl.data.progress import PackProgress
from dtl.data.shards.index import DHASHES_NAME, INDEX_NAME, PATHS_NAME, Manifest, Shard, dataset_id, write_index
from dtl.data.shards.manifest import MANIFEST_VERSION, PixelFacts
from dtl.data.sources.base import ALL, Source
from dtl.data.sources.content_split import split_by_content
from dtl.data.sources.open import open_source
from dtl.data.workers import run_tasks
from dtl.errors import UserError
from dtl.files import MAX_FILE_BYTES, clear_folder, expand_home, write_whole
from dtl.machine import num_cores
from dtl.version import __version__

# Below this, starting processes costs more than it saves.
_BYTES_PER_PROCESS = 8 * 2**20
_SAMPLES_PER_PROCESS = 4000
PACKING = "dtl.data.packing.tasks"


@dataclass(frozen=True)
class PackedSplit:
    split: str
    folder: Path
    num_samples: int
    num_shards: int
    num_bytes: int


@dataclass(frozen=True)
class PackReport:
    """What was packed. `skipped` and `doubtful` are (path, reason); doubtful images were packed."""

    destination: Path
    classes: tuple[str, ...]
    splits: tuple[PackedSplit, ...]
    skipped: tuple[tuple[str, str], ...]
    doubtful: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    seconds: float


def pack(
    source: str | Path | Source,
    destination: str | Path,
    *,
    val_fraction: float = 0.0,
    processes: int | None = None,
    shard_bytes: int = 128 * 2**20,
    seed: int = 0,
    on_error: str = "fail",
    max_side: int | None = None,
    short_side: int | None = None,
    quality: int = 95,
    verify: bool = True,
    max_pixels: int = MAX_PIXELS,
    max_file_bytes: int = MAX_FILE_BYTES,
    classes: Sequence[str] | None = None,
    names: str | Path | None = None,
    existing: Existing = "refuse",
    progress: bool = True,
) -> PackReport:
    """Pack `source` (see `open_source`) into the folder `destination`, or into a folder a split in it where there are splits.

    A split folder is complete once it has a manifest.json, which is written last. The same source and options give the same bytes.
    Unreadable images: `on_error="fail"` refuses, naming them; `"skip"` leaves them out and reports them. `classes` and `names` as in
    `open_source`. `existing` is about a destination that holds a packed set: "replace" removes it; "join" is for several nodes that
    write the same into one cache, and removes nothing.
    """
    options = PackOptions(
        val_fraction=val_fraction,
        shard_bytes=shard_bytes,
        seed=seed,
        on_error=on_error,
        max_side=max_side,
        short_side=short_side,
        quality=quality,
        verify=verify,
        max_pixels=max_pixels,
        max_file_bytes=max_file_bytes,
    )
    options.check()
    opened = source if isinstance(source, Source) else open_source(source, classes=classes, names=names, on_error="skip", max_file_bytes=max_file_bytes)
    return pack_source(opened, Path(destination), options, processes=processes, fixed_classes=classes is not None, existing=existing, progress=progress)


def pack_source(
    source: Source,
    place: Path,
    options: PackOptions,
    *,
    processes: int | None = None,
    fixed_classes: bool = False,
    existing: Existing = "refuse",
    progress: bool = True,
    groups: Mapping[str, str] | None = None,
) -> PackReport:
    """`pack` of an opened source. With `fixed_classes` its class list was given, so a class may have no image. `groups`: path -> group, as the
    options' `group_column` has them."""
    begun = time.monotonic()
    options.check()
    if processes is not None and processes < 1:
        raise UserError(f"processes must be at least 1, got {processes}")
    if options.val_fraction and source.has_splits:
        raise UserError(f"the {source.kind} already has the splits {', '.join(source.split_names)}; leave out the validation fraction")
    place = expand_home(place)
    with clear_errors(place):
        folder = prepare_destination(place, existing)
        with working_alone(folder, place, MADE, quiet=existing == "join"), clear_errors(place, work=folder):
            if existing != "join":
                make_room(place, go_on=Job.is_of(folder, source, options))
            job = Job.create(folder, source, options)
            workers = processes or _default_processes(source)
            with PackProgress(visible=progress) as shown:
                report = _Packing(job, source, workers, shown, groups, fixed_classes=fixed_classes).run()
            clear_folder(folder, MADE)
    return PackReport(destination=place, notes=source.notes, seconds=time.monotonic() - begun, **report)


class _Packing:
    """The steps of one packing, over a working folder that may hold some of their results already."""

    def __init__(self, job: Job, source: Source, processes: int, shown: PackProgress, groups: Mapping[str, str] | None, *, fixed_classes: bool) -> None:
        self.job, self.source, self.processes, self.shown, self.groups = job, source, processes, shown, groups
        self.fixed_classes = fixed_classes

    def run(self) -> dict[str, Any]:
        scan, reasons = self.scan()
        unreadable = [self._named(sample, reason) for sample, reason in reasons if scan["state"][sample] == UNREADABLE]
        doubtful = [self._named(sample, reason) for sample, reason in reasons if scan["state"][sample] == DOUBTFUL]
        if unreadable and self.job.options.on_error == "fail":
            raise UserError(_unreadable_message(unreadable, self.job.num_samples))
        members = self.members(scan)
        self.refuse_empty_classes(members, len(unreadable))
        self.check_space(scan)
        shards = {split: self.plan_shards(split, samples, scan) for split, samples in members.items()}
        del scan, members  # of a million images 30 MB, which the index needs in a moment
        self.write_shards(shards)
        packed = tuple(self.finish_split(split, num_shards) for split, num_shards in shards.items())
        return {"classes": self.source.classes, "splits": packed, "skipped": tuple(unreadable), "doubtful": tuple(doubtful)}

    def scan(self) -> tuple[npt.NDArray[Any], list[tuple[int, str]]]:
        """Rows of SCAN for all samples, and the reasons of those that are not good."""
        chunks = math.ceil(self.job.num_samples / self.job.chunk_samples)
        self.shown.start("reading", self.job.num_samples)
        tasks = ({"kind": "scan", "number": number} for number in range(chunks))
        self.run_tasks(tasks, chunks)
        rows, reasons = np.empty(self.job.num_samples, SCAN), []
        for number in range(chunks):
            at = number * self.job.chunk_samples
            found = load_chunk(self.job, number)
            assert found is not None, f"chunk {number} has just been read"
            rows[at : at + len(found[0])] = found[0]
            reasons += found[1]
        write_whole(self.job.folder / SCANNED, lambda file: np.save(file, rows), sync=False)
        return rows, reasons

    def members(self, scan: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.int64]]:
        """The sample numbers of each split, in source order, without the unreadable."""
        usable = scan["state"] != UNREADABLE
        if not self.job.options.val_fraction:
            return {name: np.flatnonzero(usable & (self.source.splits == number)) for number, name in enumerate(self.source.split_names)}
        samples = np.flatnonzero(usable)
        labels, fraction, num_classes = self.source.labels[samples], self.job.options.val_fraction, len(self.source.classes)
        if self.groups is None:
            val = split_by_content(scan["hash"][samples], labels, fraction, num_classes=num_classes)
        else:
            groups = listed_groups([self.source.names[int(sample)] for sample in samples], self.groups, f"--group-column {self.job.options.group_column}")
            val = split_by_group(groups, labels, fraction, num_classes=num_classes)
        return {"train": samples[~val], "val": samples[val]}

    def refuse_empty_classes(self, members: dict[str, npt.NDArray[np.int64]], num_unreadable: int) -> None:
        """Every class has an image to train on; a validation set with given classes may lack some."""
        first = next(iter(members))
        why = f" ({num_unreadable:,} of {self.job.num_samples:,} images cannot be read)" if num_unreadable else ""
        for split, samples in members.items():
            if not len(samples):
                raise UserError(f"no image is left for {'packing' if split == ALL else split}{why}")
        if self.fixed_classes:
            return
        counts = np.bincount(self.source.labels[members[first]], minlength=len(self.source.classes))
        empty = [self.source.classes[label] for label in np.flatnonzero(counts == 0)]
        if empty:
            raise UserError(f"no image{'' if first == ALL else ' to train on'} for {len(empty)} of {len(counts)} classes: {', '.join(empty[:10])}{why}")

    def check_space(self, scan: npt.NDArray[Any]) -> None:
        """UserError before writing if the disk is too small. The size of re-encoded images is not known yet."""
        if self.job.options.max_side or self.job.options.short_side:
            return
        needed = int(np.sum(scan["size"], dtype=np.int64)) + (1536 + 512) * len(scan)
        there = sum(path.stat().st_size for path in self.job.destination.rglob("shard-*.tar"))
        free = shutil.disk_usage(self.job.destination).free + there
        if needed > free:
            raise UserError(f"{self.job.destination}: the disk has {free / 2**30:.2f} GiB free, but packing needs {needed / 2**30:.2f} GiB")

    def plan_shards(self, split: str, samples: npt.NDArray[np.int64], scan: npt.NDArray[Any]) -> int:
        """Decide the packed order and where the shards begin; returns their number."""
        order = samples[keyed.permutation(len(samples), self.job.options.seed, "pack", split)]
        total = int(_stored_bytes(scan[samples], self.job.options).sum())
        count = min(max(1, math.ceil(total / self.job.options.shard_bytes)), len(samples))
        cuts = np.arange(count + 1) * len(samples) // count
        np.save(self.job.folder / f"{split}.order.npy", order)
        np.save(self.job.folder / f"{split}.cuts.npy", cuts)
        return count

    def write_shards(self, shards: dict[str, int]) -> None:
        self.shown.start("packing", sum(len(np.load(self.job.folder / f"{split}.order.npy", mmap_mode="r")) for split in shards))
        for split in shards:
            self.job.split_folder(split).mkdir(exist_ok=True)
        tasks = ({"kind": "shard", "split": split, "number": number} for split, count in shards.items() for number in range(count))
        self.run_tasks(tasks, sum(shards.values()))

    def run_tasks(self, tasks: Iterator[dict[str, Any]], count: int) -> None:
        facts = {"folder": str(self.job.folder), **self.job.facts}
        run_tasks(PACKING, facts, tasks, processes=min(self.processes, count), done=self.shown.advance)

    def finish_split(self, split: str, num_shards: int) -> PackedSplit:
        """Write index and paths, then the manifest, which makes the split complete."""
        folder, work = self.job.split_folder(split), self.job.folder
        if self.job.is_finished(split):
            return _described(split, folder, Manifest.read(folder))
        cuts = np.load(work / f"{split}.cuts.npy")
        rows = np.empty(int(cuts[-1]), ROWS)
        for number in range(num_shards):
            rows[cuts[number] : cuts[number + 1]] = np.load(work / f"{split}-{number:05d}.npy")
        shards = []
        for number in range(num_shards):
            facts = ShardFacts.read(work / f"{split}-{number:05d}.json")
            shards.append(Shard(url=shard_name(number), samples=int(cuts[number + 1] - cuts[number]), bytes=facts.bytes, sha256=facts.sha256))
        columns = {name: rows[name] for name in ROWS.names or ()}
        order = np.load(work / f"{split}.order.npy")
        scanned = np.load(work / SCANNED, mmap_mode="r")[["wide", "low", "high"]][order]
        index_sha256 = write_index(folder / INDEX_NAME, np.diff(cuts), columns)
        self.job.names.take(order).write(folder / PATHS_NAME)
        if self.job.options.verify:  # else no image was decoded
            hashes = np.load(work / SCANNED, mmap_mode="r")["dhash"][order]
            write_whole(folder / DHASHES_NAME, lambda file: np.save(file, hashes))
        manifest = Manifest(
            version=MANIFEST_VERSION,
            classes=self.source.classes,
            display_names=self.source.display_names,
            shards=tuple(shards),
            class_counts=tuple(np.bincount(rows["labels"], minlength=len(self.source.classes)).tolist()),
            dataset_id=dataset_id(self.source.classes, sizes=rows["sizes"], crcs=rows["crcs"], labels=rows["labels"]),
            index_sha256=index_sha256,
            made_by={
                "dtl": __version__,
                "pack_version": PACK_VERSION,
                "source": self.source.kind,
                "split": split,
                "options": self.job.facts["options"],
            },
            pixels=PixelFacts.of(scanned["wide"] > 0, scanned["low"], scanned["high"]),
        )
        manifest.write(folder)
        return _described(split, folder, manifest)

    def _named(self, sample: int, reason: str) -> tuple[str, str]:
        return self.job.names[sample], reason


def _described(split: str, folder: Path, manifest: Manifest) -> PackedSplit:
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    return PackedSplit(split=split, folder=folder, num_samples=manifest.num_samples, num_shards=len(manifest.shards), num_bytes=num_bytes)


def _stored_bytes(scan: npt.NDArray[Any], options: PackOptions) -> npt.NDArray[np.float64]:
    """Bytes of each image in a shard, guessed by area where it gets smaller, with its share of headers and padding."""
    sizes = scan["size"].astype(np.float64)
    if options.max_side or options.short_side:
        sizes *= shrink_factor(scan["width"], scan["height"], max_side=options.max_side, short_side=options.short_side) ** 2
    return np.ceil(sizes / 512) * 512 + 3 * 512


def _unreadable_message(unreadable: Sequence[tuple[str, str]], total: int) -> str:
    shown = "; ".join(f"{path}: {reason}" for path, reason in unreadable[:10])
    more = f"; and {len(unreadable) - 10:,} more" if len(unreadable) > 10 else ""
    noun = "image" if total == 1 else "images"
    way_out = "fix or remove them, or leave them out with --on-error skip (training: --data.on-error skip)"
    return f"{len(unreadable):,} of {total:,} {noun} cannot be read: {shown}{more}; {way_out}"


def _default_processes(source: Source) -> int:
    cores = num_cores()
    return max(
        1,
        min(cores, source.num_bytes // _BYTES_PER_PROCESS, 64) if source.images is None else min(cores, source.num_samples // _SAMPLES_PER_PROCESS),
    )
