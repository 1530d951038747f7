"""`dtl convert FILE OUT.safetensors`: the tensors of any file of weights, without running anything of it."""

from __future__ import annotations

import argparse

from dtl.files import user_path
from dtl.text import OptionParser, counted, to_stderr, to_stdout

_DESCRIPTION = """\
Write the tensors of a file of weights as safetensors, which every program can open safely.

FILE is a torch file (.pt, .pth, .bin, .ckpt, old or new), a whole pickled module, a TorchScript archive, a pickle with NumPy arrays
(detectron2's .pkl) or a safetensors file. Nothing in it is run; unknown objects are dropped and listed. Names are kept: keys of nested
dicts are joined by dots, and a single dict around all tensors (state_dict, model) is left out. FILE#KEY selects one of several.
"""
_EPILOG = """\
examples:
  dtl convert R-50.pkl R-50.safetensors
  dtl convert checkpoint.pth#model_ema weights.safetensors
"""


def run(arguments: list[str]) -> int:
    """The command. UserError where the file holds no tensors, or OUT exists."""
    options = _parser().parse_args(arguments)
    from dtl.checkpoint.transfer.source.convert import convert

    done = convert(options.file, user_path(options.out), overwrite=options.overwrite)
    for line in done.dropped:
        to_stderr(f"left out: {line}")
    to_stdout(f"{done.path}: {counted(done.num_tensors, 'tensor')}, {done.num_bytes / 2**20:.1f} MiB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="dtl convert", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="a file of weights; FILE#KEY selects one of several state dicts in it")
    add("out", metavar="OUT", help="the file to write; it ends in .safetensors")
    add("--overwrite", action="store_true", help="overwrite OUT if it exists")
    return parser
