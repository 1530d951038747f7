"""`dtl pack SRC DST`: images to shards. The work is `dtl.data.packing.pack`; this is its command line."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dtl.commands import add_limits, limits
from dtl.errors import UserError
from dtl.files import user_path
from dtl.text import OptionParser, counted, to_stderr, to_stdout

if TYPE_CHECKING:
    from dtl.data.packing.pack import PackReport

_DESCRIPTION = """\
Pack images once into WebDataset shards with a manifest and an index, from which training reads them quickly.

SRC is one of
  an image folder, with one folder per class                 photos/ants/1.jpg
  a folder that contains train/ and val/ image folders       (valid, validation or test instead of val work too)
  an archive of such folders                                 photos.zip, photos.tar.gz
  a list file with one line `path label` per image, or CSV with the header path,label (and split, if it has train, val and test rows)
  Parquet or Arrow files with images, as Hugging Face's datasets keeps them (needs pyarrow)
  the Python batches of CIFAR-10 or CIFAR-100
  digits, the built-in example
DST is a new folder. It gets manifest.json, index.bin and the shards, or train/ and val/ with these files.
"""
_EPILOG = """\
examples:
  dtl pack photos shards --val-fraction 0.1
  dtl pack photos shards --short-side 288 --processes 16
  dtl pack photos/val shards/val --classes-from shards/train
"""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def run(argv: list[str]) -> int:
    """The command. UserError if something is wrong with the source, the destination or the options."""
    options = _parser().parse_args(argv)
    from dtl.config.models import ColumnsConfig, arguments_checked
    from dtl.data.copies import describe_copies, find_copies_quickly
    from dtl.data.groups import read_groups, store_groups
    from dtl.data.open import describe_trouble, packed_folder
    from dtl.data.packing.job import PackOptions
    from dtl.data.packing.pack import pack_source
    from dtl.data.shards.index import Shards
    from dtl.data.shards.manifest import Manifest
    from dtl.data.sources.open import open_source

    with arguments_checked():
        columns = {} if options.columns is None else ColumnsConfig.model_validate(options.columns).given()
    groups = None if options.group_column is None else read_groups(options.source, options.group_column, path_column=columns.get("path"))
    like = options.classes_from
    classes = Manifest.read(packed_folder(like, "train") or Path(like)).classes if like else None
    shard_bytes = parse_size(options.shard_size)
    given = limits(options)
    limits_of_files = {name: value for name, value in given.items() if name == "max_file_bytes"}
    # An empty class folder is reported and left out: whoever packs reads the notes. Nobody watches a training job, so it refuses.
    source = open_source(
        options.source, classes=classes, names=options.names, on_error="skip", labelled=not options.unlabelled, columns=columns, **limits_of_files
    )
    if not options.quiet:
        to_stderr(
            f"{options.source}: {source.kind}, {counted(source.num_samples, 'image')} of {counted(len(source.classes), 'class')}, {_size(source.num_bytes)}"
        )
        for note in source.notes:
            to_stderr(f"  {note}")
    try:
        report = pack_source(
            source,
            user_path(options.destination),
            PackOptions(
                val_fraction=options.val_fraction,
                shard_bytes=shard_bytes,
                seed=options.seed,
                on_error=options.on_error,
                max_side=options.max_side,
                short_side=options.short_side,
                quality=options.quality,
                verify=options.verify,
                group_column=options.group_column,
                **given,
            ),
            groups=groups,
            processes=options.processes,
            fixed_classes=classes is not None,
            existing="replace" if options.overwrite else "refuse",
            progress=not options.quiet,
        )
    except KeyboardInterrupt:
        to_stderr(f"stopped; run the same command again to continue, or remove {options.destination}")
        return 130
    for split in report.splits if groups is not None else ():
        store_groups(split.folder, groups or {}, options.group_column)
    for line in describe_trouble(report):
        to_stderr(line)
    if line := describe_copies(find_copies_quickly({split.split: Shards.open(split.folder) for split in report.splits})):
        to_stderr(line)
    if not options.quiet:
        _print_report(report)
    return 0


def parse_size(text: str) -> int:
    """Bytes of `128MB` (10^6), `128MiB` (2^20), `1.5G` or a plain number."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if not found or found[2] not in _UNITS:
        raise UserError(f"--shard-size {text}: not a size; write 128MB, 1GiB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(prog="dtl pack", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="SRC", help="where the images are")
    add("destination", metavar="DST", help="a new folder for the shards")
    split = parser.add_argument_group("splits and classes")
    split.add_argument(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share for validation; split by content (with --group-column by whole groups), stratified by class (default: 0)",
    )
    split.add_argument("--columns", metavar="ROLE=NAME,...", help="columns of a list or table with other names: path=file,label=species,split=fold")
    split.add_argument("--group-column", metavar="C", help="SRC is a list: store its column C, for data.group.column (a patient, a camera, a session)")
    split.add_argument("--classes-from", metavar="SHARDS", help="use the class list of these packed shards (for a validation set that belongs to them)")
    split.add_argument("--unlabelled", action="store_true", help="SRC may be a folder or list of images without labels (for task: rotate)")
    split.add_argument("--names", metavar="FILE", help="JSON {class name: display name} (default: cat_to_name.json or a similar file next to the images)")
    images = parser.add_argument_group("images")
    images.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="unreadable images: stop, or leave them out and list them (default: fail)")
    images.add_argument("--no-verify", dest="verify", action="store_false", help="read the headers only, do not decode every image")
    add_limits(images)
    images.add_argument("--max-side", type=int, metavar="N", help="shrink images to a longer side of at most N pixels")
    images.add_argument("--short-side", type=int, metavar="N", help="shrink images to a shorter side of at most N pixels")
    images.add_argument("--quality", type=int, default=95, metavar="Q", help="JPEG quality of images that were shrunk (default: 95)")
    shards = parser.add_argument_group("shards")
    shards.add_argument("--shard-size", default="128MiB", metavar="SIZE", help="approximate size of a shard (default: 128MiB)")
    shards.add_argument("--seed", type=int, default=0, help="seed of the order in which samples are packed (default: 0)")
    shards.add_argument("--processes", type=int, metavar="N", help="number of processes (default: the number of cores)")
    shards.add_argument("--overwrite", action="store_true", help="replace the packed data set in DST")
    add("--quiet", action="store_true", help="print only errors and what was left out")
    return parser


def _print_report(report: PackReport) -> None:
    width = max(len(split.split) for split in report.splits)
    for split in report.splits:
        shards = counted(split.num_shards, "shard")
        to_stdout(f"{split.split:{width}}  {counted(split.num_samples, 'image')}, {shards}, {_size(split.num_bytes)}: {split.folder}")
    to_stdout(f"packed in {report.seconds:.1f} s, {counted(len(report.skipped), 'image')} left out")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
