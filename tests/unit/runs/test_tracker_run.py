"""What a run leaves with its trackers at its end, read back from wandb's own offline file and TensorBoard's; history as CSV."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import harness
import recipes
from wandb_files import wandb_records

SHORT = {"phases": {"head": {"train": "head", "steps": 2}, "all": {"train": "all", "epochs": 1, "lr": 0.05}}}


def records(run: Path) -> dict[str, Any]:
    """Config, history rows and artifacts of the one offline run."""
    found: dict[str, Any] = {"config": {}, "rows": [], "artifacts": []}
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["config"] |= {item.key or "/".join(item.nested_key): item.value_json for item in record.run.config.update}
        elif kind == "history":
            found["rows"].append({item.key or "/".join(item.nested_key): item.value_json for item in record.history.item})
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            found["artifacts"].append(record.request.log_artifact.artifact)
        elif kind == "artifact":
            found["artifacts"].append(record.artifact)
    return found


def test_wandb_has_config_metrics_by_phase_pictures_and_the_model(tmp_path: Path) -> None:
    recipe = recipes.write_recipe(tmp_path, **SHORT, tracking={"wandb": "offline", "wandb_model": True, "report": True, "tensorboard": True})
    harness.run(["--config", str(recipe)], cwd=tmp_path, env={"WANDB_MODE": "offline"})
    run = tmp_path / "runs/tiny"
    found = records(run)
    assert '"global_batch_size":120' in found["config"]["data"].replace(" ", "")
    assert {row["phase"] for row in found["rows"] if "val/top1" in row} == {'"head"', '"all"'}
    pictures = {key.split("/")[1] for row in found["rows"] for key in row if key.startswith("report/")}
    assert {path.stem for path in (run / "report").glob("*.png")} == pictures != set()
    (artifact,) = found["artifacts"]
    assert artifact.type == "model"
    assert {entry.path for entry in artifact.manifest.contents} == {"model.json", "model.safetensors"}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert "val/top1" in board.Tags()["scalars"]
    assert set(board.Tags()["images"]) == {f"report/{name}" for name in pictures}

    # The history as a table.
    harness.run([str(run), "--csv", "all.csv"], cwd=tmp_path, command="report")
    with open(tmp_path / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    events = [event for event in harness.history(run, times=True) if event["event"] in ("train", "val", "epoch")]
    assert [(row["event"], int(row["step"])) for row in rows] == [(event["event"], event["step"]) for event in events]
    assert [float(row["top1"]) for row in rows if row["event"] == "val"] == [event["top1"] for event in events if event["event"] == "val"]
    assert {row["run"] for row in rows} == {"tiny"}


def test_csv_of_what_is_no_run(tmp_path: Path) -> None:
    job = harness.run(["nowhere", "--csv", "all.csv"], cwd=tmp_path, command="report", code=2)
    assert "nowhere/history.jsonl cannot be read" in job.err()
