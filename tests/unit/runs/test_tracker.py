"""What a run tells: a history that no kill doubles or disorders, copies that never hurt, output fit for people and for files."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from wandb_files import wandb_records

import dtl.runs.wandb
from dtl.errors import UserError
from dtl.runs.tracker import Console, History, Tracker, summary_table
from dtl.runs.wandb import choose_mode


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


# ---- history


def train_line(step: int, **more: Any) -> dict[str, Any]:
    return {"event": "train", "phase": "head", "epoch": 0, "step": step, "loss": 1 / step, **more}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_each_line_is_there_when_append_returns(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for step in range(1, 4):
        history.append(train_line(step, text="Grüße", none=None, flag=True))
        assert len(lines(history.path)) == step
        assert history.offset == history.path.stat().st_size
    assert lines(history.path)[2] == train_line(3, text="Grüße", none=None, flag=True)


def test_always_valid_json(tmp_path: Path) -> None:
    import numpy as np
    import torch

    history = History(tmp_path / "history.jsonl")
    odd = {"a": float("nan"), "b": [float("inf"), -float("inf")], "c": np.float32(0.5), "d": torch.tensor(2), "e": tmp_path, "f": {1: (2,)}}
    history.append({"event": "note", **odd})
    (line,) = lines(history.path)
    assert line == {"event": "note", "a": "nan", "b": ["inf", "-inf"], "c": 0.5, "d": 2, "e": str(tmp_path), "f": {"1": [2]}}
    assert float(line["b"][1]) == -float("inf")


@pytest.mark.parametrize("torn", ["", '{"event": "tra', '{"event": "train", "step": 9}'])
@pytest.mark.parametrize("resume_at", [0, 1, 3, 6])
@pytest.mark.parametrize("by", ["offset", "step"])
def test_a_resume_neither_doubles_nor_disorders(tmp_path: Path, torn: str, resume_at: int, by: str) -> None:
    whole, history = History(tmp_path / "whole.jsonl"), History(tmp_path / "history.jsonl")
    offsets = {0: 0}
    for step in range(1, 7):
        for each in (whole, history):
            each.append(train_line(step))
            if step % 2 == 0:
                each.append({"event": "val", "phase": "head", "epoch": 0, "step": step, "loss": 0.5})
        offsets[step] = history.offset
    with open(history.path, "a") as file:
        file.write(torn)

    resumed = History(history.path)
    if by == "offset":
        assert resumed.resume_at(offsets[resume_at], step=resume_at) == 0
    else:
        resumed.truncate_after(resume_at)
    assert (resumed.offset, resumed.last_step) == (offsets[resume_at], resume_at)
    for step in range(resume_at + 1, 7):
        resumed.append(train_line(step))
        if step % 2 == 0:
            resumed.append({"event": "val", "phase": "head", "epoch": 0, "step": step, "loss": 0.5})
    assert history.path.read_bytes() == whole.path.read_bytes()


def test_resume_from_a_file_that_does_not_fit(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for step in (1, 2, 3):
        history.append(train_line(step))
    offset = history.offset
    os.truncate(history.path, offset - 10)  # the disk has lost the end
    resumed = History(history.path)
    assert resumed.resume_at(offset, step=3) > 0
    assert [line["step"] for line in lines(history.path)] == [1, 2]
    resumed.append(train_line(4))
    assert resumed.resume_at(7, step=2) == 0, "in the middle of a line: the file was edited"
    assert [line["step"] for line in lines(history.path)] == [1, 2]
    # Where only the step is known, the same evaluation is not told twice.
    resumed.append(train_line(2))
    resumed.append({"event": "note", "note": "x", "step": 2})
    assert [line["event"] for line in lines(history.path)] == ["train", "train", "note"]
    assert History(tmp_path / "none.jsonl").resume_at(100, step=3) == 100


def test_going_backwards_is_our_own_mistake(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.append(train_line(5))
    history.append({"event": "note", "note": "no step"})
    with pytest.raises(ValueError, match="4 after 5"):
        history.append(train_line(4))


def test_a_full_disk_keeps_the_lines_for_later(tmp_path: Path) -> None:
    err = io.StringIO()
    tracker = Tracker(tmp_path / "run", is_main=True, wandb="off", console=Console(stream=err))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    tracker.note("first")
    offset = tracker.history_offset
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for number in range(3):
            tracker.note("x" * 60, number=number)
        assert tracker.history_offset in (offset, offset + len(json.dumps({"event": "note", "note": "x" * 60, "number": 0})) + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    tracker.note("last")
    tracker.close()
    assert [line.get("number", line["note"]) for line in lines(tmp_path / "run" / "history.jsonl")] == ["first", 0, 1, 2, "last"]
    assert err.getvalue().count("history.jsonl cannot be written (File too large): training goes on, and it is tried again") == 1


# ---- tracker


def tell(tracker: Tracker, first: int, last: int) -> None:
    tracker.start_phase("head", first_step=0, num_steps=20, step=first - 1)
    for step in range(first, last + 1):
        tracker.train(phase="head", epoch=0, step=step, loss=1 / step, lr=0.1, images_per_second=100.0, data_wait=0.01)
        if step % 10 == 0:
            tracker.val(phase="head", epoch=0, step=step, loss=0.5, top1=step / 100, top5=1.0, num_samples=50)


def make_tracker(run_dir: Path, **options: Any) -> Tracker:
    return Tracker(run_dir, is_main=True, console=options.pop("console", Console(stream=io.StringIO())), **options)


def test_the_keys_of_the_contract(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path / "run", wandb="off")
    tell(tracker, 10, 10)
    tracker.note("saved", step=10, checkpoint_stall_seconds=0.03)
    tracker.close()
    train, val, note = lines(tmp_path / "run" / "history.jsonl")
    assert list(train) == ["event", "phase", "epoch", "step", "loss", "lr", "images_per_second", "data_wait"]
    assert list(val) == ["event", "phase", "epoch", "step", "loss", "top1", "top5", "num_samples"]
    assert note == {"event": "note", "note": "saved", "step": 10, "checkpoint_stall_seconds": 0.03}
    assert tracker.wandb_id is None


def test_other_processes_tell_nothing(tmp_path: Path) -> None:
    err = io.StringIO()
    tracker = Tracker(tmp_path / "run", is_main=False, wandb="offline", tensorboard=True, console=Console(is_main=False, stream=err))
    tell(tracker, 1, 10)
    tracker.note("x")
    tracker.say("y")
    tracker.sync()
    tracker.table([])
    tracker.close()
    assert not (tmp_path / "run").exists()
    assert (err.getvalue(), tracker.history_offset, tracker.wandb_id) == ("", 0, None)


def test_a_ghost_tells_nothing(tmp_path: Path) -> None:
    def ghost() -> None:
        raise UserError("start 2 has taken over")

    tracker = make_tracker(tmp_path / "run", wandb="off", before_write=ghost)
    with pytest.raises(UserError, match="start 2"):
        tell(tracker, 1, 1)
    assert not (tmp_path / "run" / "history.jsonl").exists()


# ---- wandb


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
    tell(first, 1, 8)
    offset = first.history_offset
    tell(first, 9, 12)
    first.close("stopped")
    assert first.wandb_id is not None
    second = make_tracker(run_dir, resume_step=8, history_offset=offset)  # not even the id was remembered by a checkpoint
    assert second.wandb_id == first.wandb_id
    tell(second, 9, 20)
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
    assert runs[1]["summary"]["head/top1"] == 0.2
    assert [(line["event"], line["step"]) for line in lines(run_dir / "history.jsonl")] == [
        (event, step) for step in range(1, 21) for event in (("train", "val") if step % 10 == 0 else ("train",))
    ]


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
        tell(tracker, 1, 3)
        tracker.close()
        assert time.monotonic() - began < 20
    assert capfd.readouterr() == ("", "")
    assert re.search(r"wandb could not start online \(.+\): working offline\nwandb: .*offline-run-", err.getvalue())
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert [row["_step"] for row in read_wandb(path)["history"]] == [1, 2, 3]


def test_wandb_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    err = io.StringIO()
    tracker = make_tracker(tmp_path / "run", wandb="offline", console=Console(stream=err))
    tell(tracker, 1, 2)
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
    assert choose_mode("online", nothing)[1] == "no wandb key is known (`wandb login` stores one), so it works offline"
    assert choose_mode("auto", nothing)[1] == ""
    netrc.write_text("what is this")
    assert choose_mode("auto", file)[0] == "offline"
    with pytest.raises(UserError, match=r"tracking.wandb is 'on': it must be auto, online, offline or off"):
        choose_mode("on", {})


# ---- TensorBoard


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = make_tracker(tmp_path / "run", wandb="off", tensorboard=True)
    tell(tracker, 1, 10)
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))
    assert [round(event.value, 3) for event in events.Scalars("val/top1")] == [0.1]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"tensorboard needs the package tensorboard: pip install tensorboard$"):
        make_tracker(tmp_path / "other", wandb="off", tensorboard=True)


# ---- console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(console: Console, steps: range) -> None:
    for step in steps:
        console.progress(step=step, epoch=1, loss=0.5, lr=0.01, images_per_second=1234.5, data_wait=0.5)


def test_a_log_file_gets_few_plain_lines() -> None:
    out = io.StringIO()
    console = Console(stream=out, plain_seconds=60)
    console.start_phase("head", first_step=100, num_steps=500)
    report(console, range(101, 601))
    console.say("100% [bold] plain")
    console.close()
    assert out.getvalue().splitlines() == [
        "head  step 1/500  epoch 1  loss 0.5000  lr 0.01  1,234 images/s  waiting for data 50%",
        "head  step 500/500  epoch 1  loss 0.5000  lr 0.01  1,234 images/s  waiting for data 50%",
        "100% [bold] plain",
    ]


def test_a_terminal_gets_a_bar_and_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    import threading

    before, out = threading.active_count(), Terminal()
    console = Console(stream=out)
    console.start_phase("head", first_step=0, num_steps=50, step=10)
    report(console, range(11, 30))
    console.say("saved [x] " + "long " * 50)
    report(console, range(30, 51))
    assert threading.active_count() == before, "no thread whose lock a forked worker could inherit"
    console.end_phase()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "saved [x] " + "long " * 50 in text
    assert re.search(r"head .*11/50 *epoch 1 +loss 0.5000", text)
    assert "50/50" in text
    assert len(out.getvalue()) < 10_000


def test_the_closing_table() -> None:
    rows = [
        {"phase": "pretext", "epochs": 3, "seconds": 61.23, "images_per_second": 12345.6, "train_loss": 0.25, "val_loss": None},
        {"phase": "all", "epochs": 1.5, "seconds": 5, "images_per_second": 800, "kept_epoch": 4, "train_loss": 0.1, "val_loss": 0.2, "top1": 0.97654},
    ]
    assert summary_table(rows).row_count == 2
    out = io.StringIO()
    Console(stream=out).table(rows)
    text = out.getvalue()
    assert re.search(r"phase +\| +epochs +\| +seconds +\| +images/s +\| +kept epoch +\| +train loss +\| +val loss +\| +top1", text)
    assert re.search(r"pretext +\| +3 +\| +61\.2 +\| +12,346 +\| +- +\| +0\.2500 +\| +- +\| +- ", text)
    assert re.search(r"all +\| +1\.5 +\| +5\.0 +\| +800 +\| +4 +\| +0\.1000 +\| +0\.2000 +\| +97\.65%", text)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100
