"""`dtl verify SHARDS`: check that packed shards are complete, unchanged and readable. The work is `dtl.data.verify`."""

from __future__ import annotations

import argparse
from shlex import quote
from typing import TYPE_CHECKING

from dtl.commands import add_limits, limits
from dtl.credentials import bare
from dtl.errors import UserError
from dtl.text import OptionParser, counted, to_stderr, to_stdout

if TYPE_CHECKING:
    from dtl.data.verify import VerifyReport

_DESCRIPTION = """\
Check packed or indexed shards: sizes, sha256, the tars' structure, index against tars, the crc of every image, labels, and that every
image decodes. Prints each problem with shard, key, offset and reason. Exit status 0: no problems; 2: something is damaged, or could not be
read (a server or a disk that is away, a permission).
Exact copies of images, within a split and in two splits of the folder, are counted in one line; they are not damage.
"""
_EPILOG = """\
With --quarantine the damaged samples are listed in quarantine.json next to the manifest, and training leaves them out. That changes the
data set: a run that was started with them cannot be resumed without them. The shards are not changed. The exit status is then 0 if all
other samples are undamaged. What could not be read is not damaged: it is counted, and never set aside. To use the samples again, remove
quarantine.json, or repair the shards and verify them again.
"""


def run(arguments: list[str]) -> int:
    """The command. UserError if the folder has no manifest, or an index that does not belong to it."""
    options = _parser().parse_args(arguments)
    options.shards = bare(options.shards)
    from dtl.config.models import DataConfig, arguments_checked
    from dtl.data.copies import describe_copies, find_copies
    from dtl.data.remote.address import is_remote
    from dtl.data.shards.index import Shards
    from dtl.data.verify import describe, folders_to_verify, verify

    if options.quarantine and is_remote(options.shards):
        raise UserError(f"{options.shards}: --quarantine writes beside the manifest, which is remote; verify a local copy, then upload its quarantine.json")
    with arguments_checked():
        data = DataConfig(cache_dir=options.cache_dir, cache_gb=options.cache_gb, allow_pipe=options.allow_pipe, **limits(options))
    usable = True
    folders = folders_to_verify(options.shards, data)
    for folder in folders:
        report = verify(folder, data, processes=options.processes, progress=not options.quiet, quarantine=options.quarantine)
        describe(report, to_stderr)
        if not options.quiet:
            to_stdout(_summary(report, quarantine=options.quarantine))
        usable = usable and report.is_usable
    splits = [Shards.open(folder, data) for folder in folders]
    names = [shards.folder.name for shards in splits]
    if is_remote(options.shards):  # whose folder here has no name of its own
        names = [str(shards.manifest.made_by.get("split", name)) for shards, name in zip(splits, names)]
    if line := describe_copies(find_copies(dict(zip(names, splits)))):
        to_stderr(line)
    return 0 if usable else 2


def _summary(report: VerifyReport, *, quarantine: bool) -> str:
    shards = counted(report.num_shards, "shard")
    new = len(report.new_samples)
    parts = [f"{report.folder}: {counted(report.num_samples, 'sample')} in {shards}, checked in {report.seconds:.1f} s"]
    if report.in_quarantine:
        parts.append(f"{len(report.in_quarantine):,} in quarantine")
    if report.unread:
        parts.append(f"{report.num_unread:,} could not be read, so nothing is known about them; verify again when they can")
    if new:
        parts.append(f"{new:,} damaged; repair the shards, or leave these out: dtl verify {quote(str(report.folder))} --quarantine")
    elif report.shards and not report.is_usable:
        parts.append("the shards named above do not match the manifest")
    elif report.unread:
        pass
    elif not report.in_quarantine:
        parts.append("no problems")
    elif quarantine:
        parts.append("no other problems")
    return "; ".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(prog="dtl verify", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="folder with a manifest.json, or with train/ and val/ that have one; also a remote one (https://, s3:// ...)")
    add("--quarantine", action="store_true", help="leave damaged samples out of training from now on")
    add("--processes", type=int, metavar="N", help="number of processes (default: the number of cores)")
    add("--cache-dir", metavar="DIR", help="folder for downloaded shards (default: $DTL_CACHE, else the user's cache folder)")
    add("--cache-gb", type=float, metavar="GB", help="largest size of the downloaded shards, in 10^9 bytes (default: all shards are kept)")
    add("--allow-pipe", action="store_true", help="run the `pipe:` commands in the manifest")
    add_limits(parser)
    add("--quiet", action="store_true", help="print only problems")
    return parser
