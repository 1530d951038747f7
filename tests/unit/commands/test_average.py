"""`dtl average`: the mean, tensor by tensor, and nothing that does not belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import CLASSES, change_weights, model_folder, write_image

from dtl import build_loader
from dtl.checkpoint.resume.model_folder import load_model_tensors
from dtl.commands.average import average, run
from dtl.data.transforms.transforms import eval_transform
from dtl.errors import UserError
from dtl.inference.model import open_model
from dtl.models.model_json import read_model_json


def test_the_mean_of_three_is_a_model_folder(tmp_path: Path) -> None:
    folders = [model_folder(tmp_path / str(seed) / "model", seed=seed) for seed in range(3)]
    assert run([*map(str, folders[:2]), str(tmp_path / "2"), "--out", str(tmp_path / "soup")]) == 0  # a run's folder will do
    parts, mean = [load_model_tensors(folder) for folder in folders], load_model_tensors(tmp_path / "soup")
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.stack([part[name] for part in parts]).mean(dim=0))
        else:
            assert torch.equal(tensor, parts[0][name])
        assert tensor.dtype == parts[0][name].dtype
    facts = read_model_json(tmp_path / "soup")
    assert facts.classes == CLASSES
    assert facts.metrics == {}  # nobody has measured it
    assert [one["model"] for one in facts.made_by["average_of"]] == [str(folder) for folder in folders]
    open_model(tmp_path / "soup")


@pytest.mark.parametrize(("precisions", "kept"), [(("bf16", "bf16"), "bf16"), (("bf16", "no"), None), (("bf16", None), "bf16"), ((None, None), None)])
def test_folders_of_an_older_dtl_go_with_new_ones(tmp_path: Path, precisions: tuple[str | None, str | None], kept: str | None) -> None:
    """They describe the same transform in other words, and do not say the precision."""
    facts = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "image_size": 16, "interpolation": "bilinear", "crop_ratio": 0.8}
    now = eval_transform(image_size=16, crop_ratio=0.8).describe()
    older = {"version": 2, **{key: value for key, value in now.items() if key != "evaluation_version"}}
    for name, transform, precision in zip("ab", (now, older), precisions):
        model_folder(tmp_path / name, preprocessing={**facts, "transform": transform}, made_by={"run": name, "precision": precision})
    assert run([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "soup")]) == 0
    assert read_model_json(tmp_path / "soup").made_by.get("precision") == kept


def test_half_precision_is_summed_in_float64() -> None:
    models = [
        {"w": torch.tensor([60000.0], dtype=torch.float16), "n": torch.tensor(7)},
        {"w": torch.tensor([60000.0], dtype=torch.float16), "n": torch.tensor(9)},
    ]
    mean, moved = average(models, ["a", "b"])
    assert mean["w"].item() == 60000.0
    assert mean["n"].item() == 7
    assert moved == []


def test_what_is_the_same_in_all_models_stays_the_same_and_statistics_that_differ_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frozen norms: with three models, a sum in float64 divided by three would be another number."""
    frozen = torch.tensor([0.1, 1 / 3, 1e300], dtype=torch.float64)
    models = [{"running_var": frozen.clone(), "weight": torch.tensor([float(number)], dtype=torch.float64)} for number in range(3)]
    mean, moved = average(models, ["a", "b", "c"])
    assert torch.equal(mean["running_var"], frozen)
    assert mean["weight"].item() == 1.0
    assert moved == ["weight"]
    assert models[0]["weight"].item() == 0.0, "the first model is left as it is"
    a, b = (str(model_folder(tmp_path / name, seed=seed)) for seed, name in enumerate("ab"))
    assert run([a, b, "--out", str(tmp_path / "soup")]) == 0
    assert "running statistics of 2 norm layers differ between the models: they are averaged" in capsys.readouterr().out
    change_weights(Path(b), lambda tensors: tensors.update({name: part for name, part in load_model_tensors(Path(a)).items() if "running" in name}))
    assert run([a, b, "--out", str(tmp_path / "soup"), "--overwrite"]) == 0
    assert "running" not in capsys.readouterr().out
    assert run([a, b, "--out", str(tmp_path / "soup"), "--overwrite", "--data", "images"]) == 0
    assert "running statistics of norm layers are the same in all models: nothing is estimated on images\n" in capsys.readouterr().out
    parts = [load_model_tensors(folder) for folder in (tmp_path / "soup", Path(a))]
    assert all(torch.equal(tensor, parts[1][name]) for name, tensor in parts[0].items() if "running" in name)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"name": "networks:without_norms"}, "the network differs: networks:small and networks:without_norms"),
        ({"classes": ("bee", "cat")}, "the number of classes differs: 3 and 2"),
        ({"classes": ("bee", "ant", "cat")}, "class 1 is 'cat' in one and 'ant' in the other"),
        (
            {"preprocessing": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "image_size": 24, "interpolation": "bilinear", "crop_ratio": 0.8}},
            "image_size is 16 and 24",
        ),
    ],
)
def test_models_that_do_not_belong_together_are_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    first, second = model_folder(tmp_path / "a"), model_folder(tmp_path / "b", **other)
    with pytest.raises(UserError, match=message):
        run([str(first), str(second), "--out", str(tmp_path / "soup")])
    assert not (tmp_path / "soup").exists()


def test_what_is_there_is_kept_unless_told(tmp_path: Path) -> None:
    a, b, c = (str(model_folder(tmp_path / name, seed=seed)) for seed, name in enumerate("abc"))
    for out, message in ((c, "--overwrite"), (str(tmp_path), "give a new folder"), (a, "one of the models")):
        with pytest.raises(UserError, match=message):
            run([a, b, "--out", out])
    assert run([a, b, "--out", c, "--overwrite"]) == 0
    with pytest.raises(UserError, match="twice"):
        run([a, a, "--out", str(tmp_path / "d")])
    with pytest.raises(UserError, match="two models"):
        run([a, "--out", str(tmp_path / "d")])


def test_weights_that_are_not_the_models_are_not_averaged(tmp_path: Path) -> None:
    first, second = (model_folder(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    (first / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"the weights .*a/model.safetensors do not match the model.json beside them"):
        run([str(first), str(second), "--out", str(tmp_path / "soup")])
    assert not (tmp_path / "soup").exists()


def test_statistics_that_differ_are_estimated_anew_on_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTL_CACHE", str(tmp_path / "cache"))
    a, b = (str(model_folder(tmp_path / name, seed=seed)) for seed, name in enumerate("ab"))
    for number in range(36):
        place = tmp_path / "images" / CLASSES[number % 3] / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        write_image(place, number)
    assert run([a, b, "--out", str(tmp_path / "mean")]) == 0
    for name in ("soup", "again"):
        assert run([a, b, "--out", str(tmp_path / name), "--data", str(tmp_path / "images")]) == 0
    assert "running statistics of 2 norm layers differ between the models: they were estimated anew on images of" in capsys.readouterr().out
    mean, soup, again = (load_model_tensors(tmp_path / name) for name in ("mean", "soup", "again"))
    assert mean.keys() == soup.keys()
    for name, tensor in soup.items():
        assert torch.equal(tensor, again[name]), "in a fixed order"
        assert torch.equal(tensor, mean[name]) == ("running" not in name), name
    # What the first norm gets: the convolution of all images, a channel's mean and variance. Two batches of 18 images.
    model = open_model(tmp_path / "soup").network.module
    images = [images[weights > 0] for images, _, weights in build_loader(str(tmp_path / "images"), split="val", image_size=16, batch_size=36, workers=0)]
    preprocessing = read_model_json(tmp_path / "soup").preprocessing
    shift, scale = (torch.tensor(preprocessing[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        seen = model[0]((torch.cat(images).float() / 255 - shift) / scale)
    torch.testing.assert_close(soup["1.running_mean"], seen.mean(dim=(0, 2, 3)), rtol=0.1, atol=0.1)
    torch.testing.assert_close(soup["1.running_var"], seen.var(dim=(0, 2, 3)), rtol=0.2, atol=0.1)
    with pytest.raises(UserError, match="nowhere"):
        run([a, b, "--out", str(tmp_path / "other"), "--data", str(tmp_path / "nowhere")])
    assert not (tmp_path / "other").exists()
