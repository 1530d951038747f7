"""Where in an image a network looks: a heat map for one class, by captum (Kokhlikyan et al. 2020, arXiv 2009.07896).

Networks with convolutions: Grad-CAM (Selvaraju et al. 2017) at the last layer that still has places. Others, such as vision transformers, have their
convolution at the beginning, where it says nothing: of these integrated gradients of the class's logit by the pixels, from a uniform image on (Sundararajan
et al. 2017), summed over patches. The gradient alone is small where the network is sure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dtl.config.models import sides
from dtl.errors import UserError
from dtl.inference.images import ImageInputs
from dtl.inference.model import RunningModel
from dtl.inference.predict import fill
from dtl.models.network import forward_logits

CAM, GRADIENTS = "Grad-CAM", "integrated gradients"
_PATCHES, _STEPS = 14, 16  # patches of a side and images on the way, for gradients
_OF_A_BLOCK = 2  # linear layers that come after the convolution of a ConvNeXt block


@dataclass(frozen=True)
class Explanation:
    """One image as the network sees it, and how much each place speaks for the class."""

    path: str
    label: int
    probability: float
    pixels: npt.NDArray[np.uint8]
    """[H,W,3]"""
    heat: npt.NDArray[np.float32]
    """[H,W], 0 to 1"""


@dataclass
class Explainer:
    """Of one model. UserError where captum is not installed."""

    model: RunningModel

    def __post_init__(self) -> None:
        try:
            import captum.attr
        except ImportError:
            raise UserError("dtl explain needs captum, which is not installed: pip install 'dtl-train[explain]'") from None
        self._captum: Any = captum.attr
        self._layer = last_layer_with_places(self.model)

    @property
    def method(self) -> str:
        return GRADIENTS if self._layer is None else CAM

    def explain(self, inputs: ImageInputs, number: int, label: int | None = None) -> Explanation | str:
        """For a class, or the predicted one; why the image cannot be read."""
        stored, forward = self.model.stored, self.model.forward
        image = torch.empty((stored.transform.reading.channels, *sides(stored.transform.image_size)), dtype=torch.uint8)
        problem = fill(inputs, number, stored.transform, image)
        if problem is not None:
            return problem
        probabilities = forward(image[None])[0].softmax(0)
        chosen = int(probabilities.argmax()) if label is None else label
        heat = self._heat(forward.normalise(image[None]).float(), chosen)
        shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        return Explanation(inputs.name(number), chosen, float(probabilities[chosen]), shown.permute(1, 2, 0).numpy(), heat)

    def _heat(self, images: Tensor, label: int) -> npt.NDArray[np.float32]:
        module, size = self.model.stored.network.module, images.shape[2:]

        def logits(given: Tensor) -> Tensor:
            return forward_logits(module, given)[0]

        images = images.clone().requires_grad_(True)  # made under inference mode
        if self._layer is None:
            found = self._captum.IntegratedGradients(logits).attribute(images, target=label, n_steps=_STEPS).sum(1, keepdim=True)
            found = nn.functional.adaptive_avg_pool2d(found, _PATCHES).relu()
        else:
            found = self._captum.LayerGradCam(logits, self._layer).attribute(images, target=label, relu_attributions=True)
        found = nn.functional.interpolate(found.detach().float().cpu(), tuple(size), mode="bilinear", align_corners=False)[0, 0]
        high = float(found.max())
        heat: npt.NDArray[np.float32] = (found / high if high > 0 else torch.zeros_like(found)).numpy()
        return heat


def last_layer_with_places(model: RunningModel) -> nn.Module | None:
    """The last convolution that gives more than one place; None where linear layers of tokens follow it, more of them than a ConvNeXt block has."""
    module, transform = model.stored.network.module, model.stored.transform
    found: nn.Module | None = None
    tokens = 0

    def note(part: nn.Module, args: Any, output: Any) -> None:
        nonlocal found, tokens
        if isinstance(part, nn.Conv2d) and output.dim() == 4 and min(output.shape[2:]) > 1:
            found, tokens = part, 0
        tokens += isinstance(part, nn.Linear) and output.dim() > 2

    hooks = [part.register_forward_hook(note) for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    try:
        model.forward(torch.zeros((1, transform.reading.channels, *sides(transform.image_size)), dtype=torch.uint8))
    finally:
        for hook in hooks:
            hook.remove()
    return found if tokens <= _OF_A_BLOCK else None


def overlaid(found: Explanation) -> npt.NDArray[np.uint8]:
    """The image, and beside it with the heat over it: uint8 [H,2W,3]."""
    import matplotlib

    colours = matplotlib.colormaps["inferno"](found.heat)[..., :3] * 255
    share = 0.25 + 0.45 * found.heat[..., None]
    return np.concatenate([found.pixels, ((1 - share) * found.pixels + share * colours).round().astype(np.uint8)], axis=1)
