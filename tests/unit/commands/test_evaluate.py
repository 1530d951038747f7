"""`dtl evaluate`: every number against a plain computation, and data that does not fit the model refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import CLASSES, change_weights, model_folder, write_image
from tiny_images import image_folder

from dtl.cli import main
from dtl.commands.evaluate import run
from dtl.config import config_from_dict
from dtl.config.own import note_made
from dtl.data.decoding.decode import decode
from dtl.data.packing.pack import pack
from dtl.data.shards.index import Shards
from dtl.errors import UserError
from dtl.inference.model import open_model
from dtl.text import from_csv_cell


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The order of the classes is not the alphabet's: labels must follow the model's.
    return model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    for number in range(37):
        write_image(folder / CLASSES[(5 * number + number // 7) % 3] / f"{number}.jpg", number, size=(16 + number % 5, 24))
    return folder


def evaluated(model: Path, data: Path, tmp_path: Path, *more: str) -> dict[str, Any]:
    file = tmp_path / "evaluation.json"
    assert run([str(model), "--data.val", str(data), "--json", str(file), "--workers", "0", "--precision", "no", *more]) == 0
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def by_hand(model: Path, photos: Path) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Paths, float64 logits [N, K] and labels [N], one image after another."""
    stored = open_model(model)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25]))
    paths, rows, labels = [], [], []
    for path in sorted(photos.rglob("*.jpg")):
        image = decode(path.read_bytes())
        pixels = torch.empty(1, 3, 16, 16, dtype=torch.uint8)
        draws = stored.transform.draw([0], [image.shape[1]], [image.shape[0]], seed=0, epoch=0)
        stored.transform.apply(image, draws, 0, pixels[0])
        with torch.no_grad():
            rows.append(stored.network.module((pixels / 255 - mean) / std)[0])
        paths.append(str(path.relative_to(photos)))
        labels.append(CLASSES.index(path.parent.name))
    return paths, torch.stack(rows).double(), torch.tensor(labels)


@pytest.mark.parametrize("batch_size", ["5", "64"])
def test_every_number_against_a_plain_computation(model: Path, photos: Path, tmp_path: Path, batch_size: str) -> None:
    found = evaluated(model, photos, tmp_path, "--batch-size", batch_size)
    paths, logits, labels = by_hand(model, photos)
    predicted, losses = logits.argmax(dim=1), torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert found["num_samples"] == 37
    assert found["top1"] == int((predicted == labels).sum()) / 37
    assert found["top5"] == 1.0
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (labels.numpy(), predicted.numpy()), 1)
    assert found["confusion"] == confusion.tolist()
    for k, row in enumerate(found["per_class"]):
        hits = int(((predicted == k) & (labels == k)).sum())
        assert (row["label"], row["support"]) == (CLASSES[k], int((labels == k).sum()))
        assert row["recall"] == hits / row["support"]
        assert row["precision"] == (hits / int((predicted == k).sum()) if (predicted == k).any() else 0.0)
    confidence = logits.softmax(dim=1).amax(dim=1)
    error = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            error += inside.sum().item() / 37 * abs((predicted == labels)[inside].double().mean() - confidence[inside].mean()).item()
    assert found["calibration_error"] == pytest.approx(error, abs=1e-5)
    assert sum(found["calibration"]["num_samples"]) == 37
    order = sorted(range(37), key=lambda i: -losses[i].item())[:20]
    assert [hard["path"] for hard in found["hardest"]] == [paths[i] for i in order]
    assert [hard["loss"] for hard in found["hardest"]] == pytest.approx([losses[i].item() for i in order], rel=1e-4)
    assert [hard["predicted"] for hard in found["hardest"]] == [CLASSES[predicted[i]] for i in order]


def test_of_many_classes_the_pairs_that_occur_are_written(model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluated(model, photos, tmp_path)
    assert "confusion_counts" not in whole
    monkeypatch.setattr("dtl.inference.tables.DENSE_CLASSES", 2)
    found = evaluated(model, photos, tmp_path)
    rebuilt = np.zeros((3, 3), int)
    occurring = found.pop("confusion_counts")
    rebuilt[occurring["label"], occurring["predicted"]] = occurring["count"]
    assert rebuilt.tolist() == whole.pop("confusion")
    assert min(occurring["count"]) > 0
    assert found.pop("confusion") is None
    assert found == whole


@pytest.mark.parametrize("batch_size", ["5", "64"])
def test_the_csv_has_each_image_once_as_a_plain_computation_has_it(model: Path, photos: Path, tmp_path: Path, batch_size: str) -> None:
    found = evaluated(model, photos, tmp_path, "--batch-size", batch_size, "--csv", str(tmp_path / "images.csv"), "--hardest", "3")
    with (tmp_path / "images.csv").open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    paths, logits, labels = by_hand(model, photos)
    assert sorted(rows) == sorted(paths)
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    for i, path in enumerate(paths):
        row = rows[path]
        assert (row["label"], row["prediction"]) == (CLASSES[labels[i]], CLASSES[predicted[i]])
        assert float(row["probability"]) == pytest.approx(confidence[i].item(), rel=1e-4)
        assert float(row["loss"]) == pytest.approx(losses[i].item(), rel=1e-4)
    assert found["top1"] == sum(row["label"] == row["prediction"] for row in rows.values()) / 37
    order = sorted(rows.values(), key=lambda row: -float(row["loss"]))[:3]
    assert [(hard["path"], hard["loss"], hard["confidence"]) for hard in found["hardest"]] == [
        (row["path"], float(row["loss"]), float(row["probability"])) for row in order
    ]


def test_a_name_that_a_spreadsheet_would_compute_stays_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("=1+1.jpg", 'a,"b.jpg', "c.jpg"):
        write_image(tmp_path / "photos" / CLASSES[0] / name, 1)
    assert run([str(model), "--data.val", str(tmp_path / "photos"), "--workers", "0", "--csv", str(tmp_path / "i.csv"), "--hardest", "2"]) == 0
    with (tmp_path / "i.csv").open(newline="") as file:
        assert {from_csv_cell(row["path"]) for row in csv.DictReader(file)} == {f"{CLASSES[0]}/{name}" for name in ("=1+1.jpg", 'a,"b.jpg', "c.jpg")}
    told = capsys.readouterr().out
    assert told.count("  loss ") == 2
    assert f"each image: {tmp_path / 'i.csv'}" in told


def test_a_table_with_display_names(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(model), "--data.val", str(photos), "--workers", "0"]) == 0
    told = capsys.readouterr().out
    for words in ("37 images: top1", "Ant, the small one", "precision", "hardest images", "calibration error"):
        assert words in told


def test_json_on_standard_output_is_all_there_is(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([str(model), "--data.val", str(photos), "--workers", "0", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["num_samples"] == 37


def test_a_network_that_overflows_is_measured_and_stays_json(photos: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    change_weights(folder, lambda tensors: tensors["9.weight"].fill_(3e38))
    found = evaluated(folder, photos, tmp_path)
    assert (found["loss"], found["num_samples"]) == (None, 37)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(photos: Path, tmp_path: Path, value: float) -> None:
    folder = model_folder(tmp_path / "model")
    change_weights(folder, lambda tensors: tensors["9.bias"][:1].fill_(value))
    with pytest.raises(UserError, match=r"model.safetensors: the tensor 9.bias holds values that are not finite"):
        evaluated(folder, photos, tmp_path)


@pytest.mark.parametrize("damage", ["a flipped bit", "64 kB of zeros", "cut short", "another run's"])
def test_weights_that_are_not_the_models_are_refused(photos: Path, tmp_path: Path, damage: str) -> None:
    folder = model_folder(tmp_path / "model")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "a flipped bit":
        data[len(data) // 2] ^= 1
    elif damage == "64 kB of zeros":
        data[len(data) - 4096 :] = bytes(4096)
    elif damage == "cut short":
        del data[-8:]
    else:
        data[:] = (model_folder(tmp_path / "other", seed=1) / "model.safetensors").read_bytes()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"the weights .*model.safetensors are damaged|the weights .*model.safetensors do not match the model.json"):
        evaluated(folder, photos, tmp_path)


def test_a_folder_of_an_older_dtl_is_used_with_a_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model")
    facts = json.loads((folder / "model.json").read_text())
    del facts["weights"]
    (folder / "model.json").write_text(json.dumps(facts))
    note_made(folder / "model.json", print)
    assert evaluated(folder, photos, tmp_path)["num_samples"] == 37
    assert capsys.readouterr().err.count("records no SHA-256 of the weights") == 1


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("bee", "cat", "dog"), "dog"),
        (("ant", "bee", "cat"), "label 0 is 'ant' there and 'bee' in the model"),
        (("bee", "cat"), "without 'ant'"),
    ],
)
def test_shards_of_other_classes_are_refused(model: Path, tmp_path: Path, classes: tuple[str, ...], message: str) -> None:
    for number, name in enumerate(classes * 2):
        write_image(tmp_path / "photos" / name / f"{number}.jpg", number)
    pack(tmp_path / "photos", tmp_path / "shards", progress=False, processes=1)
    with pytest.raises(UserError, match=message) as caught:
        run([str(model), "--data.val", str(tmp_path / "shards"), "--workers", "0"])
    assert "\n" not in str(caught.value)


def test_a_folder_with_an_unknown_class_is_refused(model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "photos/dog/1.jpg", 1)
    with pytest.raises(UserError, match="dog"):
        run([str(model), "--data.val", str(tmp_path / "photos"), "--workers", "0"])


def test_damage_ends_the_evaluation_or_is_left_out_by_name(model: Path, photos: Path, tmp_path: Path) -> None:
    whole = evaluated(model, photos, tmp_path)
    pack(photos, tmp_path / "shards", classes=CLASSES, progress=False, processes=1)
    (shard,) = (tmp_path / "shards").glob("*.tar")
    data = bytearray(shard.read_bytes())
    data[int(Shards.open(tmp_path / "shards").offsets[0]) + 300] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="--on-error skip"):
        run([str(model), "--data.val", str(tmp_path / "shards"), "--workers", "0"])
    found = evaluated(model, tmp_path / "shards", tmp_path, "--on-error", "skip", "--csv", str(tmp_path / "images.csv"))
    lines = (tmp_path / "images.csv").read_text().splitlines()
    assert lines[1] == f"{found['damaged'][0]['path']},,,,"
    assert len(lines) == 1 + whole["num_samples"]
    assert found["num_samples"] == whole["num_samples"] - 1
    (damaged,) = found["damaged"]
    assert (photos / damaged["path"]).is_file()
    assert "crc32" in damaged["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "--data.val"),
        (["{tmp}/none"], "does not exist"),
        (["{tmp}"], "neither a run nor a model folder"),
        (["{tmp}/run"], "no model yet"),
        (["{model}", "--data.val", "{tmp}/none"], "does not exist"),
        (["{model}", "--data.val", "digits", "--json", "{tmp}/no/e.json"], "does not exist"),
        (["{model}", "--data.val", "digits", "--csv", "{tmp}/no/e.csv"], "does not exist"),
        (["{model}", "--data.val", "digits", "--csv", "{tmp}"], "not a file"),
    ],
)
def test_mistakes_are_one_clear_line(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("{}")
    with pytest.raises(UserError, match=message) as caught:
        run([one.format(model=model, tmp=tmp_path) for one in arguments])
    assert "\n" not in str(caught.value)


def test_a_strangers_run_runs_no_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """pipe: in its config.yaml, and allow_pipe there beside a manifest that names commands; the user may name either."""
    images = image_folder(tmp_path / "photos", dict.fromkeys(sorted(CLASSES), 2))
    pack(images, tmp_path / "packed", progress=False)
    shard = next((tmp_path / "packed").glob("shard-*.tar"))
    command = f"pipe:touch {tmp_path}/ran; cat {shard}"
    run = tmp_path / "run"
    model_folder(run / "model", classes=tuple(sorted(CLASSES)))

    def stored(**data: object) -> None:
        (run / "config.yaml").write_text(config_from_dict({"data": data, "phases": {"all": {}}}, "the test").to_yaml())

    for data in ({"val": command}, {"train": command}, {"val": "http://127.0.0.1:9/x.tar"}):
        stored(**data)
        assert main(["evaluate", str(run), "--device", "cpu"]) == 2
        told = capfd.readouterr().err
        assert "was not written by a run of yours" in told
        assert told.count("\n") == 1
    stored(train=str(images), allow_pipe=True)
    manifest = json.loads((tmp_path / "packed/manifest.json").read_text())
    for one in manifest["shards"]:
        one["url"] = command
    (tmp_path / "packed/manifest.json").write_text(json.dumps(manifest))
    assert main(["evaluate", str(run), "--data.val", str(tmp_path / "packed"), "--device", "cpu"]) == 2
    assert "allow it with --data.allow-pipe" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert main(["evaluate", str(run), "--data.val", str(tmp_path / "packed"), "--data.allow-pipe", "--device", "cpu", "--workers", "0"]) == 0
    assert (tmp_path / "ran").exists()
    # A run that this user made, with the same config.
    note_made(run / "config.yaml", print)
    assert main(["evaluate", str(run), "--data.val", str(tmp_path / "packed"), "--device", "cpu", "--workers", "0"]) == 0


def test_a_strangers_network_needs_trust(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model", own=False, made_by={"run": "of a stranger", "step": 1})
    arguments = ["evaluate", str(folder), "--data.val", str(image_folder(tmp_path / "photos", dict.fromkeys(CLASSES, 2))), "--device", "cpu"]
    assert main(arguments) == 2
    assert "add --trust" in capfd.readouterr().err
    assert main([*arguments, "--trust"]) == 0
    assert "trusted from now on" in capfd.readouterr().err
    assert main(arguments) == 0
