"""Several runs side by side: which belong together, what differs, and what cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_runs import PHASES, make_config, make_run, write_history

from dtl.config import config_from_dict
from dtl.errors import UserError
from dtl.report import style
from dtl.report.compare import compare, compare_figure, differences
from dtl.report.record import RunRecord, read_run


def saved(figure: Any, path: Path) -> Image.Image:
    style.save(figure, path)
    with Image.open(path) as image:
        image.load()
        return image


def runs_to_compare(folder: Path) -> list[RunRecord]:
    short = {"all": {"train": "all", "epochs": 4, "lr": 0.02}}
    for seed in (0, 1, 2):
        make_run(folder / f"rotnet-s{seed}", make_config(f"rotnet-s{seed}", seed=seed), model=False)
    make_run(folder / "supervised", make_config("supervised", phases=short), model=False)
    return [read_run(path) for path in sorted(folder.iterdir())]


def test_seeds_become_one_curve_and_the_pretext_is_left_out(tmp_path: Path) -> None:
    comparison = compare(runs_to_compare(tmp_path))
    assert [(group.name, len(group.courses)) for group in comparison.groups] == [("rotnet", 3), ("supervised", 1)]
    assert (comparison.unit, comparison.task) == ("epoch", "classify")
    assert comparison.groups[0].courses[0].x.tolist() == [1, 2, 3, 4]
    assert comparison.groups[1].courses[0].x.tolist() == [1, 2, 3, 4]
    assert "rotnet-s0: pretext" in comparison.left_out[0]
    with style.plain():
        saved(compare_figure(comparison), tmp_path / "compare.png")


def test_seeds_with_images_and_sources_of_their_own_become_one_curve_too(tmp_path: Path) -> None:
    """`few0.csv` and `runs/pre-s0` belong to seed 0; a number that is not the seed tells runs apart."""
    short = {"all": {"train": "all", "epochs": 4, "lr": 0.02}}
    records = []
    for kind in ("pretext", "scratch"):
        for seed in (0, 1, 18):
            config = make_config(f"{kind}-s{seed}", phases=short, seed=seed, train=f"resnet18/few{seed}.csv").to_dict()
            config["transfer"] = {"source": f"runs/pre-s{seed}"} if kind == "pretext" else None
            records.append(read_run(make_run(tmp_path / f"{kind}-s{seed}", config_from_dict(config, "test"), model=False)))
    config = make_config("other-s1", phases=short, seed=1, train="resnet18/few5.csv")
    records.append(read_run(make_run(tmp_path / "other-s1", config, model=False)))
    groups = compare(records).groups
    assert [(group.name, len(group.courses)) for group in groups] == [
        ("pretext", 3),
        ("scratch", 3),
        ("other-s1", 1),
    ]
    assert differences(groups) == [
        ("data.train", ["resnet18/few{seed}.csv", "resnet18/few{seed}.csv", "resnet18/few5.csv"]),
        ("transfer.source", ["runs/pre-s{seed}", None, None]),
    ]


def test_what_differs_between_runs_is_listed_once(tmp_path: Path) -> None:
    assert dict(differences(compare(runs_to_compare(tmp_path)).groups)) == {
        "phases.pretext": ["yes", None],
        "phases.head": ["yes", None],
        "phases.all.epochs": [3.0, 4.0],
        "phases.all.lr": [0.01, 0.02],
    }


def test_runs_without_evaluations_cannot_be_compared(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", model=False)
    write_history(folder, [])
    with pytest.raises(UserError, match="nothing to compare"):
        compare([read_run(folder)])


def test_many_runs_are_told_apart_or_refused(tmp_path: Path) -> None:
    records = []
    for place in range(18):
        phases = {"all": {**PHASES["all"], "lr": 0.1 + place}}
        records.append(read_run(make_run(tmp_path / f"run-{place}", make_config(f"run-{place}", phases=phases), model=False)))
    with style.plain():
        figure = compare_figure(compare(records))
        looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines}
        assert len(looks) == 18
        saved(figure, tmp_path / "compare.png")
    with pytest.raises(UserError, match="more than one plot can show"):
        compare(records * 4)
