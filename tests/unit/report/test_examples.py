"""What the page shows of a network on images: chosen, counted and limited."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from report_runs import make_config, make_run


def test_of_a_run_without_predictions_numbers_come_from_at_most_so_many_images_and_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtl.report.examples import Examples, draw_samples
    from dtl.report.record import read_run

    monkeypatch.setenv("DTL_CACHE", str(tmp_path / "cache"))
    run = make_run(tmp_path / "digits")
    examples, model = Examples.open(read_run(run)), run / "model"
    few, metrics = examples.predict(model, max_images=100, seconds=60.0)
    assert len(few.labels) == len(few.predicted) == metrics["num_samples"] == 100
    assert metrics["top1"] == float((few.labels == few.predicted).mean())
    quick, _ = examples.predict(model, max_images=360, seconds=0.0)
    assert sorted(draw_samples(360, 360, seed=0)[:32].tolist()) == quick.samples.tolist()  # one batch, drawn by key: the same images every time


def test_a_phase_on_cached_features_is_shown_the_images_that_gave_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtl.report.examples import Examples
    from dtl.report.record import read_run

    monkeypatch.setenv("DTL_CACHE", str(tmp_path / "cache"))
    phases = {"head": {"train": "head", "epochs": 1, "cache_features": True}, "all": {"train": "all", "epochs": 1}}
    examples = Examples.open(read_run(make_run(tmp_path / "run", make_config("run", phases=phases), model=False)))
    head, everything = examples.training_views(num_tiles=6)
    assert (head.phases, everything.phases) == (("head",), ("all",))
    assert head.words == "not augmented, because their features are cached"
    assert everything.words == ""
    samples = examples.loaders.plan(0).step_samples(0)[:6]
    seen = examples._load(examples.loaders.train, examples.loaders.val_transform, samples, epoch=5).images.permute(0, 2, 3, 1).numpy()
    assert [tile.pixels.tolist() for tile in head.tiles] == seen.tolist()


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_small_batches_fill_the_grid_with_those_that_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixup: float) -> None:
    """The tutorials train with batches of four. Each picture is what the run's own loader made of that sample in that step."""
    from dtl.report.examples import Examples
    from dtl.report.record import read_run

    monkeypatch.setenv("DTL_CACHE", str(tmp_path / "cache"))
    config = make_config("run", phases={"all": {"train": "all", "epochs": 1, "mixup": mixup}}, global_batch_size=4)
    examples = Examples.open(read_run(make_run(tmp_path / "run", config, model=False)))
    (view,) = examples.training_views(num_tiles=10)
    assert len(view.tiles) == 10
    loaders = examples.loaders
    samples = np.concatenate([loaders.plan(0).step_samples(step) for step in range(3)])[:10]
    assert len(set(samples.tolist())) == 10
    if not mixup:
        drawn = examples._load(loaders.train, loaders.train_transform, samples, epoch=0).images.permute(0, 2, 3, 1).numpy()
        assert [tile.pixels.tolist() for tile in view.tiles] == drawn.tolist()
    else:
        assert any(" + " in tile.caption for tile in view.tiles[4:])


def test_relative_paths_are_those_of_the_folder_that_the_run_was_started_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtl.report.examples import _at_home

    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for place in ("photos", "held_out", "runs/tiny"):
        (home / place).mkdir(parents=True)
    (home / "audit.csv").touch()
    (elsewhere / "photos").mkdir(parents=True)  # what is here is meant
    config = make_config("tiny", train="photos", val=str(home / "photos"), test="held_out", audit="audit.csv", names="nowhere.json")
    monkeypatch.chdir(elsewhere)
    data = _at_home(config, home / "runs/tiny").data
    assert (data.train, data.val, data.names) == ("photos", str(home / "photos"), "nowhere.json")
    assert (data.test, data.audit) == (str(home / "held_out"), str(home / "audit.csv"))
