"""The work of `dtl verify`, in the processes of `dtl.data.workers`, without torch: a shard as a whole, and a stretch of its images.

An answer is {"kind", "shard", "samples" done, "findings": [[sample, offset, reason]], "unread": [samples, reason]}; sample -1 is about the shard
as a whole. What could not be read, for a reason that is not its own (UnreachableSample), is no finding: it is only counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dtl.data.decoding.decode import NO_MEMORY, DecodeError, size_of_decoded
from dtl.data.decoding.headers import Limits
from dtl.data.remote.address import shown as shown_address
from dtl.data.remote.fetch import Unfetched, options_of_helper
from dtl.data.shards.index import Shards
from dtl.data.wds.samples import Ignored, Rules, Sample, open_tar, read_samples, shown
from dtl.data.wds.tar import DamagedTar, TarFile
from dtl.errors import DamagedSample, UnreachableSample, UserError
from dtl.files import sha256_of_file

WHOLE = -1
_IMAGES_AT_ONCE = 32
# Findings about a shard whose index is about something else altogether would be as many as its samples.
_MAX_UNKNOWN = 3

Finding = tuple[int, int, str]
Unread = tuple[int, str]


@dataclass
class VerifyJob:
    """One split, opened whole."""

    shards: Shards
    rules: Rules
    as_names: bool
    """Labels in the tars are class names, not numbers."""


def open_job(facts: dict[str, Any]) -> VerifyJob:
    options = None if facts["options"] is None else options_of_helper(facts["options"])
    shards = Shards.open(facts["split"], options, whole=True)
    shards.limits = Limits(**facts["limits"])
    if shards.cache is not None:
        shards.cache.gives_up_on_servers = True
    made_by = shards.manifest.made_by
    rules = Rules(**made_by["rules"]) if "rules" in made_by else Rules(None, "cls")
    return VerifyJob(shards, rules, made_by.get("label_numbers") == "name")


def run_task(job: VerifyJob, task: dict[str, Any]) -> dict[str, Any]:
    """Do one task: `{"kind": "shard", "shard"}`, or `{"kind": "images", "shard", "first", "last"}` (sample numbers)."""
    if task["kind"] == "shard":
        samples, (findings, unread) = np.zeros(0), check_shard(job, task["shard"])
    else:
        samples = np.arange(task["first"], task["last"])
        findings, unread = check_images(job.shards, samples)
    return {"kind": task["kind"], "shard": task["shard"], "samples": len(samples), "findings": findings, "unread": unread}


def check_images(shards: Shards, samples: np.ndarray) -> tuple[list[Finding], Unread]:
    """Read, compare with the crc, decode, and compare with the index."""
    findings: list[Finding] = []
    unread: Unread = (0, "")
    for start in range(0, len(samples), _IMAGES_AT_ONCE):
        some = samples[start : start + _IMAGES_AT_ONCE]
        for sample, data in zip(some.tolist(), shards.read(some)):
            if isinstance(data, UnreachableSample):
                unread = unread[0] + 1, data.reason
                continue
            try:
                reason = _check_image(shards, sample, data)
            except MemoryError:
                unread = unread[0] + 1, f"{NO_MEMORY} ({shards.widths[sample]} x {shards.heights[sample]} pixels)"
                continue
            if reason:
                findings.append((sample, int(shards.offsets[sample]), reason))
    return findings, unread


def _check_image(shards: Shards, sample: int, data: bytes | DamagedSample) -> str:
    if isinstance(data, DamagedSample):
        return data.reason
    label, (widths, heights, turns) = int(shards.labels[sample]), shards.shapes(np.array([sample]))
    width, height, turn = int(widths[0]), int(heights[0]), int(turns[0])
    if not 0 <= label < shards.num_classes:
        return f"label {label} is not one of {shards.num_classes} classes"
    try:
        found = size_of_decoded(data, shards.limits.max_pixels, turn=turn)
    except DecodeError as error:
        return str(error)
    if found != (height, width):
        return f"{found[1]} x {found[0]} pixels, but {width} x {height} according to the index"
    return ""


def check_shard(job: VerifyJob, number: int) -> tuple[list[Finding], Unread]:
    """Size, sha256, the tar's structure, and whether index and tar agree on each sample."""
    shards, shard = job.shards, job.shards.manifest.shards[number]
    path, name = shards.folder / shard.url, None
    findings: list[Finding] = []
    try:
        if shards.cache is not None and shards.cache.holds(number):
            path, name = shards.cache.local(number), shown_address(shard.url)
        size = path.stat().st_size
        if size != shard.bytes:
            findings.append((WHOLE, min(size, shard.bytes), f"it has {size:,} bytes, but {shard.bytes:,} according to the manifest"))
        with open_tar(path, name) as file:
            tar = TarFile(file, name)
            try:
                findings += _compare(job, number, tar)
                digest = tar.sha256
            except DamagedTar as error:
                findings.append((WHOLE, error.offset, error.reason))
                digest = sha256_of_file(path)
    except (OSError, UserError, Unfetched) as error:
        reason, is_away = shards.why_unread(number, error)
        return (findings, (shard.samples, reason)) if is_away else ([*findings, (WHOLE, 0, reason)], (0, ""))
    if digest != shard.sha256:
        findings.append((WHOLE, 0, "its sha256 differs from the one in the manifest: it was changed, or it is another shard"))
    return findings, (0, "")


def _compare(job: VerifyJob, number: int, tar: TarFile) -> list[Finding]:
    """What differs between the tar and the index. Both are in the order of the tar."""
    shards = job.shards
    first = int(shards.shard_sizes[:number].sum())
    rows = np.arange(first, first + int(shards.shard_sizes[number]))
    offsets = shards.offsets[rows]
    order = np.argsort(offsets, kind="stable")
    met = np.zeros(len(rows), bool)
    findings: list[Finding] = []
    unknown = 0
    for sample in read_samples(tar, job.rules, Ignored(), shards.limits):
        place = int(np.searchsorted(offsets, sample.offset, sorter=order))
        known = place < len(rows) and int(offsets[order[place]]) == sample.offset
        if known:
            row = int(order[place])
            met[row] = True
            if reason := _differs(job, int(rows[row]), sample):
                findings.append((int(rows[row]), sample.offset, reason))
        elif not sample.problem:
            unknown += 1
            if unknown <= _MAX_UNKNOWN:
                findings.append((WHOLE, sample.offset, f"the tar has sample {shown(sample.key)} here, which is not in the index"))
    for row in np.flatnonzero(~met).tolist():
        findings.append((int(rows[row]), int(offsets[row]), "the tar has no image at this offset"))
    return findings


def _differs(job: VerifyJob, row: int, sample: Sample) -> str:
    shards = job.shards
    if sample.size != int(shards.sizes[row]):
        return f"the image has {sample.size:,} bytes in the tar, {int(shards.sizes[row]):,} in the index"
    label = int(shards.labels[row])
    if not 0 <= label < shards.num_classes:
        return f"label {label} is not one of {shards.num_classes} classes"
    wanted: int | str = shards.classes[label] if job.as_names else label
    if sample.label != wanted and str(sample.label) != str(wanted):
        return f"its label is {sample.label!r} in the tar, {wanted!r} in the index"
    if "keys_sha256" in shards.manifest.made_by and shards.damaged(row, "").key != sample.key:
        return f"its key is {shown(sample.key)} in the tar, {shown(shards.damaged(row, '').key)} in the index"
    return ""
