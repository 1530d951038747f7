"""What notebooks use: quick to import, the same loader as training's, and in their order: pack, fit, evaluate, predict, load, export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import CLASSES, model_folder, write_image
from PIL import Image
from recipes import RECIPE

import dtl


def test_every_public_name_is_there() -> None:
    for name in dtl.__all__:
        assert getattr(dtl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dtl.nothing  # noqa: B018


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_every_sample_once_an_epoch(tmp_path: Path, workers: int) -> None:
    loader = dtl.build_loader("digits", image_size=16, batch_size=100, workers=workers, seed=3, augment=None)
    labels, total = [], 0
    for images, label, weights in loader:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 16, 16)
        assert label.dtype == torch.int64
        assert len(images) == len(label) == len(weights) <= 100
        total += int(weights.sum())
        labels += label[weights > 0].tolist()
    assert total == 1437 == len(labels)
    assert len(loader) == 15
    assert [labels.count(k) for k in range(10)] == list(loader.shards.manifest.class_counts)


def test_ranks_share_the_epoch_and_workers_change_nothing() -> None:
    whole = [labels for _, labels, _ in dtl.build_loader("digits", "val", image_size=8, batch_size=50, workers=0)]
    parts = [
        [labels[weights > 0] for _, labels, weights in dtl.build_loader("digits", "val", image_size=8, batch_size=50, workers=w, rank=r, world_size=3)]
        for r, w in ((0, 0), (1, 2), (2, 1))
    ]
    for step, labels in enumerate(whole):
        assert torch.equal(torch.cat([part[step] for part in parts]), labels)


def test_an_epoch_is_another_order_and_the_same_again() -> None:
    loader = dtl.build_loader("digits", image_size=8, batch_size=200, workers=0)
    first = next(iter(loader))
    again = next(iter(loader))
    loader.epoch = 1
    other = next(iter(loader))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[1], other[1])


def test_a_wrong_split_or_source_is_told() -> None:
    with pytest.raises(dtl.UserError, match="train or val"):
        dtl.build_loader("digits", "training")
    with pytest.raises(dtl.UserError, match="nowhere"):
        dtl.build_loader("nowhere")


def test_validation_images_are_never_those_of_the_test_set(tmp_path: Path) -> None:
    for split, number in (("train", 8), ("test", 4), ("val", 6)):
        for image in range(number):
            file = tmp_path / "photos" / split / "ab"[image % 2] / f"{image}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, image, 0)).save(file)

    def num_images(source: Path, split: str) -> int:
        return sum(
            int((weights > 0).sum()) for _, _, weights in dtl.build_loader(source, split, image_size=8, batch_size=4, workers=0, cache_dir=tmp_path / "cache")
        )

    assert num_images(tmp_path / "photos", "val") == 6
    assert num_images(tmp_path / "photos/test", "val") == 4
    shutil.rmtree(tmp_path / "photos/val")
    with pytest.raises(dtl.UserError, match=r"photos has test images, but no validation images; give the folder of the images to look at as the source$"):
        num_images(tmp_path / "photos", "val")
    assert num_images(tmp_path / "photos", "train") == 8


def test_a_notebook_from_images_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    phases = {"all": {"train": "all", "steps": 4, "lr": 0.05}}
    recipe = {**RECIPE, "data": {**RECIPE["data"], "workers": 0}, "phases": phases}
    run = dtl.fit(recipe, {"run.name": "first", "data.global_batch_size": 64, "precision": "no"})
    assert run.folder == Path("runs/first")
    assert run.state == "done"
    assert run.metrics["num_samples"] == 360
    assert run.history()[-1]["step"] == 4
    # A finished run gives its result again, another precision in the same process does not mix with it.
    assert dtl.fit(recipe, {"run.name": "first", "data.global_batch_size": 64, "precision": "no"}) == run
    other = dtl.fit(recipe, {"run.name": "second", "phases.all.steps": 2, "precision": "bf16"})
    assert other.state == "done"

    measured = dtl.evaluate(run, workers=0)
    assert measured["top1"] == pytest.approx(run.metrics["top1"])
    assert len(measured["per_class"]) == 10

    images = [write_image(tmp_path / "new" / f"{number}.jpg", number) for number in range(3)]
    (tmp_path / "new" / "3.jpg").write_bytes(b"no image")
    found = dtl.predict(run, [*images, tmp_path / "new" / "3.jpg"], top=2)
    assert [Path(one["path"]).name for one in found] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert found[3].keys() == {"path", "problem"}
    assert [len(one["predictions"]) for one in found[:3]] == [2, 2, 2]
    assert found[0]["label"] == found[0]["predictions"][0]["label"]

    network, facts = dtl.load_model(run.model)
    assert not network.training
    assert facts["classes"] == [str(digit) for digit in range(10)]
    assert network(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
    file = dtl.export(run, tmp_path / "weights.safetensors", to="safetensors")
    assert file.is_file()
    assert json.loads(Path(f"{file}.json").read_text())


def test_a_mistake_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dtl.UserError, match=r"unknown config key data\.trian"):
        dtl.fit("finetune", {"data.trian": "photos"})
    with pytest.raises(dtl.UserError, match="no such config file"):
        dtl.fit("nothing")
    with pytest.raises(dtl.UserError, match="nowhere does not exist"):
        dtl.predict("nowhere", "a.jpg")
    folder = model_folder(tmp_path / "model")
    with pytest.raises(dtl.UserError, match="top is 0; it must be at least 1"):
        dtl.predict(folder, "a.jpg", top=0)
    with pytest.raises(dtl.UserError, match="does not record its data"):
        dtl.evaluate(folder)
    with pytest.raises(dtl.UserError, match="must be onnx"):
        dtl.export(folder, "a.bin", to="tflite")


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18"])
def test_a_model_loads_into_plain_torchvision_and_timm_in_three_lines(tmp_path: Path, name: str) -> None:
    """The lines of docs/api.md, run as they stand there."""
    page = (Path(__file__).resolve().parents[2] / "docs/api.md").read_text()
    zoo = name.split("/")[0]
    lines = next(block.split("```")[0] for block in page.split("```python\n")[1:] if f"safetensors.torch, {zoo}" in block)
    assert len([line for line in lines.splitlines() if line]) == 3
    folder = model_folder(tmp_path / "model", name=name, classes=("ant", "bee"))
    names: dict[str, Any] = {}
    exec(lines.replace("runs/finetune/model", str(folder)), names)
    ours, _ = dtl.load_model(folder)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(names["network"].eval()(images), ours(images))


def test_the_names_are_documented() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/api.md").read_text()
    for name in dtl.__all__:
        assert name == "__version__" or f"dtl.{name}" in page, name
    assert set(dir(dtl)) == set(dtl.__all__)


def test_a_data_path_may_begin_with_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = model_folder(tmp_path / "model")
    for number in range(6):
        write_image(tmp_path / "-photos" / CLASSES[number % len(CLASSES)] / f"{number}.jpg", number)
    assert dtl.evaluate(folder, data="-photos", workers=0)["num_samples"] == 6


def test_a_call_leaves_the_process_clean(tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    folder = model_folder(tmp_path / "model")
    image = write_image(tmp_path / "0.jpg", 0)
    assert "problem" not in dtl.predict(folder, image)[0]
    assert not AcceleratorState._shared_state, "the precision of this call is not that of the next"


def test_images_in_memory_have_the_probabilities_of_their_files(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    files = [write_image(tmp_path / f"{n}.jpg", n) for n in range(3)]
    gray, alpha, palette = tmp_path / "gray.png", tmp_path / "alpha.png", tmp_path / "palette.png"
    Image.open(files[0]).convert("L").save(gray)
    Image.open(files[1]).convert("RGBA").save(alpha)
    Image.open(files[2]).convert("P").save(palette)
    files += [gray, alpha, palette]

    def of_files(some: Sequence[Path]) -> list[float]:
        return [one["probability"] for one in dtl.predict(folder, some, batch_size=2)]  # a CPU may round otherwise in batches of other sizes

    opened = [Image.open(file) for file in files]
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    for images in (opened, arrays, tensors, np.stack(arrays[:3]), torch.stack(tensors[:3]), [opened[0], files[1], tensors[2], arrays[3]]):
        found = dtl.predict(folder, images, batch_size=2)
        assert [one["probability"] for one in found] == of_files(files[: len(images)])
    assert [one["path"] for one in dtl.predict(folder, [opened[0], files[1], np.stack(arrays[:2])])] == ["image 0", str(files[1]), "image 1", "image 2"]
    assert [dtl.predict(folder, opened[0])[0]["probability"]] == of_files(files[:1])
    assert [dtl.predict(folder, np.asarray(Image.open(gray)))[0]["probability"]] == of_files([gray])
    assert [dtl.predict(folder, torch.from_numpy(np.asarray(Image.open(gray)).copy()))[0]["probability"]] == of_files([gray])
    assert [dtl.predict(folder, np.asarray(Image.open(alpha)))[0]["probability"]] == of_files([alpha])
    assert [one["probability"] for one in dtl.predict(folder, opened, workers=2, batch_size=2)] == of_files(files)


@pytest.mark.parametrize(
    ("images", "why"),
    [
        (np.zeros((8, 8, 3), np.float32), "image 0 is a ndarray of float32; pixels are uint8"),
        (torch.zeros(3, 8, 8), "image 0 is a Tensor of torch.float32; pixels are uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"image 0 is a ndarray of shape \(3, 8, 8\); it must be \[H, W\], \[H, W, C\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"image 0 is a Tensor of shape \(8, 8, 3\); it must be \[H, W\], \[C, H, W\]"),
        (np.zeros((0, 8, 3), np.uint8), "image 0 is a ndarray of shape"),
        ([7], "image 0 is a int; give a path, a PIL image, an array or a tensor"),
        ([], "no images"),
    ],
)
def test_what_is_no_image_in_memory(images: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(dtl.UserError, match=why):
        dtl.predict(model_folder(tmp_path / "m"), images)


def test_an_image_that_cannot_be_decoded_is_reported_as_a_file_is(tmp_path: Path) -> None:
    whole = write_image(tmp_path / "a.jpg", 1).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: whole.index(b"\xff\xda") + 20])  # the header is whole
    with Image.open(tmp_path / "cut.jpg") as image:
        (found,) = dtl.predict(model_folder(tmp_path / "m"), image)
    assert found["path"] == "image 0"
    assert "truncated" in found["problem"]


def test_objects_where_a_name_belongs_are_one_line(tmp_path: Path) -> None:
    network: Any = torch.nn.Linear(2, 2)
    for call, why in (
        (lambda: dtl.fit(network), "the recipe is a Linear"),
        (lambda: dtl.fit(torch), "the recipe is a module"),
        (lambda: dtl.evaluate(network), "the model is a Linear"),
        (lambda: dtl.predict(network, "a.jpg"), "the model is a Linear"),
    ):
        with pytest.raises(dtl.UserError, match=why):
            call()
