"""`dtl COMMAND ...`: finds the command's module, and turns what goes wrong into one line and an exit status.

Nothing heavy is imported before the command is known, so that `--help` is quick.
"""

from __future__ import annotations

import difflib
import importlib
import os
import socket
import sys
import time
from collections.abc import Sequence

from dtl.commands import COMMANDS
from dtl.credentials import note, redacted_line
from dtl.errors import EXIT_FAULT, EXIT_WRONG_INPUT, UserError
from dtl.machine import why_no_memory
from dtl.text import printable_lines
from dtl.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """The `dtl` program; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"dtl {__version__}")
        return 0
    name, *rest = arguments
    note(arguments)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        return _fail(f"unknown command {name!r}; {hint}")
    return run_command(name, rest)


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run one command; a user's mistake becomes one line on stderr, from one rank only, and status 2."""
    note(arguments)
    if why := _why_no_folder():  # torch's libraries end the process there without a word of dtl
        return _fail(why)
    try:
        module = importlib.import_module(f"dtl.commands.{name.replace('-', '_')}")
        return int(module.run(list(arguments)))
    except UserError as error:
        if os.environ.get("DTL_DEBUG") or getattr(error, "show_traceback", False):
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`dtl ... | head`): not our fault, and nothing to report.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        why = why_no_memory(error)
        if why is None or os.environ.get("DTL_DEBUG"):
            raise
        return _fail(why, EXIT_FAULT)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            f"dtl {__version__}: distributed transfer learning for image classification",
            "",
            "usage: dtl COMMAND [options]         (dtl COMMAND --help lists them)",
            "",
            *lines,
            "",
            "On several GPUs or processes: accelerate launch dtl/train.py [options], or accelerate launch -m dtl train [options]",
        ]
    )


def _why_no_folder() -> str | None:
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the folder that this shell is in was deleted: change to another one (cd), and run the command again"
    except OSError:
        return None
    return None


def _fail(message: str, status: int = EXIT_WRONG_INPUT) -> int:
    # Leftovers of another launch (RANK alone) make no rank.
    launched = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    rank = int(os.environ["RANK"]) if launched and os.environ["RANK"].isdecimal() else 0
    if rank == 0:
        print(f"dtl: {printable_lines(redacted_line(message))}", file=sys.stderr, flush=True)
    elif not getattr(sys.modules.get("dtl.distributed.runtime"), "ranks_met", False) and _main_process_waits():
        print(f"dtl: rank {rank} (host {socket.gethostname()}): {printable_lines(message)}", file=sys.stderr, flush=True)
    return status


def _main_process_waits() -> bool:
    """For a rank that fails before the rendezvous: did the main process fail too, and print why, or is it waiting for this one?

    If it failed, the launcher ends this process within the pause, or nothing listens at the rendezvous.
    """
    time.sleep(3.0)
    try:
        with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5.0):
            return True
    except (OSError, KeyError, ValueError):
        return False
