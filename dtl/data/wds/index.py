"""Manifest and index for WebDataset shards from other tools; the shards themselves are only read."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtl.config.models import DataConfig
from dtl.data.packing.destination import clear_errors, working_alone
from dtl.data.packing.job import ROWS, remove_leftovers
from dtl.data.progress import PackProgress
from dtl.data.remote.address import is_remote
from dtl.data.remote.address import shown as shown_address
from dtl.data.remote.cache import limit_in_bytes, open_cache
from dtl.data.shards.index import INDEX_NAME, KEYS_NAME, Manifest, Shard, dataset_id, write_index
from dtl.data.shards.manifest import INDEXED, MANIFEST_NAME, MANIFEST_VERSION, PixelFacts
from dtl.data.shards.strings import StringTable
from dtl.data.sources.display_names import find_display_names
from dtl.data.wds.find import Tar, find_shards
from dtl.data.wds.labels import decide_classes, one_rule
from dtl.data.wds.samples import Label, Rules, shown
from dtl.data.wds.tasks import MADE
from dtl.data.workers import run_tasks
from dtl.errors import UserError
from dtl.files import clear_folder, expand_home, make_folder, sha256_of_file
from dtl.machine import num_cores
from dtl.untrusted import open_regular
from dtl.version import __version__

INDEX_VERSION = 2  # of what is found in a shard: part of the cache's name
INDEXING = "dtl.data.wds.tasks"


@dataclass(frozen=True)
class IndexReport:
    """What was indexed. `skipped` are (shard: sample, reason), the first of each shard; `num_skipped` counts all."""

    folder: Path
    classes: tuple[str, ...]
    num_samples: int
    num_shards: int
    num_bytes: int
    skipped: tuple[tuple[str, str], ...]
    num_skipped: int
    notes: tuple[str, ...]
    seconds: float


def index_shards(
    sources: Sequence[Tar],
    options: DataConfig = DataConfig(),
    *,
    out: str | Path | None = None,
    image_field: str | None = None,
    label_field: str | None = None,
    classes: Sequence[str] | None = None,
    processes: int | None = None,
    existing: str = "refuse",
    progress: bool = True,
    keep: bool = False,
) -> IndexReport:
    """Write manifest.json, index.bin and keys.bin for the tars that `sources` name (see `find_shards`).

    They go to `out`, or to the one folder that holds all shards. Remote shards are fetched for it once, by the `options`; with `keep`
    they stay in its cache, for the training that comes next, as many of them as may. `label_field` is a member's extension, a field of the json member
    (dots go into it), or "folder"; without it labels are in `cls`, or else the last folder of the key. `classes` fixes the names and
    their order. A sample without image or label, or with an image that cannot be read: `options.on_error` "fail" refuses, naming them, "skip"
    leaves them out. Damaged tars are always refused. `existing="replace"` writes over an index that is there, never over a packed set;
    "join" is for a cache.
    """
    begun = time.monotonic()
    if processes is not None and processes < 1:
        raise UserError(f"processes must be at least 1, got {processes}")
    shards = find_shards(sources)
    folder = _place(shards, out)
    rules = Rules(_extension(image_field), _extension(label_field))
    with clear_errors_of_index(folder):
        _check_existing(folder, existing)
        folder.mkdir(parents=True, exist_ok=True)
        work = folder / f".indexing-{socket.gethostname()}"
        make_folder(work)
        with working_alone(work, folder, MADE, quiet=existing == "join"):
            remove_leftovers(work)
            try:
                paths = [str(path) if is_remote(path) else os.path.abspath(path) for path in shards]
                job = {"folder": str(work), "paths": paths, "rules": asdict(rules), "options": options.model_dump(mode="json")}
                limit = 0 if not keep else limit_in_bytes(options)
                merged = _Merged(work, _read_all(job, work, shards, processes, progress, limit))
                merged.refuse_problems(shards, options.on_error)
                merged.refuse_copies(shards)
                report = _write(folder, shards, merged, rules, classes=classes, names=options.names, absolute=existing == "join", begun=begun)
                _keep(work, folder, options)
                return report
            finally:
                clear_folder(work, MADE)


def clear_errors_of_index(folder: Path) -> Any:
    """Disk full and folders that cannot be written: one line, and how to write elsewhere."""
    return clear_errors(folder, hint="; name another folder with --out")


def _place(shards: Sequence[Tar], out: str | Path | None) -> Path:
    if out is not None:
        if is_remote(out):
            raise UserError(f"--out {out}: the index is written to a local folder")
        return expand_home(out)
    far = next((str(path) for path in shards if is_remote(path)), None)
    if far is not None:
        raise UserError(f"{shown_address(far)} is remote, so the index cannot go beside it; choose a folder for it with --out FOLDER")
    folders = sorted({Path(path).parent for path in shards})
    if len(folders) > 1:
        raise UserError(f"the shards lie in {len(folders)} folders ({folders[0]}, {folders[1]} ...); choose a folder for the index with --out FOLDER")
    return folders[0]


def _check_existing(folder: Path, existing: str) -> None:
    if not (folder / MANIFEST_NAME).exists():
        for name in (INDEX_NAME, KEYS_NAME):
            if (folder / name).exists() and not _is_of_dtl(folder / name):
                raise UserError(f"{folder / name} was not written by dtl and would be replaced; write the index elsewhere with --out")
        return
    if Manifest.read(folder).made_by.get("source") != INDEXED:
        raise UserError(f"{folder} was packed by dtl and already has an index; train on it as it is")
    if existing == "refuse":
        raise UserError(f"{folder} already has an index; replace it with --overwrite, or write elsewhere with --out")


def _is_of_dtl(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(3) == b"DTL"  # its files begin with DTLINDEX and DTLSTR01


def _extension(name: str | None) -> str | None:
    return None if name is None else name.removeprefix(".")


def _read_all(job: dict[str, Any], work: Path, shards: Sequence[Tar], processes: int | None, progress: bool, limit: int | None) -> list[dict[str, Any]]:
    """What was found in each. Of remote shards no more than `limit` bytes stay (None: all of them)."""
    cores = num_cores()
    num_bytes = sum(path.stat().st_size for path in shards if isinstance(path, Path))
    # A process starts in about 0.3 s: time to index some 50 MB. Fetching is waiting, so it takes several at once anyhow.
    local = min(cores, num_bytes // (50 * 2**20), 64)
    far = min(max(cores, 4), sum(is_remote(path) for path in shards) // 4)
    workers = min(processes or max(1, local, far), len(shards))
    kept = 0
    found: dict[int, dict[str, Any]] = {}
    with PackProgress(visible=progress, unit="shards") as shown_progress:
        shown_progress.start("indexing", len(shards))

        def done(answer: dict[str, Any]) -> None:
            nonlocal kept
            found[answer["number"]] = answer
            file = work / f"{answer['number']:05d}.tar"
            if is_remote(shards[answer["number"]]):
                if limit is not None and kept + answer["bytes"] > limit:
                    file.unlink()
                else:
                    kept += answer["bytes"]
            shown_progress.advance(1)

        run_tasks(INDEXING, job, ({"number": number} for number in range(len(shards))), processes=workers, done=done)
    return [found[number] for number in range(len(shards))]


def _keep(work: Path, folder: Path, options: DataConfig) -> None:
    """The remote shards that are here already go into their cache."""
    files = sorted(work.glob("*.tar"))
    if files:
        cache = open_cache(Manifest.read(folder), folder, options.model_copy(update={"allow_pipe": True}))
        assert cache is not None
        for file in files:
            cache.adopt(int(file.stem), file)


class _Merged:
    """The findings of all shards, put together."""

    def __init__(self, work: Path, facts: list[dict[str, Any]]) -> None:
        self.facts = facts
        self._stems = [work / f"{number:05d}" for number in range(len(facts))]

    def refuse_problems(self, shards: Sequence[Tar], on_error: str) -> None:
        total, listed = self.problems(shards)
        if total and on_error == "fail":
            text = "; ".join(f"{name}: {reason}" for name, reason in listed[:10])
            more = f"; and {total - min(len(listed), 10):,} more" if total > min(len(listed), 10) else ""
            raise UserError(
                f"{total:,} sample{'' if total == 1 else 's'} cannot be used: {text}{more}; "
                "fix the shards, or leave out such samples with --on-error skip (training: --data.on-error skip)"
            )

    def problems(self, shards: Sequence[Tar]) -> tuple[int, list[tuple[str, str]]]:
        """How many samples cannot be used, and (shard: sample, reason) of the first ones of each shard."""
        listed = [
            (f"{_name_of(path)}: sample {shown(key)} at byte {offset}", reason)
            for path, facts in zip(shards, self.facts)
            for key, offset, reason in facts["problems"]
        ]
        return sum(facts["num_problems"] for facts in self.facts), listed

    def refuse_copies(self, shards: Sequence[Tar]) -> None:
        """The same bytes under two names would count each of their samples twice."""
        seen: dict[str, Tar] = {}
        for path, facts in zip(shards, self.facts):
            if facts["labels"] and facts["sha256"] in seen:
                raise UserError(f"{_name_of(path)} is a copy of {_name_of(seen[facts['sha256']])}, and each sample would count twice; give only one of them")
            seen[facts["sha256"]] = path

    def labels(self) -> dict[Label, str]:
        """Each label as it stands, with a sample that has it."""
        first: dict[Label, str] = {}
        for facts in self.facts:
            for label, key in facts["labels"]:
                first.setdefault(label, key)
        return first

    def rule(self) -> str:
        return one_rule((rule, key) for facts in self.facts for rule, key in facts["rules"].items())

    def pixels(self) -> PixelFacts:
        found = [facts["wide"] for facts in self.facts if facts["wide"][0]]
        counts, lows, highs = zip(*found) if found else ((0,), (0.0,), (0.0,))
        return PixelFacts(wide=sum(counts), low=min(lows), high=max(highs))

    def rows(self, numbers: dict[Label, int], *, as_names: bool) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """All rows with their class numbers, and the samples of each shard."""
        parts = []
        for stem, facts in zip(self._stems, self.facts):
            rows = np.load(stem.with_suffix(".npy"))
            table = np.array([numbers[str(label) if as_names else label] for label, _ in facts["labels"]], np.int32)
            rows["labels"] = table[rows["labels"]] if len(rows) else rows["labels"]
            parts.append(rows)
        return np.concatenate([np.zeros(0, ROWS), *parts]), np.array([len(part) for part in parts], np.int64)

    def keys(self) -> StringTable:
        return StringTable.join(StringTable.read(stem.with_suffix(".keys")) for stem in self._stems)


def _write(
    folder: Path,
    shards: Sequence[Tar],
    merged: _Merged,
    rules: Rules,
    *,
    classes: Sequence[str] | None,
    names: str | Path | None,
    absolute: bool,
    begun: float,
) -> IndexReport:
    num_skipped, skipped = merged.problems(shards)
    notes: list[str] = []
    first_of, rule = merged.labels(), merged.rule()
    if not first_of:
        raise UserError(f"no usable sample in {len(shards):,} shard{'' if len(shards) == 1 else 's'} ({_name_of(shards[0])} ...)")
    order, numbers = decide_classes(first_of, rule=rule, given=classes, notes=notes)
    rows, sizes = merged.rows(numbers, as_names=rule == "folder")
    counts = np.bincount(rows["labels"], minlength=len(order))
    display = find_display_names(order, given=names, beside=[folder], notes=notes)
    if count := sum(facts["ignored"][0] for facts in merged.facts):
        first = next(facts["ignored"][1] for facts in merged.facts if facts["ignored"][0])
        notes.append(f"{count:,} members of the tars belong to no sample (the first: {shown(first)}): hidden, without an extension, or named like __this__")
    (folder / MANIFEST_NAME).unlink(missing_ok=True)  # the old one must not be taken for that of the new index
    columns = {name: rows[name] for name in ROWS.names or ()}
    index_sha256 = write_index(folder / INDEX_NAME, sizes, columns)
    merged.keys().write(folder / KEYS_NAME)
    manifest = Manifest(
        version=MANIFEST_VERSION,
        classes=order,
        display_names=display,
        shards=tuple(
            Shard(url=_url(path, folder, absolute), samples=int(size), bytes=facts["bytes"], sha256=facts["sha256"])
            for path, size, facts in zip(shards, sizes, merged.facts)
        ),
        class_counts=tuple(counts.tolist()),
        dataset_id=dataset_id(order, sizes=rows["sizes"], crcs=rows["crcs"], labels=rows["labels"]),
        index_sha256=index_sha256,
        made_by={
            "dtl": __version__,
            "index_version": INDEX_VERSION,
            "source": INDEXED,
            "rules": asdict(rules),
            "label": rule,
            "label_numbers": _stored_numbers(numbers, order),
            "keys_sha256": sha256_of_file(folder / KEYS_NAME),
            "skipped": num_skipped,
        },
        pixels=merged.pixels(),
    )
    manifest.write(folder)
    return IndexReport(
        folder=folder,
        classes=order,
        num_samples=len(rows),
        num_shards=len(shards),
        num_bytes=sum(shard.bytes for shard in manifest.shards),
        skipped=tuple(skipped),
        num_skipped=num_skipped,
        notes=tuple(notes),
        seconds=time.monotonic() - begun,
    )


def _name_of(path: Tar) -> str:
    """A shard for a message."""
    return shown_address(path) if isinstance(path, str) else str(path)


def _stored_numbers(numbers: dict[Label, int], classes: Sequence[str]) -> str:
    """How labels as they stand are class numbers, for `dtl verify`: `number`, where they are these numbers, or `name`."""
    return "name" if all(classes[number] == str(label) for label, number in numbers.items()) else "number"


def _url(path: Tar, folder: Path, absolute: bool) -> str:
    """Relative to the manifest where both may move together; absolute where only the root of the file system is common, or remote."""
    if is_remote(path):
        return str(path)
    full, base = os.path.abspath(path), os.path.abspath(folder)
    if absolute or os.path.commonpath([full, base]) == os.sep:
        return full
    return os.path.relpath(full, base)
