"""history.jsonl: valid JSON, in order, never doubled by a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from trackers import lines

from dtl.runs.history import History


def train_line(step: int, **more: Any) -> dict[str, Any]:
    return {"event": "train", "phase": "head", "epoch": 0, "step": step, "loss": 1 / step, **more}


def test_each_line_is_there_when_append_returns(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for step in range(1, 4):
        history.append(train_line(step, text="Grüße", none=None, flag=True))
        assert len(lines(history.path)) == step
        assert history.offset == history.path.stat().st_size
    assert lines(history.path)[2] == train_line(3, text="Grüße", none=None, flag=True)


def test_always_valid_json(tmp_path: Path) -> None:
    import numpy as np
    import torch

    history = History(tmp_path / "history.jsonl")
    odd = {"a": float("nan"), "b": [float("inf"), -float("inf")], "c": np.float32(0.5), "d": torch.tensor(2), "e": tmp_path, "f": {1: (2,)}}
    history.append({"event": "note", **odd})
    (line,) = lines(history.path)
    assert line == {"event": "note", "a": "nan", "b": ["inf", "-inf"], "c": 0.5, "d": 2, "e": str(tmp_path), "f": {"1": [2]}}
    assert float(line["b"][1]) == -float("inf")


@pytest.mark.parametrize("torn", ["", '{"event": "tra', '{"event": "train", "step": 9}'])
@pytest.mark.parametrize("resume_at", [0, 1, 3, 6])
@pytest.mark.parametrize("by", ["offset", "step"])
def test_a_resume_neither_doubles_nor_disorders(tmp_path: Path, torn: str, resume_at: int, by: str) -> None:
    whole, history = History(tmp_path / "whole.jsonl"), History(tmp_path / "history.jsonl")
    offsets = {0: 0}
    for step in range(1, 7):
        for each in (whole, history):
            each.append(train_line(step))
            if step % 2 == 0:
                each.append({"event": "val", "phase": "head", "epoch": 0, "step": step, "loss": 0.5})
        offsets[step] = history.offset
    with open(history.path, "a") as file:
        file.write(torn)

    resumed = History(history.path)
    if by == "offset":
        assert resumed.resume_at(offsets[resume_at], step=resume_at) == 0
    else:
        resumed.truncate_after(resume_at)
    assert (resumed.offset, resumed.last_step) == (offsets[resume_at], resume_at)
    for step in range(resume_at + 1, 7):
        resumed.append(train_line(step))
        if step % 2 == 0:
            resumed.append({"event": "val", "phase": "head", "epoch": 0, "step": step, "loss": 0.5})
    assert history.path.read_bytes() == whole.path.read_bytes()


def test_resume_from_a_file_that_does_not_fit(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for step in (1, 2, 3):
        history.append(train_line(step))
    offset = history.offset
    os.truncate(history.path, offset - 10)  # the disk has lost the end
    resumed = History(history.path)
    assert resumed.resume_at(offset, step=3) > 0
    assert [line["step"] for line in lines(history.path)] == [1, 2]
    resumed.append(train_line(4))
    assert resumed.resume_at(7, step=2) == 0, "in the middle of a line: the file was edited"
    assert [line["step"] for line in lines(history.path)] == [1, 2]
    # Where only the step is known, the same evaluation is not told twice.
    resumed.append(train_line(2))
    resumed.append({"event": "note", "note": "x", "step": 2})
    assert [line["event"] for line in lines(history.path)] == ["train", "train", "note"]
    assert History(tmp_path / "none.jsonl").resume_at(100, step=3) == 100


def test_going_backwards_is_our_own_mistake(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.append(train_line(5))
    history.append({"event": "note", "note": "no step"})
    with pytest.raises(ValueError, match="4 after 5"):
        history.append(train_line(4))


@pytest.mark.parametrize("key", ["event", "phase"])
def test_a_list_in_an_edited_line_is_read_past(tmp_path: Path, key: str) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps({"event": "val", "phase": "all", "step": 1, key: []}) + "\n")
    history = History(path)
    history.append({"event": "val", "phase": "all", "step": 1})
    assert [line["event"] for line in lines(path)] == [[] if key == "event" else "val", "val"]
