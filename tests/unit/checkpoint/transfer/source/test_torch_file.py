"""Files that were written by pickling: their tensors come back bit for bit, nothing of them runs, and damage is one line."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from dtl.checkpoint.transfer.source.read import read_weights
from dtl.checkpoint.transfer.source.torch_file import flat, read_pickled
from dtl.errors import UserError


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(expected) and all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items())


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch executed",)


class Average:
    """A trainer's object with a network in it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.decay = module, 0.9


TENSORS = {
    **{str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool)},
    "float8": torch.arange(4.0).to(torch.float8_e4m3fn).view(torch.float8_e4m3fn),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "part": torch.arange(10.0)[3:7],
    "expanded": torch.arange(3).expand(2, 3),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "parameter": nn.Parameter(torch.ones(2)).data,
}


@pytest.mark.parametrize("zipped", [True, False])
def test_every_kind_of_tensor(tmp_path: Path, zipped: bool) -> None:
    torch.save(TENSORS, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = read_pickled(tmp_path / "w.pth").content
    assert list(found) == list(TENSORS)
    for name, value in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name].float(), value.float()), name


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_share_memory_still_do_and_a_sparse_one_is_dense(tmp_path: Path, zipped: bool) -> None:
    tied = torch.arange(4.0)
    torch.save({"a": tied, "b": tied, "s": torch.eye(3).to_sparse()}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = read_weights(tmp_path / "w.pth").tensors
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert torch.equal(found["s"], torch.eye(3))
    found["a"][0] = 9  # a private map: the file stays as it is
    assert float(read_weights(tmp_path / "w.pth").tensors["a"][0]) == 0


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_the_weights_are_dropped_and_named(tmp_path: Path, zipped: bool) -> None:
    state = small().state_dict()
    beside = {"args": argparse.Namespace(lr=1), "rng": random.Random(0), "best": numpy.float64(0.5), "place": Path("x")}
    torch.save({"state_dict": state, **beside}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    read = read_weights(tmp_path / "w.pth")
    assert same(read.tensors, state)
    assert {"1 object of argparse.Namespace", "1 object of random.Random"} <= set(read.passed_over)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"epoch": 1, "model": m}, lambda m: {"ema": Average(m)}])
def test_a_whole_pickled_module_gives_its_state_dict(tmp_path: Path, zipped: bool, wrap: Any) -> None:
    module = small()
    module.register_buffer("passing", torch.ones(1), persistent=False)
    torch.save(wrap(module), tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    assert same(read_weights(tmp_path / "whole.pth").tensors, module.state_dict())


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive_gives_its_state_dict(tmp_path: Path) -> None:
    module = small().eval()
    torch.jit.save(torch.jit.script(module), tmp_path / "script.pt")
    torch.jit.save(torch.jit.trace(module, torch.zeros(1, 3, 3, 3)), tmp_path / "trace.pt")
    for name in ("script.pt", "trace.pt"):
        found = read_weights(tmp_path / name).tensors
        assert {name: value for name, value in found.items() if name in module.state_dict()}.keys() == module.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_of_arrays_as_in_detectron2(tmp_path: Path, protocol: int) -> None:
    state = small().state_dict()
    zoo = tmp_path / "R-50.pkl"
    zoo.write_bytes(pickle.dumps({"model": {n: v.numpy() for n, v in state.items()}, "__author__": "Detectron2"}, protocol))
    read = read_weights(zoo)
    assert same(read.tensors, state)
    assert read.container == "model"


@pytest.mark.parametrize("zipped", [True, False, None])
def test_nothing_in_a_file_is_ever_executed(tmp_path: Path, zipped: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": small().state_dict(), "evil": Evil()}
    if zipped is None:
        content["state_dict"] = {name: value.numpy() for name, value in content["state_dict"].items()}  # type: ignore[attr-defined]
        Path("w.pth").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, "w.pth", _use_new_zipfile_serialization=zipped)
    read = read_weights("w.pth")
    assert same(read.tensors, {name: torch.as_tensor(value) for name, value in content["state_dict"].items()})  # type: ignore[attr-defined]
    assert "1 object of posix.system" in read.passed_over
    assert not Path("executed").exists()


def _damage(path: Path, change: Any) -> None:
    """Write the archive again with another data.pkl, or other entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries = change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def _without(ending: str) -> Any:
    return lambda entries: {name: data for name, data in entries.items() if not name.endswith(ending)}


def _shorter(entries: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data[:4] if "/data/" in name else data for name, data in entries.items()}


def _big_endian(entries: dict[str, bytes]) -> dict[str, bytes]:
    return {name: b"big" if name.endswith("byteorder") else data for name, data in entries.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without("data.pkl"), "without data.pkl"),
        (_without("/data/0"), "no uncompressed entry data/0"),
        (_shorter, "fewer bytes than its tensors need"),
        (_big_endian, "another byte order"),
    ],
)
def test_archives_that_are_damaged(tmp_path: Path, change: Any, reason: str) -> None:
    torch.save({"w": torch.arange(100.0)}, tmp_path / "w.pth")
    _damage(tmp_path / "w.pth", change)
    with pytest.raises(UserError, match=f"not readable as a torch file or a pickle .*{reason}"):
        read_weights(tmp_path / "w.pth")


def _tensor_file(path: Path, size: str, stride: str, offset: int = 0, numel: int = 4) -> None:
    """A torch file whose tensor is `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)`, of four numbers."""
    text = f"(dVw\nctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI{numel}\ntQI{offset}\n{size}{stride}I00\n(dtRs."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", text.encode())
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", bytes(16))


def test_tensors_that_lead_outside_of_their_storage(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    _tensor_file(path, "(I2\nI2\nt", "(I2\nI1\nt")
    assert read_weights(path).tensors["w"].shape == (2, 2)
    for options, reason in [
        ({"size": "(I5\nt", "stride": "(I1\nt"}, "extends beyond the end"),
        ({"size": "(I2\nt", "stride": "(I4\nt"}, "extends beyond the end"),
        ({"size": "(I2\nt", "stride": "(I1\nt", "offset": 3}, "extends beyond the end"),
        ({"size": "(I2\nt", "stride": "(I1\nt", "offset": -1}, "a tensor has an invalid shape"),
        ({"size": "(I2\nt", "stride": "(I-1\nt"}, "a tensor has an invalid shape"),
        ({"size": "(I2\nt", "stride": "(t"}, "a tensor has an invalid shape"),
        ({"size": "(I1000000\nI1000000\nt", "stride": "(I0\nI0\nt"}, "far larger than its storage"),
        ({"size": "(I2\nt", "stride": "(I1\nt", "numel": 1 << 40}, "fewer bytes"),
    ]:
        _tensor_file(path, **options)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=reason):
            read_weights(path)


def test_values_that_contain_themselves_or_are_too_many(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    laughs: list[Any] = [0]
    for _ in range(60):
        laughs = [laughs, laughs]
    for content in (endless, laughs):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="nested too deep, or there are too many"):
            read_pickled(tmp_path / "w.pkl")


def test_files_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(UserError, match="it is a named pipe, not a regular file"):
        read_weights(tmp_path / "w.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    with pytest.raises(UserError, match="no pretrained weights at"):
        read_weights(tmp_path / "loop.pth")


def test_a_zip_whose_names_are_no_text(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "w.pth")
    data = bytearray((tmp_path / "w.pth").read_bytes())
    at = data.index(b"PK\x01\x02")  # the list of entries; 8: its flags, 46: the name
    data[at + 9] |= 0x08  # names are UTF-8
    data[at + 46] = 0x80
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(UserError, match="not readable as a torch file or a pickle"):
        read_pickled(tmp_path / "w.pth")


def test_flat_joins_names_by_dots() -> None:
    one = torch.zeros(1)
    assert list(flat({"a": {"b": one, 3: [one, {"c": one}]}, "d": 1})) == ["a.b", "a.3.0", "a.3.1.c"]
