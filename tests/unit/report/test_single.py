"""The report of a run that was really trained: what it says is what the run measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import harness
import pytest
from page_reader import Page
from recipes import write_recipe

from dtl.report import make_report
from dtl.report.record import read_run
from dtl.report.style import percent

PHASES = {
    "pretext": {"task": "rotate", "train": "all", "steps": 2, "lr": 0.05},
    "head": {"train": "head", "steps": 3, "lr": 0.1},
    "all": {"train": "all", "steps": 14, "lr": 0.05, "mixup": 0.2},
}


def test_the_report_of_a_trained_run_says_what_the_run_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    harness.run(["--config", str(write_recipe(tmp_path, phases=PHASES, data={"workers": 0}))], cwd=tmp_path)
    run = tmp_path / "runs/tiny"
    said: list[str] = []
    page = Page.read(make_report(run, log=said.append))
    page.check_self_contained()
    assert said == []
    record = read_run(run)
    assert record.steps_per_epoch == 12
    assert [(phase.first_step, phase.num_steps, record.first_epoch(phase)) for phase in record.phases] == [(0, 2, 0), (2, 3, 1), (5, 14, 2)]
    best = record.phases[-1].kept()
    assert best is not None
    top1 = percent(float(record.phases[-1].val["top1"][best]), 2).replace("\u00a0", " ")
    assert "The run evaluated these weights (precision no) on all 360" in page.text
    assert f"all 360 validation images: top-1 {top1}" in page.text
    assert "with mixup or cutmix" in page.text
    assert "each image in its four rotations" in page.text

    # From the history and the model folder alone, all pictures again.
    pictures = {file.name for file in (run / "report").iterdir()}
    for other in run.iterdir():
        if other.name not in ("history.jsonl", "model"):  # the model folder is then asked again
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    again = Page.read(make_report(run, log=said.append))
    assert said == []
    assert {file.name for file in (run / "report").iterdir()} == pictures
    assert len(again.images) == len(page.images)
    for words in (f"all 360 validation images: top-1 {top1}", "with mixup or cutmix", "each image in its four rotations"):
        assert words in again.text
