"""Any file of weights as safetensors: the tensors alone, so that other programs need not open a pickle."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dtl.checkpoint.transfer.source.read import NOT_WEIGHTS, by_key, read_content, split_fragment
from dtl.checkpoint.transfer.source.torch_file import flat
from dtl.errors import UserError
from dtl.files import expand_home, temporary_suffix, user_path
from dtl.text import counted, near_path

_HELD = {
    getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16",
        "uint8", "bool", "complex64",
    )
    if hasattr(torch, name)
}  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """What was written to `path`, and lines about what was left out."""

    path: Path
    num_tensors: int
    num_bytes: int
    dropped: tuple[str, ...]


def convert(source: str, out: Path, *, overwrite: bool = False) -> Converted:
    """Write the tensors of the file `source` (or of one state dict in it: `FILE#KEY`) to `out`.

    Names stay as they are; those of nested dicts are joined by dots. The state of optimizers and the like is left out.
    UserError where there are no tensors, or `out` is there already.
    """
    user_path(source)  # no address
    path, key = split_fragment(source)
    path = expand_home(path)
    if not path.is_file():
        if not path.exists():
            raise UserError(f"{path} does not exist{near_path(path) or '; give a file with weights'}")
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}; give a file with weights")
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: the name of the output file must end in .safetensors")
    if os.path.lexists(out) and not overwrite:
        raise UserError(f"{out} exists already; use --overwrite to replace it")
    read = read_content(path)
    dropped = list(read.remarks())
    content = by_key(read.content, key, str(path)) if key is not None else _weights(read.content, "", dropped)
    tensors = _single(content) if key is None else flat(content)
    for name in [name for name, value in tensors.items() if value.dtype not in _HELD]:
        dropped.append(f"{name}, whose dtype safetensors does not support ({tensors.pop(name).dtype})")
    if not tensors:
        raise UserError(f"{path}: contains no tensors; nothing is written")
    temporary = out.with_name(f".{out.name}{temporary_suffix()}")
    try:
        # Copies: tensors that share memory are written once under each name.
        save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}, temporary, {"format": "pt"})
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Converted(out, len(tensors), out.stat().st_size, tuple(dropped))


def _weights(content: Any, prefix: str, dropped: list[str]) -> Any:
    """The content without what belongs to optimizers, schedules and the like."""
    if not isinstance(content, dict):
        return content
    kept: dict[Any, Any] = {}
    for name, value in content.items():
        where = f"{prefix}{name}"
        if isinstance(value, (dict, list)) and str(name).lower().startswith(NOT_WEIGHTS):
            if count := len(flat(value)):
                dropped.append(f"{counted(count, 'tensor')} of {where}")
        else:
            kept[name] = _weights(value, f"{where}.", dropped) if isinstance(value, dict) else value
    return kept


def _single(content: Any) -> dict[str, torch.Tensor]:
    """All tensors; where they lie in one dict (`state_dict`, `model`), without its name."""
    while isinstance(content, dict):
        holding = [value for value in content.values() if isinstance(value, torch.Tensor) or flat(value)]
        if len(holding) != 1 or isinstance(holding[0], torch.Tensor):
            break
        content = holding[0]
    return flat(content)
