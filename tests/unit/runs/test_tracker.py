"""What a run logs, where, and that no tracker hurts the run."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from trackers import lines, log_steps, make_tracker

from dtl.errors import UserError
from dtl.runs.console import Console
from dtl.runs.tracker import Tracker


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


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
    assert err.getvalue().count("history.jsonl cannot be written (File too large): training continues, and the next write tries again") == 1


def test_the_keys_of_the_contract(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path / "run", wandb="off")
    log_steps(tracker, 10, 10)
    tracker.note("saved", step=10, checkpoint_stall_seconds=0.03)
    tracker.close()
    train, val, note = lines(tmp_path / "run" / "history.jsonl")
    assert list(train) == ["event", "phase", "epoch", "step", "loss", "lr", "images_per_second", "data_wait"]
    assert list(val) == ["event", "phase", "epoch", "step", "loss", "top1", "top5", "num_samples", "kept"]
    assert note == {"event": "note", "note": "saved", "step": 10, "checkpoint_stall_seconds": 0.03}
    assert tracker.wandb_id is None


def test_weights_that_enter_a_phase_are_in_the_history_alone(tmp_path: Path) -> None:
    """Trackers have had the row of that step, of the phase before."""
    err = io.StringIO()
    tracker = make_tracker(tmp_path / "run", wandb="off", tensorboard=True, console=Console(stream=err))
    tracker.val(phase="head", epoch=3, step=8, loss=0.5, top1=0.75, top5=1.0, num_samples=50, kept=True)
    tracker.val(phase="all", epoch=4, step=8, loss=0.5, top1=0.75, top5=1.0, num_samples=50, kept=True, entering=True)
    tracker.close()
    before, entering = lines(tmp_path / "run" / "history.jsonl")
    assert entering == {**before, "phase": "all", "epoch": 4, "entering": True}
    assert "all  before its first step  validation loss 0.5000  top1 75.00%  (50 samples)\n" in err.getvalue()
    assert [event.step for event in scalars(tmp_path / "run", "val/top1")] == [8]


def scalars(run: Path, name: str) -> list[Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events.Scalars(name)  # type: ignore[no-any-return]


def test_other_processes_log_nothing(tmp_path: Path) -> None:
    err = io.StringIO()
    tracker = Tracker(tmp_path / "run", is_main=False, wandb="offline", tensorboard=True, console=Console(is_main=False, stream=err))
    log_steps(tracker, 1, 10)
    tracker.note("x")
    tracker.print("y")
    tracker.sync()
    tracker.table([])
    tracker.close()
    assert not (tmp_path / "run").exists()
    assert (err.getvalue(), tracker.history_offset, tracker.wandb_id) == ("", 0, None)


def test_a_ghost_logs_nothing(tmp_path: Path) -> None:
    def ghost() -> None:
        raise UserError("start 2 has taken over")

    tracker = make_tracker(tmp_path / "run", wandb="off", before_write=ghost)
    with pytest.raises(UserError, match="start 2"):
        log_steps(tracker, 1, 1)
    assert not (tmp_path / "run" / "history.jsonl").exists()


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = make_tracker(tmp_path / "run", wandb="off", tensorboard=True)
    log_steps(tracker, 1, 10)
    tracker.test(phase="head", epoch=0, step=10, loss=0.25, top1=0.75, top5=1.0, num_samples=40)
    tracker.close()
    run = tmp_path / "run"
    assert [event.step for event in scalars(run, "train/loss")] == list(range(1, 11))
    assert [round(event.value, 3) for event in scalars(run, "val/top1")] == [0.1]
    for name, value in {"top1": 0.75, "top5": 1.0, "loss": 0.25, "num_samples": 40}.items():
        assert [(event.step, event.value) for event in scalars(run, f"test/{name}")] == [(10, value)]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"tensorboard needs the package tensorboard: pip install tensorboard$"):
        make_tracker(tmp_path / "other", wandb="off", tensorboard=True)
