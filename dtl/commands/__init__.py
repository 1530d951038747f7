"""The commands of `dtl`, one module each: `run(arguments) -> int`, and a `--help` that imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

COMMANDS = {
    "train": "train or fine-tune, in phases, on one process or many",
    "pack": "pack images into shards, once",
    "audit": "twins, leaks between splits, and labels that are probably wrong, in a set of images",
    "transfer": "show what a transfer of pretrained weights would load (a dry run)",
    "convert": "convert a file of weights to safetensors, without running anything in it",
    "models": "list the networks that model.name accepts",
    "folds": "cross-validation: one run for each fold, all images predicted out of fold, then one run on all",
    "search": "successive halving over ranges of any settings, on any number of workers, with a paired test of the winner",
    "evaluate": "exact metrics of a run or model folder on a validation set",
    "calibrate": "fit a temperature, and a threshold for two classes, on validation images",
    "predict": "class names and probabilities for images, to CSV or JSON lines",
    "explain": "heat maps of where in an image a network looks (needs captum)",
    "export": "export a model as ONNX, torch.export or safetensors, checked against PyTorch",
    "average": "average the weights of several runs into a model folder",
    "report": "plots and an HTML page of one run or several: curves, confusion matrix, example images",
    "index": "write manifest and index for WebDataset tars made by others",
    "verify": "check packed shards: sizes, checksums, every image decoded",
    "verify-resume": "kill a run at random moments, resume it, and compare it with an uninterrupted run",
    "verify-epoch": "check that an epoch delivers every sample exactly once, for any world size",
    "find-lr": "learning rate range test of a phase, with a plot and a suggestion",
    "completion": "print a completion script for bash, zsh or fish",
    "doctor": "check this machine before a run; each problem comes with its fix",
}


def add_limits(parser: argparse._ActionsContainer) -> None:
    """--max-pixels and --max-file-bytes, for commands that read images without a recipe."""
    from dtl.text import at_least

    parser.add_argument("--max-pixels", type=at_least(1), metavar="N", help="larger images count as damaged (data.max_pixels; default: 178,956,970)")
    parser.add_argument("--max-file-bytes", type=at_least(1), metavar="N", help="larger files are not read (data.max_file_bytes; default: 2^30)")


def limits(options: argparse.Namespace) -> dict[str, Any]:
    """Those of the two that were given."""
    return {name: value for name in ("max_pixels", "max_file_bytes") if (value := getattr(options, name)) is not None}
