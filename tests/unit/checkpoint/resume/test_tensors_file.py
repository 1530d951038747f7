"""A file of tensors appears whole, or the one before stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from saved_models import save

from dtl.checkpoint.resume import tensors_file
from dtl.checkpoint.resume.model_folder import read_model_json
from dtl.errors import UserError


def test_a_failed_write_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model", metrics={"top1": 0.5})

    def full(path: Path, value: object) -> tensors_file.FileFacts:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensors_file, "write_json", full)
        with pytest.raises(UserError, match=r"could not be written to .*/model: No space left on device"):
            save(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    assert read_model_json(tmp_path / "model").metrics == {"top1": 0.5}
    (tmp_path / ".writing-model-1").mkdir()  # of a killed process
    save(tmp_path / "model", metrics={"top1": 0.75})
    assert os.listdir(tmp_path) == ["model"]
    assert read_model_json(tmp_path / "model").metrics == {"top1": 0.75}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not be written to .*/file/model: (File exists|Not a directory)"):
        save(tmp_path / "file" / "model")
