"""`dtl find-lr`: a learning rate range test of one phase of a recipe. The work is `dtl.training.lr_range`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dtl.errors import UserError
from dtl.text import OptionParser, to_nobody, to_stderr

if TYPE_CHECKING:
    from dtl.config import Config
    from dtl.distributed.runtime import Runtime
    from dtl.models.build import Network
    from dtl.training.lr_curve import LrCurve

EXIT_STOPPED = 75  # as dtl train's: run me again
_DESCRIPTION = """\
Which learning rate? Trains a phase for a while with a rate that rises exponentially at each step, until the loss diverges, and suggests
a rate inside the fall of the loss. The options are those of `dtl train`; the phase's own lr is not used, its head_lr_scale and
layer_decay are. No run folder is read or written. On several processes, with the same curve on each:
  accelerate launch --config_file launch/gpus.yaml --num_processes 4 -m dtl find-lr --config finetune --data.train photos
"""
_EPILOG = """\
examples:
  dtl find-lr
  dtl find-lr --config configs/finetune.yaml --data.train photos/train --data.val photos/val --phase head
  dtl find-lr --config configs/finetune.yaml --data.train photos/train --data.val photos/val --phase all --start runs/head-only
"""


def run(arguments: Sequence[str]) -> int:
    """The command. UserError for a recipe or options that make no test."""
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments))
    from dtl.config import Config, load_config

    for word in rest:
        name = word.partition("=")[0]
        if name.startswith("--") and "." not in name and name[2:] not in Config.model_fields:
            parser.error(f"unrecognized arguments: {word}")
    config, name = load_config([*(["--config", options.config] if options.config else []), *rest])
    if options.phase is not None and options.phase not in config.phases:
        raise UserError(f"--phase {options.phase}: the recipe has no such phase; its phases: {', '.join(config.phases)}")
    phase = options.phase or list(config.phases)[-1]
    signals = _Signals()
    try:
        with signals.caught():
            return _run(config, f"{name}-{phase}", phase, options, signals)
    except _EndNow:  # on this rank alone
        _tell_stopped(signals, "")
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:  # the others may be waiting for it: no orderly end
            sys.stderr.flush()
            os._exit(EXIT_STOPPED)
        return EXIT_STOPPED


def _run(config: Config, name: str, phase: str, options: argparse.Namespace, signals: _Signals) -> int:
    from dtl.distributed.runtime import Runtime
    from dtl.training.lr_range import SweepStopped

    with Runtime(device=config.run.device, precision=config.precision, timeout_minutes=config.run.timeout_minutes) as runtime:
        runtime.signals.release()  # it would save a checkpoint first, and here is nothing to save
        try:
            curve = _measure(config, phase, options, runtime, signals)
        except SweepStopped as stopped:
            _tell_stopped(signals, f" {stopped}")
            return EXIT_STOPPED
        if runtime.is_main:
            _tell(curve, Path(options.out), name)
    return 0


def _tell_stopped(signals: _Signals, when: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        by = "a signal to another rank" if signals.heard is None else signals.heard.name
        to_stderr(f"dtl: stopped by {by}{when}; nothing was written, and no weights were changed")


class _EndNow(BaseException):
    """A signal ends the command at once; as KeyboardInterrupt, nothing that catches errors catches it."""


class _Signals:
    """SIGTERM, SIGUSR1 and Ctrl-C. From the test's first step on they are noted, for all ranks to stop together; before, and the second time, they end."""

    def __init__(self) -> None:
        self.testing = False
        self.heard: signal.Signals | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.heard = self.heard is not None, signal.Signals(number)
        if again or not self.testing:
            raise _EndNow


def _measure(config: Config, phase_name: str, options: argparse.Namespace, runtime: Runtime, signals: _Signals) -> LrCurve:
    from dtl.models.normalise import Normalise
    from dtl.training import build
    from dtl.training.active import enter, set_head
    from dtl.training.lr_range import find_lr
    from dtl.training.micro_batch import fit

    say = to_stderr if runtime.is_main else to_nobody
    train, val = build.open_data(config, runtime, say)
    network = build.build_network(config, train.num_classes, runtime)
    feeds = build.build_dataloaders(config, runtime, train, val, network)
    phase = next(phase for phase in build.planned(config, feeds) if phase.name == phase_name)
    build.load_pretrained(config, network, runtime, train, say)
    channels_last = build.place_network(config, network, runtime)
    set_head(network, phase, init=config.model.init, seed=config.run.seed)
    if options.start is not None:
        with runtime.together("start"):
            _load(network, options.start)
    active = enter(
        network,
        phase,
        runtime,
        class_counts=feeds.class_counts,
        classes=feeds.classes,
        freeze_norm=config.model.freeze_norm,
        micro_batch_size=feeds.layout(phase).micro_batch_size,
        image_size=config.data.image_size,
        sync_bn=config.model.sync_bn,
        say=say,
    )
    normalise = Normalise(network.preprocessing, runtime.device, channels_last=channels_last)
    if config.data.micro_batch_size == "auto":
        fit(active, feeds, runtime, normalise=normalise, state=None, say=say)
    say(f"phase {phase_name}: up to {options.steps} steps from {options.first:g} to {options.last:g}")
    signals.testing = True
    return find_lr(
        active,
        feeds,
        runtime,
        normalise=normalise,
        seed=config.run.seed,
        first=options.first,
        last=options.last,
        num_steps=options.steps,
        stop=lambda: signals.heard is not None,
        say=say,
    )


def _load(network: Network, start: str) -> None:
    """The weights of a finished run as the start, strictly."""
    from dtl.checkpoint.resume.model_folder import load_model_tensors
    from dtl.inference.model import find_model
    from dtl.models.strict_load import strict_load

    folder, _ = find_model(start)
    strict_load(network.module, load_model_tensors(folder), f"--start {start}")


def _tell(curve: LrCurve, out: Path, name: str) -> None:
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
    print(curve.verdict())


def _parser() -> OptionParser:
    parser = OptionParser(
        prog="dtl find-lr", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="the recipe, and any of its keys as --section.key VALUE (default: the built-in digits)")
    add("--phase", metavar="NAME", help="the phase to test (default: the last one)")
    add("--start", metavar="RUN", help="begin with the weights of this run or model folder, instead of the recipe's own start")
    add("--from", dest="first", type=float, default=1e-6, metavar="LR", help="first learning rate (1e-6)")
    add("--to", dest="last", type=float, default=10.0, metavar="LR", help="last learning rate (10)")
    add("--steps", type=int, default=100, metavar="N", help="steps from the first to the last rate (100)")
    add("--out", metavar="FOLDER", default="find-lr", help="where CONFIG-PHASE.png and .json are written (find-lr)")
    return parser
