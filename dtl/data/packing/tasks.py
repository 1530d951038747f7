"""The two kinds of work of packing: reading a chunk of images, and writing one shard. Run in the processes of dtl.data.workers, without torch."""

from __future__ import annotations

import errno
import hashlib
import io
import tarfile
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from dtl.data.decoding.decode import NO_MEMORY, DecodeError, bounds_of, decode_jpeg, decode_with_pillow, probe
from dtl.data.dhash import SIDE, dhashes, points_of
from dtl.data.packing.job import DOUBTFUL, GOOD, ROWS, SCAN, UNREADABLE, Job, PackOptions, load_rows, write_array, write_json
from dtl.data.shards.index import FORMAT_FLAGS, flags_of
from dtl.data.sources.content_split import content_hash
from dtl.errors import UserError
from dtl.files import sha256_of_file, without_path, write_whole
from dtl.reading import Reading
from dtl.untrusted import Count, Record, Sha256, Text, as_utf8

_EXTENSIONS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tiff",
    "PPM": "ppm",
    "AVIF": "avif",
    "HEIF": "heic",
    "JXL": "jxl",
    "NPY": "npy",
}
_BLOCK = 512
# What is wrong with a file itself: it is not there, or a link that leads nowhere. All else (no permission, a disk that fails) may pass.
_OF_THE_FILE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENXIO)
SCANNED = "scanned.npy"
"""The rows of all chunks, for the processes that write shards to map: each of them needs rows from anywhere."""


class ScanFacts(Record):
    reasons: list[tuple[Count, Text]]
    """(sample, reason) of those that are not good."""


class ShardFacts(Record):
    bytes: Count
    sha256: Sha256


def open_job(facts: dict[str, Any]) -> Job:
    folder = facts.pop("folder")
    return Job(Path(folder), facts)


def run_task(job: Job, task: dict[str, Any]) -> int:
    """Do one task and return its number of samples. Done already: nothing but the check that it is."""
    if task["kind"] == "scan":
        return scan_chunk(job, task["number"])
    return write_shard(job, task["split"], task["number"])


def scan_chunk(job: Job, number: int) -> int:
    """Read the images of a chunk: what they are, and which of them cannot be used, with the reason."""
    samples, path = job.chunk(number)
    if load_chunk(job, number) is not None:
        return len(samples)
    rows, reasons, points = np.zeros(len(samples), SCAN), [], np.zeros((len(samples), SIDE, SIDE), np.uint8)
    for row, sample in enumerate(samples):
        reason = _scan_one(rows[row : row + 1], points[row], job, sample)
        if reason:
            reasons.append([sample, as_utf8(reason)])
    rows["dhash"] = dhashes(points)
    write_json(path.with_suffix(".json"), {"reasons": reasons})
    write_array(path, rows)
    return len(samples)


def load_chunk(job: Job, number: int) -> tuple[Any, list[tuple[int, str]]] | None:
    """Rows of SCAN and the reasons of a finished chunk, or None."""
    samples, path = job.chunk(number)
    try:
        rows = load_rows(path, SCAN, len(samples))
        reasons = ScanFacts.read(path.with_suffix(".json")).reasons
    except (OSError, UserError):
        return None
    known = (rows["state"] == UNREADABLE) | ((rows["state"] <= DOUBTFUL) & np.isin(rows["format"], list(FORMAT_FLAGS.values())))
    return (rows, reasons) if known.all() and all(sample in samples for sample, _ in reasons) else None


def _scan_one(row: Any, points: npt.NDArray[np.uint8], job: Job, sample: int) -> str:
    try:
        data = job.read(sample)
    except OSError as error:
        if job.options.on_error == "skip" and error.errno not in _OF_THE_FILE:
            raise UserError(
                f"{job.names[sample]} cannot be read now ({error.strerror or error}), which does not mean that it is damaged, so it is not left out: "
                "run the same command again when it can be read"
            ) from None
        row["state"] = UNREADABLE
        return error.strerror or str(error)
    except UserError as error:
        row["state"] = UNREADABLE
        return without_path(error)
    try:
        header = probe(data, job.options.max_pixels)
        width, height = header.width, header.height
        doubtful = False
        if header.wide:
            row["wide"], (row["low"], row["high"]) = 1, bounds_of(data, job.options.max_pixels)
        elif job.options.verify and header.format != "NPY":  # whose header has been compared with the bytes
            pixels = decode_jpeg(data, max_pixels=job.options.max_pixels)
            if pixels is None:
                pixels = decode_with_pillow(data, job.options.max_pixels)
                doubtful = header.format == "JPEG" and header.mode != "CMYK"
            height, width = pixels.shape[:2]
            points[:] = points_of(pixels)
        if len(data) >= 2**32:
            raise DecodeError(f"{len(data):,} bytes, more than a shard's index can hold")
    except DecodeError as error:
        row["state"] = UNREADABLE
        return str(error)
    except MemoryError:
        raise UserError(f"{job.names[sample]}: {NO_MEMORY}, which does not mean that it is damaged: use fewer --processes, or more memory") from None
    row["state"] = DOUBTFUL if doubtful else GOOD
    row["hash"], row["size"], row["crc"] = content_hash(data), len(data), zlib.crc32(data)
    row["width"], row["height"], row["format"], row["orientation"] = width, height, FORMAT_FLAGS[header.format], header.orientation
    return "libjpeg warns of damage, but the image decodes" if doubtful else ""


def write_shard(job: Job, split: str, number: int) -> int:
    """Write one tar and its index rows; one that is finished is kept: its split is, or its sha256 holds."""
    cuts = np.load(job.folder / f"{split}.cuts.npy")
    order = np.load(job.folder / f"{split}.order.npy", mmap_mode="r")[cuts[number] : cuts[number + 1]]
    target = job.split_folder(split) / shard_name(number)
    rows_path = job.folder / f"{split}-{number:05d}.npy"
    if job.is_finished(split) or _is_done(target, rows_path, len(order)):
        return len(order)
    rows = np.zeros(len(order), ROWS)
    hashing = _HashingFile()

    def write(file: Any) -> None:
        hashing.file = file
        _write_tar(hashing, job, order, first=int(cuts[number]), digits=max(6, len(str(int(cuts[-1]) - 1))), rows=rows)

    write_whole(target, write)
    write_array(rows_path, rows)
    write_json(rows_path.with_suffix(".json"), {"bytes": hashing.size, "sha256": hashing.digest.hexdigest()})
    return len(order)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.tar"


def add_sample(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    """One sample, byte for byte as `webdataset.TarWriter(mtime=0, encoder=False)` writes it (a test compares them).

    Through `tarfile`, as TarWriter itself does: importing webdataset imports torch, seconds and 600 MB in each process of packing. A fixed
    time gives the same bytes each time, and a fractional one would need a PAX header of 1.5 KB before each member.
    """
    for extension, data in sorted(members.items()):
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size, member.mtime, member.mode, member.uname, member.gname = len(data), 0, 0o444, "bigdata", "bigdata"
        tar.addfile(member, io.BytesIO(data))


def _write_tar(file: _HashingFile, job: Job, order: Any, *, first: int, digits: int, rows: Any) -> None:
    scanned = np.load(job.folder / SCANNED, mmap_mode="r")
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for row, sample in enumerate(order.tolist()):
            data, (height, width, name) = _image(job, sample, scanned[sample])
            orientation = int(scanned["orientation"][sample])
            if orientation >= 5:
                height, width = width, height
            extension, label = _EXTENSIONS[name], int(job.labels[sample])
            start = tar.offset
            add_sample(tar, f"{first + row:0{digits}d}", {extension: data, "cls": str(label).encode()})
            # Members are in the order of their extensions, each a header block and whole blocks of data.
            before = 0 if extension < "cls" else 2 * _BLOCK
            tar.members.clear()  # type: ignore[attr-defined]  # the standard library keeps a kilobyte of each
            rows[row] = (start + before + _BLOCK, len(data), zlib.crc32(data), label, width, height, flags_of(name, orientation))


def _image(job: Job, sample: int, scanned: Any) -> tuple[bytes, tuple[int, int, str]]:
    """Bytes, height, width and format of what is stored: the original, or a smaller one where that was asked for."""
    try:
        data = job.read(sample)
    except OSError as error:
        raise UserError(f"{job.names[sample]}: {error.strerror} (it could be read a moment ago; the source changed while it was packed)") from None
    except UserError as error:
        raise UserError(f"{job.names[sample]}: {without_path(error)} (it could be read a moment ago; the source changed while it was packed)") from None
    if len(data) != scanned["size"] or zlib.crc32(data) != scanned["crc"]:
        raise UserError(f"{job.names[sample]} changed while it was packed; run the same command again when nothing writes to the source")
    height, width = int(scanned["height"]), int(scanned["width"])
    name = next(name for name, flag in FORMAT_FLAGS.items() if flag == scanned["format"])
    scale = float(shrink_factor(width, height, max_side=job.options.max_side, short_side=job.options.short_side))
    if scale >= 1 or scanned["wide"]:  # what has more than 8 bits would lose them
        return data, (height, width, name)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    smaller, name = _shrink(data, size, name, job.options, int(scanned["orientation"]))
    return smaller, (size[1], size[0], name)


def shrink_factor(width: npt.ArrayLike, height: npt.ArrayLike, *, max_side: int | None, short_side: int | None) -> npt.NDArray[np.float64]:
    """1 where an image is within the limits already; of one image, or of many at once."""
    factor = np.ones(np.shape(width))
    if max_side is not None:
        factor = np.minimum(factor, max_side / np.maximum(width, height))
    if short_side is not None:
        factor = np.minimum(factor, short_side / np.minimum(width, height))
    return factor


def _shrink(data: bytes, size: tuple[int, int], name: str, options: PackOptions, orientation: int) -> tuple[bytes, str]:
    """Lanczos, then JPEG; PNG stays PNG (it is lossless for a reason, or flat graphics). The EXIF orientation is kept, as a tag."""
    try:
        pixels = decode_jpeg(data, max_pixels=options.max_pixels)
        image = Image.fromarray(decode_with_pillow(data, options.max_pixels, Reading(alpha=True)) if pixels is None else pixels)
    except DecodeError as error:  # with --no-verify nobody has decoded it yet
        raise UserError(f"an image cannot be resized: {error}; pack without --no-verify to find out which one") from None
    if name == "JPEG" and probe(data, options.max_pixels).mode == "L":
        image = image.convert("L")  # R = G = B: the conversion is exact
    image = image.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    exif: Image.Exif | bytes = b""
    if orientation > 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
    if name == "PNG":
        image.save(out, "PNG", exif=exif)
        return out.getvalue(), "PNG"
    image.save(out, "JPEG", quality=options.quality, exif=exif)
    return out.getvalue(), "JPEG"


def _is_done(target: Path, rows_path: Path, num_samples: int) -> bool:
    try:
        if target.is_symlink():
            return False
        load_rows(rows_path, ROWS, num_samples)
        done = ShardFacts.read(rows_path.with_suffix(".json"))
        return target.stat().st_size == done.bytes and sha256_of_file(target) == done.sha256
    except (OSError, UserError):
        return False


class _HashingFile:
    """Writes through and keeps the sha256 and the size of what went by."""

    def __init__(self) -> None:
        self.file: Any = None
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        written: int = self.file.write(data)
        return written
