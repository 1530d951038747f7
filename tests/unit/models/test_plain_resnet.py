"""dtl's own ResNet-18: the tutorials' layers, and what torchvision's computes."""

from __future__ import annotations

import torch
from torch import nn

from dtl.models.build import build


def test_the_plain_resnet_is_the_tutorials() -> None:
    """The same 88 shapes as torchvision's ResNet-18 in running order, once its shortcut norms and head are set aside."""
    module = build("dtl/resnet18_plain", num_classes=10, meta=True).module
    block = [name for name, _ in module.get_submodule("2.0").named_children()]
    assert block == ["conv1", "conv2", "conv3", "bn1", "bn2"]
    assert [name for name, _ in module.get_submodule("1.0").named_children()] == ["conv1", "conv2", "bn1", "bn2"]
    biases = [key for key in module.state_dict() if "conv" in key and key.endswith("bias")] + ["0.0.bias"]
    assert len(biases) == 20
    plain = {key: t for key, t in module.state_dict().items() if key not in biases and "num_batches" not in key and not key.startswith("7.")}
    theirs = build("resnet18", num_classes=10, meta=True).module.state_dict()
    wanted = {key: t for key, t in theirs.items() if "num_batches" not in key and "downsample.1" not in key and not key.startswith("fc.")}
    assert len(plain) == len(wanted) == 88
    assert sorted(tuple(t.shape) for t in plain.values()) == sorted(tuple(t.shape) for t in wanted.values())


@torch.no_grad()
def test_the_plain_resnet_computes_what_torchvisions_does() -> None:
    """With torchvision's weights, its own biases zero, and torchvision's shortcut norms made to pass everything through."""
    theirs, plain = build("resnet18", num_classes=10).module.eval(), build("dtl/resnet18_plain", num_classes=10).module.eval()
    renamed = {"0.0": "conv1", "0.1": "bn1", "7": "fc"}
    for stage, block in ((stage, block) for stage in (1, 2, 3, 4) for block in (0, 1)):
        for part in ("conv1", "conv2", "bn1", "bn2"):
            renamed[f"{stage}.{block}.{part}"] = f"layer{stage}.{block}.{part}"
        renamed[f"{stage}.{block}.conv3"] = f"layer{stage}.{block}.downsample.0"
    for name, layer in theirs.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.1)
            if name.endswith("downsample.1"):
                nn.init.zeros_(layer.running_mean)
                layer.weight.fill_((1 + layer.eps) ** 0.5)
    values = theirs.state_dict()
    ours = plain.state_dict()
    for key, tensor in ours.items():
        layer, _, leaf = key.rpartition(".")
        source = f"{renamed[layer]}.{leaf}"
        tensor.copy_(values[source] if source in values else torch.zeros_like(tensor))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(plain(images), theirs(images), rtol=1e-4, atol=1e-5)
