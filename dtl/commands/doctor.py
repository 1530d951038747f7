"""`dtl doctor`: checks this machine before a run. The work is `dtl.doctor`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dtl.files import user_path
from dtl.text import OptionParser, counted, to_stdout

if TYPE_CHECKING:
    from dtl.config import Config
    from dtl.config.models import ImageSize, ModelConfig

_DESCRIPTION = """\
Check this machine before a run: versions of PyTorch, CUDA and the driver; GPUs and the links between them; shared memory, open files,
memory and disks; the network interface that ranks would use; an all-reduce between two real processes; whether decoding keeps up with
the network; wandb; SLURM. Each problem comes with the command that fixes it. Nothing is changed.
"""
_EPILOG = """\
examples:
  dtl doctor
  dtl doctor --config configs/finetune.yaml --data photos/train
  srun --jobid 1234 dtl doctor --json

exit status: 0 no check failed (there may be warnings), 1 a check failed, 2 the command line is wrong
"""


def run(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(list(arguments))
    from dtl.doctor.examine import Doctor
    from dtl.doctor.finding import Finding, table, worst

    doctor = Doctor(**_wanted(options), data=options.data, measure=not options.quick)
    found: list[Finding] = []
    for finding in doctor.findings():
        found.append(finding)
        if not options.json:
            to_stdout(*table([finding]).split("\n"))
    status = worst(found)
    if options.json:
        print(json.dumps({"status": status, "findings": [finding.to_json() for finding in found]}, indent=1))
    else:
        counts = {kind: sum(finding.status == kind for finding in found) for kind in ("ok", "warn", "fail")}
        to_stdout("", f"{counts['ok']} ok, {counted(counts['warn'], 'warning')}, {counted(counts['fail'], 'failure')}")
    sys.stdout.flush()
    return 1 if status == "fail" else 0


def _wanted(options: argparse.Namespace) -> dict[str, Any]:
    """What the run would need, from its config if one is given."""
    from dtl.config.models import DataConfig, ModelConfig
    from dtl.data.open import default_cache_dir
    from dtl.doctor.judge_machine import Need

    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    if options.config is None:
        return {
            "run_dir": user_path(options.run_dir or "runs"),
            "cache_dir": user_path(options.cache_dir) if options.cache_dir else default_cache_dir(),
            "model": ModelConfig(name=options.model) if options.model else ModelConfig(),
            "global_batch_size": DataConfig.model_fields["global_batch_size"].default,
            "need": Need(workers=options.workers or 0, ranks=ranks),
            "auto_workers": options.workers is None,
        }
    from dtl.config import load_config
    from dtl.config.auto import BATCH_SIZES, STEPS_AIMED_AT, batch_size_of

    # The doctor needs no data of its own: a recipe that takes it from the command line is complete without.
    source = ["--data.train", options.data or "digits"] if options.config not in (None, "digits") else []
    config, _ = load_config(["--config", options.config, *source, "--data.val", "null", "--data.val-fraction", "0.1"])
    data, batch_size = config.data, batch_size_of(config.data, BATCH_SIZES[0] * STEPS_AIMED_AT)  # of enough images, for they are not looked at
    workers = data.workers if options.workers is None else options.workers
    return {
        "run_dir": user_path(options.run_dir or config.run.dir),
        "cache_dir": user_path(options.cache_dir or data.cache_dir or default_cache_dir()),
        "model": config.model.model_copy(update={"name": options.model, "options": {}, "pool": None} if options.model else {}),
        "precision": config.precision,
        "global_batch_size": batch_size if data.micro_batch_size == "auto" else None,
        "keep": config.checkpoint.keep,
        "need": Need(
            image_size=_largest_size(config),
            batch_size=-(-batch_size // ranks) if data.micro_batch_size == "auto" else data.micro_batch_size,
            workers=0 if workers == "auto" else workers,
            ranks=ranks,
        ),
        "auto_workers": workers == "auto",
    }


def _largest_size(config: Config) -> ImageSize:
    """Of the phases."""
    from dtl.config.models import num_pixels

    size = config.data.image_size
    usual = _size_of(config.model) if size == "auto" else size
    return max((phase.image_size or usual for phase in config.phases.values()), key=num_pixels)


def _size_of(model: ModelConfig) -> ImageSize:
    """Of the images of this network's published weights; another source of weights may have been trained at another size."""
    from dtl.models.build import build, options_of

    return build(model.name, num_classes=10, options=options_of(model), meta=True, own=True).preprocessing.image_size


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(prog="dtl doctor", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--config", metavar="FILE", help="the recipe to check for: its folders, model, precision, batch size and workers are used")
    add("--data", metavar="SRC", help="a folder of images or packed shards, to measure decoding on (default: a synthetic photo)")
    add("--model", metavar="NAME", help="the network whose speed decoding must keep up with (default: the recipe's, or torchvision/resnet18)")
    add("--workers", type=int, metavar="N", help="loader workers per rank (default: those of the recipe, or from the cores of this machine)")
    add("--run-dir", metavar="FOLDER", help="where runs would go (default: the recipe's, or runs)")
    add("--cache-dir", metavar="FOLDER", help="where packed images would go (default: $DTL_CACHE or ~/.cache/dtl)")
    add("--quick", action="store_true", help="skip the measurements that take seconds: the all-reduce, decoding, the speed of the network")
    add("--json", action="store_true", help="one JSON object {status, findings: [{check, status, summary, fix}]} on standard output")
    return parser
