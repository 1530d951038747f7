"""Where the ranks of a run meet: the store at MASTER_ADDR:MASTER_PORT, made by the launcher or by rank 0."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from dtl.errors import UserError
from dtl.machine import PARENT
from dtl.text import counted, some, to_stderr

FIRST_LINE = 10.0
"""Seconds after which those who have come name those who have not."""
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rendezvous_store(seconds: float = 30.0) -> TCPStore:
    """Another connection to the store of the rendezvous."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))


def check_variables(environment: Mapping[str, str]) -> None:
    """UserError where the variables of a launcher are incomplete, or none that belong together: most often leftovers of another launch."""
    given = {name: environment[name] for name in _NAMES if environment.get(name)}
    numbers = {}
    for name in {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"}.intersection(given):
        if not given[name].isdecimal():
            raise UserError(f"{name}={given[name]!r} in the environment is not a number; {_way_out(given)}")
        numbers[name] = int(given[name])
    world = numbers.get("WORLD_SIZE", 1)
    if "LOCAL_RANK" not in given and world == 1:
        return  # a process by itself
    missing = [name for name in _NAMES if name not in given]
    if missing:
        raise UserError(f"the environment has {_list(given)}, but no {' and no '.join(missing)}; {_way_out(given)}")
    if not numbers["RANK"] < world:
        raise UserError(f"RANK={numbers['RANK']} in the environment, but WORLD_SIZE={world}: ranks count from 0; {_way_out(given)}")


def _list(given: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in given.items())


def _way_out(given: Mapping[str, str]) -> str:
    return f"for one process run `unset {' '.join(given)}` first; several are started by torchrun or accelerate launch"


class Arrivals:
    """While the process group is made: reports which ranks have not come, and turns the end of the time limit into a UserError.

    torch waits in silence, and does not know for whom. So each rank writes its number into the store, by a connection of its own. Where there is no store, and
    the torchrun (accelerate launch is one, too) that started this process is gone, no one will come any more: the rank ends. A shell may well be gone.
    """

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self._world, self._rank = int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("RANK") or 0)
        self._speaks_alone = (os.environ.get("LOCAL_RANK") or "0") == "0"
        self._place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        # The agent's store outlives a restart of the ranks.
        self._key = f"dtl/arrived/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._complete = threading.Event()
        self._missing = ""
        self._thread = threading.Thread(target=self._watch, name="arrivals", daemon=True)

    def __enter__(self) -> Arrivals:
        if self._world > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._complete.set()
        if isinstance(error, DistError) and self._world > 1:
            if "EADDRINUSE" in str(error):
                reason = "another process listens there; choose a free port (--main_process_port of accelerate, --master-port of torchrun)"
            elif self._missing:
                reason = f"no {self._missing} of {self._world} within {self._minutes:g} minutes (run.timeout_minutes); were all processes started?"
            else:
                reason = " ".join(str(error).split())[:300]
            raise UserError(f"the ranks could not meet at {self._place} (MASTER_ADDR:MASTER_PORT): {reason}") from error

    def _watch(self) -> None:
        """Prints in the lowest rank that has come, or, where there is no store, in the first process of each node."""
        began, due = time.monotonic(), FIRST_LINE
        store: Any = None
        while not self._complete.wait(0.5):
            age = time.monotonic() - began
            try:
                if store is None:
                    store = rendezvous_store(2.0)
                    store.set(f"{self._key}/{self._rank}", "")
                away = [rank for rank in range(self._world) if not store.check([f"{self._key}/{rank}"])] if age >= FIRST_LINE else []
                prints = self._rank == min(set(range(self._world)).difference(away))
            except RuntimeError:  # nobody listens
                away, prints, store = [0], self._speaks_alone, None
                if os.getppid() != PARENT and "TORCHELASTIC_RUN_ID" in os.environ and not self._complete.is_set():
                    if prints:
                        to_stderr(f"dtl: the launcher was lost before the {self._world} ranks had met at {self._place}; start it again")
                    os._exit(1)
            self._missing = f"{'rank' if len(away) == 1 else 'ranks'} {some([str(rank) for rank in away])}" if away else ""
            if age >= due and away and not self._complete.is_set():
                due *= 2
                if prints:
                    to_stderr(
                        f"dtl: waiting for {self._missing} of {self._world} at {self._place} (MASTER_ADDR:MASTER_PORT), for {age:.0f} s; "
                        f"if this should be {counted(1, 'process')}, stop it and run `unset {' '.join(_NAMES)}`"
                    )
