"""`dtl explain MODEL IMAGE...`: where in an image a network looks. The work is `dtl.inference.explain`; this is its command line."""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtl.commands import add_limits, limits
from dtl.errors import UserError
from dtl.files import user_path, write_whole
from dtl.text import TRUST, OptionParser, counted, nearest, to_stderr, to_stdout

if TYPE_CHECKING:
    from dtl.inference.explain import Explanation

_DESCRIPTION = """\
Draw what in an image speaks for a class: a PNG of each image as the network sees it, and beside it with a heat map. Networks with convolutions get Grad-CAM of
their last convolution, others (vision transformers) integrated gradients by the pixels. Needs captum: pip install 'dtl-train[explain]'.

A heat map is a hint, no proof: it shows where the logit of the class is sensitive, not why.
"""
_EPILOG = """\
examples:
  dtl explain runs/flowers photos/val/77/image_00061.jpg
  dtl explain runs/flowers photos/val/77 --class 'passion flower' --out heat
"""


def run(arguments: Sequence[str]) -> int:
    """The command; 0 when at least one image could be read."""
    options = _parser().parse_args(list(arguments))
    out = user_path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    from dtl.config.models import DataConfig
    from dtl.inference.explain import Explainer
    from dtl.inference.images import find_images
    from dtl.inference.model import running_model

    with running_model(options.model, device=options.device, trust=options.trust, log=to_stderr) as model:
        if model.runtime.world_size > 1:
            raise UserError("dtl explain runs on one process")
        explainer, names = Explainer(model), model.stored.shown_names
        label = None if options.label is None else _class_number(options.label, model.stored.classes, names)
        inputs = find_images(options.paths, DataConfig(**limits(options)))
        unread = 0
        for number in range(len(inputs)):
            found = explainer.explain(inputs, number, label)
            if isinstance(found, str):
                to_stderr(f"not readable: {inputs.name(number)}: {found}")
                unread += 1
                continue
            file = out / f"{number:04d}-{re.sub(r'[^A-Za-z0-9._-]', '_', Path(found.path).stem)[:80]}.png"
            _write(found, file)
            to_stdout(f"{file}: {explainer.method} for {names[found.label]} ({found.probability:.1%})")
    if unread == len(inputs):
        raise UserError("the image could not be read" if unread == 1 else f"none of the {counted(unread, 'image')} could be read")
    return 0


def _class_number(given: str, classes: Sequence[str], names: Sequence[str]) -> int:
    for known in (classes, names):
        if given in known:
            return list(known).index(given)
    raise UserError(f"--class {given}: the model has no such class{nearest(given, [*classes, *names])}")


def _write(found: Explanation, file: Path) -> None:
    from PIL import Image

    from dtl.inference.explain import overlaid

    data = io.BytesIO()
    Image.fromarray(overlaid(found)).save(data, "PNG")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda target: target.write(data.getvalue()), sync=False)
    except OSError as error:
        raise UserError(f"--out: {file} cannot be written: {error.strerror or error}") from error


def _parser() -> OptionParser:
    parser = OptionParser(
        prog="dtl explain", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run (runs/NAME) or a model folder")
    add("paths", metavar="IMAGE", nargs="+", help="images, folders, list files, packed shards, or - (as for dtl predict)")
    add("--class", dest="label", metavar="NAME", help="the class to explain (default: the predicted one)")
    add("--out", metavar="FOLDER", default="explained", help="where the PNGs are written (default: explained)")
    add_limits(parser)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto, the GPU if there is one)")
    add("--trust", action="store_true", help=TRUST)
    return parser
