"""`dtl predict MODEL PATH...`: class names and probabilities for images. The work is `dtl.inference.predict`; this is its command line."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dtl.errors import UserError
from dtl.text import OptionParser, at_least, counted, to_stderr

if TYPE_CHECKING:
    from dtl.distributed.runtime import Runtime
    from dtl.inference.images import ImageInputs
    from dtl.inference.model import StoredModel
    from dtl.inference.predict import Prediction

_DESCRIPTION = """\
Predict the classes of images with a trained model; images are prepared as the model folder says.

PATH is an image, a folder of images (with all folders in it), a list file (a path a line, or CSV with a column path), a folder of
packed shards, or - for a list on standard input. The output keeps the order of the PATHs, and within a folder that of the sorted paths.

CSV has the columns path,label,name,probability: the most probable class, its display name and its probability. JSON lines have the
same keys, and with --top N a list `predictions` of the N most probable classes. Images that cannot be read are listed on standard error.
"""
_EPILOG = """\
examples:
  dtl predict runs/flowers photos/new --out flowers.csv
  dtl predict runs/flowers/model a.jpg b.jpg --out - --format jsonl --top 5
  find photos -name '*.png' | dtl predict runs/flowers - --out flowers.jsonl
"""
_FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_DIGITS = 6


def run(arguments: Sequence[str]) -> int:
    """The command; 0 when at least one image could be read."""
    options = _parser().parse_args(list(arguments))
    kind = _format(options)
    from dtl.distributed.runtime import Runtime
    from dtl.inference.images import find_images
    from dtl.inference.model import find_model, open_model, precision_line, trained_in

    folder, _ = find_model(options.model)
    before = trained_in(folder) if options.precision is None else None
    with Runtime(device=options.device, precision=options.precision or "auto", trained_in=before) as runtime:
        runtime.signals.release()  # nothing to save: a signal just ends it
        with runtime.together("model"):
            model = open_model(folder)
        for line in precision_line(folder, before, runtime):
            to_stderr(line)
        inputs: ImageInputs | None = None
        with runtime.together("images"):
            if runtime.is_main:
                inputs = find_images(options.paths)
        inputs = runtime.agree(inputs)
        assert inputs is not None
        problems = _write_all(options, kind, model, inputs, runtime)
    if runtime.is_main:
        _tell(options, len(inputs), problems)
    if len(problems) == len(inputs):
        raise UserError("the image could not be read" if len(inputs) == 1 else f"none of the {len(inputs):,} images could be read")
    return 0


def _write_all(options: argparse.Namespace, kind: str, model: StoredModel, inputs: ImageInputs, runtime: Runtime) -> list[tuple[str, str]] | range:
    """Predict, and write as it comes (main process). Returns (path, reason) of what could not be read, on the other ranks as many."""
    from dtl.inference.model import place
    from dtl.inference.predict import predict

    parts = predict(
        place(model, runtime),
        model.transform,
        inputs,
        runtime,
        top=min(options.top, len(model.classes)),
        batch_size=options.batch_size,
        workers=options.workers,
    )
    problems: list[tuple[str, str]] = []
    if runtime.is_main:
        with closing(parts), _output(options.out) as file:
            writer = _Writer(file, kind, model, lists=options.top > 1)
            for part in parts:
                problems += [(one.path, one.problem) for one in part if one.problem is not None]
                writer.write([one for one in part if one.problem is None])
    else:
        for _ in parts:
            pass
    count = runtime.agree(len(problems))
    return problems if runtime.is_main else range(count)


class _Writer:
    def __init__(self, file: TextIO, kind: str, model: StoredModel, *, lists: bool) -> None:
        self._file, self._classes, self._names, self._lists = file, model.classes, model.shown_names, lists
        self._csv = csv.writer(file, lineterminator="\n") if kind == "csv" else None
        if self._csv is not None:
            self._csv.writerow(["path", "label", "name", "probability"])

    def write(self, predictions: Sequence[Prediction]) -> None:
        for one in predictions:
            best = self._named(one.classes[0], one.probabilities[0])
            if self._csv is not None:
                self._csv.writerow([one.path, best["label"], best["name"], f"{best['probability']:.{_DIGITS}f}"])
                continue
            line: dict[str, Any] = {"path": one.path, **best}
            if self._lists:
                line["predictions"] = [self._named(number, value) for number, value in zip(one.classes, one.probabilities)]
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def _named(self, number: int, probability: float) -> dict[str, Any]:
        return {"label": self._classes[number], "name": self._names[number], "probability": round(probability, _DIGITS)}


@contextmanager
def _output(out: str) -> Iterator[TextIO]:
    """Standard output, or a file that gets its name when it is whole."""
    if out == "-":
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="surrogateescape")
        yield sys.stdout
        return
    target = Path(out)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
        temporary.replace(target)
    except OSError as error:
        if error.filename == str(temporary):
            raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _tell(options: argparse.Namespace, count: int, problems: Sequence[Any]) -> None:
    for path, reason in problems:
        print(f"not readable: {path}: {reason}", file=sys.stderr)
    unread = f", {len(problems):,} could not be read" if problems else ""
    where = "" if options.out == "-" else f": {options.out}"
    print(f"{counted(count - len(problems), 'image')} predicted{unread}{where}", file=sys.stderr)


def _format(options: argparse.Namespace) -> str:
    """csv or jsonl; UserError before any work where the options do not go together."""
    kind = options.format
    if options.out != "-":
        path = Path(options.out)
        if not path.absolute().parent.is_dir():
            raise UserError(f"--out {options.out}: the folder {path.absolute().parent} does not exist")
        if path.is_dir():
            raise UserError(f"--out {options.out} is a folder; give a file that ends in .csv or .jsonl")
        if kind is None and path.suffix.lower() not in _FORMATS:
            raise UserError(f"--out {options.out}: its ending says no format; use .csv or .jsonl, or --format")
        kind = kind or _FORMATS[path.suffix.lower()]
    kind = kind or "csv"
    if options.top > 1 and kind == "csv":
        raise UserError(f"--top {options.top}: CSV has one line an image, its best class; write JSON lines (--out FILE.jsonl, --format jsonl)")
    return str(kind)


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="dtl predict",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder, or a run (runs/NAME)")
    add("paths", metavar="PATH", nargs="+", help="images, folders, list files, packed shards, or -")
    add("--out", default="-", metavar="FILE", help="FILE.csv or FILE.jsonl (default: -, CSV on standard output)")
    add("--format", choices=("csv", "jsonl"), help="by default the ending of FILE, csv for -")
    add("--top", type=at_least(1), default=1, metavar="N", help="with JSON lines: a list of the N most probable classes (1)")
    add("--batch-size", type=at_least(1), default=64, metavar="N", help="images at once on each process (64)")
    add("--workers", type=at_least(0), default=2, metavar="N", help="loader processes of each process (2)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (auto: the GPU where there is one)")
    add("--precision", choices=("auto", "no", "bf16", "fp16"), help="number format of the computation (the run's, else auto)")
    return parser
