"""`dtl convert`: the tensors of any file of weights as safetensors."""

from __future__ import annotations

import argparse
import os
import pickle
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dtl.checkpoint.transfer.source.convert import convert
from dtl.checkpoint.transfer.source.read import read_weights
from dtl.cli import main
from dtl.errors import UserError


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch executed",)


def _script(module: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.script(module), path)


def _zoo(module: nn.Module, path: Path) -> None:
    content = {"model": {name: value.numpy() for name, value in module.state_dict().items()}, "author": "x", "evil": Evil()}
    path.write_bytes(pickle.dumps(content, 2))


KINDS: dict[str, Any] = {
    "torch": lambda module, path: torch.save({"state_dict": module.state_dict(), "args": argparse.Namespace(lr=1), "evil": Evil()}, path),
    "legacy": lambda module, path: torch.save({"state_dict": module.state_dict(), "evil": Evil()}, path, _use_new_zipfile_serialization=False),
    "module": lambda module, path: torch.save(module, path),
    "module in a checkpoint": lambda module, path: torch.save({"model": module, "epoch": 3}, path),
    "TorchScript": _script,
    "pickle": _zoo,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_becomes_safetensors_and_nothing_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As somebody types it: the name of the file has what a shell would run."""
    monkeypatch.chdir(tmp_path)
    module = small()
    name = "it's $(touch executed).pth"
    KINDS[kind](module, tmp_path / name)
    assert main(shlex.split(f"convert {shlex.quote(name)} OUT.safetensors")) == 0
    found = load_file("OUT.safetensors")
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in module.state_dict().items())
    assert set(read_weights("OUT.safetensors").tensors) == set(found)
    assert not Path("executed").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OUT.safetensors", name]


def test_names_of_several_dicts_are_joined_and_optimizers_are_left_out(tmp_path: Path) -> None:
    one = torch.ones(2)
    content = {"model": {"w": one, "b": one[:1]}, "ema": {"w": one}, "optimizer": {"state": {0: {"m": one}}}, "wide": torch.ones(1, dtype=torch.complex128)}
    torch.save(content, tmp_path / "w.pth")
    done = convert(str(tmp_path / "w.pth"), tmp_path / "o.safetensors")
    assert set(load_file(done.path)) == {"model.w", "model.b", "ema.w"}
    assert done.dropped == ("1 tensor of optimizer", "wide, whose dtype safetensors does not support (torch.complex128)")
    done = convert(f"{tmp_path / 'w.pth'}#ema", tmp_path / "ema.safetensors")
    assert set(load_file(done.path)) == {"w"}


def test_what_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    torch.save({"epoch": 1}, tmp_path / "none.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "there.safetensors").write_text("mine")
    for file, out, reason in [
        ("w.pth", "there.safetensors", "exists already; use --overwrite to replace it"),
        ("w.pth", "o.pth", "the name of the output file must end in .safetensors"),
        ("none.pth", "o.safetensors", "contains no tensors; nothing is written"),
        ("nothing.pth", "o.safetensors", "nothing.pth does not exist"),
        ("pipe.pth", "o.safetensors", "pipe.pth is not a regular file"),
    ]:
        with pytest.raises(UserError, match=reason):
            convert(str(tmp_path / file), tmp_path / out)
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert not (tmp_path / "o.safetensors").exists()
    assert convert(str(tmp_path / "w.pth"), tmp_path / "there.safetensors", overwrite=True).num_tensors == 1
