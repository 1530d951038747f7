"""What a search prints, of results as results.json has them; the runs behind them are in tests/unit/commands/test_search.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dtl.inference.search_results import _columns, _command, lines
from dtl.runs.predictions import ImagePredictions


def row(trial: int, state: str = "done", **more: Any) -> dict[str, Any]:
    facts = {"trial": trial, "settings": {"phases.all.lr": 0.1}, "state": state, "epochs": None, "value": 0.9, "loss": 0.3}
    return {**facts, "better": None, "worse": None, "p": None, "told_apart": None, **more}


def results(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    same = [one["trial"] for one in rows if one["told_apart"] is False]
    values = {"monitor": "top1", "rungs": [1, 3], "num_samples": 60, "winner": rows[0]["trial"], "runner_up": rows[1]["trial"], "not_told_apart": same}
    return {**values, "trials": list(rows), "test": None, "command": "dtl train --run.name best", **more}


def test_the_table_says_what_cannot_be_told_apart() -> None:
    rows = [
        row(3),
        row(1, settings={}, better=3, worse=1, p=0.625, told_apart=False),
        row(4, better=20, worse=1, p=0.00002, told_apart=True),
        row(2, "stopped", epochs=1),
        row(5, "diverged", value=None, loss=None),
    ]
    said = lines(results(*rows))
    assert said[1].split() == ["3", "0.1", "all", "90.00", "%", "0.3000", "winner"]
    assert said[2].endswith("not told apart from the winner")
    assert "as in the recipe" in said[2]
    assert said[3].endswith("  told apart")
    assert said[4].split()[2] == "1"
    assert said[5].split() == ["5", "0.1", "-", "-", "-", "diverged"]
    text = "\n".join(said)
    assert "trial 1, on the same 60 validation images: better on 3, worse on 1, p = 0.62: not told apart (McNemar's exact test)" in text
    assert "cannot be told from the winner: trial 1" in text
    assert "there is no test set: the winner's accuracy is the best of 5 trials on the images that chose it, and too good" in text


def test_groups_one_trial_and_a_test_set_have_their_own_words() -> None:
    grouped = "\n".join(lines(results(row(3), row(1))))
    assert "images come in groups, which McNemar's test takes for independent" in grouped
    alone = "\n".join(lines(results(row(3), row(1, "stopped", epochs=1), runner_up=None)))
    assert "no other trial was trained to its end" in alone
    test = {"num_samples": 100, "top1": 0.9, "top1_interval": None, "loss": 0.3, "look": 2}
    assert "test: top1 90.00 % (95 % interval 82.6 to 94.5 %) of 100 images, look 2" in "\n".join(lines(results(row(3), row(1), test=test)))


@pytest.mark.parametrize(
    ("words", "settings", "command"),
    [
        (["--config", "finetune", "--data.train", "my photos"], {}, "dtl train --config finetune --data.train 'my photos' --run.name best"),
        (
            ["--config", "finetune", "--phases.all.lr", "0.1", "--phases.all.label-smoothing=0.1", "--run.name", "x"],
            {"phases.all.lr": 0.02, "phases.all.label_smoothing": 0.0, "model.name": "a:b", "phases.all.layer_decay": None},
            "dtl train --config finetune --phases.all.lr 0.02 --phases.all.label_smoothing 0.0 --model.name a:b --phases.all.layer_decay null "
            "--run.name x-best",
        ),
        (
            ["--tracking.tensorboard", "--run.name=y"],
            {"phases.all.train": ["fc.*"]},
            "dtl train --tracking.tensorboard --phases.all.train '[\"fc.*\"]' --run.name y-best",
        ),
    ],
)
def test_the_command_of_the_winner_replaces_the_options_that_were_searched(words: list[str], settings: dict[str, Any], command: str) -> None:
    assert _command(words, settings) == command


def test_what_standard_errors_are_computed_from() -> None:
    predictions = ImagePredictions(np.arange(3), np.array([0, 1, 1]), np.array([0, 1, 0]), np.float32([0.9, 0.8, 0.7]), np.float32([0.1, 0.2, 1.2]))
    assert _columns("top1", predictions, 2)[:, 0].tolist() == [1, 1, 0]
    assert _columns("loss", predictions, 2)[:, 0] == pytest.approx([0.1, 0.2, 1.2])
    assert _columns("macro_f1", predictions, 2)[:, 0].tolist() == [0, 1, 0]
    assert _columns("auroc", predictions, 2)[:, 0] == pytest.approx([0.1, 0.8, 0.3])
    assert not _columns("auroc", predictions, 3).any(), "not kept: the metric itself decides"
