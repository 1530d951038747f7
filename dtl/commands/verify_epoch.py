"""`dtl verify-epoch SRC`: check what an epoch's loaders deliver, without a model (`dtl.checks.epoch`)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dtl.errors import UserError
from dtl.text import OptionParser, to_stderr, to_stdout

if TYPE_CHECKING:
    from dtl.checks.epoch import EpochProof
    from dtl.data.sampling.plan import EpochPlan

_DESCRIPTION = """\
Run the training loaders of one epoch without a model, for each of --world ranks in turn, and check that they deliver every sample exactly
once. The hash of the sequence of global batches is the same for every world size and every number of workers. With --start it covers the
remaining steps.

With --balance, the quota of each class decides how often its samples are expected: planned repetitions do not count as duplicated.

Exit status 0: each sample was delivered once (or as often as planned); 2: a sample is missing, duplicated or damaged.
"""
_EPILOG = """\
examples:
  dtl verify-epoch shards --world 8 --workers 4
  dtl verify-epoch digits --global-batch-size 120 --start 7 --pixels
"""


def run(arguments: list[str]) -> int:
    """The command. UserError if something is wrong with the source or the options."""
    options = _parser().parse_args(arguments)
    _check(options)
    import torch

    from dtl.checks.epoch import prove_epoch
    from dtl.config.models import AugmentConfig, DataConfig, arguments_checked
    from dtl.data.loading.processes import PREFETCH
    from dtl.data.open import open_split, reading_of
    from dtl.data.progress import PackProgress
    from dtl.data.remote.cache import limit_in_bytes
    from dtl.data.remote.cache_space import Demand, divide
    from dtl.data.remote.schedule import ShardUses
    from dtl.data.sampling.balance import class_members, plan_epoch
    from dtl.data.transforms.transforms import train_transform

    with arguments_checked():
        data = DataConfig(val_fraction=options.val_fraction, on_error=options.on_error, cache_dir=options.cache_dir, cache_gb=options.cache_gb)
    shards = open_split(options.source, data, split=options.split, progress=not options.quiet, log=to_stderr)
    plan = plan_epoch(
        shards.shard_sizes,
        members=class_members(shards, options.balance, cache_dir=options.cache_dir),
        balance=options.balance,
        seed=options.seed,
        epoch=options.epoch,
        global_batch_size=options.global_batch_size,
        window=options.window,
        drop_last=options.last == "drop",
    )
    if options.start >= plan.num_steps:
        raise UserError(f"--start {options.start}: the epoch has {plan.num_steps} steps, 0 to {plan.num_steps - 1}")
    if shards.cache is not None:
        steps = -(-max(1, options.workers) * PREFETCH) + 1
        divide([Demand(options.source, shards.cache, ShardUses.of(plan, behind=steps * plan.largest_step))], limit_in_bytes(data))
    torch.set_num_threads(1)  # as in a loader process
    with PackProgress(visible=not options.quiet) as shown:
        shown.start("loading", plan.num_positions - plan.step_bounds(options.start)[0])
        proof = prove_epoch(
            shards,
            train_transform(image_size=options.image_size, augment=AugmentConfig(preset=options.augment), reading=reading_of(shards, data)),
            plan=plan,
            num_ranks=options.world,
            micro_batch_size=options.micro_batch_size,
            workers=options.workers,
            first_step=options.start,
            image_size=options.image_size,
            pixels=options.pixels,
            advance=shown.advance,
        )
    _report(proof, plan, options)
    return 0 if proof.is_exact else 2


def _report(proof: EpochProof, plan: EpochPlan, options: argparse.Namespace) -> None:
    for line in proof.damaged:
        to_stderr(line)
    if options.json:
        facts: dict[str, Any] = {**asdict(proof), "world": options.world, "workers": options.workers, "epoch": options.epoch}
        print(json.dumps({**facts, "start": options.start, "steps_per_epoch": plan.num_steps}))
        return
    last = plan.num_steps - 1
    to_stdout(f"epoch {options.epoch}, steps {options.start} to {last} of 0 to {last}, {options.world} ranks with {options.workers} workers each")
    to_stdout(f"expected    {proof.expected:,}")
    again = "" if options.balance == "none" else f"  ({proof.distinct:,} different samples of {proof.num_samples:,}, data.balance {options.balance})"
    to_stdout(f"seen        {proof.seen:,}{again}")
    to_stdout(f"duplicated  {proof.duplicated:,}")
    to_stdout(f"missing     {proof.missing:,}")
    to_stdout(f"damaged     {len(proof.damaged):,}")
    to_stdout(f"batches     {proof.order_hash}")
    if proof.pixel_hash is not None:
        to_stdout(f"pixels      {proof.pixel_hash}")


def _check(options: argparse.Namespace) -> None:
    for name in ("world", "global_batch_size", "micro_batch_size", "image_size", "window"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("workers", "epoch", "start"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} must be at least 0, got {getattr(options, name)}")
    if options.global_batch_size < options.world:
        raise UserError(f"--global-batch-size {options.global_batch_size} is smaller than --world {options.world}; each rank needs a sample per step")


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="dtl verify-epoch", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="packed shards, or anything that data.train takes")
    who = parser.add_argument_group("ranks and workers")
    who.add_argument("--world", type=int, default=1, metavar="N", help="ranks to simulate, one after another (default: 1)")
    who.add_argument("--workers", type=int, default=2, metavar="N", help="loader workers per rank (default: 2)")
    who.add_argument("--micro-batch-size", type=int, metavar="N", help="samples per forward pass on one rank (default: its whole share)")
    which = parser.add_argument_group("which epoch, of which data")
    which.add_argument("--epoch", type=int, default=0, metavar="E", help="which epoch (default: 0)")
    which.add_argument("--start", type=int, default=0, metavar="STEP", help="first step of the epoch, as after a resume (default: 0)")
    which.add_argument("--global-batch-size", type=int, default=64, metavar="G", help="samples per step, over all ranks (default: 64)")
    which.add_argument("--seed", type=int, default=0, help="run.seed (default: 0)")
    which.add_argument("--window", type=int, default=65_536, metavar="N", help="data.window (default: 65536)")
    which.add_argument("--balance", choices=("none", "sqrt", "uniform"), default="none", help="data.balance (default: none)")
    which.add_argument("--last", choices=("keep", "drop"), default="keep", help="data.last (default: keep)")
    which.add_argument("--split", choices=("train", "val"), default="train", help="which split, if SRC has several (default: train)")
    which.add_argument("--val-fraction", type=float, default=0.0, metavar="F", help="data.val_fraction (default: 0)")
    which.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="data.on_error, while packing (default: fail)")
    which.add_argument("--cache-dir", metavar="DIR", help="data.cache_dir")
    which.add_argument("--cache-gb", type=float, metavar="GB", help="data.cache_gb, for remote shards (default: all are kept)")
    images = parser.add_argument_group("images")
    images.add_argument("--image-size", type=int, default=224, metavar="N", help="data.image_size (default: 224)")
    images.add_argument("--augment", choices=("imagenet", "cifar", "light", "none"), default="imagenet", help="data.augment.preset (default: imagenet)")
    images.add_argument("--pixels", action="store_true", help="hash the augmented pixels too")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--quiet", action="store_true", help="print no progress")
    return parser
