"""`dtl calibrate RUN|MODEL`: probabilities that can be believed, and a threshold. The work is `dtl.inference.calibrate`; this is its command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtl.errors import UserError
from dtl.files import user_path, write_whole
from dtl.text import TRUST, OptionParser, at_least, to_nobody, to_stderr, to_stdout

if TYPE_CHECKING:
    from dtl.inference.model import RunningModel

_DESCRIPTION = """\
Fit a temperature on the validation images of a run (Guo et al. 2017): probabilities are computed from logits / temperature, so that of images
with a probability of 90 % nine in ten are right. The predicted classes stay the same. With --threshold, and two classes, also the probability
from which on the second class (in the order of the class names) is predicted.

Both are stored in model.json and used by dtl predict, dtl evaluate and dtl export; the weights are not changed. They are reported on the run's
test images, if it has some, and on each half of the validation images with the temperature of the other half (a group of data.group is in one half),
with the 95 % interval of each change. The loss is what is fitted; of few images, much of a calibration error is there by chance.
"""
_EPILOG = """\
examples:
  dtl calibrate runs/flowers
  dtl calibrate runs/moles --threshold balanced_accuracy
  dtl calibrate models/flowers --data.val photos/val
"""


def run(arguments: Sequence[str]) -> int:
    """The command. UserError if the model or the data cannot be used, or no temperature fits."""
    options = _parser().parse_args(list(arguments))
    if options.json is not None and not user_path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: the folder {user_path(options.json).absolute().parent} does not exist")
    from dtl.checkpoint.resume.model_folder import write_calibration
    from dtl.inference.calibrate import in_words
    from dtl.inference.model import find_model, running_model
    from dtl.models.model_json import read_model_json

    if options.remove:
        folder = find_model(options.model)[0]
        write_calibration(folder, None, read_model_json(folder))
        to_stdout(f"{folder}: no temperature and no threshold any more")
        return 0
    with running_model(options.model, device=options.device, precision=options.precision, trust=options.trust, log=to_stderr) as model:
        runtime, stored = model.runtime, model.stored
        calibration, found = _calibrated(model, options)
        with runtime.together("model.json"):
            if runtime.is_main:
                write_calibration(stored.folder, calibration, stored.facts)
        if runtime.is_main:
            to_stdout(*in_words(found, stored.shown_names), f"stored in {stored.folder}/model.json")
            if options.json is not None:
                _write(user_path(options.json), found)
    return 0


def _calibrated(model: RunningModel, options: argparse.Namespace) -> Any:
    from dtl.inference.calibrate import answers, calibrate, check_threshold
    from dtl.inference.evaluate import Split, groups_of_images, note_test_look, open_images
    from dtl.runs.folder import read_status

    runtime, stored = model.runtime, model.stored
    with runtime.together("--threshold"):
        if options.threshold is not None:
            check_threshold(stored.classes)  # before the work
    has_test = options.data_test is not None or (model.run is not None and options.data_val is None and runtime.agree(read_status(model.run).test is not None))
    found = {}
    places: dict[Split, str | None] = {"val": options.data_val, **({"test": options.data_test} if has_test else {})}
    for split, place in places.items():
        shards, workers = open_images(
            model,
            place,
            split,
            batch_size=options.batch_size,
            workers=options.workers,
            on_error=options.on_error,
            allow_pipe=False,
            log=to_stderr if runtime.is_main else to_nobody,
        )
        groups = groups_of_images(model, shards, place, split)
        found[split] = answers(
            model,
            shards,
            batch_size=options.batch_size,
            workers=workers,
            skip_damaged=options.on_error == "skip",
            groups=None if groups is None else groups.codes,
        )
        with runtime.together("looks"):
            if runtime.is_main and split == "test":
                note_test_look(model, shards, split)
    with runtime.together("calibration"):
        return calibrate(model, found["val"], criterion=options.threshold, test=found.get("test"))


def _write(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    try:
        write_whole(path, lambda out: out.write(text.encode()))
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror or error}") from error
    to_stdout(f"all numbers: {path}")


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="dtl calibrate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="RUN|MODEL", help="a run (runs/NAME: its model, its validation data) or a model folder")
    add("--data.val", "--data-val", dest="data_val", metavar="SRC", help="other images to fit on: a folder with one folder per class, a list, packed shards")
    add("--data.test", "--data-test", dest="data_test", metavar="SRC", help="images to report on (default: the run's test images)")
    add("--threshold", choices=("accuracy", "balanced_accuracy", "f1"), help="two classes: choose the threshold by this metric (f1: of the second class)")
    add("--remove", action="store_true", help="take temperature and threshold out of model.json")
    add("--json", metavar="FILE", help="write all numbers to FILE too")
    add("--batch-size", type=at_least(1), default=64, metavar="N", help="batch size per process (default: 64)")
    add("--workers", type=at_least(0), metavar="N", help="loader workers per process (default: as in the run, else auto)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto, the GPU if there is one)")
    add("--precision", choices=("auto", "no", "bf16", "fp16"), help="precision of the computation (default: that of the run, else auto)")
    add("--on-error", choices=("fail", "skip"), default="fail", help="damaged images: stop, or leave them out (default: fail)")
    add("--trust", action="store_true", help=TRUST)
    return parser
