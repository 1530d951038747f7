"""Heat maps: convolutions get Grad-CAM at their last layer with places, others integrated gradients; what speaks for the class is warm."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dtl.data.transforms.transforms import eval_transform
from dtl.distributed.runtime import Runtime
from dtl.inference.explain import CAM, GRADIENTS, Explainer, Explanation, last_layer_with_places, overlaid
from dtl.inference.images import find_images
from dtl.models.network import Network
from dtl.models.preprocessing import Preprocessing
from dtl.training.evaluate import ForwardPass


class Tokens(nn.Module):
    """A convolution at the beginning, and then none."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 8, 8)
        self.blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(self.patches(images).flatten(2).transpose(1, 2)).mean(1))
        return found


class Sure(Tokens):
    """Its second class is bright patches. It is sure of them, so that its gradient is there the smallest."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.patches.weight.fill_(1 / 192)
            for block in self.blocks:
                block.weight.copy_(torch.eye(4))
            self.head.weight[1] = 1.0

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(5 * self.blocks(self.patches(images).flatten(2).transpose(1, 2))).mean(1))
        return found


def bright_spots() -> nn.Module:
    """Its second class is a bright place, anywhere."""
    body = nn.Sequential(nn.Conv2d(3, 2, 4, 4, bias=False), nn.ReLU())
    module = nn.Sequential(OrderedDict(body=body, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(2, 2)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        body[0].weight[1].fill_(1.0)
        module.fc.weight[1, 1] = 1.0
    return module.eval()


def model(module: nn.Module) -> Any:
    runtime = Runtime.alone("cpu")
    network = Network(module, "own", ("fc",), Preprocessing(image_size=32, mean=(0.0,) * 3, std=(1.0,) * 3))
    stored = SimpleNamespace(transform=eval_transform(image_size=32, crop_ratio=1.0, fit="stretch"), network=network)
    return SimpleNamespace(stored=stored, forward=ForwardPass.of(network, runtime), runtime=runtime)


def test_the_layer_is_the_last_convolution_unless_that_is_where_the_network_begins() -> None:
    module = bright_spots()
    assert last_layer_with_places(model(module)) is module.body[0]  # type: ignore[union-attr,index]
    assert last_layer_with_places(model(Tokens().eval())) is None


@pytest.mark.parametrize(("module", "method"), [(bright_spots(), CAM), (Tokens().eval(), GRADIENTS), (Sure().eval(), GRADIENTS)])
def test_a_heat_map_of_each_kind(module: nn.Module, method: str) -> None:
    pytest.importorskip("captum")
    explainer = Explainer(model(module))
    assert explainer.method == method
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[4:12, 20:28] = 255
    inputs = find_images([Image.fromarray(pixels)])
    found = explainer.explain(inputs, 0, 1)
    assert isinstance(found, Explanation)
    assert found.heat.shape == (32, 32)
    assert 0 <= found.heat.min() <= found.heat.max() <= 1 + 1e-6
    assert np.array_equal(explainer.explain(inputs, 0, 1).heat, found.heat)  # type: ignore[union-attr]
    if isinstance(module, Sure):
        assert found.heat[4:12, 20:28].mean() > 5 * found.heat.mean()
    if method == CAM:
        assert found.heat[4:12, 20:28].mean() > 5 * found.heat.mean()
        assert found.heat[20:].max() == 0
    assert overlaid(found).shape == (32, 64, 3)
