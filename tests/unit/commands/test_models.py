"""`dtl models`."""

from __future__ import annotations

import pytest

from dtl.commands.models import run


def test_only_names_with_the_word_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dtl.models import build

    monkeypatch.setattr(build, "model_names", lambda: ["dtl/resnet18_plain", "torchvision/resnet18", "torchvision/vgg11"])
    for word, names in (([], 3), (["resnet18"], 2), (["alexnet"], 0)):
        assert run(word) == 0
        assert len(capsys.readouterr().out.splitlines()) == names
