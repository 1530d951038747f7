"""The commands of `dtl`, one module each: `run(arguments) -> int`, and a `--help` that imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

COMMANDS = {
    "train": "train or fine-tune, in phases, on one process or many",
    "pack": "pack images into shards, once",
    "transfer": "show what a transfer of pretrained weights would load (a dry run)",
    "convert": "the tensors of any file of weights as safetensors; nothing in the file is run",
    "models": "list the networks that can be named",
    "evaluate": "exact metrics of a run or model folder on a validation set",
    "predict": "class names and probabilities for images, to CSV or JSON lines",
    "export": "a model folder as ONNX, torch.export or safetensors, checked against PyTorch",
    "average": "the mean of several runs' weights, as a model folder",
    "report": "curves, confusion, example images of one run or several, as PNG and HTML",
    "index": "manifest and index for WebDataset tars made by others",
    "verify": "check packed shards: sizes, checksums, every image decoded",
    "verify-resume": "kill a recipe at random moments, and compare with an uninterrupted run",
    "verify-epoch": "prove an epoch: count and hash what the loaders of any world size deliver",
    "find-lr": "a learning rate range test of a phase, on one process or many, with a plot and a suggestion",
    "completion": "a script for bash, zsh or fish that completes commands and options",
    "doctor": "what would go wrong on this machine, each finding with its fix",
}


def add_limits(parser: argparse._ActionsContainer) -> None:
    """--max-pixels and --max-file-bytes, for commands that read images without a recipe."""
    from dtl.text import at_least

    parser.add_argument("--max-pixels", type=at_least(1), metavar="N", help="larger images count as damaged (data.max_pixels; 178,956,970)")
    parser.add_argument("--max-file-bytes", type=at_least(1), metavar="N", help="larger files are not read (data.max_file_bytes; 2^30)")


def limits(options: argparse.Namespace) -> dict[str, Any]:
    """Those of the two that were given."""
    return {name: value for name in ("max_pixels", "max_file_bytes") if (value := getattr(options, name)) is not None}
