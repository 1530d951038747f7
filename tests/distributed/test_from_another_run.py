"""A run starts from what another run made, and a mean of several runs is a model like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import history, run, start, status, wait_for
from recipes import write_recipe

from dtl.checkpoint.resume.model_folder import load_model_tensors

PLAIN = {"augment": {"preset": "none", "erasing": 0.0}}
STILL = {"train": "all", "steps": 1, "lr": 1e-12, "schedule": "constant"}


def learn(folder: Path, name: str, *more: str, **phases: object) -> Path:
    run(["--config", str(write_recipe(folder, name, data=PLAIN, phases=phases)), *more], cwd=folder)
    return folder / "runs" / name


def test_phases_start_from_another_runs_best(tmp_path: Path) -> None:
    first = learn(tmp_path, "first", all={"train": "all", "epochs": 4, "lr": 0.2, "schedule": "constant"})
    best = max(event["top1"] for event in history(first) if event["event"] == "val")
    # The same classes: the head is kept. A step at almost no rate changes nothing, so the numbers are the first run's best.
    second = learn(tmp_path, "second", "--transfer.source", "runs/first", "--model.freeze_norm", "true", again={**STILL, "train": "head"})
    assert status(second)["phases"][-1]["val"]["top1"] == best
    report = json.loads((second / "transfer.json").read_text())
    assert report["coverage"] == 1.0
    assert not [one for one in report["outcomes"] if one["outcome"] == "fresh"]


def test_a_pretext_run_gives_its_backbone(tmp_path: Path) -> None:
    learn(tmp_path, "pretext", turns={"task": "rotate", "train": "all", "steps": 4, "lr": 0.05})
    labels = learn(tmp_path, "labels", "--transfer.source", "runs/pretext", head={**STILL, "train": "head"})
    before, after = (load_model_tensors(tmp_path / "runs" / name / "model") for name in ("pretext", "labels"))
    other = {name for name in after if before[name].shape != after[name].shape}
    assert other
    assert all(torch.equal(before[name], after[name]) for name in after.keys() - other)
    fresh = [one["target"] for one in json.loads((labels / "transfer.json").read_text())["outcomes"] if one["outcome"] == "fresh"]
    assert set(fresh) == other


def test_rows_of_the_head_are_chosen_by_class_names(tmp_path: Path) -> None:
    """The source's classes are known from its run; 0 is here what 3 and 8 were there, the others stay themselves."""
    learn(tmp_path, "first", all={"train": "all", "epochs": 1, "lr": 0.1})
    rows = ["--transfer.source", "runs/first", "--transfer.keep_head", "rows", "--transfer.head_rows", "{0: [3, 8]}"]
    learn(tmp_path, "second", *rows, head={**STILL, "train": "head"})
    before, after = (load_model_tensors(tmp_path / "runs" / name / "model") for name in ("first", "second"))
    head = next(name for name, value in before.items() if value.dim() == 2 and len(value) == 10)
    torch.testing.assert_close(after[head][0], before[head][[3, 8]].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[head][1:], before[head][1:], rtol=1e-4, atol=1e-5)
    refused = run(["--config", "first.yaml", "--run.name", "third", *rows[:2], "--transfer.head_rows", "{0: 3}"], cwd=tmp_path, code=2)
    assert "`head_rows` needs `keep_head: rows`" in refused.err()


def test_a_run_without_a_model_says_so(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "endless", data=PLAIN, phases={"all": {"train": "all", "epochs": 500, "lr": 0.01}})
    job = start(["--config", str(file)], cwd=tmp_path)
    wait_for(lambda: list((tmp_path / "runs/endless/checkpoints").glob("step-*")), what="a checkpoint")
    job.kill()
    second = run(["--config", str(file), "--run.name", "second", "--transfer.source", "runs/endless"], cwd=tmp_path, code=2)
    assert "dtl: runs/endless: the run has no model yet" in second.err()


def test_an_average_is_evaluated_like_any_model(tmp_path: Path) -> None:
    first = learn(tmp_path, "first", all={"train": "all", "steps": 8, "lr": 0.1})
    for seed in ("1", "2"):
        learn(tmp_path, f"s{seed}", "--run.seed", seed, "--transfer.source", "runs/first", all={"train": "all", "steps": 4, "lr": 0.02})
    run(["runs/s1", "runs/s2", "--out", "soup"], cwd=tmp_path, command="average")
    numbers = {}
    for name in ("runs/s1", "runs/s2", "soup"):
        out = f"{Path(name).name}.json"
        arguments = [name, "--data.val", "digits", "--json", out, "--precision", "no"]
        run(arguments, cwd=tmp_path, command="evaluate", world=2)
        numbers[name] = json.loads((tmp_path / out).read_text())
    assert numbers["soup"]["num_samples"] == numbers["runs/s1"]["num_samples"] > 300
    assert numbers["soup"]["loss"] < 2.4, "chance is 2.3: the mean of two runs with one start is a model that works"
    again = learn(tmp_path, "from-soup", "--transfer.source", "soup", head={**STILL, "train": "head"})
    assert status(again)["phases"][-1]["val"]["loss"] == pytest.approx(numbers["soup"]["loss"], rel=1e-4)
    assert first.is_dir()
