"""`dtl folds`: cross-validation. The work is `dtl.inference.folds`; this is its command line."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtl.errors import EXIT_STOPPED, UserError
from dtl.files import user_path, write_json_whole
from dtl.text import Log, OptionParser, at_least, to_nobody, to_stderr, to_stdout

if TYPE_CHECKING:
    from dtl.inference.folds import Folds, Together

_DESCRIPTION = """\
Cross-validation: train a recipe once for each fold of the training images, without that fold, and predict every image with the run that did not see it.
The options are those of `dtl train`. Each fold is an ordinary run in RUNS/NAME-folds/fold-N: the same command resumes it, and one that is done is not
trained again. A fold chooses nothing: weights are chosen by validation images that are held out of the rest (data.val_fraction, else 10 %).

When all folds are done, RUNS/NAME-folds gets predictions.csv (each image), results.json (all numbers) and report/index.html.
"""
_EPILOG = """\
examples:
  dtl folds --config finetune --data.train photos --folds 5
  dtl folds --config finetune --data.train photos --folds 5 --data.group.regex '(patient[0-9]+)_'
  dtl folds --config finetune --data.train photos --folds 5 --fold 2
  dtl folds --config finetune --data.train photos --folds 5 --refit
"""


def run(arguments: Sequence[str]) -> int:
    """The command. UserError if the recipe or the options cannot be used, or do not belong to the folds that are there."""
    started = time.monotonic()
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments))
    from dtl.config import Config, load_config

    parser.refuse_unknown(rest, Config.model_fields)
    if options.fold is not None and options.fold > options.folds:
        raise UserError(f"--fold {options.fold}: there are {options.folds} folds (--folds)")
    if options.json not in (None, "-") and not user_path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: the folder {user_path(options.json).absolute().parent} does not exist")
    if options.fold is not None and options.refit:
        raise UserError("--fold trains one fold, and --refit needs all of them: use one of the two")
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if several and options.fold is None and not options.refit:
        raise UserError("several processes train one run at a time: --fold N, or --refit when all are done; dtl folds by itself then adds them up")
    recipe = ["--config", options.config] if options.config else []
    config, name = load_config([*recipe, *rest, "--data.fold.number", "0", "--data.fold.of", str(options.folds)])
    from dtl.inference.folds import begin, check_splits, open_folds

    log = to_stderr if os.environ.get("RANK", "0") == "0" else to_nobody
    folds = open_folds(config, name, log=log)
    check_splits(folds, folds.missing() if options.fold is None else [options.fold])
    begin(folds)
    if several and options.refit and (left := folds.missing()):
        raise UserError(f"--refit on several processes is the last: train fold {left[0]} before it (--fold {left[0]})")
    alone = 0 if several and options.refit else options.fold
    for number in folds.missing() if alone is None else [alone]:
        if status := _train(folds, number, started, log):
            return status
    if alone is not None:
        left = folds.missing()
        log(f"folds left: {', '.join(map(str, left))}" if left else "all folds are done: dtl folds by itself adds them up")
        return 0
    return _results(folds, options, started)


def _train(folds: Folds, number: int, started: float, log: Log) -> int:
    """Train one fold, or all images (0); 0 when it is done."""
    from dtl.report import report_at_end
    from dtl.runs.folder import stopped_under_this_agent
    from dtl.training.run import run as run_training

    if folds.is_done(number):
        log(f"{folds.folder / folds.name(number)} is done")
        return 0
    if stopped_under_this_agent(folds.folder / folds.name(number)):
        return EXIT_STOPPED
    return run_training(folds.config_of(number), folds.name(number), report=report_at_end, started=started).exit_status


def _results(folds: Folds, options: argparse.Namespace, started: float) -> int:
    from dtl.inference.folds import CSV_NAME, collect, expected, lines
    from dtl.inference.tables import table, write_csv

    found = collect(folds, log=to_stderr)
    values = found.values
    write_csv(folds.folder / CSV_NAME, found.seen, folds.shards, values["classes"], folds=folds.numbers, what="")
    _write(folds, found, options)
    if options.json != "-":
        to_stdout("", *lines(values), "", *table(values).split("\n"))
    if options.refit:
        if status := _train(folds, 0, started, to_stderr):
            return status
        if values["refit"] is None:
            values["refit"] = folds.refit
            _write(folds, found, options)
    if options.json == "-":
        print(json.dumps(values, allow_nan=False))
        return 0
    if values["refit"] is not None:
        to_stdout("", f"{values['refit']} is trained on all images; {expected(values)}")
    to_stdout("", f"report       {folds.folder}/report/index.html", f"each image   {folds.folder}/predictions.csv", f"all numbers  {folds.folder}/results.json")
    return 0


def _write(folds: Folds, found: Together, options: argparse.Namespace) -> None:
    """All numbers, and the page."""
    from dtl.inference.folds import RESULTS_NAME
    from dtl.report.folds import make_folds_page

    for file in [folds.folder / RESULTS_NAME, *([] if options.json in (None, "-") else [user_path(options.json)])]:
        try:
            write_json_whole(file, found.values)
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
    make_folds_page(folds.folder, found.values, found.seen.predictions.labels, found.seen.predictions.predicted)


def _parser() -> OptionParser:
    parser = OptionParser(prog="dtl folds", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--config", metavar="FILE", help="the recipe; its keys are options too: --section.key VALUE (default: the built-in digits)")
    add("--folds", type=at_least(2), default=5, metavar="K", help="number of folds (default: 5)")
    add("--fold", type=at_least(1), metavar="N", help="train fold N alone: on several processes, or several folds at once")
    add("--refit", action="store_true", help="afterwards train the recipe on all images (RUNS/NAME-folds/refit)")
    add("--json", metavar="FILE", help="write all numbers to FILE too; - prints them instead of the table")
    return parser
