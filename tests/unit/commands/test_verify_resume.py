"""`dtl verify-resume`: mistakes on its command line, and how a result is printed; tests/resilience kills real runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtl.checks.resume import Killed, Result
from dtl.commands import verify_resume
from dtl.commands.verify_resume import report, run
from dtl.errors import UserError


def test_mistakes_are_refused_before_anything_runs(tmp_path: Path) -> None:
    for words, message in (
        (["--kills", "0"], "--kills and --processes must be at least 1"),
        (["--processes", "0"], "--kills and --processes must be at least 1"),
        (["--data.wrkers", "3"], "unknown config key data.wrkers"),
        (["--folder", str(tmp_path)], "exists already; give a new folder"),
    ):
        with pytest.raises(UserError, match=message):
            run(words)


def test_on_gpus_the_kernels_are_deterministic_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(verify_resume, "_check", lambda arguments, *_: started.append(arguments) or 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for words in ([], ["--run.deterministic", "false"], ["--run.device", "cpu"]):
        assert run(words) == 0
    assert started == [["--run.deterministic", "true"], ["--run.deterministic", "false"], ["--run.device", "cpu"]]
    assert capsys.readouterr().out.count("on GPUs: with --run.deterministic true") == 1


def test_a_result_is_a_status_and_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    kills = [Killed("save", 3, True), Killed("", 0, False), Killed("load", 5, False), Killed("load", 6, False)]
    assert report(Result(kills, runs=2, steps=9, events=30, slots=900)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "4 kills in 2 run(s), during: load 2, writing a checkpoint 1, starting 1",
        "the same: weights bit for bit, 30 lines of history, 900 samples of 9 steps per run, including augmentations",
    ]
    assert report(Result(kills, runs=2, differences=["state 'failed', not 'done'"])) == 1
    assert capsys.readouterr().out.splitlines()[1:] == ["DIFFERENT: state 'failed', not 'done'"]
