"""Reading a run folder back: columns, epochs, and whatever may be missing or torn."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from report_runs import make_config, make_events, make_run, write_history

from dtl.errors import UserError
from dtl.report.record import read_run


def test_phases_have_the_events_of_the_history_in_order(tmp_path: Path) -> None:
    record = read_run(make_run(tmp_path / "run", model=False))
    assert [phase.name for phase in record.phases] == ["pretext", "head", "all"]
    assert [phase.task for phase in record.phases] == ["rotate", "classify", "classify"]
    assert [(phase.first_step, phase.num_steps) for phase in record.phases] == [(0, 24), (24, 12), (36, 36)]
    assert record.phases[2].val["step"].tolist() == [48, 60, 72]
    assert record.phases[2].best() == 2
    assert record.last_step == 72
    assert record.missing == ["no model folder: no predictions, confusion matrix and numbers per class"]


@pytest.mark.parametrize(
    ("per_epoch", "durations", "log_every"),
    list(itertools.product([1, 2, 7, 40], [({"epochs": 3},), ({"steps": 11}, {"epochs": 2}), ({"epochs": 1.5}, {"epochs": 0.5}, {"epochs": 4})], [1, 5])),
)
def test_epochs_are_found_from_the_events(tmp_path: Path, per_epoch: int, durations: tuple[dict[str, float], ...], log_every: int) -> None:
    config = make_config(phases={f"p{i}": duration for i, duration in enumerate(durations)})
    folder = make_run(tmp_path / "run", config, model=False)
    (folder / "status.json").unlink()
    events = list(make_events(config, steps_per_epoch=per_epoch, log_every=log_every))
    for end in [*range(1, len(events), max(1, len(events) // 10)), len(events)]:
        write_history(folder, events[:end])
        record = read_run(folder)
        found = record.steps_per_epoch
        if found is not None:
            for phase in record.phases:
                first = record.first_epoch(phase)
                assert first is not None
                for step, epoch in zip(phase.val["step"], phase.val["epoch"]):
                    assert first + (step - 1 - phase.first_step) // found == epoch
    assert found == per_epoch


def test_what_cannot_be_read_is_named_and_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", model=False)
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"event": "note", "note": "early stop", "step": 72, "phase": "all"}\n[1, 2]\n{"event": "train", "ph')
    (folder / "status.json").write_text("{")
    (folder / "config.yaml").write_text("run: {nam: x}")
    record = read_run(folder)
    told = "\n".join(record.missing)
    assert "2 lines of history.jsonl that cannot be read" in told
    assert "status.json: not valid JSON" in told
    assert "config.yaml cannot be used" in told
    assert "run.nam" in told
    assert [note["note"] for note in record.notes] == ["early stop"]
    assert record.phases[-1].last_step == 72


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", model=False)
    lines = [
        {"event": "train", "phase": "all", "epoch": 0, "step": 1, "loss": "nan", "lr": 0.1},
        {"event": "val", "phase": "all", "epoch": 0, "step": 1, "loss": "inf", "top1": "nan", "top5": None},
    ]
    (folder / "history.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    phase = read_run(folder).phases[0]
    assert math.isnan(phase.train["loss"][0])
    assert math.isinf(phase.val["loss"][0])
    assert math.isnan(phase.val["num_samples"][0])
    assert phase.best("top1") is None
    assert phase.best("loss") is None


def test_the_kept_evaluation_is_the_one_that_the_run_kept(tmp_path: Path) -> None:
    """Among equals of top1 the lower loss; the last where the phase keeps its last weights."""
    told = [(5, 0.9, 0.5), (10, 0.95, 0.4), (15, 0.95, 0.3), (20, 0.95, 0.3), (25, 0.94, 0.1)]
    for keep, place, train_loss in (("best", 2, 3.0), ("last", 4, 5.0)):
        folder = make_run(tmp_path / keep, make_config(keep, phases={"all": {"epochs": 5, "keep": keep}}), model=False)
        events = [
            event
            for number, (step, top1, loss) in enumerate(told)
            for event in (
                {"event": "train", "phase": "all", "epoch": number, "step": step, "loss": number + 1.0, "lr": 0.1},
                {"event": "val", "phase": "all", "epoch": number, "step": step, "loss": loss, "top1": top1, "top5": 1.0, "num_samples": 9},
            )
        ]
        write_history(folder, events)
        phase = read_run(folder).phases[0]
        assert phase.kept() == place
        assert phase.train_loss_at(phase.val["step"][place]) == train_loss
        assert phase.best() == 2
        assert phase.best("loss") == 4
        # The mean of the epoch, not of the last log line; of an evaluation within an epoch the run's own table knows it alone.
        means = [{"event": "epoch", "phase": "all", "epoch": number, "step": 10 * (number + 1), "loss": number + 0.5} for number in range(2)]
        write_history(folder, sorted([*events, *means], key=lambda event: event["step"]))
        assert [read_run(folder).phases[0].train_loss_at(step) for step in (5, 10, 15, 20)] == [None, 0.5, None, 1.5]
        rows = [{"phase": "all", "kept_step": 15, "train_loss": 1.25}]
        (folder / "status.json").write_text(json.dumps({"state": "done", "step": 25, "phases": rows}))
        assert [read_run(folder).phases[0].train_loss_at(step) for step in (10, 15)] == [0.5, 1.25]


@pytest.mark.parametrize(("make", "words"), [(False, "no such run folder"), (True, "is not a run folder: it has no history.jsonl")])
def test_other_folders_are_refused(tmp_path: Path, make: bool, words: str) -> None:
    if make:
        (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=words):
        read_run(tmp_path / "x")
