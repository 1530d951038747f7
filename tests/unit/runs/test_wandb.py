"""wandb: one run for each run folder, silent, and never in the run's way."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from trackers import lines, log_steps, make_tracker
from wandb_files import wandb_records

import dtl.runs.wandb
from dtl.errors import UserError
from dtl.runs.console import Console
from dtl.runs.wandb import choose_mode


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def read_wandb(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"history": [], "summary": {}, "config": {}, "exit": None}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["id"], found["name"] = record.run.run_id, record.run.display_name
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            found["history"].append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            found["summary"] |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def test_wandb_offline_is_one_run_over_resumes_and_never_goes_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir, err = tmp_path / "digits", io.StringIO()
    first = make_tracker(run_dir, config={"data": {"workers": 2}}, console=Console(stream=err))
    log_steps(first, 1, 8)
    offset = first.history_offset
    log_steps(first, 9, 12)
    first.close("stopped")
    assert first.wandb_id is not None
    second = make_tracker(run_dir, resume_step=8, history_offset=offset)  # not even the id was remembered by a checkpoint
    assert second.wandb_id == first.wandb_id
    log_steps(second, 9, 20)
    second.test(phase="head", epoch=0, step=20, loss=0.25, top1=0.75, top5=1.0, num_samples=40)
    second.close("done")
    assert capfd.readouterr() == ("", ""), "wandb itself is silent"
    assert re.search(r"^wandb: \S*/digits/wandb/offline-run-\S+ \(`wandb sync` uploads it\)$", err.getvalue(), re.MULTILINE)

    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    runs = [read_wandb(path) for path in files]
    assert [run["id"] for run in runs] == [first.wandb_id] * 2
    assert [run["exit"] for run in runs] == [75, 0]
    assert runs[0]["name"] == "digits"
    assert runs[0]["config"]["data"] == {"workers": 2}
    rows = [row for run in runs for row in run["history"]]
    assert [row["_step"] for row in rows] == list(range(1, 21))
    assert rows[9]["train/loss"] == 0.1
    assert {key: rows[19][key] for key in ("val/top1", "phase", "epoch", "train/images_per_second")} == {
        "val/top1": 0.2,
        "phase": "head",
        "epoch": 0,
        "train/images_per_second": 100,
    }
    tested = {"top1": 0.75, "top5": 1.0, "loss": 0.25, "num_samples": 40}
    assert {name: rows[19][f"test/{name}"] for name in tested} == {name: runs[1]["summary"][f"test/{name}"] for name in tested} == tested
    assert runs[1]["summary"]["head/top1"] == 0.2
    logged = [(event, step) for step in range(1, 21) for event in (("train", "val") if step % 10 == 0 else ("train",))]
    assert [(line["event"], line["step"]) for line in lines(run_dir / "history.jsonl")] == [*logged, ("test", 20)]


def test_a_fresh_run_in_an_old_folder_is_another_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtl.runs.wandb.WandbRun, "_init", lambda *given: (_ for _ in ()).throw(RuntimeError("no")))
    ids = [make_tracker(tmp_path / "run", wandb="offline", **options).wandb_id for options in ({}, {}, {"new_run": True}, {})]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert make_tracker(tmp_path / "run", wandb="offline", wandb_id="remembered").wandb_id == "remembered"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "by-the-agent")
    assert make_tracker(tmp_path / "other", wandb="offline").wandb_id == "by-the-agent"


KILLED_SERVICE = """
import os, signal, sys, time
import psutil
from dtl.runs.tracker import Tracker
tracker = Tracker(sys.argv[1], is_main=True, wandb="offline")
for step in range(1, 40):
    tracker.train(phase="head", epoch=0, step=step, loss=1.0, lr=0.1, images_per_second=1.0, data_wait=0.0)
    if step == 5:
        services = [p for p in psutil.Process().children(recursive=True) if "wandb-core" in " ".join(p.cmdline())]
        assert services
        for service in services:
            service.send_signal(signal.SIGTERM)
        time.sleep(1)
tracker.close("done")
print("closed", flush=True)
"""


def test_a_dead_wandb_service_never_hurts_the_run(tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", KILLED_SERVICE, tmp_path / "run"], capture_output=True, text=True, timeout=90, check=True)
    assert done.stdout == "closed\n"
    assert done.stderr.count("wandb failed while") == 1
    assert "Traceback" not in done.stderr
    assert [line["step"] for line in lines(tmp_path / "run" / "history.jsonl")] == list(range(1, 40))
    assert time.monotonic() - began < 60


def test_a_key_without_an_answering_server_goes_on_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setattr(dtl.runs.wandb, "_INIT_SECONDS", 1.0)
        err = io.StringIO()
        began = time.monotonic()
        tracker = make_tracker(tmp_path / "run", console=Console(stream=err))
        log_steps(tracker, 1, 3)
        tracker.close()
        assert time.monotonic() - began < 20
    assert capfd.readouterr() == ("", "")
    assert re.search(r"wandb could not start online \(.+\): working offline\nwandb: .*offline-run-", err.getvalue())
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert [row["_step"] for row in read_wandb(path)["history"]] == [1, 2, 3]


HANGS = """
import threading
def hang(*given, **named):
    threading.Event().wait()
class Settings:
    def __init__(self, **values):
        self.mode, self.sync_dir = "offline", "there"
class Run:
    settings, resumed, summary = Settings(), False, {}
    def log(self, *given, **named): pass
    def finish(self, *given, **named): pass
    mark_preempting = log_artifact = finish
class Artifact:
    def __init__(self, *given, **named): pass
    def add_dir(self, folder): pass
def Image(path): pass
def setup(settings): pass
def init(**named): return Run()
def teardown(): pass
"""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("setup", r"could not start offline \(no answer within 1 s\): the run continues without it"),
        ("init", r"could not start offline \(no answer within 1 s\): the run continues without it"),
        ("Run.log", r"failed while logging \(no answer within 1 s\): the run continues without it, history.jsonl has everything"),
        ("Image", r"failed while logging \(no answer within 1 s\): .+"),
        ("Artifact.add_dir", r"failed while keeping the model \(no answer within 1 s\): .+"),
        ("Run.log_artifact", r"failed while keeping the model \(no answer within 1 s\): .+"),
        ("Run.mark_preempting", r"did not finish in time: `wandb sync` uploads the rest"),
        ("Run.finish", r"did not finish in time: `wandb sync` uploads the rest"),
        ("teardown", None),
    ],
)
def test_no_call_into_wandb_holds_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, said: str | None) -> None:
    (tmp_path / "wandb.py").write_text(f"{HANGS}\n{call} = hang\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for name in ("_INIT_SECONDS", "_FINISH_SECONDS"):
        monkeypatch.setattr(dtl.runs.wandb, name, 0.0)
    for name in ("_GRACE_SECONDS", "_LOG_SECONDS", "_MODEL_SECONDS", "_TEARDOWN_SECONDS"):
        monkeypatch.setattr(dtl.runs.wandb, name, 1.0)
    err, run_dir = io.StringIO(), tmp_path / "run"
    (run_dir / "report").mkdir(parents=True)
    (run_dir / "report/page.png").write_bytes(b"")
    tracker = make_tracker(run_dir, wandb="offline", console=Console(stream=err))
    log_steps(tracker, 1, 12)
    tracker.attach(run_dir / "report", run_dir, step=12)
    tracker.close("stopped")
    monkeypatch.delitem(sys.modules, "wandb")
    about_wandb = [line.removeprefix("wandb ") for line in err.getvalue().splitlines() if line.startswith("wandb ")]
    assert len(about_wandb) == (said is not None)
    assert said is None or re.fullmatch(said, about_wandb[0])
    assert [line["step"] for line in lines(run_dir / "history.jsonl") if line["event"] == "train"] == list(range(1, 13))


FROZEN_SERVICE = """
import signal, sys
import psutil
import dtl.runs.wandb
from dtl.runs.tracker import Tracker
dtl.runs.wandb._FINISH_SECONDS, dtl.runs.wandb._GRACE_SECONDS = 1.0, 2.0
tracker = Tracker(sys.argv[1], is_main=True, wandb="offline")
for process in psutil.Process().children(recursive=True):
    process.send_signal(signal.SIGSTOP)
    print(process.pid, flush=True)
tracker.train(phase="head", epoch=0, step=1, loss=1.0, lr=0.1, images_per_second=1.0, data_wait=0.0)
tracker.close("done")
"""


def test_a_wandb_service_that_does_not_answer_keeps_no_process_from_ending(tmp_path: Path) -> None:
    """Not at the exit either, where wandb's own hook waits for its service."""
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:  # not pipes: the frozen service has them too, and would keep them open
        command = [sys.executable, "-c", FROZEN_SERVICE, tmp_path / "run"]
        try:
            subprocess.run(command, stdout=out, stderr=err, timeout=90, check=True)
        finally:
            frozen = [int(pid) for pid in (tmp_path / "out").read_text().split()]
            for pid in frozen:
                os.kill(pid, signal.SIGKILL)
    assert frozen, "there was a service to freeze"
    said = (tmp_path / "err").read_text()
    assert said.count("wandb did not finish in time: `wandb sync` uploads the rest") == 1
    assert "Traceback" not in said


def test_wandb_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    err = io.StringIO()
    tracker = make_tracker(tmp_path / "run", wandb="offline", console=Console(stream=err))
    log_steps(tracker, 1, 2)
    tracker.close()
    assert "wandb cannot be imported" in err.getvalue()
    assert len(lines(tmp_path / "run" / "history.jsonl")) == 2


def test_which_mode_is_chosen(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\nmachine other.org login user password secret\n")
    netrc.chmod(0o600)
    key, file, nothing = {"WANDB_API_KEY": "k"}, {"NETRC": str(netrc)}, {"NETRC": str(tmp_path / "none")}
    cases: list[tuple[str, dict[str, str], str]] = [
        ("auto", nothing, "offline"),
        ("auto", key, "online"),
        ("auto", file, "online"),
        ("auto", file | {"WANDB_BASE_URL": "https://mine.net"}, "offline"),
        ("auto", file | {"WANDB_BASE_URL": "https://other.org"}, "online"),
        ("auto", key | {"WANDB_MODE": "offline"}, "offline"),
        ("auto", key | {"WANDB_MODE": "disabled"}, "off"),
        ("online", key | {"WANDB_MODE": "disabled"}, "off"),
        ("offline", key, "offline"),
        ("online", nothing, "offline"),
        ("off", key, "off"),
    ]
    assert [choose_mode(setting, environ)[0] for setting, environ, _ in cases] == [mode for _, _, mode in cases]
    assert choose_mode("online", nothing)[1] == "no wandb key is known (`wandb login` stores one), so wandb works offline"
    assert choose_mode("auto", nothing)[1] == ""
    netrc.write_text("what is this")
    assert choose_mode("auto", file)[0] == "offline"
    with pytest.raises(UserError, match=r"tracking.wandb is 'on': it must be auto, online, offline or off"):
        choose_mode("on", {})


@pytest.mark.parametrize("what", ["link", "endless", "pipe", "lines"])
def test_the_id_in_a_run_folder_of_somebody_else(tmp_path: Path, what: str) -> None:
    path = tmp_path / "run" / "wandb" / "run-id.txt"
    path.parent.mkdir(parents=True)
    make = {
        "link": lambda: path.symlink_to(tmp_path / "outside"),
        "endless": lambda: path.symlink_to("/dev/zero"),
        "pipe": lambda: os.mkfifo(path),
        "lines": lambda: path.write_text("a\n../b"),
    }
    make[what]()
    assert dtl.runs.wandb.stored_id(tmp_path / "run") is None
    with pytest.raises(OSError, match="regular file") if what in ("endless", "pipe") else nullcontext():
        dtl.runs.wandb.store_id(tmp_path / "run", "abc")
        assert dtl.runs.wandb.stored_id(tmp_path / "run") == "abc"
    assert not (tmp_path / "outside").exists()
