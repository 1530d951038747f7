"""Weights in parts are computed as torch computes them, or refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from dtl.checkpoint import load_pretrained
from dtl.checkpoint.transfer.source.read import computed
from dtl.errors import UserError


def small(change: Callable[[nn.Module], object]) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 3), nn.Flatten(), nn.Linear(4 * 64, 5))
    for layer in (network[0], network[1], network[3]):
        change(layer)
    return network.eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        lambda layer: parametrizations.weight_norm(layer, dim=None),
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
    ],
    ids=["weight_norm", "weight_norm of the whole", "spectral_norm", "old weight_norm", "old spectral_norm", "pruned"],
)
def test_the_product_is_torchs(change: Callable[[nn.Module], object]) -> None:
    source, target = small(change), small(lambda layer: None)
    load_pretrained(target, source.state_dict())
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(target.eval()(images), source(images))


def test_parts_that_nobody_knows_are_refused_and_names_that_only_look_like_parts_stay() -> None:
    linear = nn.Linear(4, 4)
    parametrizations.orthogonal(linear)
    with pytest.raises(UserError, match=r"^w\.pth: weight is stored in parts \(.*original.*call torch\.nn\.utils\.parametrize\.remove_parametrizations"):
        computed(linear.state_dict(), "w.pth")
    state = {"gate_v": torch.zeros(3), "attn.relative_g": torch.zeros(2), "x_orig": torch.zeros(1)}
    assert computed(state, "") == state
