"""Tensors and JSON written, hashed and synced in one pass: the files of checkpoints and model folders."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dtl.files import FileFacts

_CHUNK_BYTES = 8 << 20
_NAMES_OF_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileFacts:
    """Write a safetensors file, hashed on its way to the disk and synced to it. Tensors must lie in host memory.

    Our own writer of that format (8 bytes of header length, a JSON header, the bytes: huggingface.co/docs/safetensors)
    for two reasons: one pass writes and hashes what memory holds, in pieces that leave the interpreter to other threads,
    and a full disk is an OSError with its errno. Tensors that share memory are written once under each name.
    """
    # Widest type first keeps every tensor aligned, as the reference writer does.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES_OF_TYPES:
            raise TypeError(f"tensor {name} has dtype {tensor.dtype}, which a checkpoint cannot store")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES_OF_TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, [len(text).to_bytes(8, "little") + text, *(_LazyBytes(tensors[name]) for name in names)])


def write_json(path: Path, value: object) -> FileFacts:
    """Write a JSON file, synced to the disk. Floats come back exactly (Python's own NaN and Infinity included)."""
    return _write(path, [(json.dumps(value, indent=1) + "\n").encode()])


class _LazyBytes:
    """A tensor's bytes in row-major order, laid out only when their turn comes: never two copies of a whole model."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def view(self) -> memoryview:
        if not self.tensor.numel():
            return memoryview(b"")
        # numpy lays out with this thread alone; torch would take the threads that train. Plain integers: numpy has no bfloat16.
        whole = np.ascontiguousarray(self.tensor.detach().view(_INTEGERS[self.tensor.element_size()]).numpy())
        return memoryview(cast(bytes, whole.reshape(-1).view(np.uint8)))


def _write(path: Path, pieces: Iterable[bytes | _LazyBytes]) -> FileFacts:
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=1 << 20) as file:
        for piece in pieces:
            view = piece.view() if isinstance(piece, _LazyBytes) else memoryview(piece)
            for start in range(0, len(view), _CHUNK_BYTES):
                chunk = view[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileFacts(size, digest.hexdigest())
