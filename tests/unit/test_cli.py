"""`dtl COMMAND`: exit statuses, and one line for a mistake."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from dtl import __version__
from dtl.cli import main
from dtl.commands import COMMANDS


def test_without_a_command_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dtl {__version__}\n"


@pytest.mark.parametrize(("name", "hint"), [("trian", "did you mean train?"), ("zzz", "commands: train,")])
def test_an_unknown_command(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert hint in err


def test_a_mistake_is_told_by_rank_0_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", "--config", "nope.yaml"]) == 2
    assert capsys.readouterr().err.startswith("dtl: nope.yaml: no such config file")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--config", "nope.yaml"]) == 2
    assert capsys.readouterr().err.startswith("dtl: nope.yaml"), "a leftover of another launch makes no rank"
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "9")):
        monkeypatch.setenv(name, value)
    assert main(["train", "--config", "nope.yaml"]) == 2
    assert capsys.readouterr().err == ""


def test_print_config_prints_what_a_run_would_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--phases.head.lr", "0.25", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert "lr: 0.25" in out
    assert "global_batch_size: 64" in out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_listed_command_has_its_module(name: str) -> None:
    assert importlib.util.find_spec(f"dtl.commands.{name.replace('-', '_')}") is not None


def test_models_are_listed_by_part_of_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "resnet18"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "torchvision/resnet18" in lines
    assert "dtl/resnet18_plain" in lines
    assert all("resnet18" in line for line in lines)


@pytest.mark.parametrize("command", ["train", "evaluate", "models", "predict"])
def test_a_working_folder_that_was_deleted_is_one_line(tmp_path: Path, command: str) -> None:
    """torch's libraries end the process with a line of their own, once they are loaded."""
    (tmp_path / "gone").mkdir()
    gone = str(tmp_path / "gone")
    code = f"import os; from dtl.cli import main; os.chdir({gone!r}); os.rmdir({gone!r}); raise SystemExit(main([{command!r}, 'x']))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "dtl: the folder that this shell is in was deleted: change to another one (cd), and run the command again\n"
