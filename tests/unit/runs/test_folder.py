"""A run folder belongs to one run: seconds are refused, the dead are recognised, ghosts write nothing."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import wait_for

from dtl.errors import UserError
from dtl.runs.folder import RunFolder, Status, Superseded, check_incarnation, check_is_run, newest_incarnation, read_status


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "digits"


def start(folder: Path, *, stale_seconds: float = 60.0) -> RunFolder:
    """Quick beats, and long patience: what hangs on a beat that did not come in time holds on a core that stalls, too."""
    run = RunFolder(folder, stale_seconds=stale_seconds, beat_seconds=0.05, log=lambda line: None)
    run.acquire()
    return run


HOLD = "import sys, time; from dtl.runs.folder import RunFolder; r = RunFolder(sys.argv[1]); print(r.acquire(), flush=True); time.sleep(60)"


@pytest.fixture
def other(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        yield process
        process.kill()


def rewrite_owner(folder: Path, **facts: object) -> None:
    path = folder / "lock" / f"{newest_incarnation(folder):08d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_the_number_grows_with_each_start(folder: Path) -> None:
    for number in (1, 2, 3):
        with RunFolder(folder) as run:
            assert (run.incarnation, newest_incarnation(folder)) == (number, number)
            run.check_incarnation()
    assert os.listdir(folder / "lock") == ["00000003.json"]


def test_status_is_written_whole(folder: Path) -> None:
    assert read_status(folder) == Status()
    with RunFolder(folder) as run:
        run.write_status("running", step=3)
        run.write_status("stopped", why="SIGTERM", step=7, images=12)
        status = json.loads((folder / "status.json").read_text())
        assert read_status(folder).step == 7
        assert {key: status[key] for key in ("state", "why", "step", "images", "incarnation", "pid")} == {
            "state": "stopped",
            "why": "SIGTERM",
            "step": 7,
            "images": 12,
            "incarnation": 1,
            "pid": os.getpid(),
        }
        with pytest.raises(ValueError, match="'asleep' is none of"):
            run.write_status("asleep")
    assert sorted(os.listdir(folder)) == ["lock", "status.json"]
    for text in ("{tor", "[]", '{"step": -1}', '{"step": "3"}', '{"progress": {"step": 1}}', '{"phases": [{"phase": 3}]}', '{"a":' * 5000):
        (folder / "status.json").write_text(text)
        assert read_status(folder) == Status()


def test_a_second_run_is_refused_with_host_and_pid(folder: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(
        UserError, match=rf"another process is training in .*digits \(host {re.escape(socket.gethostname())}, pid {other.pid}, since 2.*--run.name"
    ):
        start(folder)
    assert newest_incarnation(folder) == 1


def test_also_within_one_process(folder: Path) -> None:
    first = start(folder)
    with pytest.raises(UserError, match=f"pid {os.getpid()}"):
        start(folder)
    first.release()
    start(folder).release()


def test_another_rank_releases_nothing(folder: Path) -> None:
    run, other_rank = start(folder), RunFolder(folder)
    other_rank.incarnation = run.incarnation  # told by the main process, to check it
    other_rank.check_incarnation()
    other_rank.release()
    with pytest.raises(UserError, match="another process is training"):
        start(folder)
    run.release()
    start(folder).release()


def test_a_killed_run_leaves_the_folder_free_at_once(folder: Path, other: subprocess.Popen[str]) -> None:
    other.kill()
    wait_for(lambda: Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", what="its end")
    began = time.monotonic()
    run = start(folder)  # the dead process has not even been waited for: it is still listed, as a zombie
    assert run.incarnation == 2
    assert time.monotonic() - began < 30, "half of what watching a heartbeat takes"
    run.release()


def test_a_pid_given_to_another_process_is_not_its_owner(folder: Path, other: subprocess.Popen[str]) -> None:
    rewrite_owner(folder, process_start="1")
    start(folder).release()


@pytest.mark.parametrize("machine", ["another-boot another-host pid:[1]", None])
def test_elsewhere_a_moving_heartbeat_refuses(folder: Path, machine: str | None) -> None:
    owner = start(folder)
    rewrite_owner(folder, machine=machine, host="n7", pid=12)
    with pytest.raises(UserError, match=r"\(host n7, pid 12, since"):
        start(folder)
    owner.release()


def test_elsewhere_a_silent_heartbeat_is_watched_then_taken_over(folder: Path) -> None:
    owner = start(folder)
    owner._stop.set()  # as if the machine had lost its power
    rewrite_owner(folder, machine="another", host="n7", pid=12)
    lines: list[str] = []
    began = time.monotonic()
    run = RunFolder(folder, stale_seconds=0.4, log=lines.append)
    assert run.acquire() == 2
    assert 0.4 <= time.monotonic() - began < 5
    assert "is locked by host n7, pid 12: waiting up to 0 s for a sign that it is alive" in lines[0]
    run.release()
    owner.release()


def test_elsewhere_long_silent_is_taken_over_without_waiting(folder: Path) -> None:
    owner = start(folder)
    owner._stop.set()
    assert owner._heart is not None
    owner._heart.join()
    rewrite_owner(folder, machine="another")
    os.utime(folder / "lock" / "00000001.beat", (time.time() - 500, time.time() - 500))
    began = time.monotonic()
    run = start(folder)
    assert run.incarnation == 2
    assert time.monotonic() - began < 30, "half of what watching takes"
    run.release()


def test_an_owner_file_cut_short_is_judged_by_its_heartbeat(folder: Path) -> None:
    (folder / "lock").mkdir(parents=True)
    (folder / "lock" / "00000004.json").write_text("")
    run = start(folder, stale_seconds=0.4)
    assert run.incarnation == 5
    run.release()


def test_a_requeued_job_takes_over_at_once_and_the_ghost_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    ghost = start(folder)
    ghost.write_status("running", step=5)
    rewrite_owner(folder, machine="another", host="n2")
    with pytest.raises(UserError, match="host n2"):
        start(folder)  # the same start of the same job: two programs of one script
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run = start(folder)
    assert run.incarnation == 2
    run.write_status("running", step=6)
    time.sleep(0.2)  # a few heartbeats of the ghost
    with pytest.raises(Superseded, match=r"of start 1 of the run in .*digits, and start 2 has taken over \(host .*, pid \d+\)"):
        ghost.check_incarnation()
    with pytest.raises(Superseded):
        ghost.write_status("failed", why="lost the others")
    ghost.release()
    status = read_status(folder)
    assert (status.state, status.step) == ("running", 6)
    assert sorted(name for name in os.listdir(folder / "lock") if not name.startswith(".")) == ["00000002.beat", "00000002.json"]  # a heart beats meanwhile
    run.check_incarnation()
    check_incarnation(folder, 2)
    run.release()


def test_an_elastic_restart_takes_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    ghost = start(folder)
    with pytest.raises(UserError, match="another process is training"):
        start(folder)  # on one machine the agent ends the old process first: two at once are a mistaken launch
    rewrite_owner(folder, machine="another")
    run = start(folder)
    assert run.incarnation == 2
    run.release()
    ghost.release()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what static launches are all called
    first = start(folder)
    with pytest.raises(UserError, match="another process is training"):
        start(folder)
    first.release()


def test_of_many_at_once_one_wins(folder: Path) -> None:
    won: list[RunFolder] = []
    refused: list[str] = []
    gate = threading.Barrier(8)

    def attempt() -> None:
        gate.wait()
        try:
            won.append(start(folder))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7)
    won[0].release()


def test_a_vanished_folder_is_no_newer_start(folder: Path) -> None:
    import shutil

    run = start(folder)
    shutil.rmtree(folder)
    run.check_incarnation()
    with pytest.raises(FileNotFoundError):
        run.write_status("running")
    run.release()
    assert not folder.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the run folder .*file/run cannot be written: Not a directory"):
        RunFolder(tmp_path / "file" / "run").acquire()


def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)  # nobody: root may write anywhere
    try:
        with pytest.raises(UserError, match="cannot be written: Permission denied"):
            RunFolder(tmp_path / "run").acquire()
    finally:
        os.seteuid(me)


def test_it_needs_no_torch() -> None:
    code = "import sys, dtl.runs.folder; assert not {'torch', 'numpy', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- whose folder it is


@pytest.mark.parametrize("entry", ["model/mine.txt", "report/mine.txt", "history.jsonl", "lock/mine", "status.json", "checkpoints/step-1/x", "main.py"])
def test_a_folder_that_no_run_made_is_refused_and_stays(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "project" / entry
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"is not empty \(it holds '.*no run of dtl made it: .*--run\.name NEW"):
        RunFolder(tmp_path / "project").acquire()
    assert path.read_text() == '{"mine": 1}'
    assert not list((tmp_path / "project/lock").glob("*.json"))


def test_new_empty_and_earlier_folders_are_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.DS_Store").write_text("x")
    (tmp_path / "copied").mkdir()  # of 0.1.0, without its lock
    (tmp_path / "copied/status.json").write_text('{"state": "done", "why": "", "step": 3, "incarnation": 2}')
    (tmp_path / "saved/checkpoints/step-00000003").mkdir(parents=True)
    (tmp_path / "saved/checkpoints/step-00000003/manifest.json").write_text("{}")
    for name in ("new", "empty", "copied", "saved", "new"):
        with RunFolder(tmp_path / name, log=lambda line: None) as run:
            assert run.incarnation > 0


@pytest.mark.parametrize("name", ["checkpoints", "model", "report", "history.jsonl", "lock"])
def test_links_out_of_the_run_folder_are_refused(tmp_path: Path, name: str) -> None:
    with RunFolder(tmp_path / "run", log=lambda line: None) as run:
        run.write_status("done")
    (tmp_path / "mine").mkdir()
    if name == "lock":
        (tmp_path / "run/lock").rename(tmp_path / "mine/lock")
        (tmp_path / "run/lock").symlink_to(tmp_path / "mine/lock")
    else:
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link: dtl writes and deletes inside of the run folder only"):
        RunFolder(tmp_path / "run").acquire()


def test_clear_leaves_what_is_not_of_dtl(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ours = ["checkpoints/step-00000003/state.json", "checkpoints/.writing-step-00000004-9/x", "model/model.json", "model/model.safetensors",
            "report/index.html", "report/training-head.png", "report/curves-narrow.png", "history.jsonl", "status.json", "transfer.json"]  # fmt: skip
    mine = ["checkpoints/best.pt", "model/model.onnx", "report/notes.txt", "report/photo.png", "notes.md", "thesis/main.tex"]
    for name in (*ours, *mine):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "state.json").write_text("x")
    (run / "checkpoints/step-00000005").symlink_to(outside)
    RunFolder(run).clear()
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) == sorted(mine)
    assert (outside / "state.json").exists()


def test_a_folder_of_empty_folders_is_empty(tmp_path: Path) -> None:
    """A disk is mounted at checkpoints/, and a Slurm job writes its notes, before the first start; a file in checkpoints/ is somebody's."""
    (tmp_path / "run/checkpoints/lost+found").mkdir(parents=True)
    (tmp_path / "run/slurm/17").mkdir(parents=True)
    (tmp_path / "run/slurm/17/stages").write_text("the job has begun")
    check_is_run(tmp_path / "run")
    (tmp_path / "run/checkpoints/mine.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        check_is_run(tmp_path / "run")


def test_links_among_the_locks_lead_nowhere(folder: Path, tmp_path: Path) -> None:
    """In a run folder that somebody else prepared, the names that a start writes to are known beforehand."""
    start(folder).release()
    for name in (".beat-2", "00000002.beat", f".now-{socket.gethostname()}-{os.getpid()}"):
        (folder / "lock" / name).symlink_to(tmp_path / "outside")
    run = start(folder)
    wait_for(lambda: (folder / "lock" / "00000002.beat").is_file())
    run.release()
    assert not (tmp_path / "outside").exists()
