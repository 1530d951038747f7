"""`dtl doctor` on this machine: it ends, says what it found, and no probe can take it down."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from dtl import machine
from dtl.cli import main
from dtl.doctor import examine
from dtl.doctor.finding import Finding


def test_it_answers_in_json_and_an_impossible_run_folder_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "file").write_text("in the way")
    arguments = ["doctor", "--quick", "--json", "--cache-dir", str(tmp_path / "cache")]
    code = main([*arguments, "--run-dir", str(tmp_path / "file" / "runs")])
    answer = json.loads(capsys.readouterr().out)
    assert code == 1
    assert answer["status"] == "fail"
    by_check = {finding["check"]: finding for finding in answer["findings"]}
    assert set(by_check) >= {"gpu", "shm", "memory", "files", "run", "cache", "network", "native", "wandb", "slurm"}
    assert by_check["run"]["status"] == "fail"
    assert by_check["run"]["fix"]
    assert by_check["cache"]["status"] in ("ok", "warn")
    assert not (tmp_path / "cache").exists(), "nothing is made by looking"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_check_that_breaks_or_hangs_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("what a driver may say")

    (found,) = examine._guarded("gpu", broken, 5.0)
    assert (found.check, found.status, found.summary) == ("gpu", "warn", "could not be checked (RuntimeError: what a driver may say)")
    assert "--quick" in found.fix
    with pytest.raises(AssertionError, match="a finding without a fix"):
        Finding("gpu", "warn", "something is wrong")
    start = time.monotonic()
    (found,) = examine._guarded("run", lambda: time.sleep(3) or [], 0.1)  # type: ignore[func-returns-value]
    assert time.monotonic() - start < 2
    assert found.status == "fail"
    assert "no answer" in found.summary


def test_cores_are_those_that_this_process_may_use() -> None:
    assert 0 < machine.core_share() <= len(os.sched_getaffinity(0))
