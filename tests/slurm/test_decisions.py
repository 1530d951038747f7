"""What the templates decide when a round has ended, on a real Slurm with a launcher that only pretends.

All jobs are submitted at once, since they mostly wait: Slurm lets a requeued job start again after ten seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from desk import Desk, SlurmJob
from lab import SlurmLab
from recipes import write_recipe

LISTENS_LATE = """
import pathlib, signal, time
pathlib.Path("started").touch()
time.sleep(6)
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
while not asked:
    time.sleep(0.05)
"""
# What stands for the launcher does (see pretend.sh), by the name of the job.
JOBS: dict[str, dict[str, Any]] = {
    "crashes": {"does": "exit 1", "environment": {"DTL_MAX_TRIES": "2"}},
    "fails_after_progress": {
        "does": "round=${SLURM_RESTART_COUNT:-0}; mkdir -p runs/tiny/checkpoints/step-0000000$round; say failed 'fault: no luck';[[ $round == 1 ]] && say done",
        "environment": {"DTL_MAX_TRIES": "1"},
    },
    "wrong_input": {"does": "say failed 'input: photos/train: no such folder'; exit 1"},
    "wrong_option": {"does": "say done", "arguments": ["--phases.all.lrr", "1"]},
    "left_done": {"does": "exit 1", "environment": {"DTL_MAX_TRIES": "1"}, "left": '{\n "state": "done",\n "why": ""\n}\n'},
    # Slurm's signal goes to each `sleep`, too, and may come twice: one that ends by it must not end the script (set -e).
    "cancelled": {"does": "trap 'sleep 1 || :; say stopped signal; exit 1' TERM; touch started; while :; do sleep 0.1 || :; done"},
    "listens_late": {
        "does": '[[ -e started ]] && { say done; exit 0; }; "$DTL_PYTHON" -c "$LISTENS_LATE"; say stopped signal; exit 1',
        "environment": {"LISTENS_LATE": LISTENS_LATE},
    },
    "never": {
        "does": 'echo "$*" >>told; say stopped "signal before the first step"; [[ $(wc -l <told) == 2 ]] && say done; exit 1',
        "arguments": ["--run.resume", "never"],
    },
    "array": {
        "does": 'run=${DTL_LOGS%/slurm/*}; say stopped; [[ $run == *seed0 || -e $run/again ]] && say done; touch "$run/again"',
        "template": "array_sweep.sbatch",
        "arguments": ["sweep.txt"],
        "options": ["--array=1-2"],
    },
    "dry_run_refuses": {"does": "touch begun; say done", "environment": {"PRETEND_DRY_RUN": "echo 'dtl: no weights' >&2; exit 2"}},
    "dry_run_fails": {"does": "touch begun; say done", "environment": {"PRETEND_DRY_RUN": "exit 1"}},
    "dry_run_stops": {"does": "say done", "environment": {"PRETEND_DRY_RUN": "echo dry >>told; exit 75"}},
    "dry_run_off": {"does": "say done", "environment": {"PRETEND_DRY_RUN": "exit 2", "DTL_DRY_RUN": "off"}},
    "early": {"does": "say done", "environment": {"DTL_SITE": "site.sh"}},
}


@pytest.fixture(scope="module")
def jobs(lab: SlurmLab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SlurmJob]:
    return {name: submit(Desk(lab, tmp_path_factory.mktemp(name)), **job) for name, job in JOBS.items()}


def submit(
    desk: Desk,
    *,
    does: str,
    template: str = "single_gpu.sbatch",
    arguments: list[str] | None = None,
    options: list[str] | None = None,
    environment: dict[str, str] | None = None,
    left: str | None = None,
) -> SlurmJob:
    write_recipe(desk.folder)
    (desk.folder / "sweep.txt").write_text("--run.seed 0\n--run.seed 1\n")
    (desk.folder / "site.sh").write_text("[[ ${SLURM_RESTART_COUNT:-0} -gt 0 ]] || kill -USR1 $$\n")
    if left:
        (desk.folder / "runs/tiny").mkdir(parents=True)
        (desk.folder / "runs/tiny/status.json").write_text(left)
    wrap = str(Path(__file__).with_name("pretend.sh"))
    return desk.submit(
        template, "tiny.yaml", *(arguments or []), options=["--gpus-per-node=0", *(options or [])],
        DTL_WRAP=wrap, DTL_LAUNCH="", PRETEND=does, **(environment or {}),
    )  # fmt: skip


def test_a_run_that_fails_again_and_again_is_not_requeued(jobs: dict[str, SlurmJob]) -> None:
    job = jobs["crashes"]
    job.wait_for_state("FAILED")
    assert job.lab.job(job.number)["ExitCode"] == "1:0"
    assert job.rounds == 1
    assert "2 rounds without a new checkpoint (DTL_MAX_TRIES), not requeued" in job.log


def test_a_fault_after_progress_is_tried_again(jobs: dict[str, SlurmJob]) -> None:
    job = jobs["fails_after_progress"]
    job.wait_for_state("COMPLETED", "FAILED")
    assert (job.state, job.rounds) == ("COMPLETED", 1)
    assert "ended with an error: fault: no luck; requeued, to resume from step-00000000" in job.log


def test_a_wrong_input_is_not_tried_again(jobs: dict[str, SlurmJob]) -> None:
    job = jobs["wrong_input"]
    job.wait_for_state("FAILED")
    assert job.lab.job(job.number)["ExitCode"] == "2:0"
    assert "not requeued, the input is wrong: photos/train: no such folder" in job.log


def test_a_mistake_on_the_command_line_starts_nothing(jobs: dict[str, SlurmJob]) -> None:
    job = jobs["wrong_option"]
    job.wait_for_state("FAILED")
    assert job.lab.job(job.number)["ExitCode"] == "2:0"
    assert job.log.count("\n") == 1
    assert "unknown config key phases.all.lrr" in job.log
    assert not job.run.exists()


def test_what_an_earlier_run_left_decides_nothing(jobs: dict[str, SlurmJob]) -> None:
    job = jobs["left_done"]
    job.wait_for_state("FAILED", "COMPLETED")
    assert "ended without a result in status.json (state unknown): it was killed, or the log above has the error" in job.log


def test_a_cancelled_job_stays_cancelled(jobs: dict[str, SlurmJob]) -> None:
    job = jobs["cancelled"]
    job.wait("to start", (job.folder / "started").exists)
    job.lab.call("scancel", job.number)
    job.wait_for_state("CANCELLED")
    job.wait("to end its script", lambda: "not requeued by this script, because Slurm reports the job as" in job.log)
    assert "stopped after saving" in job.log
    assert (job.state, job.rounds) == ("CANCELLED", 0)


def test_the_run_is_asked_again_and_again_until_it_listens(jobs: dict[str, SlurmJob]) -> None:
    job = jobs["listens_late"]
    job.wait("to start", (job.folder / "started").exists)
    job.lab.call("scancel", "--batch", "--signal=USR1", job.number)  # as Slurm does it for --signal=B:USR1@...
    job.wait_for_state("COMPLETED", "FAILED")
    assert (job.state, job.rounds) == ("COMPLETED", 1)


def test_run_resume_never_counts_for_the_first_round_only(jobs: dict[str, SlurmJob]) -> None:
    job = jobs["never"]
    job.wait_for_state("COMPLETED", "FAILED")
    first, second = (job.folder / "told").read_text().splitlines()
    assert first.endswith("--run.resume never")
    assert second.endswith("--run.resume never --run.resume auto")
    assert "stopped before its first step; requeued" in job.log


def test_requeueing_the_last_element_of_an_array_leaves_the_others_alone(jobs: dict[str, SlurmJob]) -> None:
    job = jobs["array"]
    elements = [SlurmJob(job.lab, f"{job.number}_{i}", job.folder, job.run) for i in (1, 2)]
    for element in elements:
        element.wait_for_state("COMPLETED", "FAILED")
    assert [(element.state, element.rounds) for element in elements] == [("COMPLETED", 0), ("COMPLETED", 1)]


def test_a_warning_before_the_start_requeues_at_once(jobs: dict[str, SlurmJob]) -> None:
    job = jobs["early"]
    job.wait_for_state("COMPLETED", "FAILED")
    assert (job.state, job.rounds) == ("COMPLETED", 1)
    assert "stopped before it could save; requeued" in job.log
    assert "round 0" not in job.log


@pytest.mark.parametrize(("name", "status", "line"), [("dry_run_refuses", 2, "the input is wrong"), ("dry_run_fails", 1, "the dry run failed")])
def test_what_the_dry_run_finds_ends_the_job_before_its_first_round(jobs: dict[str, SlurmJob], name: str, status: int, line: str) -> None:
    job = jobs[name]
    job.wait_for_state("FAILED", "COMPLETED")
    assert job.lab.job(job.number)["ExitCode"] == f"{status}:0"
    assert job.rounds == 0
    assert f"not requeued, {line}" in job.log
    assert not (job.folder / "begun").exists()


def test_a_dry_run_that_is_stopped_is_not_repeated(jobs: dict[str, SlurmJob]) -> None:
    job = jobs["dry_run_stops"]
    job.wait_for_state("COMPLETED", "FAILED")
    assert (job.state, job.rounds) == ("COMPLETED", 1)
    assert "stopped in the dry run; requeued, to resume from the-beginning" in job.log
    assert (job.folder / "told").read_text() == "dry\n"


def test_without_a_dry_run(jobs: dict[str, SlurmJob]) -> None:
    job = jobs["dry_run_off"]
    job.wait_for_state("COMPLETED", "FAILED")
    assert job.state == "COMPLETED"
