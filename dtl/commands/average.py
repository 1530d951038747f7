"""`dtl average RUN... --out FOLDER`: average the weights of several runs into a model folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from dtl.errors import UserError
from dtl.files import user_path
from dtl.text import OptionParser, counted, to_stderr, to_stdout

if TYPE_CHECKING:
    from torch import Tensor

    from dtl.models.model_json import ModelFacts

_DESCRIPTION = """\
Average the weights of several models that started from the same pretrained weights (Wortsman et al. 2022, "Model soups",
arXiv 2203.05482). The result is a model folder like any other. Evaluate it: it may be better or worse than the models it was made from.

The models must have the same architecture, classes and preprocessing. Integer tensors are taken from the first model.
A tensor that is the same in all models stays the same, bit for bit: frozen layers, and the running statistics of batch norm layers of phases with
norm_statistics: frozen. Statistics that differ are averaged, which is an approximation; a line says of how many layers. With --data they are estimated anew on
about 1,024 of these images (training images: those that choose or measure the result should not be used), as for stochastic weight averaging.
"""
_EPILOG = """\
example:
  dtl average runs/seed0 runs/seed1 runs/seed2 --out models/soup
  dtl evaluate models/soup --data.val photos/val
"""


def run(arguments: Sequence[str]) -> int:
    """The command. UserError if the models cannot be averaged."""
    options = _parser().parse_args(list(arguments))
    if len(options.models) < 2:
        raise UserError("averaging needs at least two models")
    target = user_path(options.out)
    from dtl.checkpoint.resume.model_folder import load_model_tensors, save_model_folder
    from dtl.config.own import is_allowed, is_function, note_made
    from dtl.inference.model import find_model
    from dtl.models.model_json import read_model_json

    folders = [find_model(place)[0] for place in options.models]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a model is named twice; its weights would count double")
    _check_target(target, folders, overwrite=options.overwrite)
    facts = [read_model_json(folder) for folder in folders]
    for folder, one in zip(folders[1:], facts[1:]):
        _check_same(folders[0], facts[0], folder, one)
    mean, moved = average((load_model_tensors(folder) for folder in folders), [str(folder) for folder in folders])
    norms = [name.removesuffix("running_var").rstrip(".") for name in moved if name.endswith("running_var")]
    if norms and options.data is not None:
        from dtl.inference.evaluate import with_statistics
        from dtl.inference.model import running_model

        with running_model(folders[0], log=to_stderr) as model:
            mean = with_statistics(model, mean, norms, options.data, log=to_stderr)
    first, precisions = facts[0], {one.made_by.get("precision") for one in facts} - {None}
    save_model_folder(
        target,
        mean,
        architecture=first.architecture,
        classes=first.classes,
        display_names=first.display_names,
        preprocessing=first.preprocessing,
        metrics={},
        made_by={
            "average_of": [{"model": str(folder), **_origin(one)} for folder, one in zip(folders, facts)],
            **({"precision": precisions.pop()} if len(precisions) == 1 else {}),
        },
    )
    if is_function(name := first.architecture["name"]) and all(is_allowed(name, one.json_sha256) for one in facts):
        note_made(target / "model.json", to_stderr)
    to_stdout(f"{target}: the mean of {len(folders)} models ({first.architecture['name']}, {len(first.classes)} classes); not evaluated yet:")
    to_stdout(f"  dtl evaluate {quote(str(target))} --data.val SRC")
    if norms:
        to_stdout(
            f"running statistics of {counted(len(norms), 'norm layer')} differ between the models: "
            + (
                "they are averaged, which describes the averaged network only roughly; --data SRC (training images) estimates them anew"
                if options.data is None
                else f"they were estimated anew on images of {options.data}"
            )
        )
    elif options.data is not None:
        to_stdout(f"running statistics of norm layers are the same in all models: nothing is estimated on {options.data}")
    return 0


def average(models: object, names: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Mean of the floating-point tensors, summed in float64 and returned in the first model's dtypes, and the names of those that differ between models; a
    tensor that does not, and what is no floating-point one, is the first model's.

    `models` gives one state dict after another: two are in memory at a time. UserError where they do not match.
    """
    import torch

    first: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    moved: set[str] = set()
    for name, tensors in zip(names, models):  # type: ignore[call-overload]
        if not first:
            first = tensors
        if difference := sorted(tensors.keys() ^ first.keys()):
            raise UserError(f"{names[0]} and {name} do not have the same tensors: only one of them has {difference[0]}")
        for key, tensor in tensors.items():
            if tensor.shape != first[key].shape:
                raise UserError(f"the tensor {key} has shape {tuple(first[key].shape)} in {names[0]} and {tuple(tensor.shape)} in {name}")
            if tensor.is_floating_point():
                if not bool(torch.isfinite(tensor).all()):
                    raise UserError(f"{name}: the tensor {key} holds values that are not finite; leave this model out")
                sums[key] = tensor.double().clone() if key not in sums else sums[key].add_(tensor.double())
                if key not in moved and not torch.equal(tensor, first[key]):
                    moved.add(key)
    return {key: (sums[key] / len(names)).to(tensor.dtype) if key in moved else tensor for key, tensor in first.items()}, sorted(moved)


def _check_same(first_folder: Path, first: ModelFacts, folder: Path, other: ModelFacts) -> None:
    for what, a, b in (
        ("network", first.architecture["name"], other.architecture["name"]),
        ("number of classes", len(first.classes), len(other.classes)),
        ("configuration of the network", first.architecture.get("options") or {}, other.architecture.get("options") or {}),
    ):
        if a != b:
            raise UserError(f"{first_folder} and {folder} cannot be averaged: the {what} differs: {a} and {b}")
    for label, (a, b) in enumerate(zip(first.classes, other.classes)):
        if a != b:
            raise UserError(f"{first_folder} and {folder} cannot be averaged: class {label} is '{a}' in one and '{b}' in the other")
    for key in first.preprocessing.keys() | other.preprocessing.keys():
        a, b = (_versioned(facts.preprocessing.get(key)) for facts in (first, other))
        if a != b:
            raise UserError(f"{first_folder} and {folder} cannot be averaged: their preprocessing differs: {key} is {a} and {b}")


def _versioned(value: object) -> object:
    """A transform as this dtl describes it: an older one wrote another version, in which evaluation was the same."""
    if not isinstance(value, dict) or "version" not in value:
        return value
    return {"evaluation_version": 1, **{key: one for key, one in value.items() if key != "version"}}


def _check_target(target: Path, folders: Sequence[Path], *, overwrite: bool) -> None:
    if target.resolve() in {folder.resolve() for folder in folders}:
        raise UserError(f"--out {target} is one of the models to average")
    if target.exists() and not (overwrite and (target / "model.json").is_file()):
        again = "; --overwrite replaces it" if (target / "model.json").is_file() and not overwrite else "; give a new folder"
        raise UserError(f"--out {target} exists{again}")


def _origin(facts: ModelFacts) -> dict[str, object]:
    return {key: facts.made_by[key] for key in ("run", "step") if key in facts.made_by}


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="dtl average", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("models", metavar="RUN", nargs="+", help="runs (runs/NAME) or model folders")
    add("--out", required=True, metavar="FOLDER", help="a new model folder")
    add("--data", metavar="SRC", help="images (any source) on which running statistics of norm layers are estimated anew where they differ")
    add("--overwrite", action="store_true", help="replace an existing model folder")
    return parser
