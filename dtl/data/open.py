"""Data for training: an image folder is packed once into the cache, WebDataset shards from other tools are indexed there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from dtl.config.models import DataConfig
from dtl.credentials import bare
from dtl.data.decoding.decode import DecodeError, decode
from dtl.data.packing.job import PACK_VERSION, PackOptions
from dtl.data.packing.pack import PackReport, pack_source
from dtl.data.remote.address import cache_place, is_remote, kind_of, shown, without_query
from dtl.data.remote.address import default_cache_dir as default_cache_dir
from dtl.data.shards.index import Shards
from dtl.data.shards.manifest import MANIFEST_NAME, Manifest
from dtl.data.shards.mirror import Unreachable, earlier_mirror, find_remote_folder, mirror, mirror_place, refuse_remote_folder
from dtl.data.sources.base import ALL, Source
from dtl.data.sources.open import open_source
from dtl.data.sources.splits import SERVES_AS, SPLIT_WORDS, HasSplits, NoSplit, choose, plain_name, split_folders
from dtl.data.wds.find import Tar, is_remote_folder, know_listed, shards_for_training
from dtl.data.wds.index import INDEX_VERSION, IndexReport, index_shards
from dtl.errors import DamagedSample, UserError
from dtl.files import expand_home, flock, open_lock
from dtl.reading import Reading
from dtl.text import Log, counted, to_nobody, to_stdout

_MEASURED = 500  # images
_MOST_LISTED = 10  # images in one line of trouble


def ensure_packed(
    source: str | Path,
    options: DataConfig = DataConfig(),
    *,
    split: str,
    classes: Sequence[str] | None = None,
    labelled: bool = True,
    processes: int | None = None,
    progress: bool = True,
    log: Log = to_stdout,
    listed: dict[str, Source] | None = None,
) -> Path:
    """A folder of packed shards of `split` ("train" or "val"), packing `source` into the cache if it is not there yet.

    Only the `options` for finding, packing, downloading and caching data matter here: `val_fraction`, `on_error`, `names`, `cache_dir` ...

    Packed or indexed shards, or a folder that holds them under train/ and val/, are used as they are. Tars from other tools (a folder of them,
    a brace pattern, a list), also remote ones, are not moved; they are indexed once into the cache. The manifest and index of a remote
    packed folder are copied there. Anything that `open_source` reads is packed
    once into CACHE/FINGERPRINT (of paths, sizes, modification times and options). `split` chooses among the splits of the source,
    or those that `val_fraction` makes; a source without splits is one split. Give a validation set the `classes` of its training set.

    `listed` keeps what was listed for the next call of another split of the same source, which then does not list it again.

    Any number of processes may call this at once: on one node one packs and the others wait (the lock goes with its process); two
    nodes on a shared disk write the same bytes by atomic renames.
    """
    source = bare(source) if isinstance(source, str) else source
    if isinstance(source, str) and is_remote_folder(source):
        try:
            url, text = find_remote_folder(source, SERVES_AS[split], options=options) or refuse_remote_folder(source, SERVES_AS[split])
        except Unreachable as error:
            if (copied := earlier_mirror(_cache_place(options), source, SERVES_AS[split])) is None:
                raise
            log(f"{error}; using the copy of its manifest and index in {copied}")
            return copied
        return _mirrored(url, text, options, log)
    if (ready := packed_folder(source, split)) is not None:
        if options.val_fraction and split == "train":
            log(f"{source} is already packed, so data.val_fraction is ignored")
        return ready
    if (tars := shards_for_training(source, split)) is not None:
        if options.val_fraction:
            raise UserError(f"{source}: data.val_fraction cannot split WebDataset shards from other tools; give --data.val SHARDS")
        return _ensure_indexed(source, tars, options, classes=classes, processes=processes, progress=progress, log=log)
    opened = None if listed is None else listed.get(str(source))
    again = opened is not None
    if opened is None:
        opened = _list(source, options, classes=classes, labelled=labelled)
    if listed is not None:
        listed[str(source)] = opened
    if options.val_fraction and opened.has_splits:
        raise HasSplits(
            f"{source} already has the splits {', '.join(opened.split_names)}: leave out data.val_fraction, or set data.train to the images of one split"
        )
    wanted = _wanted_split(source, opened, split, options.val_fraction)
    place = _cache_place(options)
    packing = PackOptions(val_fraction=options.val_fraction, on_error=options.on_error, max_pixels=options.max_pixels, max_file_bytes=options.max_file_bytes)
    home = place / _fingerprint(opened, packing, fixed=classes is not None)
    folder = home if wanted == ALL else home / wanted
    if (folder / MANIFEST_NAME).exists():
        for note in opened.notes:
            if note.startswith("passed over") and not again:  # again at each start: a log of another run is not read
                log(f"{source}: {note}")
        return folder
    with cache_lock(home.with_name(home.name + ".lock"), f"packs {source}", log):
        if not (folder / MANIFEST_NAME).exists():
            log(f"packing {source} ({counted(opened.num_samples, 'image')} of {counted(len(opened.classes), 'class')}) into {home}")
            for note in opened.notes:
                log(f"  {note}")
            report = pack_source(opened, home, packing, processes=processes, fixed_classes=classes is not None, existing="join", progress=progress)
            for line in describe_trouble(report):
                log(f"  {line}")
            log(f"  packed in {report.seconds:.1f} s; it is used again as long as the source does not change")
    return folder


def _list(source: str | Path, options: DataConfig, *, classes: Sequence[str] | None, labelled: bool) -> Source:
    return open_source(
        source,
        classes=classes,
        names=options.names,
        on_error=options.on_error,
        labelled=labelled,
        max_file_bytes=options.max_file_bytes,
        columns=None if options.columns is None else options.columns.given(),
    )


def open_split(
    source: str | Path,
    options: DataConfig = DataConfig(),
    *,
    split: str,
    classes: Sequence[str] | None = None,
    labelled: bool = True,
    processes: int | None = None,
    progress: bool = True,
    log: Log = to_stdout,
    leads: bool = True,
    found: str | Path | None = None,
    listed: dict[str, Source] | None = None,
) -> Shards:
    """`ensure_packed`, opened. A source that is itself a command (`pipe:`) may be run; what a manifest names only with `options.allow_pipe`.

    `leads`: this process acts for its node: it looks whether remote folders have changed, and fetches ahead along the plan.
    `found`: the folder of another process of this node that has opened the same just now, so that nothing is listed, fetched or hashed again.
    """
    source = bare(source) if isinstance(source, str) else source
    if is_remote(source) and kind_of(str(source)) == "pipe":
        options = options.model_copy(update={"allow_pipe": True})
    if found is None:
        folder = ensure_packed(source, options, split=split, classes=classes, labelled=labelled, processes=processes, progress=progress, log=log, listed=listed)
    else:
        folder = Path(found)
        know_listed(source)
    shards = Shards.open(folder, options, checked=found is not None)
    if shards.cache is not None:
        shards.cache.leads = leads
        if leads and found is None:
            shards.cache.clean()
    return shards


def reading_of(train: Shards, options: DataConfig) -> Reading:
    """How the stored values of these training images, and of all other images of their run, become pixels."""
    found = train.manifest.pixels
    if options.exif == "apply" and found is None:
        raise UserError(f"{train.folder}: data.exif apply needs the images' EXIF orientation, which an older dtl did not note; {train.again}")
    known = (found.low, found.high) if found is not None and found.wide else None
    return Reading(
        known if options.range == "auto" else options.range, exif=found is not None and options.exif != "ignore", alpha=True, channels=options.channels
    )


def channel_statistics(shards: Shards, reading: Reading) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel, for pixels in 0..1, of at most some hundred images from all over the set. UserError where they cannot be had."""
    counts = np.zeros((reading.channels, 256), np.int64)
    samples = np.unique(np.linspace(0, shards.num_samples - 1, _MEASURED).astype(np.int64))
    problem = ""
    for sample in samples:
        (data,) = shards.read(sample[None])
        try:
            if isinstance(data, DamagedSample):
                raise DecodeError(data.reason)
            pixels = decode(data, max_pixels=shards.limits.max_pixels, reading=reading, turn=1)
        except DecodeError as error:
            problem = problem or f"{shards.name(int(sample))}: {error}"
            continue
        for channel in range(reading.channels):
            counts[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
    if not counts.any():
        raise UserError(f"mean and std of {counted(reading.channels, 'channel')} cannot be measured: {problem}")
    levels, total = np.arange(256) / 255, counts.sum(axis=1)
    means = counts @ levels / total
    deviations = np.sqrt(np.maximum(counts @ levels**2 / total - means**2, 0))
    return tuple(means.tolist()), tuple(np.maximum(deviations, 1 / 255).tolist())


def check_reading(reading: Reading, splits: Mapping[str, Shards]) -> list[str]:
    """What to be warned of where these images are read so; by the names of their splits. UserError where they cannot be."""
    lines = []
    for name, shards in splits.items():
        found = shards.manifest.pixels
        if found is None:
            if reading.exif:
                lines.append(
                    f"warning: {shards.folder} does not have the images' EXIF orientation, since an older dtl made it: its images are not turned, "
                    f"those trained on are; {shards.again}"
                )
        elif found.wide and reading.range is None:
            raise UserError(
                f"{counted(found.wide, 'image')} of {name} have more than 8 bits a channel (from {found.low:g} to {found.high:g}), but no training image "
                "has: train with --data.range [LOW, HIGH], the values that become black and white"
            )
        elif 0 < found.wide < shards.num_samples and shards.part is None:
            lines.append(
                f"warning: {found.wide:,} of {counted(shards.num_samples, 'image')} of {name} have more than 8 bits a channel and are scaled by "
                "data.range; the others keep their values, so the same brightness may be another number in them"
            )
        if found is not None and found.wide and found.low == found.high:
            lines.append(f"warning: all values of the images of {name} that have more than 8 bits are {found.low:g}")
    return lines


def mirrored_splits(source: str, options: DataConfig) -> list[Path]:
    """Copies of the manifests and indexes of a remote folder, or of all splits below it. UserError where there are none."""
    found: dict[str, bytes] = {}
    for split in SPLIT_WORDS:
        if source not in found and (folder := find_remote_folder(source, [split], options=options)) is not None:
            found.update([folder])
    if not found:
        refuse_remote_folder(source, list(SPLIT_WORDS))
    return [_mirrored(url, text, options, to_nobody) for url, text in found.items()]


def _mirrored(url: str, text: bytes, options: DataConfig, log: Log) -> Path:
    """The copy of a remote folder's manifest and index, brought up to date."""
    folder = mirror_place(_cache_place(options), url)
    folder.parent.mkdir(exist_ok=True)
    with cache_lock(folder.with_name(folder.name + ".lock"), f"reads {shown(url)}", log):
        return mirror(url, text, folder, options=options)


def _ensure_indexed(
    source: str | Path, tars: Sequence[Tar], options: DataConfig, *, classes: Sequence[str] | None, processes: int | None, progress: bool, log: Log
) -> Path:
    """The index of shards made by others, in the cache; their bytes are read where they are."""
    folder = _cache_place(options) / _fingerprint_of_tars(tars, options, classes=classes)
    if (folder / MANIFEST_NAME).exists():
        _refresh_addresses(folder, tars)
        return folder
    with cache_lock(folder.with_name(folder.name + ".lock"), f"indexes {source}", log):
        if (folder / MANIFEST_NAME).exists():
            return folder
        log(f"indexing {source} ({counted(len(tars), 'WebDataset shard')}) into {folder}; the shards themselves are not changed")
        report = index_shards(tars, options, out=folder, classes=classes, processes=processes, progress=progress, existing="join", keep=True)
        for line in describe_index(report):
            log(f"  {line}")
        log(f"  indexed in {report.seconds:.1f} s; it is used again as long as the shards do not change")
    return folder


def _refresh_addresses(folder: Path, tars: Sequence[Tar]) -> None:
    """Addresses may be the same but for a signature that has expired: the manifest takes those of now."""
    manifest = Manifest.read(folder)
    if any(isinstance(tar, str) and tar != shard.url for tar, shard in zip(tars, manifest.shards)):
        shards = tuple(replace(shard, url=str(tar)) if isinstance(tar, str) else shard for tar, shard in zip(tars, manifest.shards))
        replace(manifest, shards=shards).write(folder)


def _fingerprint_of_tars(tars: Sequence[Tar], options: DataConfig, *, classes: Sequence[str] | None) -> str:
    digest = hashlib.sha256(json.dumps(["tars", INDEX_VERSION, options.on_error, classes, str(options.names)]).encode())
    for tar in tars:
        if isinstance(tar, str):
            digest.update(json.dumps([without_query(tar)]).encode())
            continue
        facts = tar.stat()
        digest.update(json.dumps([os.path.abspath(tar), facts.st_size, facts.st_mtime_ns]).encode())
    return digest.hexdigest()[:20]


def _cache_place(options: DataConfig) -> Path:
    """The cache's folder, created if it does not exist."""
    return cache_place(options.cache_dir, shared=options.cache_shared)


def packed_folder(source: str | Path, split: str) -> Path | None:
    """The folder of packed shards that `source` is, or holds for `split`; None where it is something else.

    UserError where it holds packed shards, but none of this split.
    """
    place = expand_home(source)
    if (place / MANIFEST_NAME).is_file():
        return place
    folders = packed_splits(place)
    if (name := choose(folders, split, place)) is not None:
        return place / name
    if folders:
        raise NoSplit(
            f"{place} holds packed shards of {', '.join(sorted(name for names in folders.values() for name in names))}, but none of {plain_name(split)}"
        )
    return None


def packed_splits(place: Path) -> dict[str, list[str]]:
    """Split -> the folders of packed or indexed shards below `place`, by their names."""
    return split_folders(place, lambda folder: (folder / MANIFEST_NAME).is_file())


def _wanted_split(source: str | Path, opened: Source, split: str, val_fraction: float) -> str:
    if val_fraction and not split.endswith("test"):
        return plain_name(split)
    if opened.split_names == (ALL,) and not val_fraction and not split.startswith("own "):
        return ALL
    served = next((name for name in SERVES_AS[split] if name in opened.split_names), None)
    if served is None:
        raise NoSplit(f"{source} has no split '{plain_name(split)}'; it has {', '.join(opened.split_names)}")
    return served


def _fingerprint(opened: Source, packing: PackOptions, *, fixed: bool) -> str:
    facts = [PACK_VERSION, opened.kind, opened.fingerprint, packing.val_fraction, packing.on_error, packing.seed, fixed]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def describe_trouble(report: PackReport) -> list[str]:
    """Lines about images that were left out, or that look damaged."""
    kinds = (
        (report.skipped, "image cannot be read and was left out", "images cannot be read and were left out"),
        (report.doubtful, "image looks damaged but decodes, and was packed", "images look damaged but decode, and were packed"),
    )
    lines = []
    for found, one, many in kinds:
        if found:
            more = f"; and {len(found) - _MOST_LISTED:,} more" if len(found) > _MOST_LISTED else ""
            listed = "; ".join(f"{path}: {reason}" for path, reason in found[:_MOST_LISTED])
            lines.append(f"{len(found):,} {one if len(found) == 1 else many}: {listed}{more}")
    return lines


def describe_index(report: IndexReport) -> list[str]:
    """Lines about an index: what is in it, what was left out, what should be looked at."""
    lines = [f"{counted(report.num_samples, 'image')} of {counted(len(report.classes), 'class')}", *report.notes]
    if report.num_skipped:
        left_out = "sample cannot be used and was left out" if report.num_skipped == 1 else "samples cannot be used and were left out"
        listed = "; ".join(f"{name}: {reason}" for name, reason in report.skipped[:_MOST_LISTED])
        more = f"; and {report.num_skipped - _MOST_LISTED:,} more" if report.num_skipped > _MOST_LISTED else ""
        lines.append(f"{report.num_skipped:,} {left_out}: {listed}{more}")
    return lines


@contextmanager
def cache_lock(path: Path, work: str, log: Log) -> Iterator[None]:
    """An exclusive lock of this node, freed by the system when its process ends. The file stays: removing it would let two in.

    Without locks two processes may do the same `work` at the same time, which is waste, not harm.
    """
    try:
        file = open_lock(path)
    except OSError as error:
        raise UserError(f"the cache {path.parent} cannot be written: {error.strerror}; choose another one (data.cache_dir or $DTL_CACHE)") from None
    with file:
        lock = flock(file, wait=False)
        if lock == "busy":
            log(f"waiting for another process that {work}")
            flock(file)
        if lock == "none":
            log(f"the cache {path.parent} is on a file system without locks: another process that {work} may do the same work again")
        yield
