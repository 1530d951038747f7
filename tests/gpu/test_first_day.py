"""`python -m benchmarks.first_day` runs on simulated GPUs as it shall on the first real ones, section by section."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.first_day.day import Day, Section

ROOT = Path(__file__).parents[2]


def test_all_sections_run_and_are_reported(tmp_path: Path, device: str) -> None:
    if device != "sim":
        pytest.skip("on GPUs it is a command of its own: python -m benchmarks.first_day --out DIR")
    words = [sys.executable, "-m", "benchmarks.first_day", "--device", "sim", "--out", str(tmp_path / "day")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "day/report.json").read_text())["sections"]
    assert "".join(found) == "abcdefghi"
    assert not any(section["fault"] for section in found.values())
    assert all(found[name]["marks"] for name in "bcdfi")
    assert {"all_reduce", "host_to_device", "loader_one_core"} <= found["a"].keys()
    assert found["e"]["loops"][0]["seconds"].keys() == {"dtl", "bare loop", "timm's train.py", "torchvision's train.py"}
    assert found["f"]["gaps"] == {place: {"times": 1, "median_ms": 0.0, "longest_ms": 0.0} for place in ("log line", "evaluation", "checkpoint")}
    assert found["g"]["weak"].keys() == {"1", "2"}
    text = (tmp_path / "day/report.md").read_text()
    assert "Times mean nothing" in text
    for what in ("kill -9", "SIGSTOP", "an exception", "out of memory", "SIGTERM"):
        assert f"- pass: {what}: all ranks have left" in text
    assert "- pass: host waits in a step, precision fp16" in text
    assert "- pass: the recipe digits on 2 GPUs ends: done" in text
    assert "- pass: the fine-tune: dtl predict labels them alike" in text


def test_a_section_that_fails_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    day = Day(tmp_path / "day", "sim", steps=2, rounds=1, num_photos=20)

    def fails(day: Day, section: Section) -> None:
        section.lines.append("found until then")
        raise SystemExit("of one section")

    def lacks(day: Day, section: Section) -> None:
        section.mark("fast", 2 > 3, "2, at least 3")

    day.work_on(Section("x", "the first"), fails)
    first = (tmp_path / "day/report.md").read_text()
    assert "| x: the first | 0 | did not end |" in first
    assert "found until then" in first
    assert "SystemExit: of one section" in first
    day.work_on(Section("y", "the second"), lambda day, section: section.mark("right", True, "yes"))
    assert "- pass: right: yes" in (tmp_path / "day/report.md").read_text()
    assert not day.passed
    other = Day(tmp_path / "other", "sim", steps=2, rounds=1, num_photos=20)
    other.work_on(Section("z", "slow"), lacks)
    assert "- **FAIL**: fast: 2, at least 3" in (tmp_path / "other/report.md").read_text()
    assert not other.passed
