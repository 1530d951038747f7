"""`dtl export`: what is written gives PyTorch's logits for any batch, knows its preprocessing, and is not written otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import CLASSES, model_folder, write_image

from dtl.commands.export import run
from dtl.errors import UserError
from dtl.inference import export as engine
from dtl.inference.model import open_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "model")


def logits(model: Path, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return open_model(model).network.module(images).numpy()  # type: ignore[no-any-return]


def check_facts(facts: dict[str, Any]) -> None:
    assert facts["classes"] == list(CLASSES)
    assert facts["display_names"] == {"ant": "Ant, the small one"}
    assert facts["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert facts["preprocessing"]["transform"]["geometry"] == {"name": "ShortSide", "image_size": 16, "resize_size": 20, "random": False}
    assert facts["input"]["shape"] == ["batch", 3, 16, 16]


def test_onnx_gives_the_logits_of_pytorch(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime as runtime

    for number in range(3):
        write_image(tmp_path / f"photos/{number}.jpg", number)
    (tmp_path / "photos/broken.jpg").touch()
    out = tmp_path / "model.onnx"
    assert run([str(model), "--to", "onnx", "--out", str(out), "--images", str(tmp_path / "photos")]) == 0
    assert "checked against PyTorch on 3 images" in capsys.readouterr().out
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for batch_size in (1, 5):
        images = torch.randn(batch_size, 3, 16, 16)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(found, logits(model, images), atol=1e-5)
    check_facts(json.loads(session.get_modelmeta().custom_metadata_map["dtl"]))
    check_facts(json.loads((tmp_path / "model.onnx.json").read_text()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.json", "photos"]


def test_torch_export_runs_without_our_code(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.pt2"
    assert run([str(model), "--to", "torch-export", "--out", str(out)]) == 0
    assert "built-in digits" in capsys.readouterr().out
    extra = {"dtl.json": ""}
    program = torch.export.load(str(out), extra_files=extra).module()
    for batch_size in (1, 5):
        images = torch.randn(batch_size, 3, 16, 16)
        np.testing.assert_allclose(program(images).detach().numpy(), logits(model, images), atol=1e-5)
    check_facts(json.loads(extra["dtl.json"]))


def test_safetensors_is_the_state_dict_with_its_facts(model: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    out = tmp_path / "model.safetensors"
    assert run([str(model), "--to", "safetensors", "--out", str(out)]) == 0
    assert out.stat().st_mode == out.with_name("model.safetensors.json").stat().st_mode, "readable by those whom the umask lets"
    wanted = open_model(model).network.module.state_dict()
    with safe_open(out, "pt") as file:
        assert set(file.keys()) == set(wanted)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in wanted.items())
        check_facts(json.loads(file.metadata()["dtl"]))


def test_a_file_that_differs_from_pytorch_is_not_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        found, note = written(*arguments)
        return lambda images: found(images) + 0.1, note

    written = engine._to_safetensors
    monkeypatch.setattr(engine, "_to_safetensors", wrong)
    with pytest.raises(UserError, match=r"differs from PyTorch by 0\.1"):
        run([str(model), "--to", "safetensors", "--out", str(tmp_path / "m.safetensors")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--to", "safetensors", "--out", "{tmp}/no/m"], "does not exist"),
        (["{model}", "--to", "safetensors", "--out", "{tmp}"], "is a folder"),
        (["{model}", "--to", "safetensors", "--out", "{tmp}/m", "--opset", "18"], "--opset needs --to onnx"),
        (["{tmp}", "--to", "safetensors", "--out", "{tmp}/m"], "neither a run nor a model folder"),
        (["{model}", "--to", "safetensors", "--out", "{tmp}/m", "--images", "{tmp}/bad.jpg"], "can be read"),
    ],
)
def test_mistakes_are_one_clear_line(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "bad.jpg").write_text("no image")
    with pytest.raises(UserError, match=message) as caught:
        run([one.format(model=model, tmp=tmp_path) for one in arguments])
    assert "\n" not in str(caught.value)


def test_missing_packages_are_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx and onnxscript.*pip install onnx onnxscript$"):
        run([str(model), "--to", "onnx", "--out", str(tmp_path / "m.onnx")])


def test_a_folder_that_cannot_be_written_is_one_line(model: Path) -> None:
    with pytest.raises(UserError, match=r"^/proc/model\.safetensors cannot be written: [A-Z][a-z -]+$"):  # not even by root
        run([str(model), "--to", "safetensors", "--out", "/proc/model.safetensors"])
