"""torchrun's elastic agents: a rank that dies, one that is asked to stop, a host that is cut off; and a ghost of an older start."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import history, kind, run, status, wait_for
from recipes import weights_hash, write_recipe

from dtl.distributed.watchdog import read_stage

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "dtl/train.py")
LATER = str(int(time.time()) + 86400)
# On a host of another name, as far as the program can see.
ELSEWHERE = """
import runpy, socket, sys
socket.gethostname = lambda: "ghost"
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PHASES: dict[str, Any] = {"all": {"train": "all", "steps": 60, "lr": 0.05, "ema": 0.9, "eval_every": 2}}


def recipe(folder: Path, **phase: Any) -> list[str]:
    file = write_recipe(folder, phases={"all": {**PHASES["all"], **phase}}, model={"name": "paced:small"}, checkpoint={"every_steps": 2})
    return ["--config", str(file)]


class Launched:
    """A real launcher with its ranks; everything is gone when the test is over."""

    def __init__(self, command: list[str], folder: Path, name: str = "0", **variables: str) -> None:
        self.folder, self.stages, self.log = folder, folder / f"stages-{name}", folder / f"launcher-{name}.log"
        self.stages.mkdir(exist_ok=True)
        environment = {
            **os.environ, "DTL_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", "DTL_STAGES": str(self.stages),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "HOLD": str(folder / "hold"), **variables,
        }  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)

    def rank(self, number: int) -> int:
        """The process of a rank."""
        return read_stage(self.stages / f"rank-{number}")[3]

    def wait_for_step(self, step: int, *, after: int = 0) -> None:
        """Until rank 0 is there; `after`: in another process than this one."""

        def is_there() -> bool:
            _, at, _, pid = read_stage(self.stages / "rank-0")
            return self.process.poll() is not None or (at >= step and pid != after)

        wait_for(is_there, what=f"step {step}", seconds=120)
        assert self.process.poll() is None, self.text()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        for file in self.stages.glob("rank-*"):
            pid = read_stage(file)[3]
            if pid and Path(f"/proc/{pid}/cmdline").exists() and b"dtl" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def begin(command: list[str], **more: str) -> Launched:
        started.append(Launched(command, tmp_path, str(len(started)), **more))
        return started[-1]

    yield begin
    for each in started:
        each.end()


def elastic(*arguments: str) -> list[str]:
    return [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", SCRIPT, *arguments]


def test_a_rank_dies_and_all_start_again_then_one_is_stopped_and_all_leave(tmp_path: Path, launch: Callable[..., Launched]) -> None:
    """The agent starts the ranks anew after both; after the first they go on, after the second they leave at once, each time."""
    arguments = recipe(tmp_path)
    (tmp_path / "hold").touch()
    job = launch([*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", SCRIPT, *arguments])
    job.wait_for_step(6)
    before = job.rank(0)
    os.kill(job.rank(1), signal.SIGKILL)
    job.wait_for_step(8, after=before)
    os.kill(job.rank(0), signal.SIGTERM)
    assert job.process.wait(120) != 0
    assert "lost rank 1" in job.text()
    told = status(tmp_path / "runs/tiny")
    assert (told["state"], told["incarnation"]) == ("stopped", 2)
    assert job.text().count("was stopped, and its launcher restarted it: exiting") == 2  # of three restarts the first was for the death
    run(arguments, cwd=tmp_path, world=2, env={"HOLD": "/nonexistent"})
    folder = tmp_path / "reference"
    folder.mkdir()
    run(recipe(folder), cwd=folder, world=2, env={"HOLD": "/nonexistent"})
    assert weights_hash(tmp_path / "runs/tiny") == weights_hash(folder / "runs/tiny")
    assert history(tmp_path / "runs/tiny") == history(folder / "runs/tiny")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    lab, environment = str(Path(__file__).with_name("netlab.sh")), {**os.environ, "NETLAB": str(tmp_path / "netlab")}
    made = subprocess.run([lab, "up"], env=environment, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"network namespaces cannot be made here (root and iproute2 are needed): {(made.stdout + made.stderr).strip()[-200:]}")
    yield lambda *words: ["env", f"NETLAB={environment['NETLAB']}", lab, *words]
    subprocess.run([lab, "down"], env=environment, check=False)


def test_a_host_that_is_cut_off_is_named_and_the_other_goes_on_alone(tmp_path: Path, hosts: Callable[..., list[str]], launch: Callable[..., Launched]) -> None:
    arguments = [*recipe(tmp_path), "--run.timeout-minutes", "0.2"]
    rendezvous = "join_timeout=70,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    command = [
        *TORCHRUN, "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", "h1:29400",
        "--rdzv-id", "lab", "--rdzv-conf", rendezvous, SCRIPT, *arguments,
    ]  # fmt: skip
    (tmp_path / "hold").touch()
    first, second = (launch(hosts("on", host, "env", "GLOO_SOCKET_IFNAME=eth0", f"CUDA_VISIBLE_DEVICES={host}", *command)) for host in "12")
    wait_for(lambda: max(read_stage(file)[1] for launched in (first, second) for file in [launched.stages / "rank-0"]) >= 4, what="step 4", seconds=120)
    assert f"2 processes on {kind()}" in first.text() + second.text()
    subprocess.run(hosts("cut", "2"), check=True)
    (tmp_path / "hold").unlink()
    assert first.process.wait(150) == 0, first.text() + second.text()
    lost = [line for line in first.text().splitlines() if line.startswith("dtl: no progress for") and "the same command resumes" in line]
    assert len(lost) == 1, first.text()
    assert re.search(r"waiting for rank 1 \(host h2, pid \d+\), silent for \d+ s, last seen in stage \w+ of step \d+", lost[0])
    assert "this run used 2 processes and now uses 1:" in first.text()
    told = status(tmp_path / "runs/tiny")
    assert (told["state"], told["step"], told["host"]) == ("done", 60, "h1")


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_ghost_of_an_older_start_writes_nothing_any_more(tmp_path: Path, launch: Callable[..., Launched]) -> None:
    """A job was requeued because its node was cut off; its old process lives on there, and comes back to the shared disk."""
    arguments = recipe(tmp_path, steps=30)
    (tmp_path / "hold").touch()
    ghost = launch([sys.executable, "-c", ELSEWHERE, SCRIPT, *arguments, "--checkpoint.every-steps", "1"], SLURM_JOB_ID="7", SLURM_JOB_END_TIME=LATER)
    ghost.wait_for_step(4)
    assert status(tmp_path / "runs/tiny")["host"] == "ghost"
    os.kill(ghost.process.pid, signal.SIGSTOP)
    (tmp_path / "hold").unlink()
    environment = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_END_TIME": LATER, "HOLD": "/nonexistent"}
    run(arguments, cwd=tmp_path, env=environment)
    before = content(tmp_path / "runs/tiny")
    assert status(tmp_path / "runs/tiny")["incarnation"] == 2
    os.kill(ghost.process.pid, signal.SIGCONT)
    assert ghost.process.wait(60) == 2, ghost.text()
    assert "start 2 has taken over" in ghost.text()
    assert content(tmp_path / "runs/tiny") == before
