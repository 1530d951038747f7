"""The network that weights were saved from: dtl's, or a class of transformers, of which a stand-in is enough (transfer_hub in benchmarks loads real ones)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from dtl.checkpoint.transfer.source.arch import source_network
from dtl.checkpoint.transfer.source.read import SourceWeights, read_weights
from dtl.errors import UserError


class PreTrainedModel(nn.Module):
    pass


class TinyConfig:
    def __init__(self, **given: Any) -> None:
        if "sizes" in given:
            raise TypeError("sizes is not known")
        self.given = given


class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(4, config.given["num_labels"])
        self.wide = nn.ModuleList(nn.Linear(size, size) for size in config.given.get("widths", []))
        self.deep = nn.ModuleList(nn.Identity() for _ in range(config.given.get("num_hidden_layers", 0)))
        {"gelu": nn.GELU}[config.given.get("hidden_act", "gelu")]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SourceWeights:
    fake = ModuleType("transformers")
    fake.__dict__.update(PreTrainedModel=PreTrainedModel, TinyModel=TinyModel, run=lambda *_: pytest.fail("called"), __version__="5.0")
    monkeypatch.setitem(sys.modules, "transformers", fake)
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6)).state_dict(), tmp_path / "pytorch_model.bin")
    return read_weights(tmp_path)


def test_a_class_of_transformers_is_built_from_the_sizes_beside_the_weights(weights: SourceWeights, tmp_path: Path) -> None:
    found = source_network("transformers:TinyModel", weights, 9)
    assert [(name, list(value.shape), value.is_meta) for name, value in found.state_dict().items()] == [("fc.weight", [6, 4], True), ("fc.bias", [6], True)]
    code = {
        "auto_map": {"AutoModel": "evil--x.Model"},
        "attn_implementation": "org/kernel",
        "backbone": "resnet",
        "_name_or_path": "org/name",
        "torch_dtype": "x",
    }
    sizes = {"hidden_size": 4, "depths": [2, 2], "use_mask": True, "hidden_act": "gelu", "id2label": {"0": "a", "1": "b"}}
    (tmp_path / "config.json").write_text(json.dumps({**code, **sizes}))
    found = source_network("transformers:TinyModel", weights, 9, meta=False)
    assert found.config.given == {"hidden_size": 4, "depths": [2, 2], "use_mask": True, "hidden_act": "gelu", "num_labels": 2}  # type: ignore[union-attr]
    assert not next(found.parameters()).is_meta


@pytest.mark.parametrize(
    ("named", "config", "message"),
    [
        ("transformers:TinyModle", "{}", "source_arch: transformers 5.0 has no network 'TinyModle'; did you mean 'TinyModel'?"),
        ("transformers:run", "{}", "source_arch: transformers 5.0 has no network 'run'"),
        ("transformers:TinyModel", "[]", "config.json: expected a JSON object"),
        ("transformers:TinyModel", '{"sizes": 3}', "sizes is not known"),
        ("transformers:TinyModel", '{"num_labels": 6, "hidden_act": "no such"}', "TinyModel cannot be built by "),
        ("transformers:TinyModel", '{"num_labels": 6, "num_hidden_layers": 1000000}', "has more than 100,000 modules"),
        ("transformers:TinyModel", '{"num_hidden_layers": 1e99}', "num_hidden_layers is larger than 1,048,576"),
        ("transformers:TinyModel", '{"num_labels": 6, "widths": [1000000]}', "has more parameters than its weights"),
    ],
)
def test_what_is_no_network_of_transformers(weights: SourceWeights, tmp_path: Path, named: str, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as refused:
        source_network(named, weights, 9, meta=False)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_where_transformers_is_not_installed_a_line_names_it(weights: SourceWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"^source_arch transformers:ViTModel needs the package transformers: pip install transformers$"):
        source_network("transformers:ViTModel", weights, 9)
    assert source_network("torchvision/resnet18", weights, 9).get_parameter("fc.weight").shape == (6, 512)
