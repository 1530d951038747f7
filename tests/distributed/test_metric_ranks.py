"""Metrics of sorted scores on real ranks: scikit-learn's, to the last bit the same at any world size; and runs that choose their weights by them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from harness import history, run, status, the_line
from ranked_scores import CASES, MONITORS, case
from recipes import write_recipe
from safetensors.torch import load_file


def test_one_two_and_three_processes_give_scikit_learns_numbers(tmp_path: Path) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    found = {}
    for world in (1, 2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        run([], cwd=folder, world=world, by_rank={rank: {"before": "ranked_scores:write"} for rank in range(world)})
        found[world] = json.loads((folder / "scores.json").read_text())
    assert found[1] == found[2] == found[3]
    for (num_classes, levels), values in zip(CASES, found[1]):
        labels, logits = case(num_classes, levels)
        scores = logits.softmax(dim=1).numpy()
        each = [1] if num_classes == 2 else range(num_classes)
        for name, theirs in (("auroc", sklearn.roc_auc_score), ("average_precision", sklearn.average_precision_score)):
            assert values[name] == pytest.approx(np.mean([theirs(labels == k, scores[:, k]) for k in each]), abs=1e-12)
            value, (low, high) = values["with_intervals"][name]
            assert value == values[name]
            assert low < value < high


@pytest.mark.parametrize(("monitor", "world"), [("auroc", 2), ("balanced_accuracy", 3), ("recall:7", 1)])
def test_a_run_keeps_the_weights_that_are_best_by_the_metric(tmp_path: Path, monitor: str, world: int) -> None:
    phases = {
        "turns": {"task": "rotate", "steps": 2, "lr": 0.05},
        "all": {"steps": 8, "lr": 0.05, "eval_every": 0.1, "early_stop": {"patience": 50}, "keep": "best"},
    }
    recipe = write_recipe(tmp_path, phases=phases, data={"workers": 0}, checkpoint={"monitor": monitor})
    run(["--config", str(recipe)], cwd=tmp_path, world=world)
    values = [event for event in history(tmp_path / "runs/tiny") if event["event"] == "val" and event["phase"] == "all"]
    best = max(values, key=lambda event: (event[monitor], -event["loss"]))
    row = status(tmp_path / "runs/tiny")["phases"][-1]
    assert row["best"]["metric"] == monitor
    assert (row["kept_step"], row["val"][monitor]) == (best["step"], best[monitor])
    assert len(row["top1_interval"]) == 2
    file = tmp_path / "evaluation.json"
    run(["runs/tiny", "--json", str(file), "--workers", "0"], cwd=tmp_path, command="evaluate")
    measured = json.loads(file.read_text())
    again = measured["per_class"][7]["recall"] if monitor == "recall:7" else measured[monitor]
    assert math.isclose(again, best[monitor], abs_tol=2e-3)
    run(["runs/tiny"], cwd=tmp_path, command="report")


def test_the_default_rule_keeps_the_same_weights_on_one_two_and_three_processes(tmp_path: Path) -> None:
    """Which evaluation is kept, and every byte that is held of its images, for metrics that are no means over images."""
    found = {}
    for world in (1, 2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        run([], cwd=folder, world=world, by_rank={rank: {"before": "ranked_scores:keep"} for rank in range(world)})
        found[world] = json.loads((folder / "kept.json").read_text())
    assert found[1] == found[2] == found[3]
    assert tuple(found[1]) == MONITORS
    others = 0
    for one in found[1].values():
        best = max(range(8), key=lambda place: (one["values"][place][0], -one["values"][place][1]))
        others += one["kept"][-1] != best
        assert one["values"][one["kept"][-1]][1] <= one["values"][best][1], "a lower loss, or the best itself"
    assert others >= 3, "the rule is not that of the best metric"


def test_a_run_by_the_default_rule_on_three_processes_is_that_on_one(tmp_path: Path) -> None:
    runs, kept = {}, {}
    phases = {"all": {"train": "all", "steps": 8, "lr": 0.4, "momentum": 0.9, "eval_every": 0.08}}
    for world in (1, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        checkpoint = {"monitor": "auroc", "every_steps": 100}
        recipe = write_recipe(folder, model={"name": "networks:without_norms"}, data={"workers": 0}, phases=phases, checkpoint=checkpoint)
        run(["--config", str(recipe)], cwd=folder, world=world, env={"DTL_CACHE": str(tmp_path / "cache")})
        runs[world] = folder / "runs/tiny"
        row = status(runs[world])["phases"][-1]
        kept[world] = row["kept_step"]
        values = [event for event in history(runs[world]) if event["event"] == "val"]
        assert len(values) == row["looks"] == 8
        last = [event["step"] for event in values if event["kept"]][-1]
        assert (row["kept_step"], row["val"]["auroc"]) == (last, next(event["auroc"] for event in values if event["step"] == last))
    assert kept[1] == kept[3]
    assert [event.get("kept") for event in history(runs[1])] == [event.get("kept") for event in history(runs[3])]
    weights, others = (load_file(runs[world] / "model/model.safetensors") for world in (1, 3))
    assert all(value.allclose(others[name], rtol=1e-3, atol=1e-5) for name, value in weights.items())


def test_a_metric_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, data={"workers": 0})
    job = run(["--config", str(recipe), "--checkpoint.monitor", "recall:eleven"], cwd=tmp_path, code=2)
    assert "checkpoint.monitor is recall:eleven, but there is no class 'eleven'" in the_line(job)
    job = run(["--config", str(recipe), "--checkpoint.monitor", "aucroc"], cwd=tmp_path, code=2)
    assert "checkpoint.monitor" in the_line(job)
    assert "did you mean 'auroc'?" in the_line(job)
