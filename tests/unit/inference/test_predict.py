"""Predictions in the order of the images, whatever the batches; an unreadable image is one prediction with a problem."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from model_folders import CLASSES, model_folder, write_image

from dtl.inference.images import find_images
from dtl.inference.model import RunningModel, running_model
from dtl.inference.predict import Prediction, predict


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningModel]:
    folder = model_folder(tmp_path_factory.mktemp("model") / "model")
    with running_model(folder, device="cpu", precision="no") as running:
        yield running


def predicted(model: RunningModel, places: list[Path], **options: int) -> list[Prediction]:
    inputs = find_images([str(place) for place in places])
    return [one for batch in predict(model, inputs, workers=0, **options) for one in batch]


def test_the_order_and_the_numbers_do_not_depend_on_the_batches(model: RunningModel, tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{number}.jpg", number) for number in range(7)][::-1]
    whole, ones = predicted(model, paths, top=3), predicted(model, paths, top=3, batch_size=2)
    assert [one.path for one in whole] == [one.path for one in ones] == [str(path) for path in paths]
    for one, other in zip(whole, ones):
        assert one.classes == other.classes
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        assert sorted(one.classes) == [0, 1, 2]
        assert sum(one.probabilities) == pytest.approx(1.0, abs=1e-5)
        assert list(one.probabilities) == sorted(one.probabilities, reverse=True)


def test_more_classes_than_there_are_give_all(model: RunningModel, tmp_path: Path) -> None:
    (one,) = predicted(model, [write_image(tmp_path / "a.jpg", 0)], top=99)
    assert len(one.classes) == len(CLASSES)


def test_an_unreadable_image_takes_no_row_of_the_others(model: RunningModel, tmp_path: Path) -> None:
    first, last = write_image(tmp_path / "a.jpg", 0), write_image(tmp_path / "c.jpg", 2)
    (tmp_path / "b.jpg").write_bytes(first.read_bytes()[:40])
    alone = [predicted(model, [path])[0] for path in (first, last)]
    found = predicted(model, [first, tmp_path / "b.jpg", last])
    assert [one.problem is None for one in found] == [True, False, True]
    assert [one.classes for one in (found[0], found[2])] == [one.classes for one in alone]
    assert found[1].classes == ()
    assert all(one.problem for one in predicted(model, [tmp_path / "b.jpg"])), "a batch of nothing else"


def test_as_json(model: RunningModel) -> None:
    one = Prediction("a.jpg", (2, 0), (0.71234, 0.2))
    best = {"label": "ant", "name": "Ant, the small one", "probability": 0.712}
    assert one.to_json(model.stored, lists=False, digits=3) == {"path": "a.jpg", **best}
    listed = one.to_json(model.stored, lists=True)
    assert listed["probability"] == 0.71234
    assert [row["label"] for row in listed["predictions"]] == ["ant", "bee"]
    assert Prediction("b.jpg", problem="broken").to_json(model.stored, lists=True) == {"path": "b.jpg", "problem": "broken"}
