"""`dtl report RUN [RUN ...]`: pictures and a page about one run, or about several side by side. The work is `dtl.report`."""

from __future__ import annotations

import argparse

from dtl.errors import UserError
from dtl.text import TRUST, OptionParser, counted, to_stderr, to_stdout

_DESCRIPTION = """\
Pictures and one self-contained page (index.html) about a run: curves, the images as the network saw them, predictions, confusion,
numbers by class, what was transferred. Given several runs, one plot and one table that compare them.

RUN is a run folder. The page opens without a network connection. What is missing (for example data that has moved) is left out, and the page lists it.
"""
_EPILOG = """\
examples:
  dtl report runs/digits                              writes runs/digits/report/index.html and PNGs
  dtl report runs/rotnet runs/supervised              writes comparison/index.html and compare.png
  dtl report runs/rot-s* runs/sup-s* --out seeds      runs that differ in their seed only become one curve with a band
"""


def run(argv: list[str]) -> int:
    """The command. UserError where a RUN is no run folder or nothing can be written."""
    options = _parser().parse_args(argv)
    if options.max_images < 1:
        raise UserError(f"--max-images {options.max_images}: at least one image")
    if options.seconds < 0:
        raise UserError(f"--seconds {options.seconds:g}: 0 or more")
    if options.csv is not None:
        from dtl.report.csv_file import write_csv

        to_stdout(f"{options.csv}: {counted(write_csv(options.runs, options.csv), 'line')}")
        return 0
    from dtl.report import make_comparison, make_report

    if len(options.runs) == 1:
        page = make_report(
            options.runs[0],
            out=options.out,
            device=options.device,
            max_images=options.max_images,
            seconds=options.seconds,
            trust=options.trust,
            log=to_stderr,
        )
    else:
        page = make_comparison(options.runs, out=options.out, log=to_stderr)
    to_stdout(str(page))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="dtl report",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="a run folder, such as runs/digits")
    add("--out", metavar="FOLDER", help="where to write (RUN/report; for several runs comparison/)")
    add("--csv", metavar="FILE", help="write the history of the runs as one CSV table instead, a line an event (train, val, epoch)")
    add("--max-images", type=int, default=1000, metavar="N", help="show the model at most N validation images, drawn at random (1000)")
    add("--seconds", type=float, default=6.0, metavar="S", help="and for about S seconds at most (6)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs (auto: as the run did)")
    add("--trust", action="store_true", help=TRUST)
    return parser
