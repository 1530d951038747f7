"""`dtl search`: successive halving over ranges of config keys. The work is `dtl.inference.search`; this is its command line and its workers."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dtl.errors import EXIT_FAULT, EXIT_STOPPED, EXIT_WRONG_INPUT, UserError
from dtl.text import Log, OptionParser, at_least, printable, to_stderr, to_stdout

if TYPE_CHECKING:
    from dtl.inference.search import Budget, Search

_DESCRIPTION = """\
Search for the best settings of a recipe: trials with settings from a space, all trained to the first rung, a third of them (the best) to the next one, and
at least two to their end (synchronous successive halving). The options are those of `dtl train`. Each trial is an ordinary run in RUNS/NAME-search/trial-N;
trial 1 is the recipe as it is. Trials that train only a head share the cached features of their network.

A space is a YAML file that gives config keys ranges:
  phases.all.lr: {log: [0.0001, 0.01]}         or uniform, integers, log_integers
  model.name: [torchvision/resnet18, timm/convnext_tiny]
  model.name, transfer.source: [[torchvision/resnet18, pretrained], [timm/vit_small_patch16_224, vit.pt]]

The same command goes on where a search was stopped or killed, and several may work on one search, here (--slots) or as a Slurm array: the winner and the
table are the same for any number of workers. At the end: the table, a paired test of the winner, one look at the test set, and the command that trains
the winner (RUNS/NAME-search/results.json has all of it).
"""
_EPILOG = """\
examples:
  dtl search --config finetune --data.train photos --space space.yaml --budget 27
  dtl search --config features --data.train photos --space networks.yaml --budget 30m --slots 2
"""
_UNITS = {"s": 1 / 60, "m": 1.0, "h": 60.0}


def run(arguments: Sequence[str]) -> int:
    """The command. UserError if the recipe, the space or the options cannot be used, or do not belong to the search that is there."""
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments))
    from dtl.config import Config
    from dtl.config.load import read_options, resolve_config
    from dtl.config.space import candidates, read_space, resolver

    for word in ("--dry-run", "--print-config"):
        if word in rest:
            raise UserError(f"{word} is for one run: leave out --budget, and give it to dtl train")
    parser.refuse_unknown(rest, Config.model_fields)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError("a trial is trained by one process: start dtl search without a launcher, and several workers with --slots or a Slurm array")
    words = [*(["--config", options.config] if options.config else []), *rest]
    recipe, given = read_options(words)
    config, name = resolve_config(recipe, given)
    space, resolve = None if options.space is None else read_space(options.space), resolver(recipe, given)
    (space or candidates(config)).check(resolve)
    from dtl.inference.search import begin, open_search

    log = to_stderr
    search = open_search(config, name, space, resolve, _budget(options.budget), log=log)
    begin(search)
    slots = options.slots or _num_gpus(config.run.device)
    with _stopping() as stopped:
        status = _work_alone(search, slots, stopped, log) if slots == 1 or options.worker else _work_together(list(arguments), slots, stopped, log)
        if options.worker or (status and stopped()):
            return status
        if search.look()[0]:
            if not status:
                log("dtl: all workers have ended before the search; the same command continues it")
            return status or EXIT_FAULT
    return _print(search, words, options)


def folder_of(arguments: Sequence[str]) -> str:
    """The folder of the search that a command line is about."""
    from dtl.config import load_config
    from dtl.runs.looks import SEARCH_END

    options, rest = _parser().parse_known_args(list(arguments))
    config, name = load_config([*(["--config", options.config] if options.config else []), *rest])
    return f"{config.run.dir}/{name}{SEARCH_END}"


def _print(search: Search, words: Sequence[str], options: argparse.Namespace) -> int:
    from dtl.inference.search_results import conclude, lines

    values = conclude(search, words, log=to_stderr)
    if options.json:
        print(json.dumps(values, allow_nan=False))
    else:
        to_stdout("", *lines(values), "", f"its model: {search.place(values['winner'])}/model", f"all numbers: {search.folder}/results.json")
    return 0


def _budget(text: str | None) -> Budget | None:
    from dtl.inference.search import Budget

    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh]?)", text)
    if found is None or (not found[2] and "." in found[1]):
        raise UserError(f"--budget {text[:40]}: give a number of trials (27), or minutes (30m) or hours (2h)")
    if float(found[1]) == 0:
        raise UserError(f"--budget {text} is too small for one trial")
    return Budget(minutes=float(found[1]) * _UNITS[found[2]]) if found[2] else Budget(trials=_at_most(int(found[1])))


def _at_most(trials: int) -> int:
    from dtl.config.space import MOST_TRIALS

    if trials > MOST_TRIALS:
        raise UserError(f"--budget {trials}: a search has at most {MOST_TRIALS:,} trials")
    return trials


# ---- workers


def _work_alone(search: Search, slots: int, stopped: Callable[[], bool], log: Log) -> int:
    from dtl.inference.search import work

    return work(search, workers=slots * int(os.environ.get("SLURM_ARRAY_TASK_COUNT") or 1), stopped=stopped, log=log)


def _work_together(arguments: list[str], slots: int, stopped: Callable[[], bool], log: Log) -> int:
    """Start workers, each with a GPU of its own where there are some, and wait for them. One that dies is replaced by the others.

    UserError with the line of the first one that cannot use its input, on which the others are stopped.
    """
    from dtl.machine import fresh_python

    gpus, workers = _gpu_names(), list[subprocess.Popen[bytes]]()
    with tempfile.TemporaryFile() as lines:
        command = fresh_python("dtl.commands.search", "worker", str(os.getpid()), str(lines.fileno()), *arguments, "--slots", str(slots), "--worker")
        for number in range(slots):
            own = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
            workers.append(subprocess.Popen(command, env={**os.environ, **own}, stdout=subprocess.DEVNULL, pass_fds=[lines.fileno()]))
        told = _wait(workers, stopped)
        lines.seek(0)
        if line := lines.readline().decode().rstrip("\n"):
            raise UserError(line)
    codes = [worker.returncode for worker in workers]
    for number, code in enumerate(codes, 1):
        ended_by_us = told and code == -signal.SIGTERM  # before it had its handler
        if code not in (0, EXIT_STOPPED) and not ended_by_us:
            log(f"worker {number} ended with status {code}{'; others took over its trial' if 0 in codes else ''}")
    return EXIT_STOPPED if told or EXIT_STOPPED in codes else 0


def _wait(workers: Sequence[subprocess.Popen[bytes]], stopped: Callable[[], bool]) -> bool:
    """Until all have ended. Returns whether they were told to: after a signal, or when one could not use its input."""
    told = False
    while any(worker.poll() is None for worker in workers):
        wrong = any(worker.poll() == EXIT_WRONG_INPUT for worker in workers)
        if (stopped() or wrong) and not told:
            told = True
            for worker in workers:
                if worker.poll() is None:
                    worker.send_signal(signal.SIGTERM)
        for worker in workers:
            try:
                worker.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                pass
    return told


def worker(parent: str, lines: str, *arguments: str) -> None:
    """The process of one slot. `lines`: the file descriptor that takes the line of an error of the user, so that it appears once."""
    from dtl.machine import end_with_parent, why_no_memory

    end_with_parent(int(parent))
    try:
        status = run(arguments)
    except UserError as error:
        os.write(int(lines), f"{printable(str(error))}\n".encode())
        status = EXIT_WRONG_INPUT
    except (MemoryError, OSError, RuntimeError, ImportError) as error:  # as `dtl.cli` tells it
        why = why_no_memory(error)
        if why is None:
            raise
        to_stderr(f"dtl: {why}")
        status = EXIT_FAULT
    sys.exit(status)


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether a signal has asked for a stop; while a trial is trained its own handlers take it."""
    seen: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda received, frame: seen.append(received)) for number in numbers}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _num_gpus(device: str) -> int:
    import torch

    from dtl.distributed.devices import uses_gpu

    return max(1, torch.cuda.device_count()) if uses_gpu(device) else 1


def _gpu_names() -> list[str]:
    """As CUDA_VISIBLE_DEVICES would name one each."""
    import torch

    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given or [str(number) for number in range(torch.cuda.device_count())]


def _parser() -> OptionParser:
    parser = OptionParser(prog="dtl search", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--config", metavar="FILE", help="the recipe; its keys are options too: --section.key VALUE (default: the built-in digits)")
    add("--space", metavar="FILE", help="the ranges, a YAML file (default: other learning rates and durations of the last phase)")
    add(
        "--budget",
        metavar="N|MINUTES",
        help="number of trials (27), or a time such as 30m or 2h, from which the number is computed once, after the first rung of trial 1, and written down "
        "(default: 27 trials)",
    )
    add("--slots", type=at_least(1), metavar="N", help="workers on this machine, one trial each (default: one for each GPU)")
    add("--json", action="store_true", help="print all numbers instead of the table")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser
