"""Check a packed or indexed split against itself, byte by byte and image by image, and set the damaged samples aside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from dtl.config.models import DataConfig
from dtl.credentials import bare
from dtl.data.open import mirrored_splits, packed_splits
from dtl.data.progress import PackProgress
from dtl.data.remote.address import is_remote
from dtl.data.remote.address import shown as shown_address
from dtl.data.shards.index import KEYS_NAME, ROW_COLUMNS, Shards, write_index
from dtl.data.shards.manifest import MANIFEST_NAME
from dtl.data.shards.quarantine import QUARANTINE_NAME, BadSample, Quarantine, left_out_index_name
from dtl.data.verify_tasks import WHOLE, Finding, Unread
from dtl.data.wds.find import is_remote_folder
from dtl.data.workers import run_tasks
from dtl.errors import DamagedSample, UserError
from dtl.files import sha256_of_file, user_path
from dtl.machine import num_cores
from dtl.text import counted

VERIFYING = "dtl.data.verify_tasks"
_IMAGES_PER_TASK = 1024
# Decoding takes about 1 ms an image: starting a process has to be worth it.
_IMAGES_PER_PROCESS = 500
_MOST_LINES = 10  # of one shard


@dataclass
class VerifyReport:
    """`samples` are the damaged ones, one entry each; `shards` (shard, offset, reason) is what concerns a shard as a whole.

    `unread` (shard, samples, reason) is what could not be read, for a reason that is not its own: nothing is known about these samples.
    """

    folder: Path
    num_samples: int
    num_shards: int
    samples: list[BadSample] = field(default_factory=list)
    shards: list[tuple[str, int, str]] = field(default_factory=list)
    unread: list[tuple[str, int, str]] = field(default_factory=list)
    in_quarantine: frozenset[int] = frozenset()
    """Numbers of the samples that are set aside now."""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def new_samples(self) -> list[BadSample]:
        """Damaged samples that a training would meet."""
        return [bad for bad in self.samples if bad.sample not in self.in_quarantine]

    @property
    def num_unread(self) -> int:
        return sum(samples for _, samples, _ in self.unread)

    @property
    def is_usable(self) -> bool:
        """All was read, and nothing is wrong but what is in quarantine, and what is wrong with a shard because of it."""
        explained = {bad.shard for bad in self.samples if bad.sample in self.in_quarantine}
        return not self.unread and not self.new_samples and all(shard in explained for shard, _, _ in self.shards)


def folders_to_verify(place: str | Path, options: DataConfig = DataConfig()) -> list[Path]:
    """The folder itself, or those below it that hold packed shards; of a remote one the copies of their manifests and indexes.

    UserError where there are none.
    """
    place = bare(place) if isinstance(place, str) else place
    if isinstance(place, str) and is_remote(place):
        if not is_remote_folder(place):
            raise UserError(f"{shown_address(place)}: tars need an index before they can be verified: dtl index {quote(place)} --out DIR, then dtl verify DIR")
        return mirrored_splits(place, options)
    folder = user_path(place)
    if (folder / MANIFEST_NAME).is_file():
        return [folder]
    found = [folder / name for names in packed_splits(folder).values() for name in names]
    if not found:
        hint = f"index its tars with `dtl index {quote(str(folder))}`" if folder.is_dir() and any(folder.glob("*.tar")) else "make one with `dtl pack SRC DST`"
        raise UserError(f"{folder} holds no {MANIFEST_NAME}, so there is nothing to check it against; {hint}")
    return found


def verify(folder: Path, options: DataConfig = DataConfig(), *, processes: int | None = None, progress: bool = True, quarantine: bool = False) -> VerifyReport:
    """Check one split: sizes, sha256, tars, index, crc, labels, and decode every image.

    With `quarantine` the damaged samples are set aside (see `dtl.data.shards.quarantine`): a list that was there is replaced, or removed where
    nothing is damaged any more; of a shard that cannot be read now it stays as it is. UserError where manifest and index cannot be used at all,
    or where no sample would be left.
    """
    begun = time.monotonic()
    if processes is not None and processes < 1:
        raise UserError(f"processes must be at least 1, got {processes}")
    shards = Shards.open(folder, options, whole=True)
    if shards.cache is not None:
        shards.cache.clean()
    before = _old_quarantine(folder, shards, lenient=quarantine)
    report = VerifyReport(folder, shards.num_samples, len(shards.manifest.shards), in_quarantine=frozenset(bad.sample for bad in before))
    _check_keys(shards, report)
    # The reason from reading an image is more helpful than that from the tar's structure, so it comes first.
    of_images: dict[int, list[Finding]] = {}
    of_shards: dict[int, list[Finding]] = {}
    unread: dict[int, dict[str, Unread]] = {}
    with PackProgress(visible=progress) as shown:
        far = None if shards.cache is None else options.model_dump(mode="json")
        facts = {"split": str(folder.absolute()), "options": far, "limits": asdict(shards.limits)}
        shown.start("verifying", shards.num_samples)

        def done(answer: dict[str, Any]) -> None:
            findings = of_images if answer["kind"] == "images" else of_shards
            findings.setdefault(answer["shard"], []).extend((s, o, r) for s, o, r in answer["findings"])
            count, reason = answer["unread"]
            if count:
                of_kind = unread.setdefault(answer["shard"], {})
                of_kind[answer["kind"]] = count + of_kind.get(answer["kind"], (0, ""))[0], reason
            shown.advance(answer["samples"])

        run_tasks(VERIFYING, facts, _tasks(shards), processes=_processes(shards, processes), done=done)
    for number in range(len(shards.shard_sizes)):
        _judge(shards, number, [*of_images.get(number, []), *of_shards.get(number, [])], report)
    report.unread = [(shards.manifest.shards[number].url, *max(counts.values())) for number, counts in sorted(unread.items())]
    if quarantine:
        _set_aside(shards, report, [bad for bad in before if shards.shard_of(bad.sample) in unread])
    report.seconds = time.monotonic() - begun
    return report


def _tasks(shards: Shards) -> Iterator[dict[str, Any]]:
    first = 0
    for number, size in enumerate(shards.shard_sizes.tolist()):
        yield {"kind": "shard", "shard": number}
        for start in range(first, first + size, _IMAGES_PER_TASK):
            yield {"kind": "images", "shard": number, "first": start, "last": min(start + _IMAGES_PER_TASK, first + size)}
        first += size


def _processes(shards: Shards, wanted: int | None) -> int:
    cores = num_cores()
    return wanted or max(1, min(cores, shards.num_samples // _IMAGES_PER_PROCESS, 64))


def _old_quarantine(folder: Path, shards: Shards, *, lenient: bool) -> tuple[BadSample, ...]:
    try:
        found = Quarantine.of_folder(folder, shards.manifest)
    except UserError:
        if lenient:
            return ()  # it is about to be replaced
        raise
    return found.samples if found else ()


def _check_keys(shards: Shards, report: VerifyReport) -> None:
    expected = shards.manifest.made_by.get("keys_sha256")
    if expected is None:
        return
    path = shards.folder / KEYS_NAME
    if not path.is_file() or sha256_of_file(path) != expected:
        report.shards.append((KEYS_NAME, 0, "it is missing, or does not belong to the manifest; index the shards again"))


def _judge(shards: Shards, number: int, findings: list[Finding], report: VerifyReport) -> None:
    """One entry for each damaged sample, the first finding; a shard's own findings where its samples do not show them."""
    url = shards.manifest.shards[number].url
    first: dict[int, Finding] = {}
    for finding in findings:
        if finding[0] != WHOLE:
            first.setdefault(finding[0], finding)
    whole = [finding for finding in findings if finding[0] == WHOLE]
    if first and len(whole) == 1 and "sha256" in whole[0][2]:
        whole = []  # its samples are reported already
    report.shards += [(url, offset, reason) for _, offset, reason in whole]
    for sample in sorted(first):
        _, offset, reason = first[sample]
        report.samples.append(BadSample(sample=sample, shard=url, key=shards.damaged(sample, reason).key, offset=offset, reason=reason))


def _set_aside(shards: Shards, report: VerifyReport, kept: Sequence[BadSample]) -> None:
    """Write quarantine.json and the index without its samples; or remove them where nothing is damaged. `kept`: nothing new is known of these."""
    folder = shards.folder
    known = {bad.sample: bad for bad in (*kept, *report.samples)}
    report.samples = [known[sample] for sample in sorted(known)]
    if not report.samples:
        if (folder / QUARANTINE_NAME).exists():
            (folder / QUARANTINE_NAME).unlink()
            report.notes.append(f"no sample is damaged any more: {QUARANTINE_NAME} was removed")
    else:
        report.in_quarantine = frozenset(bad.sample for bad in report.samples)
        if len(report.samples) == shards.num_samples:
            raise UserError(f"{folder}: all {shards.num_samples:,} samples are damaged ({report.samples[0].reason}); no sample would be left to train on")
        _write_quarantine(shards, report)
    used = "" if not report.samples else left_out_index_name([bad.sample for bad in report.samples])
    for old in folder.glob("index-without-*.bin"):
        if old.name != used:
            old.unlink(missing_ok=True)


def _write_quarantine(shards: Shards, report: VerifyReport) -> None:
    numbers = np.array([bad.sample for bad in report.samples], np.int64)
    left = np.ones(shards.num_samples, bool)
    left[numbers] = False
    owner = np.repeat(np.arange(len(shards.shard_sizes)), shards.shard_sizes)
    sizes = np.bincount(owner[left], minlength=len(shards.shard_sizes)).astype(np.int64)
    labels = shards.labels[left]
    counts = np.bincount(labels, minlength=shards.num_classes)
    name = left_out_index_name(numbers.tolist())
    digest = write_index(shards.folder / name, sizes, {column: getattr(shards, column)[left] for column in ROW_COLUMNS})
    Quarantine(
        of=shards.dataset_id,
        index=name,
        index_sha256=digest,
        shard_samples=tuple(sizes.tolist()),
        class_counts=tuple(counts.tolist()),
        samples=tuple(report.samples),
    ).write(shards.folder)
    lost = [shards.classes[label] for label in np.flatnonzero((counts == 0) & (np.array(shards.manifest.class_counts) > 0))]
    if lost:
        report.notes.append(f"no sample is left of {len(lost)} class{'' if len(lost) == 1 else 'es'}: {', '.join(lost[:10])}")


def describe(report: VerifyReport, log: Callable[[str], None]) -> None:
    """A line for each finding, at most ten of one shard, then a summary."""
    for shard, count, reason in report.unread:
        log(f"{shown_address(shard) if is_remote(shard) else shard}: {counted(count, 'sample')} not checked: {reason}")
    for shard, offset, reason in report.shards:
        log(f"{shard}: at byte {offset}: {reason}")
    shown: dict[str, int] = {}
    for bad in report.new_samples:
        shown[bad.shard] = shown.get(bad.shard, 0) + 1
        if shown[bad.shard] <= _MOST_LINES:
            log(str(DamagedSample(shard=bad.shard, key=bad.key, offset=bad.offset, reason=bad.reason)))
    for shard, count in shown.items():
        if count > _MOST_LINES:
            log(f"{shard}: {count - _MOST_LINES:,} more damaged samples")
    for note in report.notes:
        log(note)
