"""`dtl index TARS`: manifest and index for WebDataset shards that others wrote. The work is `dtl.data.wds.index`."""

from __future__ import annotations

import argparse

from dtl.commands import add_limits, limits
from dtl.text import OptionParser, counted, to_stderr, to_stdout

_DESCRIPTION = """\
Write manifest.json and index.bin for WebDataset shards made by others, so that dtl trains on them as on its own. The shards are not
changed. Each is read once from end to end and checked: tar headers, sizes, end-of-archive marks, the header of every image.

TARS are folders of tars, brace patterns, globs, single tars, or text files with one tar per line. Remote shards (https:// addresses,
`pipe:` commands, what fsspec reads: s3://, gs:// ...) are downloaded once for this, and need --out.
A sample's label is its `cls` (a number or a name), a field of its `json` (--label-field), or the last folder of its key.
"""
_EPILOG = """\
examples:
  dtl index shards/                                    labels in cls, or class folders in the keys
  dtl index 'imagenet-train-{0000..1281}.tar' --classes imagenet_classes.txt
  dtl index laion/ --label-field json_field.class_name --out laion-index
  dtl index 'https://host/train-{000..010}.tar' --out train-index
  dtl index 'pipe:ssh host cat /data/train-{000..010}.tar' --out train-index
"""


def run(arguments: list[str]) -> int:
    """The command. UserError if something is wrong with the shards or the options."""
    options = _parser().parse_args(arguments)
    from dtl.config.models import DataConfig, arguments_checked
    from dtl.data.copies import describe_copies, find_copies_quickly
    from dtl.data.open import describe_index
    from dtl.data.remote.address import is_remote
    from dtl.data.shards.index import Manifest, Shards
    from dtl.data.wds.index import index_shards
    from dtl.data.wds.labels import read_classes

    with arguments_checked():
        data = DataConfig(on_error=options.on_error, names=options.names, retries=options.retries, timeout=options.timeout, **limits(options))
    report = index_shards(
        options.tars,
        data,
        out=options.out,
        image_field=options.image_field,
        label_field=options.label_field,
        classes=read_classes(options.classes) if options.classes else None,
        processes=options.processes,
        existing="replace" if options.overwrite else "refuse",
        progress=not options.quiet,
    )
    lines = describe_index(report)
    for line in lines[1:]:
        to_stderr(line)
    local = not any(is_remote(shard.url) for shard in Manifest.read(report.folder).shards)
    if local and (line := describe_copies(find_copies_quickly({"the shards": Shards.open(report.folder, data)}))):
        to_stderr(line)
    if not options.quiet:
        shards = counted(report.num_shards, "shard")
        to_stdout(f"{lines[0]} in {shards}, {report.num_bytes / 2**20:,.1f} MiB, indexed in {report.seconds:.1f} s: {report.folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(prog="dtl index", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("tars", metavar="TARS", nargs="+", help="folder, 'train-{000..099}.tar', glob, tar, or list of tars")
    add("--out", metavar="DIR", help="folder for the index (default: the folder of the shards; required for remote shards)")
    add("--label-field", metavar="F", help="where labels are: an extension (cls), a field of the json member, or `folder`, the last folder of the key")
    add("--image-field", metavar="E", help="extension of the image, if samples have several")
    add("--classes", metavar="FILE", help="class names in the order of the labels: a file with one name per line, a JSON file, or a folder of packed shards")
    add("--names", metavar="FILE", help="JSON {class name: display name}")
    add("--on-error", choices=("fail", "skip"), default="fail", help="samples that cannot be used: stop, or leave them out and list them (default: fail)")
    add("--processes", type=int, metavar="N", help="number of processes (default: the number of cores)")
    add("--retries", type=int, default=5, metavar="N", help="how often a failed download is retried (default: 5)")
    add("--timeout", type=float, default=60.0, metavar="SECONDS", help="seconds without data after which a download counts as failed (default: 60)")
    add("--overwrite", action="store_true", help="replace an existing index")
    add_limits(parser)
    add("--quiet", action="store_true", help="print only errors and what was left out")
    return parser
