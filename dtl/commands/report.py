"""`dtl report RUN [RUN ...]`: plots and a page about one run, or a comparison of several. The work is `dtl.report`."""

from __future__ import annotations

import argparse

from dtl.errors import UserError
from dtl.text import TRUST, OptionParser, counted, to_stderr, to_stdout

_DESCRIPTION = """\
Plots and one self-contained page (index.html) about a run: curves, augmented training images, predictions, confusion matrix, metrics
per class, transferred weights. For several runs: one plot and one table that compare them; for two runs also McNemar's exact test on the
validation images of both.

RUN is a run folder. The page opens without a network connection. What is missing (for example data that has moved) is left out, and the page lists it.
"""
_EPILOG = """\
examples:
  dtl report runs/digits                              writes runs/digits/report/index.html and PNGs
  dtl report runs/rotnet runs/supervised              writes comparison/index.html and compare.png
  dtl report runs/lr/* --table-csv lr.csv             writes the sorted table of the runs to a file too
  dtl report runs/rot-s* runs/sup-s* --out seeds      runs that differ only in their seed become one curve with a band
"""


def run(argv: list[str]) -> int:
    """The command. UserError if a RUN is not a run folder or nothing can be written."""
    options = _parser().parse_args(argv)
    if options.max_images < 1:
        raise UserError(f"--max-images must be at least 1, got {options.max_images}")
    if options.seconds < 0:
        raise UserError(f"--seconds must be at least 0, got {options.seconds:g}")
    if options.csv is not None:
        from dtl.report.csv_file import write_csv

        to_stdout(f"{options.csv}: {counted(write_csv(options.runs, options.csv), 'line')}")
        return 0
    from dtl.report import make_comparison, make_report

    if len(options.runs) == 1 and options.table_csv is None:
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
        page = make_comparison(options.runs, out=options.out, table_csv=options.table_csv, log=to_stderr)
        if options.table_csv is not None:
            to_stdout(options.table_csv)
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
    add("--out", metavar="FOLDER", help="output folder (default: RUN/report, or comparison for several runs)")
    add("--csv", metavar="FILE", help="write only a CSV table of the runs' history, one line per event (train, val, epoch)")
    add("--table-csv", metavar="FILE", help="write also the table of the comparison to FILE: one line per run, one column per setting that differs")
    add("--max-images", type=int, default=1000, metavar="N", help="a run without predictions.npy: run the model on at most N random images (default: 1000)")
    add("--seconds", type=float, default=6.0, metavar="S", help="and for about S seconds at most (default: 6)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run the model (default: auto, as in the run)")
    add("--trust", action="store_true", help=TRUST)
    return parser
