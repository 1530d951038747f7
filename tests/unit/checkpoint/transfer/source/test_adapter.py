"""LoRA adapters over their base: the merged weights compute what base and adapter compute side by side (benchmarks/transfer_hub.py asks peft itself)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from dtl.checkpoint import load_pretrained, read_weights
from dtl.checkpoint.transfer.source.adapter import with_adapter
from dtl.commands.transfer import run
from dtl.errors import UserError

State = dict[str, torch.Tensor]


class Network(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.table = nn.Embedding(5, 6)
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(self.conv(x).mean((2, 3)) + self.table.weight.sum(0)))  # type: ignore[no-any-return]


def lora(r: int = 2) -> State:
    """For each layer but the head; as PEFT names them."""
    shapes = {
        "conv.lora_A.weight": (r, 3, 3, 3), "conv.lora_B.weight": (6, r, 1, 1), "fc.lora_A.weight": (r, 6), "fc.lora_B.weight": (6, r),
        "table.lora_embedding_A": (r, 5), "table.lora_embedding_B": (6, r),
    }  # fmt: skip
    return {f"base_model.model.{name}": torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    torch.manual_seed(0)

    def write(tensors: State, **config: Any) -> Path:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        given = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 3,
            "lora_dropout": 0.1,
            "bias": "none",
            "target_modules": ["fc"],
            "base_model_name_or_path": "org/base",
        }
        (tmp_path / "adapter_config.json").write_text(json.dumps(given | config))
        return tmp_path

    return write


def beside(base: Network, adapter: State, scale: float, x: torch.Tensor) -> torch.Tensor:
    """The function of base and adapter, neither of which is merged."""
    part = {name.removeprefix("base_model.model."): value for name, value in adapter.items()}
    y = (base.conv(x) + scale * F.conv2d(F.conv2d(x, part["conv.lora_A.weight"]), part["conv.lora_B.weight"])).mean((2, 3))
    y = y + (base.table.weight + scale * (part["table.lora_embedding_B"] @ part["table.lora_embedding_A"]).T).sum(0)
    y = base.fc(y) + scale * F.linear(F.linear(y, part["fc.lora_A.weight"]), part["fc.lora_B.weight"])
    return base.head(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.5),
        ({"use_rslora": True}, 3 / 2**0.5),
        ({"alpha_pattern": {"fc": 6.0, "conv": 6.0, "table": 6.0}}, 3.0),
        ({"r": 4, "rank_pattern": {"^fc": 2, "conv": 2, "table": 2}}, 1.5),
    ],
)
def test_a_merged_adapter_computes_the_same(write: Callable[..., Path], config: dict[str, Any], scale: float) -> None:
    base, target, adapter, x = Network(), Network(), lora(), torch.randn(2, 3, 8, 8)
    report = load_pretrained(target, base.state_dict(), adapter=write(adapter, **config))
    torch.testing.assert_close(target(x), beside(base, adapter, scale, x))
    assert report.to_dict()["adapter"].endswith(": 3 layers changed")
    assert "  with the adapter " in str(report)


def test_modules_that_were_trained_whole_take_the_place_of_the_bases(write: Callable[..., Path], tmp_path: Path) -> None:
    base, target, adapter = Network(1000), Network(4), lora()
    head = {
        "base_model.model.head.weight": torch.randn(4, 6),
        "base_model.model.head.bias": torch.randn(4),
        "base_model.model.fc.base_layer.bias": torch.randn(6),
    }
    torch.save({f"module.{name}": value for name, value in base.state_dict().items()}, tmp_path / "base.pth")
    report = load_pretrained(target, tmp_path / "base.pth", adapter=write(adapter | head, modules_to_save=["head"], bias="lora_only"))
    assert report.coverage == 1
    assert torch.equal(target.head.bias, head["base_model.model.head.bias"])
    assert torch.equal(target.fc.bias, head["base_model.model.fc.base_layer.bias"])
    assert report.sha256 not in (None, read_weights(tmp_path / "base.pth").sha256)  # the file's alone would not say what was loaded


def test_half_precision_is_merged_in_float32_and_stays_half(write: Callable[..., Path]) -> None:
    base = {name: value.half() for name, value in Network().state_dict().items()}
    adapter = {name: value for name, value in lora().items() if ".fc." in name}
    merged = with_adapter(read_weights(base), write(adapter)).tensors["fc.weight"]
    a, b = (adapter[f"base_model.model.fc.lora_{part}.weight"] for part in "AB")
    assert torch.equal(merged, (base["fc.weight"].float() + 1.5 * b @ a).half())


def changed(name: str, value: torch.Tensor | None) -> State:
    tensors = lora()
    tensors.pop(f"base_model.model.{name}", None)
    return tensors if value is None else {**tensors, f"base_model.model.{name}": value}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (lora(), {"r": 10**12}, r"lora_A \[2, 3, 3, 3\] and lora_B \[6, 2, 1, 1\] of rank 1000000000000 do not fit the base's weight"),
        (lora(), {"r": -1}, "adapter_config.json"),
        (changed("fc.lora_B.weight", torch.zeros(7, 2)), {}, r"fc: lora_A \[2, 6\] and lora_B \[7, 2\] of rank 2 do not fit the base's weight \[6, 6\]"),
        (changed("conv.lora_A.weight", torch.zeros(2, 6, 3, 3)), {}, "perhaps of a grouped convolution, which cannot be merged"),
        (changed("fc.lora_B.weight", None), {}, "fc: has no matrix lora_B"),
        (changed("fc.lora_B.weight", torch.zeros(0)), {}, "has no matrix lora_B; the adapter is damaged or was saved in parts"),
        (changed("fc.lora_A.weight", torch.zeros(2, 6, dtype=torch.int8)), {}, "quantised tensors are not merged"),
        (changed("fc.lora_magnitude_vector", torch.ones(6)), {}, "use_dora is false"),
        (lora(), {"use_dora": True}, "use_dora is true"),
        (changed("other.lora_A.weight", torch.zeros(2, 6)), {}, r"a dict has no layer other.*give its base \(adapter_config.json names org/base\) as source"),
        (changed("extra.weight", torch.zeros(2)), {}, "extra.weight is no part of LoRA, and the base has no tensor of this name"),
        (changed("fc.base_layer.bias", torch.zeros(2)), {}, r"fc.bias \[2\] would replace the base's, which is \[6\]"),
        (changed("fc.lora_B.bias", torch.zeros(5)), {}, "fc.lora_B has a bias, but the base has none of its shape"),
        ({"a": torch.zeros(2)}, {}, "contains no LoRA layers"),
        (lora(), {"peft_type": "IA3"}, "an adapter of the kind IA3; only LoRA is merged here"),
        (lora(), {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4"),
        (lora(), {"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern has the regular expression"),
        (lora(), {"rank_pattern": {f"layer{n}": 2 for n in range(5000)}}, "rank_pattern has 5,000 entries; 4,096 are the most"),
        (lora(), {"layer_replication": [[0, 4]]}, "sets layer_replication, and how that is merged is not known here"),
        (lora(), {"of_the_future": 1}, "sets of_the_future"),
        (lora(), {"lora_alpha": "8"}, "lora_alpha"),
    ],
)  # fmt: skip
def test_what_does_not_fit_or_is_not_understood_is_refused(write: Callable[..., Path], tensors: State, config: dict[str, Any], message: str) -> None:
    target = Network()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_pretrained(target, Network().state_dict(), adapter=write(tensors, **config))
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_attention_whose_merge_peft_does_otherwise_is_refused(write: Callable[..., Path]) -> None:
    adapter = {f"base_model.model.attn.base_layer.out_proj.lora_{part}.weight": torch.zeros(shape) for part, shape in (("A", (2, 4)), ("B", (4, 2)))}
    base = {f"attn.{name}": value for name, value in nn.MultiheadAttention(4, 2).state_dict().items()}
    with pytest.raises(UserError, match=r"attn is a torch\.nn\.MultiheadAttention"):
        with_adapter(read_weights(base), write(adapter))


def test_a_folder_that_is_no_whole_adapter(tmp_path: Path) -> None:
    base = read_weights(Network().state_dict())
    with pytest.raises(UserError, match="no adapter at"):
        with_adapter(base, tmp_path / "none")
    with pytest.raises(UserError, match=r"no adapter_config\.json in it: the scale of the adapter stands there"):
        with_adapter(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"contains no adapter_model.safetensors or adapter_model.bin"):
        with_adapter(base, tmp_path)
    save_file(lora(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_config.json"):
        with_adapter(base, tmp_path)


def test_the_command_names_the_adapter_and_the_way_when_it_is_given_alone(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.models import resnet18

    net = resnet18(num_classes=3)
    torch.save(net.state_dict(), tmp_path / "base.pth")
    folder = write({"base_model.model.fc.lora_A.weight": torch.randn(2, 512), "base_model.model.fc.lora_B.weight": torch.randn(3, 2)})
    options = ["--model", "torchvision/resnet18", "--num-classes", "3"]
    with pytest.raises(UserError, match=r"without the weights that it was trained on; give those as source and this folder as adapter \(transfer.adapter"):
        run([*options, "--source", str(folder)])
    assert run([*options, "--source", str(tmp_path / "base.pth"), "--adapter", str(folder)]) == 0
    assert f"  with the adapter {folder}: 1 layer changed\n" in capsys.readouterr().out
