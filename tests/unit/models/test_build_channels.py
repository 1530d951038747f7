"""Networks for images of other channels than three: timm's have an option, of torchvision's and dtl's the first convolution is replaced."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from dtl.checkpoint.transfer.apply import load_pretrained
from dtl.config.models import AugmentConfig
from dtl.data.transforms.transforms import eval_transform, train_transform
from dtl.errors import UserError
from dtl.models.build import build
from dtl.models.network import Normalise, image_shape
from dtl.models.preprocessing import Preprocessing
from dtl.reading import Reading


@pytest.mark.parametrize(
    "name", ["torchvision/mobilenet_v2", "torchvision/vit_b_16", "torchvision/inception_v3", "dtl/resnet_tiny", "timm/resnet18", "timm/vit_tiny_patch16_224"]
)
@pytest.mark.parametrize("channels", [1, 5])
def test_a_network_of_so_many_channels(name: str, channels: int) -> None:
    network = build(name, num_classes=4, options={"in_chans": channels}, meta=True)
    shape = image_shape(network.module, 2, network.preprocessing.image_size)
    assert shape[1] == channels
    outputs = network.module.eval()(torch.empty(shape, device="meta"))
    assert outputs.shape == (2, 4)
    assert network.options["in_chans"] == channels, "so that it is built again from its model.json"
    assert image_shape(build(name, num_classes=4, meta=True).module, 2, 224)[1] == 3


def test_an_impossible_number_is_refused() -> None:
    for channels in (0, 65, "x", 2.5):
        with pytest.raises(UserError, match="it must be a number of channels, from 1 to 64"):
            build("torchvision/resnet18", num_classes=2, options={"in_chans": channels}, meta=True)


def test_weights_of_three_channels_are_adapted() -> None:
    """A gray image gives what it gave as RGB of three equal channels."""
    rgb = build("dtl/resnet_tiny", num_classes=4)
    gray = build("dtl/resnet_tiny", num_classes=4, options={"in_chans": 1})
    report = load_pretrained(gray.module, rgb.module.state_dict(), by="name", keep_head=True)
    assert report.coverage == 1
    images = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(gray.module.eval()(images), rgb.module.eval()(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    first = cast(
        nn.Conv2d, next(layer for layer in build("dtl/resnet_tiny", num_classes=4, options={"in_chans": 5}).module.modules() if isinstance(layer, nn.Conv2d))
    )
    assert first.in_channels == 5


@pytest.mark.parametrize("channels_last", [True, False])
def test_each_channel_has_its_own_mean_and_std(channels_last: bool) -> None:
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.4, 0.3, 0.2, 0.1)
    normalise = Normalise(Preprocessing(mean=mean, std=std), torch.device("cpu"), channels_last=channels_last)
    images = torch.randint(0, 256, (2, 5, 6, 7), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    expected = (images / 255 - torch.tensor(mean).view(1, 5, 1, 1)) / torch.tensor(std).view(1, 5, 1, 1)
    torch.testing.assert_close(normalise(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_channels_are_cut_and_resized_one_like_the_other(channels: int, fit: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, channels)).astype(np.uint8)
    augment = AugmentConfig(vertical_flip=0.5, turns=True, rotation=10, erasing=1.0)
    reading = Reading(channels=channels)

    def views(pixels: np.ndarray, read: Reading) -> torch.Tensor:
        out = []
        count = read.channels
        for transform in (
            eval_transform(image_size=24, fit=fit, fill=(9,) * count, reading=read),  # type: ignore[arg-type]
            train_transform(image_size=24, augment=augment, fit=fit, erase_fill=(9,) * count, reading=read),  # type: ignore[arg-type]
        ):
            draws = transform.draw(range(4), [70] * 4, [50] * 4, seed=0, epoch=0)
            batch = torch.empty((4, count, 24, 24), dtype=torch.uint8, memory_format=torch.channels_last)
            for i in range(4):
                transform.apply(pixels, draws, i, batch[i])
            out.append(batch)
        return torch.cat(out)

    found = views(image, reading)
    for channel in range(channels):
        alone = views(np.repeat(image[..., channel : channel + 1], 3, axis=2), Reading())[:, 0]
        assert (found[:, channel].int() - alone.int()).abs().max() <= 1, "the kernel for three channels rounds in its own way"


@pytest.mark.parametrize("knob", [{"color_jitter": 0.1}, {"grayscale": 0.5}, {"randaugment": (2, 9)}, {"trivial": True}])
def test_what_changes_colours_needs_colours(knob: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"data\.augment\.{next(iter(knob))} changes colours, and data\.channels is 5"):
        train_transform(image_size=24, augment=AugmentConfig(**knob), reading=Reading(channels=5))  # type: ignore[arg-type]
