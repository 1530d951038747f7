"""`dtl predict MODEL PATH...`: class names and probabilities for images. The work is `dtl.inference.predict`; this is its command line."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

from dtl.commands import add_limits, limits
from dtl.errors import UserError
from dtl.files import user_path, write_whole
from dtl.text import TRUST, OptionParser, at_least, counted, csv_line, json_line, printable, to_stderr

if TYPE_CHECKING:
    from dtl.inference.model import StoredModel
    from dtl.inference.predict import Prediction

_DESCRIPTION = """\
Predict the classes of images with a trained model. Images are preprocessed as in the model's evaluation.

PATH is an image, a folder of images (searched recursively), a list file (one path per line, or CSV with a column path), a folder of
packed shards, or - for a list on standard input. The output is in the order of the PATHs; images of a folder are sorted by path.

CSV has the columns path,label,name,probability: the most probable class, its display name and its probability. JSON lines have the
same keys, and with --top N a list `predictions` of the N most probable classes. Images that cannot be read are listed on standard error.

In CSV, an apostrophe is put before text that a spreadsheet would evaluate as a formula (text that begins with = + - @, a tab or a line
break). To undo it, remove the first apostrophe of each cell that begins with one or more apostrophes followed by one of these characters.
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
    from dtl.config.models import DataConfig
    from dtl.inference.images import ImageInputs, find_images
    from dtl.inference.model import running_model
    from dtl.inference.predict import predict, predict_groups

    with running_model(options.model, device=options.device, precision=options.precision, trust=options.trust, log=to_stderr) as model:
        runtime = model.runtime
        found: ImageInputs | None = None
        with runtime.together("images"):
            if runtime.is_main:
                found = find_images(options.paths, DataConfig(**limits(options)))
        inputs = runtime.agree(found)
        assert inputs is not None
        unread: list[Prediction] = []
        if options.by_group or options.group_regex is not None:
            with runtime.together("groups"):
                group = _group_of(options.group_regex, model.run)
            answers, unread_images = predict_groups(
                model, inputs, group, top=options.top, batch_size=options.batch_size, workers=options.workers, flip=options.flip
            )
            parts = (part for part in [answers, unread_images])
        else:
            parts = predict(model, inputs, top=options.top, batch_size=options.batch_size, workers=options.workers, flip=options.flip)
        if runtime.is_main:
            with closing(parts):
                unread = _write(options.out, lambda file: _write_all(file, kind, model.stored, parts, lists=options.top > 1))
        else:
            for _ in parts:
                pass
        num_unread = runtime.agree(len(unread))
    if runtime.is_main:
        _summarise(options.out, len(inputs), unread)
    if num_unread == len(inputs):
        raise UserError("the image could not be read" if len(inputs) == 1 else f"none of the {len(inputs):,} images could be read")
    return 0


def _group_of(regex: str | None, run: Path | None) -> Callable[[str], str]:
    """From an image's path to its group's name. UserError where there is no regular expression, and for a path that it does not match."""
    from dtl.config.own import stored_config
    from dtl.data.groups import compiled

    if regex is None and run is not None:
        stored = stored_config(run)
        stored.require("data.group.regex")
        regex = None if stored.config.data.group is None else stored.config.data.group.regex
    if regex is None:
        raise UserError("--by-group: which images belong together is not known; give --group-regex R, or train with data.group.regex")
    pattern = compiled(regex)

    def group(path: str) -> str:
        match = pattern.search(path)
        if match is None or match[1] is None:
            raise UserError(f"--by-group: {regex!r} does not match {path}")
        return str(match[1])

    return group


def _write_all(file: TextIO, kind: str, model: StoredModel, parts: Iterable[list[Prediction]], *, lists: bool) -> list[Prediction]:
    """Write each part as it comes; returns the images that could not be read."""
    terminal = file.isatty()
    if kind == "csv":
        file.write("path,label,name,probability\n")
    unread = []
    for part in parts:
        for one in part:
            values = one.to_json(model, lists=lists, digits=_DIGITS)
            if one.problem is not None:
                unread.append(one)
            elif kind == "csv":
                texts = (one.path, values["label"], values["name"])
                file.write(csv_line([*(map(printable, texts) if terminal else texts), Decimal(f"{values['probability']:.{_DIGITS}f}")]))
            else:
                file.write(json_line(values) + "\n")
        file.flush()
    return unread


def _write(out: str, work: Callable[[TextIO], list[Prediction]]) -> list[Prediction]:
    """Call `work`, which writes to standard output, or to a file that gets its name when it is complete. Returns what `work` returns."""
    if out == "-":
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="surrogateescape")
        return work(sys.stdout)
    unread: list[Prediction] = []

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        unread.extend(work(text))
        text.detach()

    try:
        write_whole(user_path(out), write)
    except OSError as error:
        if error.filename is None or Path(out).name in str(error.filename):  # else it is not about this file
            raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error
        raise
    return unread


def _summarise(out: str, count: int, unread: Sequence[Prediction]) -> None:
    for one in unread:
        to_stderr(f"not readable: {one.path}: {one.problem}")
    failed = f", {len(unread):,} could not be read" if unread else ""
    where = "" if out == "-" else f": {out}"
    to_stderr(f"{counted(count - len(unread), 'image')} predicted{failed}{where}")


def _format(options: argparse.Namespace) -> str:
    """csv or jsonl; UserError before any work if the options contradict each other."""
    kind = options.format
    if options.out != "-":
        path = user_path(options.out)
        if not path.absolute().parent.is_dir():
            raise UserError(f"--out {options.out}: the folder {path.absolute().parent} does not exist")
        if path.is_dir():
            raise UserError(f"--out {options.out} is a folder; give a file that ends in .csv or .jsonl")
        if kind is None and path.suffix.lower() not in _FORMATS:
            raise UserError(f"--out {options.out}: the file's extension does not determine the format; use .csv or .jsonl, or --format")
        kind = kind or _FORMATS[path.suffix.lower()]
    kind = kind or "csv"
    if options.top > 1 and kind == "csv":
        raise UserError(f"--top {options.top}: CSV has one line per image, with its best class; write JSON lines (--out FILE.jsonl or --format jsonl)")
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
    add("--format", choices=("csv", "jsonl"), help="output format (default: by the extension of FILE; csv for -)")
    add("--top", type=at_least(1), default=1, metavar="N", help="with JSON lines: list the N most probable classes (default: 1)")
    add(
        "--by-group",
        action="store_true",
        help="one line per group of images (the run's data.group.regex), by the mean of their probabilities; path is the group",
    )
    add("--group-regex", metavar="R", help="as --by-group; the first part in parentheses of R in an image's path is its group")
    add("--flip", action="store_true", help="average the probabilities of each image and its mirror image")
    add("--batch-size", type=at_least(1), default=64, metavar="N", help="batch size per process (default: 64)")
    add_limits(parser)
    add("--workers", type=at_least(0), default=2, metavar="N", help="loader workers per process (default: 2)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto, the GPU if there is one)")
    add("--precision", choices=("auto", "no", "bf16", "fp16"), help="precision of the computation (default: that of the run, else auto)")
    add("--trust", action="store_true", help=TRUST)
    return parser
