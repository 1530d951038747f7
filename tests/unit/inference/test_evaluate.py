"""What a model is evaluated on: the data that is named, or its run's, and only where labels mean the model's classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from model_folders import CLASSES, model_folder, write_image

from dtl.data.packing.pack import pack
from dtl.errors import UserError
from dtl.inference import assess
from dtl.inference.evaluate import evaluate
from dtl.inference.model import RunningModel, running_model
from dtl.inference.tables import table
from dtl.intervals import shown, wilson


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningModel]:
    folder = model_folder(tmp_path_factory.mktemp("model") / "model")
    with running_model(folder, device="cpu", precision="no") as running:
        yield running


def photos(folder: Path, *classes: str, number: int = 4) -> Path:
    for name in classes:
        for seed in range(number):
            write_image(folder / name / f"{seed}.jpg", seed)
    return folder


def test_numbers_do_not_depend_on_the_batches(model: RunningModel, tmp_path: Path) -> None:
    data = str(photos(tmp_path / "photos", *CLASSES))
    whole, small = (evaluate(model, data, batch_size=size, workers=0) for size in (64, 5))
    assert whole["top1"] == small["top1"]
    assert whole["loss"] == pytest.approx(small["loss"], rel=1e-5)
    assert (whole["num_samples"], whole["precision"], whole["model"]) == (12, "no", str(model.stored.folder))
    assert whole["data"]["dataset_id"] == small["data"]["dataset_id"]


def test_a_model_folder_knows_no_data(model: RunningModel) -> None:
    with pytest.raises(UserError, match=r"is a model folder, which does not record its data; give --data\.val SRC, or the run itself"):
        evaluate(model, workers=0)


@pytest.mark.parametrize(
    ("classes", "what"),
    [
        (("bee", "cat", "dog"), r"it has 'dog', which the model does not have"),
        (("bee", "cat"), r"it was packed without 'ant', so its label numbers stand for other classes"),
        (CLASSES, r"their order differs: label 0 is 'ant' there and 'bee' in the model"),
    ],
)
def test_shards_whose_labels_mean_other_classes_are_refused(model: RunningModel, tmp_path: Path, classes: tuple[str, ...], what: str) -> None:
    shards = pack(str(photos(tmp_path / "photos", *classes, number=2)), tmp_path / "shards", progress=False, processes=1)
    with pytest.raises(UserError, match=what + "; give the images themselves, or pack them with the model's classes"):
        evaluate(model, str(shards if isinstance(shards, Path) else tmp_path / "shards"), workers=0)


def test_each_number_has_its_interval_and_too_many_probabilities_are_not_kept(model: RunningModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(photos(tmp_path / "photos", *CLASSES))
    found = evaluate(model, data, workers=0)
    names = ("top1", "top5", "balanced_accuracy", "macro_f1", "auroc", "average_precision")
    for name in names:
        low, high = found[f"{name}_interval"]
        assert low <= found[name] <= high
        assert high - low > 0.2, "of twelve images"
    assert (found["balanced_accuracy"], found["macro_f1"]) == (pytest.approx(found["macro"]["recall"]), pytest.approx(found["macro"]["f1"]))
    assert found["per_class"][0]["recall_interval"] == wilson(found["per_class"][0]["recall"], 4)
    lines = table(found).splitlines()
    assert lines[1].startswith(f"95 % intervals: top1 ({shown(found['top1_interval'])} %); balanced accuracy ")
    monkeypatch.setattr(assess, "_MOST_SCORES", 35)  # 12 images of 3 classes
    fewer = evaluate(model, data, workers=0)
    assert fewer == {**found, **dict.fromkeys(["auroc", "auroc_interval", "average_precision", "average_precision_interval"])}
    assert "AUROC" not in table(fewer)
