"""Weights by their name in torchvision or timm, and by address."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from dtl.checkpoint.transfer.source import hubs
from dtl.checkpoint.transfer.source import read as read_module
from dtl.checkpoint.transfer.source.read import read_weights
from dtl.data.remote.fetch import Unfetched
from dtl.errors import UserError


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_torchvision_names_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(hubs, "fetch_file", _no_network)
    with pytest.raises(UserError, match=r"https://.*resnet18-.*\.pth cannot be downloaded.*put the file at .*resnet18-.*\.pth"):
        read_weights("torchvision:resnet18")
    with pytest.raises(UserError, match=r"no such weights.*resnet18"):
        read_weights("torchvision:resnet81")
    with pytest.raises(UserError, match="no such weights"):
        read_weights("torchvision:ResNet18_Weights.IMAGENET9")
    cached = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert not cached.exists()
    cached.parent.mkdir(parents=True, exist_ok=True)
    torch.save(models.resnet18().state_dict(), cached)
    with pytest.raises(UserError, match=r"according to its name, its SHA-256 begins with f37072fd"):
        read_weights("torchvision:ResNet18_Weights.IMAGENET1K_V1")
    monkeypatch.setattr(read_module, "check_promised_hash", lambda path, sha256: None)
    read = read_weights("torchvision:ResNet18_Weights.IMAGENET1K_V1")
    assert len(read.tensors) == 122
    assert len(read.facts["classes"]) == 1000
    assert read.facts["preprocessing"]["image_size"] == 224
    assert read.origin == "torchvision:ResNet18_Weights.IMAGENET1K_V1"


def test_timm_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    monkeypatch.setattr(timm, "create_model", _no_network)
    with pytest.raises(UserError, match=r"timm has no such model; the nearest names are .*resnet18"):
        read_weights("timm:resnet188")
    with pytest.raises(UserError, match=r"cannot download timm/resnet18.*with network access"):
        read_weights("timm:resnet18")


def _no_network(*_args: object, **_kwargs: object) -> None:
    raise Unfetched("https://host/resnet18-f37072fd.pth cannot be downloaded: no network")


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    site = tmp_path / "site"
    for number, folder in enumerate(("a", "b")):
        (site / folder).mkdir(parents=True)
        torch.save({f"net.{name}": torch.full_like(value, number) for name, value in small().state_dict().items()}, site / folder / "w.pth")
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        # The same file name at two addresses is two files, and each is fetched once.
        for number, folder in enumerate(("a", "b")):
            read = read_weights(f"{address}/{folder}/w.pth#net.")
            assert read.prefix == "net."
            assert float(read.tensors["net.0.bias"][0]) == number
        with pytest.raises(UserError, match=r"missing.pth cannot be downloaded.*404.*put the file at"):
            read_weights(f"{address}/missing.pth")
        server.shutdown()
    assert float(read_weights(f"{address}/b/w.pth").tensors["net.0.bias"][0]) == 1
    with pytest.raises(UserError, match="downloaded from http:// and https:// addresses"):
        read_weights("s3://bucket/w.pth")
