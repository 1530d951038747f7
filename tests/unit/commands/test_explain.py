"""`dtl explain`: a PNG for each image, or one line."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from model_folders import model_folder, write_image
from PIL import Image

from dtl.commands import explain
from dtl.errors import UserError


def test_a_png_of_each_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("captum")
    model = model_folder(tmp_path / "model")
    paths = [str(write_image(tmp_path / f"{number} (a).png", number)) for number in range(2)]
    (tmp_path / "no.png").write_bytes(b"no image")
    assert explain.run([str(model), *paths, str(tmp_path / "no.png"), "--out", str(tmp_path / "heat"), "--device", "cpu"]) == 0
    assert sorted(path.name for path in (tmp_path / "heat").iterdir()) == ["0000-0__a_.png", "0001-1__a_.png"]
    with Image.open(tmp_path / "heat/0000-0__a_.png") as image:
        assert image.width == 2 * image.height
    said = capsys.readouterr()
    assert "0001-1__a_.png: Grad-CAM for " in said.out
    assert "not readable: " in said.err
    with pytest.raises(UserError, match="the image could not be read"):
        explain.run([str(model), str(tmp_path / "no.png"), "--out", str(tmp_path / "heat"), "--device", "cpu"])
    with pytest.raises(UserError, match="--class zebra: the model has no such class"):
        explain.run([str(model), *paths, "--class", "zebra", "--device", "cpu"])


def test_without_captum_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder(tmp_path / "model")
    known = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "captum":
            raise ImportError(name)
        return known(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"^dtl explain needs captum, which is not installed: pip install 'dtl-train\[explain\]'$"):
        explain.run([str(model), str(write_image(tmp_path / "a.png", 0)), "--device", "cpu"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; give a folder"):
        explain.run([str(model), "a.png", "--out", str(tmp_path / "file")])
