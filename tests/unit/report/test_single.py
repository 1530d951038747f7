"""The report of a run that was really trained: what it says is what the run measured."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import numpy as np
import pytest
from page_reader import Page
from recipes import write_recipe
from report_runs import make_config, make_run, write_history
from tiny_images import picture

from dtl.config import load_config
from dtl.models.model_json import Calibration, Threshold
from dtl.report import make_report
from dtl.report.html import Table
from dtl.report.record import read_run
from dtl.report.single import _blends, _phase_cells, _splits
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


def test_where_it_errs_by_size_group_and_class_with_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images of one shorter side, as packing makes large ones; two patients; one with a twin in train."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 8), ("val", 12)):
        for label in "ab":
            (tmp_path / "photos" / split / label).mkdir(parents=True)
            for number in range(count):
                image = picture(number + (100 if split == "val" else 0) + 200 * (label == "a"), 40).resize((40 + 10 * (number % 2), 40))
                image.save(tmp_path / "photos" / split / label / f"p{number // 6}_{number}.png")
    picture(3, 40).resize((50, 40)).save(tmp_path / "photos/val/a/p0_copy.jpg", quality=90)
    data = {"train": "photos", "workers": 0, "global_batch_size": 8, "group": {"regex": "((?:train|val)/./p[0-9])"}, "augment": {"preset": "none"}}
    recipe = write_recipe(tmp_path, phases={"head": {"train": "head", "steps": 1, "lr": 1e-6, "cache_features": False}}, data=data)
    harness.run(["--config", str(recipe), "--run.seed", "2"], cwd=tmp_path)
    run = tmp_path / "runs/tiny"
    images, page = np.load(run / "predictions.npy"), Page.read(make_report(run, log=lambda line: None))
    page.check_self_contained()
    section = page.text[page.text.index("Where it errs") :]
    right = images["label"] == images["predicted"]
    without = right[images["sample"] != json.loads((run / "twins.jsonl").read_text())["sample"]]
    with_them = f"{percent(right.mean(), 2)} with them and {percent(without.mean(), 2)} without"
    assert "1 of 25 images has a twin in the training images (twins.jsonl lists them): top-1 is " + with_them.replace("\u00a0", " ") in section
    assert re.search(r"longer side right images top-1 40 pixels \d+ 12 \S+ % 50 pixels \d+ 13 ", section)
    assert re.search(r"groups with most mistakes right images top-1 val/./p\d \d+ [67] ", section)
    assert (~right).sum() > 2
    for true, name in enumerate("ab"):
        count = int(((images["label"] == true) & ~right).sum())
        heading = f"{name}, predicted as {'ba'[true]} ({count} images)"
        assert (heading in section) == (count > 1)
        if count > 1:
            shown = section.partition(heading)[2].partition("predicted as")[0]
            assert shown.count(f"val/{name}/") == min(count, 8)


def test_a_fold_groups_and_a_temperature_are_named(tmp_path: Path) -> None:
    """They say how numbers of the page are meant."""
    config = load_config(["--data.fold.number", "2", "--data.fold.of", "5"])[0]
    calibration = Calibration(temperature=1.5, threshold=Threshold(criterion="balanced_accuracy", value=0.25), data="x", num_samples=49)
    settings = {"data.group.column": "patient", "data.group.regex": None, "data.train": "list.csv"}
    record: Any = SimpleNamespace(config=config, model=SimpleNamespace(calibration=calibration), is_grouped=True, settings=settings)
    assert _splits(record) == [
        ("Fold", "2 of 5: its images are the test set"),
        ("Groups", "data.group.column patient; intervals of top-1 draw whole groups"),
        (
            "Calibration",
            "temperature 1.5, threshold 0.2500 (balanced accuracy), fitted on 49 validation images after training; this page shows the run without it",
        ),
    ]
    plain: Any = SimpleNamespace(config=load_config([])[0], model=SimpleNamespace(calibration=None), is_grouped=False, settings={})
    assert _splits(plain) == []


def test_points_of_a_blend_are_in_a_table_and_not_in_the_curves(tmp_path: Path) -> None:
    phases = {"head": {"train": "head", "epochs": 1}, "all": {"epochs": 2, "after": "blend"}}
    run = make_run(tmp_path / "run", make_config("run", phases=phases), model=False, steps_per_epoch=4)
    events = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    (end,) = [event for event in events if event["event"] == "val" and event["step"] == 12]
    start = {**end, "step": 4, "entering": True, "kept": True, "top1": 0.5, "loss": 0.7}
    points = [{**end, "blend": share, "top1": top1, "loss": loss, "kept": share == 0.4} for share, top1, loss in ((0.4, 0.97, 0.2), (0.6, 0.98, 0.25))]
    write_history(run, sorted([*events, start, *points], key=lambda event: event["step"]))
    record = read_run(run)
    phase = record.phases[1]
    assert (phase.kept(), phase.best()) == (3, 2), "start, two epochs, two points: the kept one is no evaluation of the phase's own steps"
    assert phase.course["step"].tolist() == [4, 8, 12]
    assert [cell.text for cell in _phase_cells(record, phase)][5:9] == ["blend 0.4", "–", "0.2000", "97.00\u00a0%"]
    section = _blends(record)
    assert section is not None
    tables = [block for block in section.blocks if isinstance(block, Table)]
    assert [[cell.text for cell in row] for row in tables[0].rows] == [
        ["start", "0.7000", "50.00\u00a0%", ""],
        ["0.4", "0.2000", "97.00\u00a0%", "kept"],
        ["0.6", "0.2500", "98.00\u00a0%", ""],
        ["end", f"{end['loss']:.4f}", percent(end["top1"], 2), ""],
    ]
