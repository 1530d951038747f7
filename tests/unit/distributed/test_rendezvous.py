"""Ranks that do not come, and variables of a launcher that do not belong together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import free_port
from launchers import ROOT

from dtl.distributed import rendezvous
from dtl.distributed.rendezvous import check_variables
from dtl.errors import UserError

WHOLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "variables",
    [{}, WHOLE, {**WHOLE, "WORLD_SIZE": "1"}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"}, {"RANK": ""}],
)
def test_variables_that_belong_together(variables: dict[str, str]) -> None:
    check_variables(variables)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"LOCAL_RANK": "0"},
            "the environment has LOCAL_RANK=0, but no RANK and no WORLD_SIZE and no MASTER_ADDR and no MASTER_PORT; .* run `unset LOCAL_RANK` first",
        ),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2, but no RANK"),
        ({**WHOLE, "MASTER_PORT": ""}, "but no MASTER_PORT; .* `unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR` first"),
        ({**WHOLE, "RANK": "2"}, "RANK=2 in the environment, but WORLD_SIZE=2: ranks count from 0"),
        ({**WHOLE, "WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is not a number"),
        ({"RANK": "-1"}, "RANK='-1' in the environment is not a number"),
    ],
)
def test_leftovers_of_another_launch_are_one_line(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_variables(variables)


RANK = """
import os, sys
import dtl.machine  # first, as in dtl.cli
from dtl.distributed import rendezvous
rendezvous.FIRST_LINE = 1.0
from dtl.distributed.runtime import Runtime, MARGIN
from dtl.errors import UserError
import dtl.distributed.runtime as runtime
from datetime import timedelta
runtime.MARGIN = timedelta(0)
try:
    with Runtime(device="cpu", timeout_minutes=float(sys.argv[1])) as made:
        os.write(1, f"met {made.world_size}\\n".encode())  # in one piece, into the pipe that others write to as well
except UserError as error:
    print(error)
"""


def start(rank: int, world: int, port: int, minutes: float) -> subprocess.Popen[str]:
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **variables, "PYTHONPATH": f"{ROOT}", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", RANK, str(minutes)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_lowest_rank_that_came_names_those_that_did_not(tmp_path: Path) -> None:
    port = free_port()
    here = [start(rank, 4, port, 0.25) for rank in (0, 2)]
    out = [process.communicate(timeout=120) for process in here]
    assert f"dtl: waiting for ranks 1, 3 of 4 at 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT), for " in out[0][1]
    assert "waiting for" not in out[1][1], "one rank prints for all"
    assert f"the ranks could not meet at 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT): no ranks 1, 3 of 4 within 0.25 minutes" in out[0][0]


def test_without_rank_0_the_others_wait_for_it_until_it_comes() -> None:
    port = free_port()
    late = start(1, 2, port, 2.0)
    time.sleep(8.0)
    first = start(0, 2, port, 2.0)
    assert first.communicate(timeout=120)[0].splitlines()[-1] == "met 2"  # before it torch 2.9 prints a line of gloo's own
    assert late.communicate(timeout=120)[0].splitlines()[-1] == "met 2"


LAUNCHER = """
import os, subprocess, sys, time
for rank in "01":
    subprocess.Popen([sys.executable, "-c", sys.argv[1], "5"], env={**os.environ, "RANK": rank, "LOCAL_RANK": rank})
time.sleep(float(sys.argv[2]))
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("seconds", [1.0, 7.0])  # while they import, and while they wait
def test_ranks_whose_launcher_is_killed_before_they_come_end_with_one_line(seconds: float) -> None:
    """Its store has died with it: they waited for it until run.timeout_minutes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment = {**os.environ, **place, **torchrun, "PYTHONPATH": f"{ROOT}", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK, str(seconds)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    errors = launcher.communicate(timeout=120)[1]  # until the last process that may write there has ended
    lines = [line for line in errors.splitlines() if line.startswith("dtl:") and "waiting for" not in line]
    assert lines == [f"dtl: the launcher was lost before the 2 ranks had met at 127.0.0.1:{place['MASTER_PORT']}; start it again"]


def test_ranks_whose_shell_has_ended_meet() -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    environment = {**os.environ, **place, "PYTHONPATH": f"{ROOT}", "GLOO_SOCKET_IFNAME": "lo"}
    shell = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK, "0.5"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert shell.communicate(timeout=120)[0].splitlines().count("met 2") == 2


def test_who_is_missing_is_known_between_two_lines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines come after 10, 20, 40 s ...: at the end of the time limit most of the time since the last one has passed."""
    from torch.distributed import DistStoreError, TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {**WHOLE, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "FIRST_LINE", 0.5)
    arrivals = rendezvous.Arrivals(30.0)
    arrivals.__enter__()
    time.sleep(3.25)  # after the line at 2 s, long before that at 4 s
    with pytest.raises(UserError, match=r"no ranks 1, 2 of 3 within 30 minutes \(run\.timeout_minutes\)"):
        arrivals.__exit__(DistStoreError, DistStoreError("Timed out after 16 seconds waiting for clients"), None)
