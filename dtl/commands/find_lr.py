"""`dtl find-lr`: a learning rate range test of one phase of a recipe. The work is `dtl.checks.lr_range`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtl.errors import EXIT_FAULT, EXIT_STOPPED, UserError
from dtl.files import user_path
from dtl.text import OptionParser, to_nobody, to_stderr, to_stdout

if TYPE_CHECKING:
    from dtl.checks.lr_range import LrCurve
    from dtl.config import Config
    from dtl.distributed.runtime import Runtime
    from dtl.distributed.watchdog import Heartbeat
    from dtl.models.build import Network

_DESCRIPTION = """\
Learning rate range test: train one phase while the learning rate rises exponentially from step to step, until the loss diverges.
Suggests a rate from the falling part of the loss curve. The options are those of `dtl train`. The phase's own lr is not used, but its
head_lr_scale and layer_decay are. No run folder is read or written. On several processes, each gets the same curve:
  accelerate launch --config_file launch/gpus.yaml --num_processes 4 -m dtl find-lr --config finetune --data.train photos
"""
_EPILOG = """\
examples:
  dtl find-lr
  dtl find-lr --config configs/finetune.yaml --data.train photos/train --data.val photos/val --phase head
  dtl find-lr --config configs/finetune.yaml --data.train photos/train --data.val photos/val --phase all --start runs/head-only
"""


def run(arguments: Sequence[str]) -> int:
    """The command. UserError if the recipe or the options cannot be used."""
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments))
    from dtl.config import Config, load_config
    from dtl.config.load import is_shipped, with_sgd

    parser.refuse_unknown(rest, Config.model_fields)
    config, name = load_config([*(["--config", options.config] if options.config else []), *rest])
    if options.phase is not None and options.phase not in config.phases:
        raise UserError(f"--phase {options.phase}: the recipe has no such phase; its phases: {', '.join(config.phases)}")
    phase = options.phase or list(config.phases)[-1]
    if config.phases[phase].optimizer == "solve":
        if not is_shipped(config, f"phases.{phase}.optimizer"):
            raise UserError(f"phase {phase} is solved (optimizer: solve), so it has no learning rate; give another --phase, or --phases.{phase}.optimizer sgd")
        config = with_sgd(config, phase, "a head that is solved has no learning rate")
    return _run(config, f"{name}-{phase}", phase, options)


def _run(config: Config, name: str, phase: str, options: argparse.Namespace) -> int:
    from dtl.checks.lr_range import SweepStopped
    from dtl.distributed.determinism import deterministic_kernels
    from dtl.distributed.runtime import Runtime
    from dtl.distributed.signals import StoppedBeforeFirstStep

    with (
        deterministic_kernels(config.run.deterministic),
        Runtime(device=config.run.device, precision=config.precision, timeout_minutes=config.run.timeout_minutes) as runtime,
    ):
        try:
            curve = _watched(config, phase, options, runtime)
        except (StoppedBeforeFirstStep, SweepStopped) as stopped:
            if runtime.is_main:
                when = f" {stopped}" if isinstance(stopped, SweepStopped) else ""
                to_stderr(f"dtl: stopped by {runtime.signals.origin}{when}; nothing was written, and no weights were changed")
            runtime.barrier()  # the first rank that leaves makes the launcher end the others
            return EXIT_STOPPED
        if runtime.is_main:
            _report(curve, user_path(options.out), name)
    return 0


def _watched(config: Config, phase: str, options: argparse.Namespace, runtime: Runtime) -> LrCurve:
    """`_measure`, which ends on all ranks where one is lost or none gets on."""
    from dtl.checks.lr_range import SweepStopped
    from dtl.distributed.signals import StoppedBeforeFirstStep
    from dtl.distributed.watchdog import Heartbeat, PeerLost, Watchdog

    heart = Heartbeat()
    watchdog = Watchdog(
        heart,
        rank=runtime.rank,
        world_size=runtime.world_size,
        name=runtime.token,
        limit=60 * config.run.timeout_minutes,
        log=lambda line: to_stderr(f"dtl: {line}"),
        end=_lost,
        processes=[place.process for place in runtime.places],
    )
    try:
        with watchdog:
            runtime.leave_limits_to_watchdog()
            try:
                return _measure(config, phase, options, runtime, heart)
            except (StoppedBeforeFirstStep, SweepStopped) as stop:
                stopped = stop  # no failure of this rank: all of them stop
    except PeerLost as lost:
        if str(lost):
            _lost(str(lost))
        os._exit(EXIT_FAULT)  # the usual way out would wait for the rank that is gone
    raise stopped


def _lost(line: str) -> None:
    to_stderr(f"dtl: {line}; nothing was written, and no weights were changed")


def _measure(config: Config, phase_name: str, options: argparse.Namespace, runtime: Runtime, heart: Heartbeat) -> LrCurve:
    from dtl.checkpoint.transfer.source.read import preprocessing_for
    from dtl.checks.lr_range import find_lr
    from dtl.distributed.determinism import name_operators
    from dtl.models.init import head_init
    from dtl.training import build
    from dtl.training.active import enter, set_head
    from dtl.training.micro_batch import fit, unstable_operators

    log = to_stderr if runtime.is_main else to_nobody
    for line in config.notes:
        log(line)
    with runtime.before_first_step(lambda: None):
        data = build.open_data(config, runtime, log)
        train = data.train
        network = build.build_network(config, train.num_classes, runtime)
        weights = build.read_pretrained(config, network, runtime)
        facts = build.data_facts(config, runtime, data)
        with runtime.together("model"):
            found = build.with_data(config, preprocessing_for(network.preprocessing, weights), facts)
        network = build.network_for(found, config, network, runtime, pretrained=weights is not None)
        loaders = build.build_dataloaders(config, runtime, data, network)
        phase = next(phase for phase in build.planned(config, loaders) if phase.name == phase_name)
        loaders.use(phase)
        build.load_pretrained(config, network, runtime, train, log, weights=weights)
        normalise = build.place_network(config, network, runtime)
        set_head(network, phase, init=head_init(config), seed=config.run.seed)
        if options.start is not None:
            with runtime.together("start"):
                _load(network, options.start)
        active = enter(
            network,
            phase,
            runtime,
            class_counts=loaders.class_counts,
            classes=loaders.classes,
            freeze_norm=config.model.freeze_norm,
            micro_batch_size=loaders.layout(phase).micro_batch_size,
            image_size=loaders.image_size,
            sync_bn=config.model.sync_bn,
            log=log,
        )
        if config.data.micro_batch_size == "auto":
            fit(active, loaders, runtime, normalise=normalise, state=None, log=log)
        if config.run.deterministic:
            for line in name_operators(unstable_operators(active, loaders, runtime, normalise=normalise), phase_name, runtime.device.type):
                log(line)
    log(f"phase {phase_name}: up to {options.steps} steps, learning rate from {options.first:g} to {options.last:g}")
    return find_lr(
        active,
        loaders,
        runtime,
        normalise=normalise,
        seed=config.run.seed,
        first=options.first,
        last=options.last,
        num_steps=options.steps,
        heart=heart,
        stop=lambda: runtime.stop_signal is not None,
        log=log,
    )


def _load(network: Network, start: str) -> None:
    """The weights of a finished run as the start, strictly."""
    from dtl.checkpoint.resume.model_folder import load_model_tensors
    from dtl.inference.model import find_model
    from dtl.models.strict_load import strict_load

    folder, _ = find_model(start)
    strict_load(network.module, load_model_tensors(folder), f"--start {start}")


def _report(curve: LrCurve, out: Path, name: str) -> None:
    from dtl.files import write_whole
    from dtl.report.lr_plot import save_lr_plot

    values = curve.to_json()
    try:
        out.mkdir(parents=True, exist_ok=True)
        data = (json.dumps(values, indent=1, allow_nan=False) + "\n").encode()
        write_whole(out / f"{name}.json", lambda file: file.write(data))
        save_lr_plot(out / f"{name}.png", phase=curve.phase, lrs=curve.lrs, losses=curve.losses, smoothed=curve.smoothed, suggestion=curve.suggestion)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    to_stderr(f"{len(curve.lrs)} steps; plot {out / name}.png, numbers {out / name}.json")
    to_stdout(curve.summary())


def _parser() -> OptionParser:
    parser = OptionParser(
        prog="dtl find-lr", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="the recipe; its keys are options too: --section.key VALUE (default: the built-in digits)")
    add("--phase", metavar="NAME", help="the phase to test (default: the last one)")
    add("--start", metavar="RUN", help="start from the weights of this run or model folder, instead of those of the recipe")
    add("--from", dest="first", type=float, default=1e-6, metavar="LR", help="first learning rate (default: 1e-6)")
    add("--to", dest="last", type=float, default=10.0, metavar="LR", help="last learning rate (default: 10)")
    add("--steps", type=int, default=100, metavar="N", help="number of steps from the first to the last rate (default: 100)")
    add("--out", metavar="FOLDER", default="find-lr", help="where CONFIG-PHASE.png and .json are written (default: find-lr)")
    return parser
