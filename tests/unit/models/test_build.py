"""Networks by name: forward passes with replaced heads, options, preprocessing, user's functions, and every mistake's message."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from dtl.errors import UserError
from dtl.models.build import build, forward_logits, replace_head

FORWARD = [
    ("torchvision/resnet18", "fc", 64, {}),
    ("torchvision/squeezenet1_0", "classifier.1", 64, {}),
    ("torchvision/vit_b_16", "heads.head", 32, {"image_size": 32}),
    ("torchvision/swin_t", "head", 64, {}),
    ("torchvision/convnext_tiny", "classifier.2", 64, {}),
    ("torchvision/densenet121", "classifier", 64, {}),
    ("torchvision/efficientnet_b0", "classifier.1", 64, {}),
    ("torchvision/mobilenet_v2", "classifier.1", 64, {}),
    ("torchvision/mobilenet_v3_small", "classifier.3", 64, {}),
    ("torchvision/regnet_y_400mf", "fc", 64, {}),
    ("torchvision/shufflenet_v2_x0_5", "fc", 64, {}),
    ("torchvision/mnasnet0_5", "classifier.1", 64, {}),
    ("dtl/resnet18_plain", "7", 64, {}),
    ("dtl/resnet18_plain_small", "7", 32, {}),
    ("dtl/resnet_tiny", "6", 32, {}),
    ("timm/resnet10t", "fc", 64, {}),
    ("timm/vit_tiny_patch16_224", "head", 32, {"img_size": 32}),
    ("timm/convnext_atto", "head.fc", 64, {}),
    ("timm/levit_128s", "head.linear", 224, {}),
    ("timm/deit_tiny_distilled_patch16_224", "head", 32, {"img_size": 32}),
    ("timm/mobilenetv3_small_050", "classifier", 64, {}),
    ("timm/efficientnet_lite0", "classifier", 64, {}),
]
# Their forward pass is heavy, and shapes are all that counts here.
FORWARD_META = [
    ("torchvision/inception_v3", "fc", 299, 1),
    ("torchvision/googlenet", "fc", 224, 2),
    ("torchvision/vgg11_bn", "classifier.6", 224, 0),
    ("torchvision/alexnet", "classifier.6", 224, 0),
    ("torchvision/maxvit_t", "classifier.5", 224, 0),
    ("torchvision/swin_v2_t", "head", 256, 0),
]


@pytest.mark.parametrize(("name", "head", "size", "options"), FORWARD)
def test_forward_with_a_replaced_head(name: str, head: str, size: int, options: dict[str, object]) -> None:
    network = build(name, num_classes=4, options=options)
    assert network.heads[0] == head
    assert network.num_outputs == 4
    old = network.module.get_submodule(head)
    replace_head(network, 6)
    new = network.module.get_submodule(head)
    assert type(new) is type(old)
    assert (new.bias is None) == (old.bias is None)
    assert network.num_outputs == 6
    logits, auxiliary = forward_logits(network.module.eval(), torch.rand(2, 3, size, size))
    assert logits.shape == (2, 6)
    assert torch.isfinite(logits).all()
    assert auxiliary == []


@pytest.mark.parametrize(("name", "head", "size", "num_auxiliary"), FORWARD_META)
def test_forward_of_shapes_and_auxiliary_heads(name: str, head: str, size: int, num_auxiliary: int) -> None:
    network = build(name, num_classes=4, meta=True)
    replace_head(network, 6)
    assert network.heads[0] == head
    assert len(network.heads) == 1 + num_auxiliary
    images = torch.empty(2, 3, size, size, device="meta")
    logits, auxiliary = forward_logits(network.module.train(), images)
    assert [tuple(out.shape) for out in (logits, *auxiliary)] == [(2, 6)] * (1 + num_auxiliary)
    logits, auxiliary = forward_logits(network.module.eval(), images)
    assert logits.shape == (2, 6)
    assert auxiliary == []


def test_a_new_head_keeps_the_rest_and_its_type() -> None:
    network = build("torchvision/squeezenet1_0", num_classes=4)
    network.module.to(torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in network.module.state_dict().items()}
    order = list(before)
    replace_head(network, 9)
    after = network.module.state_dict()
    assert list(after) == order
    assert all(torch.equal(after[key], before[key]) for key in order if not key.startswith("classifier.1."))
    assert after["classifier.1.weight"].shape == (9, 512, 1, 1)
    assert after["classifier.1.weight"].dtype == torch.bfloat16
    assert network.module.get_submodule("classifier.1").weight.requires_grad
    assert network.module.num_classes == 9


def test_inception_undoes_the_normalisation_its_weights_never_saw() -> None:
    for name in ("inception_v3", "googlenet"):
        assert build(name, num_classes=4, meta=True).module.transform_input is True
        assert build(name, num_classes=4, meta=True, options={"transform_input": False}).module.transform_input is False
    network = build("inception_v3", num_classes=4, meta=True, options={"aux_logits": False})
    assert network.heads == ("fc",)


MINE = """
import torch
from torch import nn

def counted(num_classes, width=8):
    features = [nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(width, num_classes), nn.Linear(num_classes, num_classes))

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(8, 1000)      # registered first, runs last
        self.stem = nn.Conv2d(3, 8, 3)
        self.squeeze = nn.Conv2d(8, 8, 1)
    def forward(self, x):
        return self.classifier(self.squeeze(self.stem(x)).mean((2, 3)))

class Choosy(Fixed):
    def forward(self, x):
        if x.sum() > 0:                           # cannot be decided without data
            return super().forward(x)
        return super().forward(x)

class Odd(Fixed):
    def forward(self, x):
        return super().forward(x)[:, :5]

def nothing(num_classes):
    return "no network"

def broken(num_classes):
    widths = {}
    return nn.Linear(widths["last"], num_classes)

def mistyped(num_classes):
    return nn.Linear("8", num_classes)

def four_only(num_classes):
    if num_classes != 4:
        raise ValueError("four classes,\\n or none")
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 4))

number = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("my_networks", None)
    return "my_networks"


def test_a_users_function(mine: str) -> None:
    network = build(f"{mine}:Fixed", num_classes=4, own=True)
    assert network.heads == ("classifier",)
    assert forward_logits(network.module, torch.rand(2, 3, 16, 16))[0].shape == (2, 4)
    network = build(f"{mine}:counted", num_classes=4, options={"width": 16, "head": "4"}, own=True)
    assert network.heads == ("4",)
    assert network.module[0].out_channels == 16
    network = build(f"{mine}:Choosy", num_classes=4, options={"head": "classifier"}, own=True)
    assert network.num_outputs == 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "unknown model 'resnet19'; did you mean torchvision/resnet18"),
        ("torchvision/mobilnet_v2", {}, "did you mean torchvision/mobilenet_v2"),
        ("timm/convnext_ato", {}, "did you mean timm/convnext_atto"),
        ("timm/resnet18.a9_in1k", {}, "timm/resnet18 has no pretrained weights 'a9_in1k'; it has resnet18.a1_in1k"),
        ("keras/resnet50", {}, "unknown model 'keras/resnet50'; did you mean torchvision/resnet50"),
        ("resnet18", {"widht": 3}, "torchvision/resnet18' cannot be built with the options {'widht': 3}"),
        ("resnet18", {"head": "fcc"}, "the option head names 'fcc', which is not a linear layer or 1x1 convolution of this network; did you mean fc?"),
        ("no_such_package:f", {}, "cannot import 'no_such_package'"),
        ("my_networks:count", {}, "has no function 'count'; did you mean 'counted'?"),
        ("my_networks:nothing", {}, "returned a str, not a torch.nn.Module"),
        ("my_networks:number", {}, "has no function 'number'"),
        ("my_networks:", {}, "has no function ''"),
        (":counted", {}, "importing '' raised ValueError: Empty module name"),
        ("my_networks:broken", {}, r"model 'my_networks:broken': the function raised KeyError: 'last' \(.*my_networks\.py:\d+\)"),
        ("my_networks:mistyped", {}, r"the function raised TypeError: .*my_networks\.py:\d+\)"),
        ("my_networks:four_only", {}, r"the function raised ValueError: four classes, or none \(.*my_networks\.py:\d+\)"),
        ("collections:OrderedDict", {}, "model 'collections:OrderedDict': OrderedDict is a builtin without a signature; give a Python function"),
        ("builtins:dict", {}, "dict is a builtin without a signature"),
        ("my_networks:Choosy", {}, "its head was not found .* name its layer with the option head"),
        ("timm/gemma4_vit_167m_enc", {}, "gives no logits: its output does not come from a linear layer or 1x1 convolution; use another network"),
        ("my_networks:Odd", {}, "its output does not come from a linear layer or 1x1 convolution; name its layer with the option head"),
    ],
)
def test_mistakes_are_told(mine: str, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message if ".*" in message else re.escape(message)) as caught:
        build(name, num_classes=4, options=options, own=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n1 / 0\n", r"importing 'failing' raised ZeroDivisionError: .*failing\.py:2\)"),
        ("def f(:\n", r"importing 'failing' raised SyntaxError: .*failing\.py, line 1\)"),
        ("import sys\nsys.exit(0)\n", r"importing 'failing' raised SystemExit: 0 .*failing\.py:2\)"),
    ],
)
def test_a_module_that_fails_at_its_import(mine: str, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "failing.py").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        build("failing:f", num_classes=4, own=True)
    assert "\n" not in str(caught.value)


def test_other_mistakes() -> None:
    with pytest.raises(UserError, match="at least 1, not 0"):
        build("resnet18", num_classes=0)
    with pytest.raises(UserError, match="default, library, xavier or kaiming"):
        build("resnet18", num_classes=2, init="javier")  # type: ignore[arg-type]
    network = build("dtl/resnet_tiny", num_classes=2)
    network.heads = ("0",)
    with pytest.raises(UserError, match="the head '0' is a Sequential"):
        replace_head(network, 3)
