"""Damaged files of weights: tensors or a UserError of one line, in memory that the file has; `dtl convert` writes a whole file or none."""

from __future__ import annotations

import argparse
import io
import pickle
import tempfile
from pathlib import Path

import torch
from mutations import bounded, fuzzed, mutated, one_line
from safetensors.torch import save
from torch import nn

from dtl.checkpoint.transfer.source.convert import convert
from dtl.checkpoint.transfer.source.read import read_weights
from dtl.errors import UserError


def _saved(content: object, *, zipped: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


_STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2).half(), "n": torch.tensor(3)}
_CONTENT = {"state_dict": _STATE, "args": argparse.Namespace(lr=1), "s": torch.eye(2).to_sparse()}
_TORCH = [_saved(_CONTENT), _saved(_CONTENT, zipped=False), _saved(nn.BatchNorm1d(3)), pickle.dumps({"model": {"w": _STATE["a.weight"].numpy()}}, 2)]
_SAFE = [save(_STATE)]


def check(name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        path, out = Path(place) / name, Path(place) / "out.safetensors"
        path.write_bytes(data)
        with bounded():
            try:
                for value in read_weights(path).tensors.values():
                    assert value.numel() * value.element_size() < 64 << 20
                    value.sum() if value.dtype.is_floating_point else value.numel()
            except UserError as error:
                one_line(error)
            try:
                convert(str(path), out)
                assert out.stat().st_size < 64 << 20
            except UserError:
                assert not out.exists()
        assert {entry.name for entry in Path(place).iterdir()} <= {name, out.name}


test_torch_files = fuzzed(mutated(_TORCH), 150)(lambda data: check("w.pth", data))
test_safetensors = fuzzed(mutated(_SAFE), 80)(lambda data: check("w.safetensors", data))
