"""`dtl evaluate RUN|MODEL`: exact metrics of a finished model. The work is `dtl.inference.assess`; this is its command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtl.errors import UserError
from dtl.text import OptionParser, at_least, some, to_nobody, to_stderr

if TYPE_CHECKING:
    from dtl.config import Config
    from dtl.data.shards.index import Shards
    from dtl.distributed.runtime import Runtime
    from dtl.inference.model import StoredModel

_DESCRIPTION = """\
Measure a trained model on validation images: top1, top5, loss, precision, recall and F1 of each class, the confusion matrix, the
expected calibration error, the classes that are mixed up most, and the images with the greatest loss.

The numbers are exact and the same on any number of processes:
  accelerate launch --num_processes 4 -m dtl evaluate runs/NAME
"""
_EPILOG = """\
examples:
  dtl evaluate runs/digits
  dtl evaluate runs/flowers --data.val photos/test --json flowers.json
  dtl evaluate models/flowers --data.val shards/val --device cpu
"""
_DEFAULT_BATCH_SIZE = 64


def run(arguments: Sequence[str]) -> int:
    """The command. UserError for a model or data that do not go together."""
    options = parser().parse_args(list(arguments))
    values = measure(options)
    if values is not None:
        from dtl.inference.tables import table

        _tell(values, table(values), options)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any] | None:
    """All numbers, on the main process; None on the others."""
    from dtl.distributed.runtime import Runtime
    from dtl.inference.assess import RankBatches, assess
    from dtl.inference.model import find_model, open_model, place, precision_line, stored_config, trained_in
    from dtl.inference.tables import report

    _check_json(options.json)
    folder, run_folder = find_model(options.model)
    config = stored_config(run_folder) if run_folder is not None else None
    before = None
    if options.precision is None:  # a folder of an older dtl does not say it; its run does, where somebody asked for one
        before = trained_in(folder) or (config.precision if config is not None and config.precision != "auto" else None)
    with Runtime(device=options.device, precision=options.precision or "auto", trained_in=before) as runtime:
        runtime.signals.release()  # nothing to save: a signal just ends it
        with runtime.together("model"):
            model = open_model(folder)
        for line in precision_line(folder, before, runtime):
            to_stderr(line)
        shards = _open_data(options, config, model, runtime)
        batches = RankBatches(shards, model.transform, batch_size=options.batch_size, workers=_workers(options, config), runtime=runtime)
        seen = assess(
            place(model, runtime),
            batches,
            runtime,
            task=model.task,
            num_outputs=len(model.classes),
            skip_damaged=options.on_error == "skip",
        )
        if not runtime.is_main:
            return None
        return {
            **report(seen, shards, classes=model.classes, names=model.shown_names),
            "model": str(folder),
            "data": {"folder": str(shards.folder), "dataset_id": shards.dataset_id},
            "precision": runtime.precision,
        }


def _tell(values: dict[str, Any], table: str, options: argparse.Namespace) -> None:
    for one in values["damaged"]:
        print(f"left out: {one['path']}: {one['reason']}", file=sys.stderr)
    if options.json == "-":
        print(json.dumps(values, allow_nan=False))
        return
    print(table)
    if options.json is not None:
        from dtl.files import write_whole

        data = (json.dumps(values, indent=1, allow_nan=False) + "\n").encode()
        try:
            write_whole(Path(options.json), lambda file: file.write(data))
        except OSError as error:
            raise UserError(f"--json {options.json}: cannot be written: {error.strerror or error}") from error
        print(f"\nall numbers: {options.json}")


def _open_data(options: argparse.Namespace, config: Config | None, model: StoredModel, runtime: Runtime) -> Shards:
    """The images to evaluate on, whose labels must mean the model's classes; a folder of images is packed into the cache first."""
    from dataclasses import replace

    from dtl.data.open import open_split
    from dtl.data.remote.address import RemoteOptions

    source, details = _source(options, config)
    own_labels = model.task.name == "classify"
    other_set = details.pop("other_set")
    data = None if config is None else config.data
    remote = RemoteOptions() if data is None else RemoteOptions(cache_gb=data.cache_gb, retries=data.retries, timeout=data.timeout, allow_pipe=data.allow_pipe)

    def opened(found: str | None = None) -> Shards:
        return open_split(
            source,
            split="val",
            classes=model.classes if own_labels and other_set else None,
            progress=runtime.is_main,
            say=to_stderr if runtime.is_main else to_nobody,
            remote=remote if runtime.local_rank == 0 else replace(remote, leader=False),
            found=found,
            **details,
        )

    with runtime.together("data"):
        (folder,) = runtime.once_a_node(lambda: [str(opened().folder)])
        shards = opened(folder)
        if own_labels:
            _check_classes(source, shards.classes, model.classes)
        if shards.num_samples == 0:
            raise UserError(f"{source} holds no images to evaluate on")
    runtime.same("the validation data", shards.dataset_id)
    return shards


def _source(options: argparse.Namespace, config: Config | None) -> tuple[str, dict[str, Any]]:
    """What to evaluate on, and how it is packed: as training packed it, so that its cache is used again.

    `other_set`: it is a set of its own, whose classes are the model's, and not a split of the training set.
    """
    if config is None:
        if options.data_val is None:
            raise UserError(f"{options.model} is a model folder, which knows no data; give it with --data.val SRC, or name its run (runs/NAME)")
        return options.data_val, {"other_set": True, "on_error": options.on_error}
    data = config.data
    common = {"cache_dir": data.cache_dir, "names": data.names, "on_error": data.on_error}
    if options.data_val is not None:
        # Display names are the model's; those of training need not fit here.
        return options.data_val, {**common, "names": None, "other_set": True, "on_error": options.on_error}
    if data.val is not None:
        return data.val, {**common, "other_set": True}
    assert data.train is not None
    return data.train, {**common, "val_fraction": data.val_fraction, "other_set": False}


def _check_classes(source: str, found: Sequence[str], known: Sequence[str]) -> None:
    """Label numbers must mean the same names: otherwise all would be scored against wrong classes in silence."""
    if tuple(found) == tuple(known):
        return
    unknown = [name for name in found if name not in set(known)]
    missing = [name for name in known if name not in set(found)]
    if unknown:
        what = f"it has {some(unknown, limit=6, quoted=True)}, which the model does not know"
    elif missing:
        what = f"it was packed without {some(missing, limit=6, quoted=True)}, so its label numbers mean other classes"
    else:
        at = next(i for i, (a, b) in enumerate(zip(found, known)) if a != b)
        what = f"they come in another order: label {at} is '{found[at]}' there and '{known[at]}' in the model"
    raise UserError(
        f"{source}: its classes are not the model's {some(known, limit=6, quoted=True)}: {what}; "
        "give the images themselves, or pack them with the model's classes (`dtl pack SRC DST --classes-from TRAIN_SHARDS`)"
    )


def _workers(options: argparse.Namespace, config: Config | None) -> int:
    if options.workers is not None:
        return int(options.workers)
    return config.data.workers if config is not None else 2


def _check_json(path: str | None) -> None:
    """Before the work, not after it."""
    if path not in (None, "-"):
        parent = Path(str(path)).absolute().parent
        if not parent.is_dir():
            raise UserError(f"--json {path}: the folder {parent} does not exist")


def parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="dtl evaluate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="RUN|MODEL", help="a run (runs/NAME: its model, its validation data) or a model folder")
    add("--data.val", "--data-val", dest="data_val", metavar="SRC", help="other images: a folder a class, a list file, packed shards, digits")
    add("--json", metavar="FILE", help="write all numbers there; - prints them instead of the table")
    add("--batch-size", type=at_least(1), default=_DEFAULT_BATCH_SIZE, metavar="N", help=f"images at once on each process ({_DEFAULT_BATCH_SIZE})")
    add("--workers", type=at_least(0), metavar="N", help="loader processes of each process (the run's, else 2)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (auto: the GPU where there is one)")
    add("--precision", choices=("auto", "no", "bf16", "fp16"), help="number format of the computation (the run's, else auto)")
    add("--on-error", choices=("fail", "skip"), default="fail", help="damaged images: end, or leave them out and list them (fail)")
    return parser
