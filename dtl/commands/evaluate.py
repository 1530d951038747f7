"""`dtl evaluate RUN|MODEL`: exact metrics of a finished model. The work is `dtl.inference.evaluate`; this is its command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from dtl.errors import UserError
from dtl.files import user_path, write_whole
from dtl.text import TRUST, OptionParser, at_least, to_stderr, to_stdout

_DESCRIPTION = """\
Measure a trained model on validation images: top1, top5, loss, precision, recall and F1 of each class, the confusion matrix, the
expected calibration error, the most confused classes, and the images with the largest loss. Balanced accuracy, macro F1, AUROC and average
precision; 95 % intervals of all (Wilson's; a bootstrap with a fixed seed).

The numbers are exact and the same on any number of processes:
  accelerate launch --num_processes 4 -m dtl evaluate runs/NAME
"""
_EPILOG = """\
examples:
  dtl evaluate runs/digits
  dtl evaluate runs/flowers --data.val photos/test --json flowers.json
  dtl evaluate runs/flowers --split test
  dtl evaluate runs/flowers --csv images.csv --hardest 50
  dtl evaluate models/flowers --data.val shards/val --device cpu
"""
_DEFAULT_BATCH_SIZE = 64


def run(arguments: Sequence[str]) -> int:
    """The command. UserError if the model or the data cannot be used, or do not fit together."""
    options = _parser().parse_args(list(arguments))
    _check_file("--json", None if options.json == "-" else options.json)
    _check_file("--csv", options.csv)
    from dtl.config.models import GroupConfig
    from dtl.inference.assess import NUM_HARDEST
    from dtl.inference.evaluate import evaluate
    from dtl.inference.model import running_model

    with running_model(options.model, device=options.device, precision=options.precision, trust=options.trust, log=to_stderr) as model:
        values = evaluate(
            model,
            options.data_val,
            split=options.split,
            batch_size=options.batch_size,
            workers=options.workers,
            on_error=options.on_error,
            allow_pipe=options.allow_pipe,
            hardest=NUM_HARDEST if options.hardest is None else options.hardest,
            csv=options.csv,
            flip=options.flip,
            by_group=options.by_group or options.group_regex is not None,
            group=None if options.group_regex is None else GroupConfig(regex=options.group_regex),
            log=to_stderr,
        )
        if model.runtime.is_main:
            _print(values, options)
    return 0


def _print(values: dict[str, Any], options: argparse.Namespace) -> None:
    file = options.json
    for one in values["damaged"]:
        to_stderr(f"left out: {one['path']}: {one['reason']}")
    if file == "-":
        print(json.dumps(values, allow_nan=False))
        return
    from dtl.inference.tables import TABLE_HARDEST, group_lines, table

    to_stdout(*table(values, hardest=TABLE_HARDEST if options.hardest is None else options.hardest).split("\n"))
    if "by_group" in values:
        to_stdout("", *group_lines(values["by_group"]))
    if "look" in values:
        to_stdout("", f"test set: look {values['look']} at it by runs beside {options.model}")
    if file is not None:
        try:
            text = json.dumps(values, indent=1, allow_nan=False) + "\n"
            write_whole(user_path(file), lambda out: out.write(text.encode()))
        except OSError as error:
            raise UserError(f"--json {file}: cannot be written: {error.strerror or error}") from error
        to_stdout("", f"all numbers: {file}")
    if options.csv is not None:
        to_stdout("", f"each image: {options.csv}")


def _check_file(option: str, path: str | None) -> None:
    """Before the work, not after it."""
    if path is not None:
        parent = user_path(path).absolute().parent
        if not parent.is_dir():
            raise UserError(f"{option} {path}: the folder {parent} does not exist")
        if path == "-" or user_path(path).is_dir():
            raise UserError(f"{option} {path}: not a file; give the name of one")


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="dtl evaluate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="RUN|MODEL", help="a run (runs/NAME: its model, its validation data) or a model folder")
    add("--data.val", "--data-val", dest="data_val", metavar="SRC", help="other images: a folder with one folder per class, a list, packed shards, digits")
    add("--split", choices=("val", "test"), default="val", help="which split of the run (default: val); each look at a test set is counted")
    add("--by-group", action="store_true", help="also measure groups of images (the run's data.group): mean probabilities, one answer per group")
    add("--group-regex", metavar="R", help="measure groups: the first part in parentheses of R in an image's path is its group")
    add("--flip", action="store_true", help="average the probabilities of each image and its mirror image")
    add("--data.allow-pipe", "--data-allow-pipe", dest="allow_pipe", action="store_true", help="run the `pipe:` commands in the manifest of SRC")
    add(
        "--json",
        metavar="FILE",
        help="write all numbers to FILE; - prints them instead of the table (the confusion matrix of more than 1,000 classes as the pairs that occur)",
    )
    add("--csv", metavar="FILE", help="write one line per image to FILE: path, label, prediction, its probability, loss")
    add("--hardest", type=at_least(0), metavar="N", help="number of images with the greatest loss to list (default: 20 in --json, 5 in the table)")
    add("--batch-size", type=at_least(1), default=_DEFAULT_BATCH_SIZE, metavar="N", help=f"batch size per process (default: {_DEFAULT_BATCH_SIZE})")
    add("--workers", type=at_least(0), metavar="N", help="loader workers per process (default: as in the run, else from the cores of the machine)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto, the GPU if there is one)")
    add("--precision", choices=("auto", "no", "bf16", "fp16"), help="precision of the computation (default: that of the run, else auto)")
    add("--on-error", choices=("fail", "skip"), default="fail", help="damaged images: stop, or leave them out and list them (default: fail)")
    add("--trust", action="store_true", help=TRUST)
    return parser
