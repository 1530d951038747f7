"""`dtl export MODEL --to FORMAT --out FILE`. The work is `dtl.inference.export`; this is its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtl.errors import UserError
from dtl.files import user_path
from dtl.text import TRUST, OptionParser, to_nobody, to_stderr, to_stdout

if TYPE_CHECKING:
    from dtl.inference.images import ImageInputs

_DESCRIPTION = """\
Export a trained model for other programs. Its outputs are compared with PyTorch's on real images before the file is kept.

  onnx           one ONNX file (needs the packages onnx and onnxscript; run with onnxruntime if that is installed)
  torch-export   a graph for torch.export.load, without any code of the network
  safetensors    the state dict alone

Input: float32 images [batch, 3, S, S], normalised; output: logits. The preprocessing and the classes are stored in the file
(ONNX metadata `dtl`, extra file `dtl.json`, safetensors metadata `dtl`) and next to it in FILE.json.
"""
_EPILOG = """\
examples:
  dtl export runs/flowers --to onnx --out flowers.onnx --images photos/val
  dtl export runs/flowers/model --to torch-export --out flowers.pt2
"""


def run(arguments: Sequence[str]) -> int:
    """The command; nothing is written if the result differs from PyTorch."""
    options = _parser().parse_args(list(arguments))
    target = user_path(options.out)
    if options.opset is not None and options.to != "onnx":
        raise UserError(f"--opset needs --to onnx, not {options.to}")
    if not target.absolute().parent.is_dir():
        raise UserError(f"--out {target}: the folder {target.absolute().parent} does not exist")
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; give a file")

    from dtl.inference.export import export, need, real_images
    from dtl.inference.images import find_images
    from dtl.inference.model import find_model, open_model

    if options.to == "onnx":
        need("onnx", "onnxscript")  # before the work
    folder, run_folder = find_model(options.model)
    model = open_model(folder, trust=options.trust, log=to_stderr)
    inputs = find_images(options.images) if options.images else _images_of(run_folder)
    done = export(model, target, to=options.to, images=real_images(model, inputs), opset=options.opset)
    of = "images" if options.images else "of the run's validation images" if inputs is not None else "of the built-in digits (use --images for your own)"
    if done.difference is None:
        to_stderr(f"not checked against PyTorch: {done.note}")
    else:
        to_stdout(f"checked against PyTorch on {done.num_images} {of}: largest difference between logits {done.difference:.2g}")
    to_stdout(f"{done.path} ({options.to}{'' if done.difference is None else ', ' + done.note}), {done.path}.json")
    return 0


def _images_of(run_folder: Path | None) -> ImageInputs | None:
    """The run's validation images, as it packed them; None for a model folder, and if they are not available any more."""
    if run_folder is None:
        return None
    from dtl.config.own import stored_config
    from dtl.data.open import open_split
    from dtl.data.splits_of_run import open_splits
    from dtl.inference.images import find_images

    data = stored_config(run_folder).config.data
    if any(source is not None and ("://" in source or source.startswith("pipe:")) for source in (data.train, data.val, data.test)):
        return None
    try:
        if data.val is not None:
            shards = open_split(data.val, data.model_copy(update={"val_fraction": 0.0}), split="val", log=to_nobody)
        elif data.train is not None:
            shards = open_splits(data, log=to_nobody).val
        else:
            return None
        return find_images([str(shards.place)])
    except UserError:
        return None


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(prog="dtl export", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder, or a run (runs/NAME)")
    add("--to", choices=("onnx", "torch-export", "safetensors"), required=True, help="the format")
    add("--out", required=True, metavar="FILE", help="the file to write; FILE.json is written next to it")
    add("--opset", type=int, metavar="N", help="ONNX opset version (default: that of torch)")
    add(
        "--images", action="append", metavar="PATH",
        help="images for the comparison: a folder, a list, shards; may be repeated (default: the run's validation images)",
    )  # fmt: skip
    add("--trust", action="store_true", help=TRUST)
    return parser
