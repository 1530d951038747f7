"""`dtl verify-resume`: kill runs of your recipe at random moments, resume them, and compare them with an uninterrupted run."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dtl.checks.resume import Result, check
from dtl.errors import UserError
from dtl.text import OptionParser, to_stdout

_EPILOG = """All other options are those of `dtl train`. Keep the run short (--phases.all.steps 50): it is trained at least twice.
The weights must come out bit-identical. On GPUs this holds with --run.deterministic true only, so it is on there unless the recipe or an option sets it."""


def run(arguments: Sequence[str]) -> int:
    parser = OptionParser(
        prog="dtl verify-resume", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=6, metavar="N", help="number of kills (default: 6)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="ranks on this machine (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (default: 0)")
    parser.add_argument("--folder", type=Path, help="folder for the runs; must not exist, and is kept (default: a temporary folder, which is removed)")
    options, rest = parser.parse_known_args(list(arguments))
    if options.kills < 1 or options.processes < 1:
        raise UserError("--kills and --processes must be at least 1")
    from dtl.config import load_config
    from dtl.distributed.devices import uses_gpu

    config, _ = load_config(rest)  # a mistake in it is reported here, once
    if "deterministic" not in config.run.model_fields_set and uses_gpu(config.run.device):
        rest += ["--run.deterministic", "true"]
        to_stdout("on GPUs: with --run.deterministic true (--run.deterministic false compares runs with the fastest kernels, which may differ)")
    if options.folder is None:
        with tempfile.TemporaryDirectory(prefix="dtl-verify-resume-") as folder:
            return _check(rest, Path(folder), options)
    if options.folder.exists():
        raise UserError(f"--folder {options.folder} exists already; give a new folder")
    options.folder.mkdir(parents=True)
    return _check(rest, options.folder.resolve(), options)


def _check(arguments: list[str], folder: Path, options: argparse.Namespace) -> int:
    def start(words: Sequence[str], variables: dict[str, str]) -> Ranks:
        return Ranks(words, variables, world=options.processes, log=folder / "output.log")

    result = check(start, arguments, folder, kills=options.kills, world=options.processes, seed=options.seed, log=to_stdout)
    return report(result)


def report(result: Result) -> int:
    to_stdout(f"{len(result.kills)} kills in {result.runs} run(s), during: {result.where()}")
    if result.differences:
        for line in result.differences:
            to_stdout(f"DIFFERENT: {line}")
        return 1
    samples = f"{result.slots} samples of {result.steps} steps per run, including augmentations"
    to_stdout(f"the same: weights bit for bit, {result.events} lines of history, {samples}")
    return 0


class Ranks:
    """The processes of one start, each `python -m dtl train`."""

    def __init__(self, arguments: Sequence[str], variables: dict[str, str], *, world: int, log: Path) -> None:
        self.log = log
        shared = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **variables}
        if world > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                shared |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        self._processes = []
        for rank in range(world):
            ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            with open(log, "ab") as output:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "dtl", "train", *arguments], env={**shared, **ranked}, stdout=output, stderr=output, start_new_session=True
                    )
                )

    def is_alive(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its loader processes
        for process in self._processes:
            process.wait()

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self._processes]

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""
