"""What the runs of a cross-validation have in common; tests/unit/commands/test_folds.py trains them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_images import image_folder

from dtl.config import load_config
from dtl.errors import UserError
from dtl.inference.folds import FoldsFile, begin, expected, open_folds, over_folds
from dtl.text import to_nobody


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("DTL_CACHE", str(tmp_path / "cache"))
    image_folder(tmp_path / "photos", {"a": 5, "b": 7})
    return ["--config", "finetune", "--data.train", str(tmp_path / "photos"), "--run.dir", str(tmp_path / "runs")]


def test_folds_leave_other_test_sets_to_the_run_on_all_images(words: list[str], tmp_path: Path) -> None:
    config, name = load_config([*words, "--data.test", "elsewhere", "--data.fold.number", "0", "--data.fold.of", "3"])
    folds = open_folds(config, name, log=to_nobody)
    assert not (tmp_path / "runs").exists()
    assert folds.folder == tmp_path / "runs/finetune-folds"
    assert folds.missing() == [1, 2, 3]
    assert sorted(folds.numbers.tolist()) == [1] * 4 + [2] * 4 + [3] * 4
    for number in range(4):
        one = folds.config_of(number)
        assert one.data.fold is not None
        assert (one.data.fold.number, one.data.test) == (number, None if number else "elsewhere")
        assert (one.run.dir, one.run.name) == (str(folds.folder), f"fold-{number}" if number else "refit")


def test_the_plan_is_written_once(words: list[str], tmp_path: Path) -> None:
    for of, line in (("3", None), ("3", None), ("2", "was begun with --folds 3, now it is 2")):
        folds = open_folds(*load_config([*words, "--data.fold.number", "0", "--data.fold.of", of]), log=to_nobody)
        if line is None:
            begin(folds)
        else:
            with pytest.raises(UserError, match=line):
                begin(folds)
    found = FoldsFile.read(tmp_path / "runs/finetune-folds/folds.json")
    assert (found.folds, found.seed, found.images, found.groups) == (3, 0, (4, 4, 4), None)


def test_groups_that_have_changed_are_refused(words: list[str], tmp_path: Path) -> None:
    for regex, line in (("([0-9]+)[.]", None), ("(.*)[.]", "was begun with other groups: data.group has changed")):
        group = ["--data.group.regex", regex, "--data.fold.number", "0", "--data.fold.of", "2"]
        folds = open_folds(*load_config([*words, *group]), log=to_nobody)
        if line is None:
            begin(folds)
        else:
            with pytest.raises(UserError, match=line):
                begin(folds)


def test_words() -> None:
    values = {"folds": 2, "top1": 0.75, "top1_interval": (0.5, 0.9), "mean": {"top1": 0.7}, "range": {"top1": [0.6, 0.8]}}
    assert over_folds(values) == "over 2 folds: top1 70.00 % on average, 60.00 % to 80.00 %"
    assert expected(values) == "its expected top1 is that of the folds, 75.00 % (95 % interval 50.0 to 90.0 %): no image is left to measure it on"
