"""Functions that a user names are imported from the working directory or the path, and the hash of their file is known."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from dtl.config.functions import code_sha256, import_function, raised
from dtl.errors import UserError


def test_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def wave(image):\n    return image\nclass Wave:\n    def __call__(self, image):\n        return image\nobject_of_it = Wave()\n"
    (tmp_path / "mine_of_this_test.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    function = import_function("mine_of_this_test:wave", "data.x")
    assert function(3) == 3
    digest = hashlib.sha256(hashlib.sha256(code.encode()).digest()).hexdigest()
    assert code_sha256("mine_of_this_test:wave", "data.x") == code_sha256("mine_of_this_test:object_of_it", "data.x") == digest
    assert code_sha256("own_functions:noisy", "data.x") != digest != code_sha256("builtins:len", "data.x")
    (tmp_path / "mine_of_this_test.py").write_text(f"{code}\n")
    assert code_sha256("mine_of_this_test:wave", "data.x") != digest
    with pytest.raises(UserError, match=r"^data.x: mine_of_this_test has no function 'waves'; did you mean 'wave'\?$"):
        import_function("mine_of_this_test:waves", "data.x")
    with pytest.raises(UserError, match=r"^data.x: cannot import 'no_such_module'"):
        import_function("no_such_module:f", "data.x")


def test_errors_name_the_users_line() -> None:
    with pytest.raises(ValueError, match="two") as caught:
        raise ValueError("two\nlines")
    assert raised(caught.value).startswith(f"ValueError: two lines ({__file__}:")
