"""Networks of many families on the meta device: built, with head, layer groups and a cut for cached features, and their own weights transferred, at their
size and at another. The long tests: all networks there are, and a forward pass of one network of each family."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable
from unittest import mock

import pytest
import torch

from dtl.checkpoint import plan_transfer
from dtl.config.models import as_size, sides
from dtl.errors import UserError
from dtl.models.build import Network, build, forward_logits, model_names, sized
from dtl.models.freeze import freeze, select
from dtl.models.groups import layer_groups
from dtl.training import features

FEW = (
    "torchvision/resnet18", "torchvision/vit_b_32", "torchvision/swin_t", "timm/gmixer_12_224", "timm/levit_128", "timm/volo_d1_224",
    "timm/resmlp_12_224", "timm/sequencer2d_s", "timm/coat_tiny", "timm/vit_small_patch14_dinov2", "timm/beit_base_patch16_224", "timm/xcit_nano_12_p8_224",
    "timm/vit_dpwee_patch16_reg1_gap_256", "timm/lambda_resnet26rpt_256",
)  # fmt: skip
# Several heads; a network that reshapes what its head gives (SqueezeNet, DLA, DPN); a head that is called in another way (CSPNeXt); dropout of the network's
# own before it (GhostNet).
NOT_CUT = ("more than the head is trained", "the output of the network is not the output of", "is not called exactly once with one tensor", "is random")
NO_LOGITS = "gives no logits: its output does not come from a linear layer or 1x1 convolution; use another network"
"""Encoders for other networks (Gemma 4's, MobileNetV5's)."""
MOST_PARAMETERS = 250_000_000
"""Of the network that stands for its family in a forward pass."""


def families() -> dict[str, list[str]]:
    """timm's families, by their modules, and torchvision's."""
    import timm
    import torchvision.models

    found = dict[str, list[str]]()
    for name in model_names():
        library, _, short = name.partition("/")
        if library != "dtl":
            function = timm.models.model_entrypoint(short) if library == "timm" else torchvision.models.get_model_builder(short)
            found.setdefault(function.__module__, []).append(name)
    return found


def walk(name: str, *, runs: bool = True) -> None:
    """`runs`: it is run on the meta device too, to find the cut and the size."""

    def again(options: dict[str, object], *, meta: bool = True) -> Network:
        return build(name, num_classes=7, options=options, meta=True, own=True)

    network = again({})
    assert network.num_outputs == 7
    assert len(layer_groups(network)) >= 2
    assert select(network, "last:2")
    own = network.preprocessing.image_size
    if runs:
        equal = mock.patch.object(torch, "equal", lambda one, other: one.shape == other.shape)  # there are no values
        with equal, mock.patch.object(torch.Tensor, "isfinite", lambda values: torch.ones(values.shape)):
            cut_before_head(network)
    state = network.module.state_dict()
    plan = plan_transfer(state, network.module, heads=network.heads, trace=False)
    assert plan.ok, plan.refusals
    assert not [o.target for o in plan.outcomes if o.target and o.outcome in ("fresh", "ambiguous") and not o.head]
    if not runs:
        return
    height, width = sides(own)
    refused = ""
    try:
        other = sized(network, as_size(2 * height, 2 * width), again, pretrained=True)
    except UserError as error:
        refused = str(error)
    if refused:
        assert "; use --data.image_size " in refused
        assert "\n" not in refused
        return
    plan = plan_transfer(state, other.module, heads=other.heads, trace=False)
    assert plan.ok, plan.refusals
    assert not [o.target for o in plan.outcomes if o.target and o.outcome in ("fresh", "ambiguous") and not o.head], "at another size"


def cut_before_head(network: Network) -> None:
    head = select(network, "head")
    freeze(network.module, head)
    network.module.train()
    cut, why = features.find_cut(network, head, image_size=network.preprocessing.image_size)
    assert cut is not None or any(reason in why for reason in NOT_CUT), why


def run_forward(name: str) -> None:
    network = build(name, num_classes=7, own=True)
    cut_before_head(network)
    with torch.inference_mode():
        logits, _ = forward_logits(network.module.eval(), torch.randn(2, 3, *sides(network.preprocessing.image_size)))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def problems(names: Iterable[str], of: Callable[[str], object] = walk) -> dict[str, str]:
    found = {}
    for number, name in enumerate(names):
        try:
            of(name)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
        if number % 10 == 9:  # what it looks through is large: a quarter of a second
            gc.collect()
    return found


def middling(names: list[str]) -> str:
    """The first network that is not too large to run here, else the first."""
    for name in names:
        with contextlib.suppress(UserError):
            if sum(parameter.numel() for parameter in build(name, num_classes=7, meta=True).module.parameters()) < MOST_PARAMETERS:
                return name
    return names[0]


@pytest.mark.parametrize("name", FEW)
def test_a_network_takes_its_own_weights(name: str) -> None:
    walk(name, runs="sequencer" not in name)  # its LSTMs are slow, even on shapes


def test_a_network_of_each_family_takes_its_own_weights() -> None:
    """The one of the shortest name, without a pass: that is a second each."""
    names = [min(names, key=len) for names in families().values()]
    found = problems((name for name in names if name not in FEW), of=lambda name: walk(name, runs=False))
    assert not {name: why for name, why in found.items() if NO_LOGITS not in why}


@pytest.mark.soak
def test_every_network_takes_its_own_weights() -> None:
    found = problems(name for names in families().values() for name in names)
    assert not {name: why for name, why in found.items() if NO_LOGITS not in why}


@pytest.mark.soak
def test_a_network_of_each_family_runs() -> None:
    found = problems((middling(names) for names in families().values()), of=run_forward)
    assert not {name: why for name, why in found.items() if NO_LOGITS not in why}
