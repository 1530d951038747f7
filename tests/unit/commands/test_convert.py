"""The command line of `dtl convert`; what it reads and writes is tested in checkpoint/transfer/source/test_convert.py."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtl.cli import main


def test_help_imports_no_torch() -> None:
    code = "import sys; from dtl.commands.convert import _parser; _parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_it_prints_what_was_written_and_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "args": argparse.Namespace()}, tmp_path / "w.pth")
    out = tmp_path / "o.safetensors"
    assert main(["convert", str(tmp_path / "w.pth"), str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}: 1 tensor, 0.0 MiB\n"
    assert said.err == "left out: 1 object of argparse.Namespace\n"
    assert main(["convert", str(tmp_path / "w.pth"), str(out)]) == 2
    assert "exists already; use --overwrite to replace it" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "w.pth"), str(out), "--overwrite"]) == 0
